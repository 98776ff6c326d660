"""The search for what to ship: input size, head, glances, exits and their combinations, measured on this machine.

Every candidate is a net (the full path with some head at some input size) and the exits that are open on it. AP and
objects lost are measured on the calib split, where the fastest candidate that holds the accuracy budget is chosen; that
one is evaluated on the test split. Nothing is chosen there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import nn

from earlyexit_ssd.calibration.certificate import Certificate, CertifiedTarget, Measured
from earlyexit_ssd.calibration.drift import Reference
from earlyexit_ssd.calibration.thresholds import threshold_grid
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data import DetectionDataset, to_coco
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.evaluate import Rival, evaluate_detections
from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import ExitMatches, exit_matches, photo_counts
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.evaluation.results import Record
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, save_model
from earlyexit_ssd.modeling.branches import describe_exits
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.heads import is_folded
from earlyexit_ssd.pipeline.build import build_architecture, build_evaluation, build_model, evaluation_device
from earlyexit_ssd.pipeline.calibrate import BudgetSearch, Target
from earlyexit_ssd.pipeline.evaluate import build_onnx_rivals, evaluate_model, smaller_sizes
from earlyexit_ssd.pipeline.replay import Recorded, Replay, disjoint_sets, fit_policy
from earlyexit_ssd.progress import progress

logger = logging.getLogger(__name__)

GLANCES = ((96, 12), (128, 12), (160, 12))
"""Pixels and layer of the glances that are tried where EXITS.GLANCES names none, for an input of 320 pixels; for
another one the pixels are in proportion, in whole 16s."""
SHARES = (1.0, 0.9, 0.8, 0.7)
"""Input sides that are tried, as shares of the detector's own."""
HOPELESS = 2.0
"""A net that alone loses this many times the budget is not tried with exits, which can only lose more."""


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        ap_drop: AP50 that may be lost against the detector as it is, in 1 - ``delta`` of the draws of calib photos.
        speedup, ms: wanted; None for as fast as it gets.
        minutes: after which no further candidate is begun; None for all of them.
    """

    ap_drop: float = 0.01
    delta: float = 0.05
    speedup: float | None = None
    ms: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        Target("ap_drop", self.ap_drop, self.delta)
        for name in ("speedup", "ms", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EarlyExitError(f"{name} is {value:g}, expected a number above 0")


@dataclass(frozen=True)
class Candidate(Record):
    """One way to run the detector, and what was measured of it on the calib split.

    Attributes:
        name: in words, such as "288 px, compact head, glance at 128 px".
        image_size: pixels; fold: of the head; exits: names of those that are open, in the order of the walk.
        policy, thresholds: of these exits.
        AP50, lost, lost_bound: on the calib split; lost against the detector as it is, and its bound in 1 - delta draws.
        objects_kept, objects: of those that the detector as it is finds at EVAL.SCORE.
        ms: mean per photo; speedup: against the detector as it is, in the same run.
        holds: whether the bound is within the budget.
    """

    name: str
    image_size: int
    fold: str
    exits: tuple[str, ...] = ()
    policy: str | None = None
    thresholds: tuple[float, ...] = ()
    AP50: float | None = None
    lost: float | None = None
    lost_bound: float | None = None
    objects: int | None = None
    objects_kept: int | None = None
    mmacs: float | None = None
    ms: float | None = None
    speedup: float | None = None
    holds: bool = False
    rival: bool = False

    def __str__(self) -> str:
        if self.ms is None or self.speedup is None:
            return f"{self.name}: not measured"
        kept = "" if self.objects is None else f", {self.objects_kept} of {self.objects} objects kept"
        lost = "AP50 undefined" if self.lost is None else f"{self.lost:.3f} AP50 lost"
        return f"{self.name}: {self.speedup:.2f} times as fast, {lost}{kept}"


@dataclass(frozen=True)
class Net:
    """A full path with one head at one input size, and every exit that may be opened on it, recorded."""

    fold: str
    recorded: Recorded
    calib: Replay
    train: Replay

    @property
    def size(self) -> int:
        """Side of the input, pixels."""
        return self.recorded.architecture.image_size

    def with_exits(self, names: Sequence[str]) -> Net:
        """The same with these exits alone."""
        model, architecture = self.recorded.model, self.recorded.architecture
        indices = [model.exit_names.index(name) for name in names]
        architecture = dataclasses.replace(architecture, exits=tuple(architecture.exits[index] for index in indices))
        part = architecture.build().to(next(model.parameters()).device).eval()
        state = model.state_dict()
        part.load_state_dict({key: state[key] for key in part.state_dict()})
        replays = [dataclasses.replace(one, recording=one.recording.only(indices)) for one in (self.calib, self.train)]
        return Net(self.fold, dataclasses.replace(self.recorded, model=part, architecture=architecture), *replays)


@dataclass(frozen=True)
class Found:
    """A candidate with what writes it down: the net with its open exits, and what chose its thresholds."""

    candidate: Candidate
    net: Net
    search: Search | None = None
    chosen: Chosen | None = None


class Optimizer:
    """The search over one detector.

    Args:
        cfg: its MODEL, EXITS, DATA, CALIBRATION and EVAL sections are used.
        weights: a trained model of this project, whose branches are candidates too; None: MODEL.WEIGHTS.
        out: folder of results and recordings.
    """

    def __init__(self, cfg: CfgNode, weights: str | os.PathLike[str] | None, goal: Goal, out: Path) -> None:
        self.goal, self.out, self.device = goal, out, evaluation_device(cfg)
        if weights is None:
            classes = class_names(cfg)
            self.model, self.architecture = build_model(_without_branches(cfg), classes)
            self.info: ModelInfo = {"taken_over": True}
        else:
            self.model, self.architecture, self.info = open_model(cfg, weights)
        self.cfg = with_classes(cfg, self.architecture.classes)
        self.model = self.model.to(self.device).eval()
        self.sets, self.repeats = disjoint_sets(self.cfg, ("CALIB",))
        self.base = self._net("as it is", self.architecture.image_size)
        self.reference = self.base.calib.recording.detections[-1]
        text = f"{weights_hash(self.model)} {self.goal} {fingerprint(self.sets['CALIB'])} {self._settings()}"
        self.key = hashlib.sha256(text.encode()).hexdigest()

    def _settings(self) -> str:
        cfg = self.cfg
        return f"{cfg.EVAL.RUNTIME} {cfg.EVAL.TIMING_THREADS} {cfg.EVAL.SCORE} {cfg.CALIBRATION} {self.plan()}"

    # What is tried.

    @property
    def folds(self) -> list[str]:
        """Heads: as it is, and where rows of other classes are folded into background, as few of them as it takes."""
        return ["as it is", *(["compact"] if self.architecture.folded_rows else [])]

    @property
    def sizes(self) -> list[int]:
        """Sides of the input, pixels, largest first."""
        own = self.architecture.image_size
        step = 32 if own >= 256 else 16
        asked = self.cfg.EVAL.RIVALS.SIZES or [round(share * own / step) * step for share in SHARES]
        return sorted({own, *(side for side in asked if model_fits(self.model, side))}, reverse=True)

    def exits_at(self, size: int) -> tuple[Exit, ...]:
        """Glances, and at the detector's own size the exits that it has."""
        own = self.architecture.image_size
        glances = self.cfg.EXITS.GLANCES or [(round(pixels * own / 320 / 16) * 16, layer) for pixels, layer in GLANCES]
        others = [one for one in self.architecture.exits if one.pixels is None] if size == own else []
        return (*describe_exits((), glances=[one for one in glances if one[0] < size]), *others)

    def plan(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Input size, fold and names of the open exits of every candidate; nets without exits come first."""
        nets = list(itertools.product(self.sizes, self.folds))
        plan = [(size, fold, ()) for size, fold in nets]
        for size, fold in nets:
            names = [one.name for one in self.exits_at(size)]
            glances = [name for name in names if name.startswith("glance")]
            others = tuple(name for name in names if name not in glances) if fold == "as it is" else ()
            sets = [*((one,) for one in glances), *itertools.combinations(glances, 2)]
            if others:
                sets += [*((one,) for one in others), others, *((one, *others) for one in glances)]
            plan += [(size, fold, one) for one in dict.fromkeys(sets)]
        return plan

    @functools.lru_cache(maxsize=2)
    def _net(self, fold: str, size: int) -> Net:
        own = self.architecture.image_size
        architecture, state = self.architecture, self.model.state_dict()
        if fold == "compact":
            architecture, state = self._compact()
        trained = architecture.trained_size or own
        exits = self.exits_at(size)
        if fold == "compact":
            exits = tuple(one for one in exits if one.pixels is not None)
        architecture = dataclasses.replace(architecture, image_size=size, trained_size=trained, exits=exits)
        model = architecture.build().to(self.device).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        folder = self.out / "recordings" / f"{fold.replace(' ', '_')}_{size}"
        recorded = Recorded(self.cfg, model, architecture, self.info, self.sets, self.repeats, folder)
        return Net(fold, recorded, recorded.replay("CALIB"), recorded.replay("TRAIN"))

    @functools.cached_property
    def _base_detector(self) -> nn.Module:
        return self.base.recorded.model

    # How it is measured.

    def measure(self, size: int, fold: str, exits: tuple[str, ...]) -> Found:
        """One candidate on the calib split."""
        net = self._net(fold, size).with_exits(exits)
        if not exits:
            return self._without_exits(net)
        found = [self._with_policy(net, policy) for policy in self._policies(net)]
        return min(found, key=lambda one: (not one.candidate.holds, one.candidate.ms or np.inf))

    def _policies(self, net: Net) -> list[str]:
        """Empty exits need one that foresees; where all have a branch the configuration's is tried too."""
        empty = net.recorded.model.empty
        if all(empty):
            return ["foreseen_emptiness"]
        return ["learned_gain"] if any(empty) else list(dict.fromkeys([self.cfg.ROUTING.POLICY, "learned_gain"]))

    def _with_policy(self, net: Net, policy: str) -> Found:
        model, cfg = net.recorded.model, self.cfg
        fitted = fit_temperatures(cfg, model.exit_names, net.calib)
        photos = net.train if needs_training_photos(policy) else net.calib
        router = fit_policy(cfg, policy, temperatures_of(fitted, model.exit_names), photos)
        costs = measure_cost_model(cfg, model, router, self._base_detector)
        target = Target("ap_drop", self.goal.ap_drop, self.goal.delta)
        search = Search(cfg, target, router, net.calib, None, costs, reference=self.reference)
        chosen = search.run()
        open_ = tuple(n for n, t in zip(model.exit_names, chosen.thresholds, strict=False) if t < CLOSED)
        ms = float(costs.per_exit(chosen.thresholds)[chosen.exits].mean())
        candidate = self._judged(net, open_, chosen.exits, ms, costs.plain, chosen.measured.AP50_lost_bound)
        candidate = dataclasses.replace(candidate, policy=policy, thresholds=chosen.thresholds)
        return Found(dataclasses.replace(candidate, exits=model.exit_names[:-1]), net, search, chosen)

    def _without_exits(self, net: Net) -> Found:
        costs = measure_cost_model(self.cfg, net.recorded.model, ExitRouter(0), self._base_detector)
        choice = np.zeros(len(net.calib.recording), np.int64)
        return Found(self._judged(net, (), choice, costs.paths[()], costs.plain), net)

    def _judged(
        self, net: Net, exits: tuple[str, ...], choice: np.ndarray, ms: float, base_ms: float, bound: float | None = None
    ) -> Candidate:
        matches, reference = net.calib.matches_beside(self.reference)
        before, after = (ap_of_choice(matches, one, ap50_only=True).AP50 for one in (reference, choice))
        if bound is None:
            kept, routed = bootstrap_choices(matches, [reference, choice], seed=self.cfg.SEED)
            bound = float(np.nanquantile(kept.AP50 - routed.AP50, 1 - self.goal.delta))
        truth, found = net.calib.ground_truth, net.calib.detections_of(choice)
        said = agreement(truth, self.reference, found, self.cfg.EVAL.SCORE, self.cfg.EVAL.IOU)
        return Candidate(
            name=describe(net.size, net.fold, exits, self.architecture.image_size),
            image_size=net.size,
            fold=net.fold,
            exits=exits,
            AP50=after,
            lost=None if before is None or after is None else before - after,
            lost_bound=bound,
            objects=said.objects,
            objects_kept=said.kept,
            ms=ms,
            speedup=base_ms / ms,
            holds=bound <= self.goal.ap_drop,
        )


def describe(size: int, fold: str, exits: Sequence[str], own_size: int) -> str:
    """A candidate in words."""
    words = [f"{size} px"] if size != own_size else []
    words += [f"{fold} head"] if fold != "as it is" else []
    for name in exits:
        words.append(f"glance at {name.removeprefix('glance')} px" if name.startswith("glance") else name)
    return ", ".join(words) or "the detector as it is"

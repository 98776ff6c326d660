"""The search for what to ship: input size, head, glances, exits and their combinations, measured on this machine.

A candidate is a net (the full path with some head at some input size) and the exits that are open on it. AP50 and
objects lost are measured on the calib split. The fastest candidate that holds the accuracy budget there is evaluated on
the test split, where nothing is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torchvision.models.detection.ssd import SSDScoringHead

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data import build_loader, class_names
from earlyexit_ssd.data.dataset import fingerprint
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import ONNX_RUNTIME, PlainPath, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import agreement, ap_of_choice, bootstrap_choices
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.evaluation.results import Interval, Record, Results
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, Exit, describe_exits, save_model
from earlyexit_ssd.modeling.checkpoint import ModelInfo, weights_hash
from earlyexit_ssd.modeling.compact import find_competing_rows
from earlyexit_ssd.modeling.heads import slice_rows
from earlyexit_ssd.modeling.retrofit import resize_detector
from earlyexit_ssd.pipeline.build import (
    build_evaluation,
    build_model,
    evaluation_device,
    open_model,
    photos_to_compare_on,
    with_classes,
)
from earlyexit_ssd.pipeline.calibrate import Chosen, Search, Target, certificate_of
from earlyexit_ssd.pipeline.evaluate import evaluate_model, onnx_rivals
from earlyexit_ssd.pipeline.export import export_detector, open_any
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Recorded,
    Replay,
    disjoint_sets,
    fit_policy,
    fit_temperatures,
    measure_cost_model,
    temperatures_of,
)
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.charts import candidates_chart
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import needs_training_photos

logger = logging.getLogger(__name__)

GLANCES = ((96, 12), (128, 12), (160, 12))
"""Pixels and layer of the glances that are tried where EXITS.GLANCES names none, for an input of 320 pixels; for
another one the pixels are in proportion, in whole 16s."""
SHARES = (1.0, 0.9, 0.8, 0.7)
"""Input sides that are tried, as shares of the detector's own."""
EXPORT_PHOTOS = 16
"""Photos of the calib split on which the exported file is compared with the model."""
GLANCE_PRICE = 0.15
"""Of the detector's time, roughly: what a glance costs every photo."""
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
        AP50, lost, lost_bound: on the calib split; lost against the detector as it is, and the bound of it.
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
    """A full path with one head at one input size, and every exit that may be opened on it, recorded.

    Attributes:
        train: photos that policies are fitted on, as the detector as it is saw them. A glance sees the same there.
    """

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
        recorded = dataclasses.replace(self.recorded, model=part, architecture=architecture)
        return Net(self.fold, recorded, self.calib.only(names), self.train.only(names))


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
        cfg = _measured_in_ms(cfg)
        if weights is None:
            model, architecture = build_model(_as_it_is(cfg), class_names(cfg))
            self.model, self.architecture, self.info = model, architecture, {"taken_over": True}
        else:
            self.model, self.architecture, self.info = open_model(cfg, weights)
        self.cfg = with_classes(cfg, self.architecture.classes)
        self.model = self.model.to(self.device).eval()
        self.sets, self.repeats = disjoint_sets(self.cfg, ("CALIB",))
        self._nets: dict[tuple[str, int], Net] = {}
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
        smaller = [round(share * own / step) * step for share in SHARES] if self.model.any_size else []
        return sorted({own, *(self.cfg.EVAL.RIVALS.SIZES or smaller)}, reverse=True)

    def exits_at(self, size: int) -> tuple[Exit, ...]:
        """Glances, and at the detector's own size the exits that it has."""
        own = self.architecture.image_size
        glances = self.cfg.EXITS.GLANCES or [(round(pixels * own / 320 / 16) * 16, layer) for pixels, layer in GLANCES]
        others = [one for one in self.architecture.exits if one.pixels is None] if size == own else []
        return (*describe_exits((), glances=[one for one in glances if one[0] < size]), *others)

    @property
    def shows_empty_photos(self) -> bool:
        """Whether a glance could pay: the share of calib photos in which nothing is found is above its price."""
        found = self.reference.values()
        return sum(not (one["scores"] >= self.cfg.EVAL.SCORE).any() for one in found) > GLANCE_PRICE * len(found)

    def plan(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Input size, fold and names of the open exits of every candidate: nets without exits first, and those with the
        whole head and exits last, since they are tried only where a compact head loses too much."""
        own, best = self.architecture.image_size, self.folds[-1]
        plan: list[tuple[int, str, tuple[str, ...]]] = [(own, self.folds[0], ())]
        plan += [(size, best, ()) for size in self.sizes]
        for size, fold in [*((size, best) for size in self.sizes), (own, self.folds[0])]:
            names = [one.name for one in self.exits_at(size)]
            glances = [name for name in names if name.startswith("glance")] if self.shows_empty_photos else []
            others = tuple(name for name in names if not name.startswith("glance")) if fold == "as it is" else ()
            sets = [*((one,) for one in glances), *itertools.combinations(glances, 2)]
            if others:
                sets += [*((one,) for one in others), others, *((one, *others) for one in glances)]
            plan += [(size, fold, one) for one in dict.fromkeys(sets)]
        return list(dict.fromkeys(plan))

    def _net(self, fold: str, size: int) -> Net:
        """It is kept until the next one is asked for; what it says about the photos is on disk."""
        if self._nets.keys() != {(fold, size)}:
            self._nets = {(fold, size): self._build_net(fold, size)}
        return self._nets[fold, size]

    def _build_net(self, fold: str, size: int) -> Net:
        own = self.architecture.image_size
        architecture, state = self.architecture, self.model.state_dict()
        if fold == "compact":
            architecture, state = self._compact
        trained = architecture.trained_size or own
        exits = self.exits_at(size)
        if fold == "compact":
            exits = tuple(one for one in exits if one.pixels is not None)
        architecture = dataclasses.replace(architecture, image_size=size, trained_size=trained, exits=exits)
        model = architecture.build().to(self.device).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        folder = self.out / "recordings" / f"{fold.replace(' ', '_')}_{size}"
        recorded = Recorded(self.cfg, model, architecture, self.info, self.sets, self.repeats, folder)
        train = self.base.train if hasattr(self, "base") else recorded.replay("TRAIN")
        return Net(fold, recorded, recorded.replay("CALIB"), train)

    @functools.cached_property
    def _compact(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The full path with a compact head (`earlyexit_ssd.modeling.compact`), at its own size."""
        detector = resize_detector(self.model, self.architecture, self.architecture.image_size)
        head, wanted = detector.head.classification_head, self.architecture.folded_rows
        whole = detector.head.classification_head = SSDScoringHead(head.module_list, head.num_columns)
        photos = photos_to_compare_on(self.cfg, self.architecture.classes)
        others = find_competing_rows(detector, wanted, photos, self.cfg.MODEL.COMPACT_TOLERANCE)
        slice_rows(whole, (*wanted, *others))
        known = COCO_CLASSES if head.num_columns == len(COCO_CLASSES) + 1 else None
        names = tuple(known[row - 1] if known else f"class_{row}" for row in others)
        rows = tuple(range(1, len(wanted) + 1))
        folded = {"head_outputs": whole.num_columns, "folded_rows": rows, "competing": names, "folded_branches": True}
        return dataclasses.replace(self.architecture, **folded), detector.state_dict()

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
        costs = measure_cost_model(cfg, model, router, self.base.recorded.model)
        search = Search(cfg, self._target(costs), router, net.calib, None, costs, reference=self.reference)
        try:
            chosen = search.run()
        except EarlyExitError:  # even with every photo at the first exit it is slower than what is wanted
            search = dataclasses.replace(search, target=Target("ap_drop", self.goal.ap_drop, self.goal.delta))
            chosen = search.run()
        open_ = tuple(n for n, t in zip(model.exit_names, chosen.thresholds, strict=False) if t < CLOSED)
        ms = float(costs.per_exit(chosen.thresholds)[chosen.exits].mean())
        candidate = self._judged(net, open_, chosen.exits, ms, costs.plain, chosen.measured.AP50_lost_bound)
        candidate = dataclasses.replace(candidate, policy=policy, thresholds=chosen.thresholds)
        return Found(dataclasses.replace(candidate, exits=model.exit_names[:-1]), net, search, chosen)

    def _target(self, costs: CostModel) -> Target:
        """What thresholds are searched for: the speed that is wanted, else the accuracy budget."""
        if self.goal.speedup is not None:
            return Target("speedup", self.goal.speedup)
        if self.goal.ms is not None:
            return Target("speedup", costs.plain / self.goal.ms)
        return Target("ap_drop", self.goal.ap_drop, self.goal.delta)

    def _without_exits(self, net: Net) -> Found:
        costs = measure_cost_model(self.cfg, net.recorded.model, ExitRouter(0), self.base.recorded.model)
        choice = np.zeros(len(net.calib.recording), np.int64)
        return Found(self._judged(net, (), choice, costs.paths[()], costs.plain), net)

    def _judged(
        self,
        net: Net,
        exits: tuple[str, ...],
        choice: np.ndarray,
        ms: float,
        base_ms: float,
        bound: float | None = None,
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

    def rivals(self) -> list[Candidate]:
        """Small nets from ONNX files (EVAL.RIVALS.ONNX) on the calib split; they stand in the chart."""
        cfg, dataset = self.cfg, self.sets["CALIB"]
        settings, found = build_evaluation(cfg), []
        for rival in onnx_rivals(cfg, self.architecture.classes):
            loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)
            detections = collect_detections(rival.detector, loader)
            networks = [rival.network, PlainPath(self.base.recorded.model)]
            examples = [rival.example, example_input(self.base.recorded.model)]
            runs, threads = settings.timing_runs, settings.timing_threads
            timing, base = time_in_runtime(networks, examples, ONNX_RUNTIME, runs, threads)
            matches, choice = self.base.calib.matches_beside(detections)
            after = ap_of_choice(matches, choice, ap50_only=True).AP50
            before = ap_of_choice(matches, choice - 1, ap50_only=True).AP50
            lost = None if before is None or after is None else before - after
            ms = {"ms": timing.ms, "speedup": base.ms / timing.ms, "mmacs": rival.mmacs}
            size = int(rival.example.shape[-1])
            found.append(Candidate(rival.name, size, "its own", AP50=after, lost=lost, **ms, rival=True))
        return found


def _measured_in_ms(cfg: CfgNode) -> CfgNode:
    """Milliseconds of EVAL.RUNTIME decide, whatever unit a calibration takes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.CALIBRATION.COST = "ms"
    cfg.freeze()
    return cfg


def _as_it_is(cfg: CfgNode) -> CfgNode:
    """The whole head, and no branch, which would be untrained."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOLD = "rows" if cfg.MODEL.FOLD == "rows" else "exact"
    if set(cfg.EXITS.LAYERS) != set(cfg.EXITS.EMPTY):
        cfg.EXITS.LAYERS, cfg.EXITS.EMPTY = (), ()
        for key in ("BRANCH", "COPY", "DEPTH"):
            cfg.EXITS[key] = cfg.EXITS[key][:1]
    cfg.freeze()
    return cfg


def describe(size: int, fold: str, exits: Sequence[str], own_size: int) -> str:
    """A candidate in words."""
    words = [f"{size} px"] if size != own_size else []
    words += [f"{fold} head"] if fold != "as it is" else []
    for name in exits:
        words.append(f"glance at {name.removeprefix('glance')} px" if name.startswith("glance") else name)
    return ", ".join(words) or "the detector as it is"


# The whole job.


@dataclass(frozen=True)
class TestFigures(Record):
    """On the test split; intervals are 95 %, of other photos."""

    splits: list[str]
    photos: int
    AP: float | None
    AP_base: float | None
    AP50: float | None
    AP50_base: float | None
    AP50_lost_interval: Interval
    objects_found: int | None
    objects_found_base: int | None
    mmacs: float | None
    mmacs_base: float | None
    ms: float | None
    ms_base: float | None
    ms_base_interval: Interval
    runtime: str
    threads: int | None

    @property
    def speedup(self) -> float | None:
        return self.ms_base / self.ms if self.ms and self.ms_base else None


@dataclass(frozen=True)
class Outcome(Record):
    """What `optimize` found; the JSON of optimize.json.

    Attributes:
        base: the detector as it is, and chosen, the candidate to ship (None: nothing is faster and holds the budget),
            on the calib split. candidates: all, rivals among them.
        test: of the chosen one and the detector as it is, on the test split.
        ship: the chosen one is faster than the detector as it is on the test split's photos and loses no more than the
            budget there.
        summary: the paragraph in words.
    """

    base: Candidate
    chosen: Candidate | None
    candidates: tuple[Candidate, ...]
    test: TestFigures | None
    ship: bool
    summary: str


@locks_folder("out_dir")
def optimize(
    cfg: CfgNode, goal: Goal, out_dir: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> Outcome:
    """Search what to ship, and write it.

    ``out_dir`` gets model.pth, detector.onnx, test/ (its evaluation), optimize.json, candidates.png and summary.txt.

    A search that was stopped goes on where it was.

    Args:
        cfg: see `Optimizer`.
        weights: a trained model of this project; None: the checkpoint MODEL.WEIGHTS.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EarlyExitError("optimize under torchrun: it times networks and runs in one process; start it without")
    out, started = Path(out_dir), time.monotonic()
    search = Optimizer(cfg, weights, goal, out)
    store = _Store(out / "candidates.json", search.key)
    plan = search.plan()
    hopeless: set[tuple[int, str]] = set()
    for size, fold, exits in progress(plan, desc="candidates"):
        if len(store) and goal.minutes is not None and time.monotonic() - started > 60 * goal.minutes:
            logger.warning("%g minutes are over: %d of %d candidates were tried", goal.minutes, len(store), len(plan))
            break
        name = f"{size} {fold} {' '.join(exits)}"
        if name in store or (size, fold) in hopeless or (exits and fold == "as it is" and _needless(store, exits)):
            continue
        candidate = search.measure(size, fold, exits).candidate
        store.add(name, candidate)
        logger.info("%s", candidate)
        if not exits and candidate.lost is not None and candidate.lost > HOPELESS * goal.ap_drop:
            hopeless.add((size, fold))
    measured, rivals = store.candidates, search.rivals()
    chosen = choose_candidate(measured, goal)
    outcome = _write(search, measured[0], chosen, (*measured, *rivals))
    write_json(out / "optimize.json", outcome.to_json())
    write_text(out / "summary.txt", outcome.summary + "\n")
    write_image(out / "candidates.png", candidates_chart(outcome.candidates, outcome.chosen, cfg.EVAL.RUNTIME))
    return outcome


def _needless(store: _Store, exits: Sequence[str]) -> bool:
    """Glances on the whole head, where the compact head alone holds the budget."""
    compact = [one for one in store.candidates if one.fold == "compact" and not one.exits and one.holds]
    return bool(compact) and all(name.startswith("glance") for name in exits)


def choose_candidate(candidates: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """The fastest that holds the budget; where a speed is asked for that none of them has, the one of the least loss
    that has it. None where nothing is faster than the detector as it is."""

    def fast(one: Candidate) -> bool:
        return (goal.speedup is None or one.speedup >= goal.speedup) and (goal.ms is None or one.ms <= goal.ms)

    known = [one for one in candidates[1:] if one.ms is not None and one.lost is not None and one.speedup > 1]
    holding = [one for one in known if one.holds]
    if holding and (fast(best := min(holding, key=lambda one: 1 / one.speedup)) or not any(map(fast, known))):
        return best
    asked = [one for one in known if fast(one)] if goal.speedup or goal.ms else []
    return min(asked, key=lambda one: one.lost, default=min(holding, key=lambda one: 1 / one.speedup, default=None))


class _Store:
    """The measured candidates on disk, by name; those of another search are left out."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._found: dict[str, Candidate] = {}
        if path.is_file():
            content = read_json(path, "candidates of a search", "delete it")
            if isinstance(content, dict) and content.get("key") == key:
                self._found = {name: Candidate.from_json(one) for name, one in content["candidates"].items()}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __len__(self) -> int:
        return len(self._found)

    def add(self, name: str, candidate: Candidate) -> None:
        self._found[name] = candidate
        found = {name: one.to_json() for name, one in self._found.items()}
        write_json(self._path, {"key": self._key, "candidates": found})

    @property
    def candidates(self) -> list[Candidate]:
        return list(self._found.values())


def _write(search: Optimizer, base: Candidate, chosen: Candidate | None, candidates: Sequence[Candidate]) -> Outcome:
    """Write the chosen model and evaluate it on the test split, the detector as it is beside it."""
    out = search.out
    if chosen is None:
        least = min((one for one in candidates if not one.rival and one is not base and one.lost is not None),
                    key=lambda one: one.lost_bound, default=None)  # fmt: skip
        nearest = "" if least is None else f"; the nearest: {least} (bound {least.lost_bound:.3f})"
        asked = f"nothing faster holds {search.goal.ap_drop:g} AP50 lost on the calib split"
        summary = f"{asked}: ship the detector as it is{nearest}"
        return Outcome(base, None, tuple(candidates), None, False, summary)
    found = search.measure(chosen.image_size, chosen.fold, chosen.exits)
    recorded = found.net.recorded
    info: ModelInfo = {**search.info}
    if found.search is not None:
        certificate = certificate_of(recorded, found.search, found.chosen)
        info |= {"router": certificate.router, "certificate": certificate.to_dict()}
    else:
        info = {key: value for key, value in info.items() if key not in ("router", "certificate")}
    save_model(out / "model.pth", recorded.model, recorded.architecture, info)
    photos = [record.path for record in recorded.sets["CALIB"].records[:EXPORT_PHOTOS]]
    export_detector(open_any(out / "model.pth"), out / "detector.onnx", "onnx", photos)
    plain = dataclasses.replace(search.architecture, exits=())
    detector = resize_detector(search.model, search.architecture, search.architecture.image_size)
    save_model(out / "base.pth", plain.add_exits(detector), plain, {})
    cfg = search.cfg.clone()
    cfg.defrost()
    cfg.EVAL.RIVALS.ENABLED = True
    cfg.EVAL.RIVALS.FULL_PATHS = (*cfg.EVAL.RIVALS.FULL_PATHS, str(out / "base.pth"))
    cfg.freeze()
    results = evaluate_model(cfg, out / "model.pth", out / "test", compare=False)
    test = _test_figures(results)
    ship = test.speedup is not None and test.ms < test.ms_base_interval[0]
    ship = ship and test.AP50 is not None and test.AP50_base - test.AP50 <= search.goal.ap_drop
    return Outcome(base, chosen, tuple(candidates), test, ship, _summary(chosen, test, ship, search.goal))


def _test_figures(results: Results) -> TestFigures:
    routed = results.routed
    base = next(one for one in results.rivals if one.source == "base.pth")
    low_high = base.routed_minus_rival_AP50_interval
    return TestFigures(
        splits=results.context.splits,
        photos=results.context.images,
        AP=routed.number("AP"),
        AP_base=base.number("AP"),
        AP50=routed.ap50,
        AP50_base=base.ap50,
        AP50_lost_interval=None if low_high is None else [-low_high[1], -low_high[0]],
        objects_found=routed.number("true_positives"),
        objects_found_base=base.number("true_positives"),
        mmacs=routed.mmacs,
        mmacs_base=base.mmacs,
        ms=routed.ms,
        ms_base=base.ms,
        ms_base_interval=base.ms_interval,
        runtime=results.context.runtime,
        threads=results.context.threads,
    )


def _summary(chosen: Candidate, test: TestFigures, ship: bool, goal: Goal) -> str:
    """One paragraph in words."""
    lost = "undefined" if test.AP50 is None else f"{test.AP50_base - test.AP50:.3f}"
    interval = "" if test.AP50_lost_interval is None else " [{:.3f}, {:.3f}]".format(*test.AP50_lost_interval)
    times = f"{test.ms:.1f} ms against {test.ms_base:.1f}, {test.runtime}, {test.threads} thread"
    found = f"{test.objects_found} objects found where your detector finds {test.objects_found_base}"
    figures = (
        f"{chosen.name}: {test.speedup:.2f} times as fast as your detector ({times}), {lost} AP50 lost{interval}, "
        f"{found}, on {test.photos} test photos ({', '.join(test.splits)})"
    )
    if ship:
        return f"ship it. {figures}."
    return (
        f"do not ship it: on the test photos it does not hold {goal.ap_drop:g} AP50 lost, or is no faster. {figures}."
    )

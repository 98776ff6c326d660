"""Search the fastest variant of a detector within an accuracy budget, measured on this machine.

A *net* is a full path at one input size, with one kind of head, with the given weights or with newly trained ones. A
*candidate* is a net and a set of exits, such as glances; a net alone is a candidate too. A glance is an early exit that
runs the first trunk layers on a small copy of the image before the full-size pass. Candidates are measured on the calib
split. The chosen one is then evaluated on the test split.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader
from torchvision.models.detection.ssd import SSD, SSDScoringHead

from earlyexit_ssd.calibration.certificate import Measured
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data import build_loader, class_names
from earlyexit_ssd.data.dataset import fingerprint, to_coco
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import ONNX_RUNTIME, OPENVINO, PlainPath, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import ap_of_choice, bootstrap_choices, exit_matches, interval, photo_counts
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.evaluation.results import Interval, Record, Results
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.files import locked_folder, locks_folder, write_image, write_json, write_text
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, Exit, describe_exits, load_model, save_model
from earlyexit_ssd.modeling.checkpoint import ModelInfo, weights_hash
from earlyexit_ssd.modeling.heads import find_competing_rows, slice_rows
from earlyexit_ssd.modeling.retrofit import resize_detector
from earlyexit_ssd.pipeline.build import (
    build_exits,
    build_model,
    evaluation_device,
    open_model,
    photos_to_compare_on,
    with_classes,
    with_values,
)
from earlyexit_ssd.pipeline.calibrate import Chosen, Search, Target, certificate_of
from earlyexit_ssd.pipeline.evaluate import evaluate_model, onnx_rivals
from earlyexit_ssd.pipeline.export import export_detector, open_any
from earlyexit_ssd.pipeline.int8 import detect, export_int8
from earlyexit_ssd.pipeline.phases import fine_tune
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Recorded,
    Replay,
    disjoint_sets,
    fit_router,
    fit_temperatures,
    measure_cost_model,
    temperatures_of,
)
from earlyexit_ssd.pipeline.train import train_phases
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.page import never_failing, search_page, write_page
from earlyexit_ssd.report.pictures import candidates_chart
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import needs_training_photos

logger = logging.getLogger(__name__)

GLANCES = ((128, 12), (160, 12), (192, 12))
"""(pixels, layer) of the tried glances if EXITS.GLANCES is empty, for an input of 320 pixels. For other inputs the
pixels are scaled and rounded to multiples of 16."""
EMPTY_EXITS = (12,)
"""Trunk layers of the empty exits that are tried, also behind a glance, if the detector has no exits of its own."""
OWN_HEAD = "as it is"  # `Candidate.fold` of a net that keeps the detector's head
SHARES, FINE_TUNED_SHARES = (1.0, 0.9, 0.8, 0.7), (1.0, 0.9, 0.8, 0.7, 0.6)
"""Tried input sides as shares of the detector's own side: with its own weights, and with fine-tuned weights."""
FINE_STEP = 16  # distance in pixels of the input sides that are tried with fine-tuned weights
BASE_FILE = "base.pth"
"""File of the base detector (see `Goal`) in the folder of the search: a rival in the evaluation of the chosen one."""
EXPORT_PHOTOS = 16  # photos of the calib split on which the exported file is compared with the model
GLANCE_PRICE = 0.15
"""Approximate cost of a glance as a share of the detector's time. Every photo has this cost, so a glance can save time
only if a larger share of the photos leaves."""
HOPELESS = 2.0
"""A net without exits that loses more than this multiple of the budget is not tried with exits: with exits a net rarely
loses less."""


@dataclass(frozen=True)
class Goal:
    """The target of a search. *Base detector* below is the given detector, unchanged and without exits.

    Attributes:
        ap_drop, delta: accuracy budget: largest AP50 lost against the base detector, in a share 1 - ``delta`` of the
            bootstrap draws of the calib photos.
        coco_ap_drop: as ``ap_drop``, for COCO's AP (the mean over IoU 0.5 to 0.95); None: not limited.
        speedup, ms: wanted speed relative to the base detector, or milliseconds per photo; None: as fast as possible.
        minutes: time after which no further candidate is started; None: no limit.
        train: also try trained nets: fine-tuned ones, and those of the joint phase if it is configured.
    """

    ap_drop: float = 0.01
    delta: float = 0.05
    speedup: float | None = None
    ms: float | None = None
    minutes: float | None = None
    train: bool = False
    coco_ap_drop: float | None = None

    def __post_init__(self) -> None:
        _ = self.budget  # raises if ap_drop or delta is out of range
        if self.coco_ap_drop is not None and not 0 <= self.coco_ap_drop <= 1:
            raise EarlyExitError(f"coco_ap_drop is {self.coco_ap_drop:g}, expected a number in [0, 1]")
        for name in ("speedup", "ms", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EarlyExitError(f"{name} is {value:g}, expected a number above 0")

    @property
    def budget(self) -> Target:
        """The accuracy budget as the target of a threshold search."""
        return Target("ap_drop", self.ap_drop, self.delta)

    def target(self, base_ms: float) -> Target:
        """The target of a threshold search: the wanted speed, otherwise the accuracy budget."""
        speedup = self.speedup if self.ms is None else base_ms / self.ms
        return self.budget if speedup is None else Target("speedup", speedup)


@dataclass(frozen=True)
class Candidate(Record):
    """One variant of the detector and, once it is measured, its figures on the calib split."""

    name: str  # such as "288 px, compact head, glance at 128 px"; empty before the measurement
    image_size: int  # side of the input in pixels
    fold: str  # kind of the head
    exits: tuple[str, ...] = ()  # names in the order of computation
    policy: str | None = None
    thresholds: tuple[float, ...] = ()
    AP50: float | None = None
    lost: float | None = None  # AP50 lost against the base detector
    lost_bound: float | None = None  # upper bound of ``lost`` with confidence 1 - delta
    objects: int | None = None  # number of detections of the base detector at EVAL.SCORE
    objects_kept: int | None = None  # number of these that the candidate finds too
    mmacs: float | None = None  # millions of multiply-accumulates; rivals only
    ms: float | None = None  # mean milliseconds per photo
    speedup: float | None = None  # speed relative to the base detector in the same run
    holds: bool = False  # whether ``lost_bound`` and ``AP_lost_bound`` are within the budget
    rival: bool = False
    fine_tuned: bool = False  # whether the net is fine-tuned
    joint: bool = False  # whether the net's weights are those of the joint phase
    # as ``lost_bound``, for COCO's AP; None if the goal does not limit it or ``lost_bound`` is too large
    AP_lost_bound: float | None = None

    @property
    def net(self) -> Candidate:
        """The net alone, without exits and figures."""
        return Candidate("", self.image_size, self.fold, fine_tuned=self.fine_tuned, joint=self.joint)

    @property
    def key(self) -> str:
        """Text that tells it from the others of a search."""
        training = " fine-tuned" if self.fine_tuned else " joint" if self.joint else ""
        return " ".join([f"{self.image_size} {self.fold}{training}", *self.exits])

    def describe(self, opened: Sequence[str], own_size: int) -> str:
        """The name with these exits open; ``own_size`` is the side of the detector's own input."""
        words = [f"{self.image_size} px"] if self.image_size != own_size else []
        words += [f"{self.fold} head"] if self.fold != OWN_HEAD else []
        words += ["fine-tuned"] if self.fine_tuned else []
        words += ["jointly trained"] if self.joint else []
        for name in opened:
            words.append(f"glance at {name.removeprefix('glance')} px" if name.startswith("glance") else name)
        name = ", ".join(words) or "the detector as it is"
        return name if opened or not self.exits else f"{name} ({', '.join(self.exits)} closed)"

    def __str__(self) -> str:
        if self.ms is None or self.speedup is None:
            return f"{self.name}: not measured"
        kept = "" if self.objects is None else f", {self.objects_kept} of {self.objects} objects kept"
        lost = "AP50 undefined" if self.lost is None else f"{self.lost:.3f} AP50 lost"
        return f"{self.name}: {self.speedup:.2f} times as fast, {lost}{kept}"


@dataclass(frozen=True)
class Found:
    """A candidate with all that is needed to save it: its model, and the threshold search with its result (both None:
    the candidate has no exits)."""

    candidate: Candidate
    recorded: Recorded
    search: Search | None = None
    chosen: Chosen | None = None


class Optimizer:
    """The search over one detector.

    Args:
        cfg: configuration.
        goal: accuracy budget and wanted speed.
        weights: a trained model of this project, whose branches are tried too; None: MODEL.WEIGHTS.
        out: folder of results and recordings.
    """

    def __init__(self, cfg: CfgNode, weights: str | os.PathLike[str] | None, goal: Goal, out: Path) -> None:
        self.goal, self.out, self.device = goal, out, evaluation_device(cfg)
        cfg = with_values(cfg, {"CALIBRATION.COST": "ms"})
        if weights is None:
            model, architecture = build_model(_base_config(cfg), class_names(cfg))
            self.model, self.architecture, self.info = model, architecture, {"taken_over": True}
        else:
            self.model, self.architecture, self.info = open_model(cfg, weights)
        self.cfg = cfg = with_classes(cfg, self.architecture.classes)
        self.model = self.model.to(self.device).eval()
        self.sets, self.repeats = disjoint_sets(cfg, ("CALIB",))
        self._replays: dict[tuple[Candidate, str], Replay] = {}
        self.base = self._replay(Candidate("", self.architecture.image_size, OWN_HEAD), "CALIB")
        self.reference = self.base.recording.detections[-1]
        plan = [one.key for one in self.plan()]
        fine_tuning = f"{cfg.FINE_TUNING} {fingerprint(self.sets['TRAIN'])}" if goal.train else ""
        fine_tuning += f"{cfg.EXITS_PHASE} {cfg.JOINT}" if self.trains_jointly else ""
        settings = f"{cfg.EVAL.RUNTIME} {cfg.EVAL.TIMING_THREADS} {cfg.EVAL.SCORE} {cfg.CALIBRATION}"
        text = f"{weights_hash(self.model)} {goal} {fingerprint(self.sets['CALIB'])} {settings} {plan} {fine_tuning}"
        self.key = hashlib.sha256(text.encode()).hexdigest()

    # The plan of candidates.

    @property
    def best_head(self) -> str:
        """The compact head if the detector's head folds classes, otherwise its own."""
        return "compact" if self.architecture.folded_rows else OWN_HEAD

    def sizes(self, fine_tuned: bool = False) -> list[int]:
        """Tried sides of the input in pixels, largest first."""
        own, shares = self.architecture.image_size, FINE_TUNED_SHARES if fine_tuned else SHARES
        step = 32 if own >= 256 else 16
        smaller = [round(share * own / step) * step for share in shares] if self.model.any_size else []
        return sorted({own, *(self.cfg.EVAL.RIVALS.SIZES or smaller)}, reverse=True)

    @property
    def glances(self) -> list[tuple[int, int]]:
        """(pixels, layer) of the tried glances."""
        own = self.architecture.image_size
        return list(self.cfg.EXITS.GLANCES) or [(round(px * own / 320 / 16) * 16, layer) for px, layer in GLANCES]

    def exits_of(self, net: Candidate) -> tuple[Exit, ...]:
        """All exits that may be tried with a net: glances smaller than the input, and other exits.

        Other exits of a jointly trained net are the configured ones. Other nets of a detector with branches have its
        own exits if they have its head and weights, otherwise none. Nets of a detector without branches have empty
        exits.
        """
        own = [one for one in self.architecture.exits if one.pixels is None]
        if net.joint:
            others = [one for one in build_exits(self.cfg) if one.pixels is None]
        elif self.has_branches:
            others = own if net.fold == OWN_HEAD and not net.fine_tuned else []
        else:
            layers = [one.layer for one in own] or [layer for layer in EMPTY_EXITS if layer < self.model.last_layer]
            others = describe_exits(layers, empty=layers)
        return (*describe_exits((), glances=[one for one in self.glances if one[0] < net.image_size]), *others)

    @property
    def has_branches(self) -> bool:
        """Whether any exit of the detector detects."""
        return not all(one.empty for one in self.architecture.exits)

    @property
    def trains_jointly(self) -> bool:
        """Whether the joint phase is tried: the goal allows training, and the configuration has it and branches."""
        branches = set(self.cfg.EXITS.LAYERS) - set(self.cfg.EXITS.EMPTY)
        return self.goal.train and bool(branches) and "joint" in self.cfg.PHASES and self.cfg.JOINT.EPOCHS > 0

    @property
    def has_empty_photos(self) -> bool:
        """Whether a share of more than `GLANCE_PRICE` of the calib photos has no detection, so that glances can save
        time."""
        found = self.reference.values()
        return sum(not (one["scores"] >= self.cfg.EVAL.SCORE).any() for one in found) > GLANCE_PRICE * len(found)

    def plan(self) -> list[Candidate]:
        """All candidates, in the order in which they are tried.

        Nets without exits come first, then nets with the best head and exits. Then follow nets with the detector's own
        head and exits (at all sizes if it has branches), the fine-tuned and the jointly trained nets.
        """

        def nets(sizes: Sequence[int], fold: str, **training: bool) -> list[Candidate]:
            return [Candidate("", size, fold, **training) for size in sizes]

        base, best = nets([self.architecture.image_size], OWN_HEAD), nets(self.sizes(), self.best_head)
        with_own_head = nets(self.sizes(), OWN_HEAD) if self.has_branches else base
        plan = [*base, *best, *self._with_exits([*best, *with_own_head])]
        if self.goal.train:
            learnt = self.sizes(fine_tuned=True)
            between = range(learnt[0], learnt[-1] - 1, -FINE_STEP)  # the net is good at sizes between the trained ones
            plan += nets(sorted({*learnt, *between}, reverse=True), self.best_head, fine_tuned=True)
            plan += self._with_exits(nets(learnt, self.best_head, fine_tuned=True))
        if self.trains_jointly:
            fold = "compact" if self.cfg.MODEL.FOLD == "compact" else OWN_HEAD
            joint = nets(sorted({*self.sizes(), *self.cfg.JOINT.SIZES}, reverse=True), fold, joint=True)
            plan += [*joint, *self._with_exits(joint)]
        return list(dict.fromkeys(plan))

    def _with_exits(self, nets: Sequence[Candidate]) -> list[Candidate]:
        """Each net with the sets of exits that are tried: each glance alone, each other exit alone, all other exits,
        and all other exits behind each glance. Two glances are not tried together: one of them always stayed closed."""
        plan = []
        for net in nets:
            exits = [one for one in self.exits_of(net) if self.has_empty_photos or not one.empty]
            glances = [(one.name,) for one in exits if one.pixels is not None]
            others = tuple(one.name for one in exits if one.pixels is None)
            sets = [*glances, *((one,) for one in others), others, *((*one, *others) for one in glances)]
            plan += [dataclasses.replace(net, exits=names) for names in sets if names]
        return plan

    def skips(self, candidate: Candidate, measured: Iterable[Candidate]) -> bool:
        """Whether a candidate is not tried after these.

        There are two cases. Its net loses too much without exits (`HOPELESS`). Or its exits are empty, it has the
        detector's own head, and some net with a compact head holds the budget. Then these exits are tried with the
        compact head only.
        """
        if not candidate.exits:
            return False
        nets = [one for one in measured if not one.exits]
        lost = next((one.lost for one in nets if one.net == candidate.net), None)
        if lost is not None and lost > HOPELESS * self.goal.ap_drop:
            return True
        compact_holds = any(one.fold == "compact" and one.holds for one in nets)
        empty = all(one.empty for one in self.exits_of(candidate) if one.name in candidate.exits)
        return compact_holds and candidate.fold == OWN_HEAD and empty

    def _replay(self, net: Candidate, split: str) -> Replay:
        """The recording of a split by a net with all its exits. Of each split only the latest is kept in memory."""
        if (net, split) not in self._replays:
            self._replays = {key: one for key, one in self._replays.items() if key[1] != split}
            exits = tuple(one.name for one in self.exits_of(net))
            self._replays[net, split] = self._recorded(dataclasses.replace(net, exits=exits)).replay(split)
        return self._replays[net, split]

    def _policy_photos(self, candidate: Candidate) -> Replay:
        """The photos that its policies are fitted on, recorded by the detector itself or by the trained net, at the
        detector's own size: a glance gets nearly the same small copy of a photo at every size."""
        net = dataclasses.replace(candidate.net, image_size=self.architecture.image_size)
        if not (net.fine_tuned or net.joint):
            net = dataclasses.replace(net, fold=OWN_HEAD)
        return self._replay(net, "TRAIN").only(candidate.exits)

    def _recorded(self, candidate: Candidate) -> Recorded:
        """Its model, its splits, and the folder of its net's recordings."""
        architecture, state = self.architecture, self.model.state_dict()
        if candidate.fine_tuned:
            architecture, state = self._fine_tuned
        elif candidate.joint:
            architecture, state = self._jointly_trained
        elif candidate.fold == "compact":
            architecture, state = self._compact
        architecture = dataclasses.replace(
            architecture,
            image_size=candidate.image_size,
            trained_size=architecture.trained_size or self.architecture.image_size,
            exits=tuple(one for one in self.exits_of(candidate) if one.name in candidate.exits),
        )
        model = architecture.build().to(self.device).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        folder = self.out / "recordings" / candidate.net.key.replace(" ", "_")
        return Recorded(self.cfg, model, architecture, self.info, self.sets, self.repeats, folder)

    def full_path(self) -> SSD:
        """A copy of the detector's full path."""
        return resize_detector(self.model, self.architecture, self.architecture.image_size)

    @functools.cached_property
    def _fine_tuned(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The full path with the best head, fine-tuned at all tried sizes and at the sizes of the glances."""
        if self.best_head == "compact":
            architecture, state = self._compact
        else:
            architecture, state = self.architecture, self.full_path().state_dict()
        architecture = dataclasses.replace(architecture, exits=())
        sizes = [*self.sizes(fine_tuned=True), *(pixels for pixels, _ in self.glances if self.has_empty_photos)]
        student = architecture.build().to(self.device)
        student.load_state_dict(state)
        fine_tune(self.cfg, student, architecture, self.model, sizes, self.sets["CALIB"], self.out / "fine_tuned")
        return architecture, student.state_dict()

    @functools.cached_property
    def _jointly_trained(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The detector with the configured exits after its last phase, which is the joint one."""
        values = {"OUTPUT_DIR": str(self.out / "joint"), "CALIBRATION.TARGET": ""}
        with locked_folder(self.out / "joint"):
            model, architecture, _ = load_model(train_phases(with_values(self.cfg, values)))
        return architecture, model.state_dict()

    @functools.cached_property
    def _compact(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The full path with a compact head (`earlyexit_ssd.modeling.heads`), at its own size."""
        detector = self.full_path()
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

    # Measurement.

    def measure(self, candidate: Candidate) -> Found:
        """The candidate with its figures, and with the best of the policies that are tried."""
        recorded, calib = self._recorded(candidate), self._replay(candidate.net, "CALIB").only(candidate.exits)
        if not candidate.exits:
            costs = measure_cost_model(self.cfg, recorded.model, ExitRouter(0), self.model)
            unrouted = Chosen((), np.zeros(len(calib.recording), np.int64), Measured())
            return Found(self._judged(candidate, calib, costs, unrouted), recorded)
        found = [self._with_policy(candidate, recorded, calib, one) for one in self._policies(recorded.model.empty)]
        return min(found, key=lambda one: (not one.candidate.holds, one.candidate.ms or np.inf))

    def _policies(self, empty: Sequence[bool]) -> list[str]:
        """Policies to try. An empty exit needs a policy that reads the tap, so ROUTING.POLICY is for branches only."""
        if all(empty):
            return ["foreseen_emptiness"]
        return ["learned_gain"] if any(empty) else list(dict.fromkeys([self.cfg.ROUTING.POLICY, "learned_gain"]))

    def _with_policy(self, candidate: Candidate, recorded: Recorded, calib: Replay, policy: str) -> Found:
        cfg, model = self.cfg, recorded.model
        train = self._policy_photos(candidate) if needs_training_photos(policy) else None
        temperatures = temperatures_of(fit_temperatures(cfg, calib), model.exit_names)
        router, confidences = fit_router(cfg, policy, temperatures, calib, train)
        costs = measure_cost_model(cfg, model, router, self.model)
        target = self.goal.target(costs.plain)
        search = Search(cfg, target, router, confidences, calib, None, costs, baseline=self.reference)
        try:
            chosen = search.run()
        except EarlyExitError:  # the wanted speed is impossible even if every photo leaves at the first exit
            search = dataclasses.replace(search, target=self.goal.budget)
            chosen = search.run()
        candidate = dataclasses.replace(candidate, policy=policy, thresholds=chosen.thresholds)
        return Found(self._judged(candidate, calib, costs, chosen), recorded, search, chosen)

    def _judged(self, candidate: Candidate, calib: Replay, costs: CostModel, chosen: Chosen) -> Candidate:
        """The candidate with its figures."""
        matches, base_choice = calib.matches_beside(self.reference)
        choices = [base_choice, chosen.exits]
        before, after = (ap_of_choice(matches, one, ap50_only=True).AP50 for one in choices)
        draw = functools.partial(bootstrap_choices, matches, choices, seed=self.cfg.SEED)
        bound, ap_bound = chosen.measured.AP50_lost_bound, None
        if bound is None:
            base, routed = draw()
            bound = float(np.nanquantile(base.AP50 - routed.AP50, 1 - self.goal.delta))
        holds = bound <= self.goal.ap_drop
        if holds and self.goal.coco_ap_drop is not None:
            base, routed = draw(ap50_only=False)
            ap_bound = float(np.nanquantile(base.AP - routed.AP, 1 - self.goal.delta))
            holds = ap_bound <= self.goal.coco_ap_drop
        kept = calib.agreement(chosen.exits, self.reference)
        ms = float(costs.per_exit(chosen.thresholds)[chosen.exits].mean())
        opened = [name for name, one in zip(candidate.exits, chosen.thresholds, strict=True) if one < CLOSED]
        return dataclasses.replace(
            candidate,
            name=candidate.describe(opened, self.architecture.image_size),
            AP50=after,
            lost=_loss(before, after),
            lost_bound=bound,
            objects=kept.objects,
            objects_kept=kept.kept,
            ms=ms,
            speedup=costs.plain / ms,
            holds=holds,
            AP_lost_bound=ap_bound,
        )

    def rivals(self) -> list[Candidate]:
        """Detectors from ONNX files (EVAL.RIVALS.ONNX) on the calib split, for the chart; they are never chosen."""
        found, runs, threads = [], self.cfg.EVAL.TIMING_RUNS, self.cfg.EVAL.TIMING_THREADS
        for rival in onnx_rivals(self.cfg, self.architecture.classes):
            detections = collect_detections(rival.detector, self.loader("CALIB"))
            networks, examples = [rival.network, PlainPath(self.model)], [rival.example, example_input(self.model)]
            timing, base = time_in_runtime(networks, examples, ONNX_RUNTIME, runs, threads)
            matches, choice = self.base.matches_beside(detections)
            # in the matches the rival is the last exit, behind the full path
            before, after = (ap_of_choice(matches, one, ap50_only=True).AP50 for one in (choice - 1, choice))
            ms = {"ms": timing.ms, "speedup": base.ms / timing.ms, "mmacs": rival.mmacs}
            accuracy = {"AP50": after, "lost": _loss(before, after)}
            size = int(rival.example.shape[-1])
            found.append(Candidate(rival.name, size, "its own", **accuracy, **ms, rival=True))
        return found

    def loader(self, split: str) -> DataLoader:
        """The photos of a split in batches, not augmented."""
        cfg = self.cfg
        return build_loader(self.sets[split], cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)


def _loss(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _base_config(cfg: CfgNode) -> CfgNode:
    """A copy of the configuration without a compact head. If an exit has a branch, which would be untrained, only
    glances stay."""
    values = {"MODEL.FOLD": "rows" if cfg.MODEL.FOLD == "rows" else "exact"}
    if set(cfg.EXITS.LAYERS) != set(cfg.EXITS.EMPTY):
        values |= {"EXITS.LAYERS": (), "EXITS.EMPTY": ()}
        values |= {f"EXITS.{key}": cfg.EXITS[key][:1] for key in ("BRANCH", "COPY", "DEPTH")}
    return with_values(cfg, values)


@dataclass(frozen=True)
class TestFigures(Record):
    """Figures of the chosen candidate and of the base detector (``_base``) on the test split; intervals are 95 %."""

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

    @classmethod
    def of(cls, results: Results) -> TestFigures:
        """From an evaluation in which the base detector is the rival `BASE_FILE`."""
        base = next(one for one in results.rivals if one.source == BASE_FILE)
        figures: dict[str, float | None] = {}
        for one, end in ((results.routed, ""), (base, "_base")):
            figures |= {f"AP{end}": one.number("AP"), f"AP50{end}": one.ap50, f"mmacs{end}": one.mmacs}
            figures |= {f"objects_found{end}": one.number("true_positives"), f"ms{end}": one.ms}
        low_high, context = base.routed_minus_rival_AP50_interval, results.context
        return cls(
            splits=context.splits,
            photos=context.images,
            **figures,
            AP50_lost_interval=None if low_high is None else [-low_high[1], -low_high[0]],
            ms_base_interval=base.ms_interval,
            runtime=context.runtime,
            threads=context.threads,
        )

    @property
    def speedup(self) -> float | None:
        return self.ms_base / self.ms if self.ms and self.ms_base else None

    @property
    def base_detects(self) -> bool:
        """Whether the base detector finds objects at all."""
        return self.AP50_base is not None and self.AP50_base >= DETECTS_AP50

    def worth_shipping(self, goal: Goal) -> bool:
        """Whether it is faster than a base detector that detects, and its measured loss is within the budget."""
        faster = self.speedup is not None and self.ms < self.ms_base_interval[0]
        if not (faster and self.base_detects and self.AP50 is not None):
            return False
        ap_holds = goal.coco_ap_drop is None or self.AP_base - self.AP <= goal.coco_ap_drop
        return self.AP50_base - self.AP50 <= goal.ap_drop and ap_holds


@dataclass(frozen=True)
class Outcome(Record):
    """Result of `optimize`, the content of optimize.json."""

    base: Candidate
    chosen: Candidate | None  # see `choose_candidate`
    candidates: tuple[Candidate, ...]  # the base detector and all others on the calib split, rivals included
    test: TestFigures | None
    ship: bool  # whether the chosen one is faster on the test split, and its measured loss (not a bound) in the budget
    summary: str  # one paragraph of text


@locks_folder("out_dir")
def optimize(
    cfg: CfgNode, goal: Goal, out_dir: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> Outcome:
    """Run the search and write the chosen model.

    ``out_dir`` gets model.pth, detector.onnx, test/ (the evaluation of the chosen model), optimize.json,
    candidates.png, summary.txt and report.html. If OpenVINO is the runtime, ``out_dir`` also gets detector.xml. This
    file is in 8 bits if 8 bits hold the budget and are faster. The milliseconds of a candidate in 8 bits are those in
    32 bits divided by the speed-up of 8 bits, from photo to detections.

    A stopped search resumes with the candidates that are already measured.

    Args:
        cfg, goal, weights: see `Optimizer`.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EarlyExitError("optimize under torchrun: it times networks and runs in one process; start it without")
    _warn_if_busy()
    out, started = Path(out_dir), time.monotonic()
    search = Optimizer(cfg, weights, goal, out)
    found, plan = _read_candidates(out / "candidates.json", search.key), search.plan()
    for candidate in progress(plan, desc="candidates"):
        if found and goal.minutes is not None and time.monotonic() - started > 60 * goal.minutes:
            logger.warning("stopped after %g minutes: %d of %d candidates tried", goal.minutes, len(found), len(plan))
            break
        if candidate.key in found or search.skips(candidate, found.values()):
            continue
        found[candidate.key] = search.measure(candidate).candidate
        candidates = {key: one.to_json() for key, one in found.items()}
        write_json(out / "candidates.json", {"key": search.key, "candidates": candidates})
        logger.info("%s", found[candidate.key])
    measured, results, test, ship = list(found.values()), None, None, False
    chosen, candidates = choose_candidate(measured, goal), (*measured, *search.rivals())
    if chosen is None:
        summary = _nothing_holds(measured, goal)
    else:
        results = _write_chosen(search, chosen)
        test = TestFigures.of(results)
        int8 = _in_8_bits(search, chosen) if cfg.EVAL.RUNTIME == OPENVINO else None
        if int8 is not None:
            candidates, test = (*candidates, int8), _test_in_8_bits(search, test, chosen.ms / int8.ms)
            chosen = int8
        ship = test.worth_shipping(goal)
        summary = _summary(chosen, test, ship, goal)
    outcome = Outcome(measured[0], chosen, candidates, test, ship, summary)
    write_json(out / "optimize.json", outcome.to_json())
    write_text(out / "summary.txt", summary + "\n")
    write_image(out / "candidates.png", candidates_chart(candidates, chosen, cfg.EVAL.RUNTIME))
    with never_failing(out / "report.html"):
        write_page(out / "report.html", search_page(candidates, chosen, summary, ship, results, BASE_FILE))
    return outcome


def _warn_if_busy() -> None:
    """Log a warning if more processes run than there are cores."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        logger.warning("the machine is busy (load %.1f on %d cores): milliseconds will be unreliable", load, cores)


def choose_candidate(candidates: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """The candidate to ship, among those that are faster than the base detector. The base is ``candidates[0]``.

    1. The fastest candidate that holds the budget, if it reaches the wanted speed or no candidate reaches it.
    2. Otherwise the candidate that loses least, of those that reach the wanted speed.
    3. None if neither exists.
    """
    known = [one for one in candidates[1:] if one.ms is not None and one.lost is not None and one.speedup > 1]
    # with all exits closed it equals the candidate without exits
    known = [one for one in known if not one.exits or min(one.thresholds) < CLOSED]
    holding = [one for one in known if one.holds]
    best = max(holding, key=lambda one: one.speedup, default=None)
    if goal.speedup is None and goal.ms is None:
        return best
    fast = [one for one in known if one.speedup >= (goal.speedup or 0) and one.ms <= (goal.ms or np.inf)]
    return best if best in fast or not fast else min(fast, key=lambda one: one.lost)


def _read_candidates(path: Path, key: str) -> dict[str, Candidate]:
    """The candidates that a stopped search has measured, by their keys; none if the file is of another search."""
    content = (
        read_json(path, "candidates of a search", "delete it") if path.is_file() else {"key": key, "candidates": {}}
    )
    if not isinstance(content, dict) or content.get("key") != key:
        logger.info("%s is of a search with other settings, photos or weights: all candidates are measured again", path)
        return {}
    return {name: Candidate.from_json(one) for name, one in content["candidates"].items()}


def _nothing_holds(measured: Sequence[Candidate], goal: Goal) -> str:
    """The summary if no candidate is chosen."""
    known = [one for one in measured[1:] if one.lost is not None]
    least = min(known, key=lambda one: one.lost_bound, default=None)
    nearest = "" if least is None else f"; the nearest: {least} (bound {least.lost_bound:.3f})"
    asked = f"no faster candidate holds the budget of {goal.ap_drop:g} AP50 on the calib split"
    return f"{asked}: ship the detector as it is{nearest}"


def _write_chosen(search: Optimizer, chosen: Candidate) -> Results:
    """Write and export the chosen model, and evaluate it on the test split, with the base detector as a rival."""
    out, found = search.out, search.measure(chosen)  # candidates.json has only figures
    recorded = found.recorded
    info: ModelInfo = {**search.info}
    if found.search is None:
        info = {key: value for key, value in info.items() if key not in ("router", "certificate")}
    else:
        certificate = certificate_of(recorded, found.search, found.chosen)
        info |= {"router": certificate.router, "certificate": certificate.to_dict()}
    save_model(out / "model.pth", recorded.model, recorded.architecture, info)
    photos = [record.path for record in recorded.sets["CALIB"].records[:EXPORT_PHOTOS]]
    export_detector(open_any(out / "model.pth"), out / "detector.onnx", "onnx", photos)
    if search.cfg.EVAL.RUNTIME == OPENVINO:
        export_detector(open_any(out / "model.pth"), out / "detector.xml", "openvino", photos)
    plain = dataclasses.replace(search.architecture, exits=())
    save_model(out / BASE_FILE, plain.add_exits(search.full_path()), plain, {})
    rivals = (*search.cfg.EVAL.RIVALS.FULL_PATHS, str(out / BASE_FILE))
    cfg = with_values(search.cfg, {"EVAL.RIVALS.ENABLED": True, "EVAL.RIVALS.FULL_PATHS": rivals})
    return evaluate_model(cfg, out / "model.pth", out / "test", compare=False)


def _in_8_bits(search: Optimizer, chosen: Candidate) -> Candidate | None:
    """The chosen candidate in 8 bits; its file replaces detector.xml. None if the candidate in 8 bits does not hold the
    budget, is not faster, or cannot be made."""
    try:
        if search.goal.coco_ap_drop is not None:
            raise EarlyExitError("the loss of COCO's AP is limited (--coco-ap-drop), and 8 bits are not checked for it")
        model, path, goal = open_any(search.out / "model.pth"), search.out / "detector.xml", search.goal
        ranges = [record.path for record in search.sets["TRAIN"].records]
        figures = export_int8(
            model, path, "openvino", search.sets["CALIB"], goal.ap_drop, ranges, search.reference, goal.delta
        )
    except EarlyExitError as reason:
        logger.info("no candidate in 8 bits: %s", reason)
        return None
    (before, after), speed = figures.AP50, figures.speed.value
    return dataclasses.replace(
        chosen,
        name=f"{chosen.name}, 8 bits",
        AP50=after,
        lost=before - after,
        lost_bound=figures.lost_bound,
        objects=figures.objects,
        objects_kept=figures.objects_kept,
        ms=chosen.ms / speed,
        speedup=chosen.speedup * speed,
    )


def _test_in_8_bits(search: Optimizer, test: TestFigures, speed: float) -> TestFigures:
    """The test figures of detector.xml in 8 bits: accuracy measured, time from ``test`` (32 bits) and ``speed``, the
    speed relative to 32 bits."""
    cfg, dataset = search.cfg, search.sets["TEST"]
    base = collect_detections(open_any(search.out / BASE_FILE), search.loader("TEST"))
    quantised = detect(Predictor(search.out / "detector.xml", OPENVINO), dataset)
    matches = exit_matches(to_coco(dataset), [base, quantised], cfg.EVAL.IOU)
    choices = [np.full(matches.photos, index) for index in range(2)]
    found, draws = ap_of_choice(matches, choices[1]), bootstrap_choices(matches, choices, seed=cfg.SEED)
    return dataclasses.replace(
        test,
        AP=found.AP,
        AP50=found.AP50,
        AP50_lost_interval=interval(draws[0].AP50 - draws[1].AP50),
        objects_found=int(photo_counts(matches, cfg.EVAL.SCORE).hits[:, 1].sum()),
        ms=test.ms / speed,
    )


def _summary(chosen: Candidate, test: TestFigures, ship: bool, goal: Goal) -> str:
    lost, ap_lost = _loss(test.AP50_base, test.AP50), _loss(test.AP_base, test.AP)
    losses = "undefined AP50 lost" if lost is None else f"{lost:.3f} AP50 lost"
    losses += "" if test.AP50_lost_interval is None else " [{:.3f}, {:.3f}]".format(*test.AP50_lost_interval)
    losses += "" if ap_lost is None else f", {round(ap_lost, 3) + 0.0:.3f} AP lost"  # no -0.000
    times = f"{test.ms:.1f} ms against {test.ms_base:.1f}, {test.runtime}, threads: {test.threads}"
    found = f"{test.objects_found} objects found where your detector finds {test.objects_found_base}"
    figures = (
        f"{chosen.name}: {test.speedup:.2f} times as fast as your detector ({times}), {losses}, {found}, on "
        f"{test.photos} test photos ({', '.join(test.splits)})"
    )
    if ship:
        return f"ship it. {figures}."
    if not test.base_detects:
        return f"do not ship it: your detector itself does not detect (AP50 {test.AP50_base or 0:.3f}). {figures}."
    budget = f"{goal.ap_drop:g} AP50"
    budget += "" if goal.coco_ap_drop is None else f" and {goal.coco_ap_drop:g} AP"
    return f"do not ship it: on the test photos it exceeds the budget of {budget}, or is no faster. {figures}."

"""Search the fastest variant of a detector within an accuracy budget, measured on this machine.

A *net* is a full path at one input size, with one kind of head, with its own weights or with trained ones. A
*candidate* is a net and a set of open exits, such as glances. A glance is an early exit that runs the first trunk
layers on a small copy of the image before the full-size pass. Candidates are measured on the calib split. The chosen
one is then evaluated on the test split.
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
from torchvision.models.detection.ssd import SSDScoringHead

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data import build_loader, class_names
from earlyexit_ssd.data.dataset import fingerprint, to_coco
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import ONNX_RUNTIME, OPENVINO, PlainPath, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import (
    agreement,
    ap_of_choice,
    bootstrap_choices,
    exit_matches,
    interval,
    photo_counts,
)
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.evaluation.results import Interval, Record, Results
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, Exit, describe_exits, load_model, save_model
from earlyexit_ssd.modeling.checkpoint import ModelInfo, weights_hash
from earlyexit_ssd.modeling.heads import find_competing_rows, slice_rows
from earlyexit_ssd.modeling.retrofit import resize_detector
from earlyexit_ssd.pipeline.build import (
    build_evaluation,
    build_exits,
    build_model,
    evaluation_device,
    open_model,
    photos_to_compare_on,
    with_classes,
    with_values,
)
from earlyexit_ssd.pipeline.calibrate import Chosen, Search, Target, certificate_of, fit_router
from earlyexit_ssd.pipeline.evaluate import evaluate_model, onnx_rivals
from earlyexit_ssd.pipeline.export import export_detector, open_any
from earlyexit_ssd.pipeline.int8 import detect, export_int8
from earlyexit_ssd.pipeline.phases import fine_tune
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Recorded,
    Replay,
    disjoint_sets,
    fit_temperatures,
    measure_cost_model,
    temperatures_of,
)
from earlyexit_ssd.pipeline.train import train_phases
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.charts import candidates_chart
from earlyexit_ssd.report.page import never_failing, search_page, write_page
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import needs_training_photos

logger = logging.getLogger(__name__)

GLANCES = ((128, 12), (160, 12), (192, 12))
"""(pixels, layer) of the tried glances if EXITS.GLANCES is empty, for an input of 320 pixels. For other inputs the
pixels are scaled and rounded to multiples of 16."""
EMPTY_EXITS = (12,)
"""Trunk layers of the empty exits that are tried, also behind a glance, if the detector has no exits of its own."""
OWN_HEAD = "as it is"  # `Variant.fold` of a net that keeps the detector's head
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
        Target("ap_drop", self.ap_drop, self.delta)
        if self.coco_ap_drop is not None and not 0 <= self.coco_ap_drop <= 1:
            raise EarlyExitError(f"coco_ap_drop is {self.coco_ap_drop:g}, expected a number in [0, 1]")
        for name in ("speedup", "ms", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EarlyExitError(f"{name} is {value:g}, expected a number above 0")


@dataclass(frozen=True)
class Candidate(Record):
    """One variant of the detector and its figures on the calib split."""

    name: str  # such as "288 px, compact head, glance at 128 px"
    image_size: int  # of the net, see `Variant`
    fold: str  # of the net
    exits: tuple[str, ...] = ()  # names in the order of computation
    policy: str | None = None
    thresholds: tuple[float, ...] = ()
    AP50: float | None = None
    lost: float | None = None  # AP50 lost against the base detector
    lost_bound: float | None = None  # upper bound of ``lost`` with confidence 1 - delta
    objects: int | None = None  # number of objects that the base detector finds at EVAL.SCORE
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

    def __str__(self) -> str:
        if self.ms is None or self.speedup is None:
            return f"{self.name}: not measured"
        kept = "" if self.objects is None else f", {self.objects_kept} of {self.objects} objects kept"
        lost = "AP50 undefined" if self.lost is None else f"{self.lost:.3f} AP50 lost"
        return f"{self.name}: {self.speedup:.2f} times as fast, {lost}{kept}"


@dataclass(frozen=True)
class Variant:
    """A net without its exits: side of the input in pixels, kind of the head, whether its weights are fine-tuned, and
    whether they are those of the joint phase."""

    size: int
    fold: str
    fine_tuned: bool = False
    joint: bool = False

    def __str__(self) -> str:
        return f"{self.size} {self.fold}{' fine-tuned' if self.fine_tuned else ''}{' joint' if self.joint else ''}"

    def describe(self, exits: Sequence[str], own_size: int) -> str:
        """The name of a candidate."""
        words = [f"{self.size} px"] if self.size != own_size else []
        words += [f"{self.fold} head"] if self.fold != OWN_HEAD else []
        words += ["fine-tuned"] if self.fine_tuned else []
        words += ["jointly trained"] if self.joint else []
        for name in exits:
            words.append(f"glance at {name.removeprefix('glance')} px" if name.startswith("glance") else name)
        return ", ".join(words) or "the detector as it is"


@dataclass(frozen=True)
class Net:
    """A variant with all its exits and recorded outputs.

    Attributes:
        calib: recording of the calib split.
        train: recording of the photos that policies are fitted on, made once, at the detector's own size. Nets of all
            sizes share the recording, since a glance gets nearly the same small copy of a photo at every size.
    """

    variant: Variant
    recorded: Recorded
    calib: Replay
    train: Replay

    def with_exits(self, names: Sequence[str]) -> Net:
        model, architecture = self.recorded.model, self.recorded.architecture
        indices = [model.exit_names.index(name) for name in names]
        architecture = dataclasses.replace(architecture, exits=tuple(architecture.exits[index] for index in indices))
        part = architecture.build().to(next(model.parameters()).device).eval()
        state = model.state_dict()
        part.load_state_dict({key: state[key] for key in part.state_dict()})
        recorded = dataclasses.replace(self.recorded, model=part, architecture=architecture)
        return Net(self.variant, recorded, self.calib.only(names), self.train.only(names))


@dataclass(frozen=True)
class Found:
    """A candidate with all that is needed to save it: net, threshold search, and the search's result (both None: the
    candidate has no exits)."""

    candidate: Candidate
    net: Net
    search: Search | None = None
    chosen: Chosen | None = None


class Optimizer:
    """The search over one detector.

    Args:
        cfg: configuration; its MODEL, EXITS, DATA, CALIBRATION and EVAL sections are used.
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
        self.sets, self.repeats = disjoint_sets(self.cfg, ("CALIB",))
        self._nets: dict[Variant, Net] = {}
        self._photos: dict[Variant, Replay] = {}
        self.base = self._net(Variant(self.architecture.image_size, OWN_HEAD))
        self.reference = self.base.calib.recording.detections[-1]
        plan = [f"{variant} {exits}" for variant, exits in self.plan()]
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

    def exits_of(self, variant: Variant) -> tuple[Exit, ...]:
        """All exits that may be tried with a net: glances smaller than the input, and other exits.

        The other exits of a jointly trained net are the configured ones. A detector with branches has its own exits,
        but only with its own head and weights. All nets of a detector without branches have empty exits.
        """
        own = [one for one in self.architecture.exits if one.pixels is None]
        if variant.joint:
            others = [one for one in build_exits(self.cfg) if one.pixels is None]
        elif self.has_branches:
            others = own if variant.fold == OWN_HEAD and not variant.fine_tuned else []
        else:
            layers = [one.layer for one in own] or [layer for layer in EMPTY_EXITS if layer < self.model.last_layer]
            others = describe_exits(layers, empty=layers)
        return (*describe_exits((), glances=[one for one in self.glances if one[0] < variant.size]), *others)

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
    def shows_empty_photos(self) -> bool:
        """Whether a share of more than `GLANCE_PRICE` of the calib photos has no detection, so that glances can save
        time."""
        found = self.reference.values()
        return sum(not (one["scores"] >= self.cfg.EVAL.SCORE).any() for one in found) > GLANCE_PRICE * len(found)

    def plan(self) -> list[tuple[Variant, tuple[str, ...]]]:
        """Net and exit names of every candidate, in the order in which they are tried.

        Nets without exits come first, then nets with the best head and exits. Then follow nets with the detector's own
        head and exits (at all sizes if it has branches), the fine-tuned and the jointly trained nets.
        """
        own, best = self.architecture.image_size, self.best_head
        base, smaller = Variant(own, OWN_HEAD), [Variant(size, best) for size in self.sizes()]
        plan: list[tuple[Variant, tuple[str, ...]]] = [(base, ()), *((one, ()) for one in smaller)]
        with_own_head = [Variant(size, OWN_HEAD) for size in self.sizes()] if self.has_branches else [base]
        plan += [(one, exits) for one in (*smaller, *with_own_head) for exits in self._exit_sets(one)]
        if self.goal.train:
            learnt = self.sizes(fine_tuned=True)
            between = range(learnt[0], learnt[-1] - 1, -FINE_STEP)  # the net is good at sizes between the trained ones
            plan += [(Variant(size, best, fine_tuned=True), ()) for size in sorted({*learnt, *between}, reverse=True)]
            tuned = [Variant(size, best, fine_tuned=True) for size in learnt]
            plan += [(one, exits) for one in tuned for exits in self._exit_sets(one)]
        if self.trains_jointly:
            fold = "compact" if self.cfg.MODEL.FOLD == "compact" else OWN_HEAD
            sizes = sorted({*self.sizes(), *self.cfg.JOINT.SIZES}, reverse=True)
            joint = [Variant(size, fold, joint=True) for size in sizes]
            plan += [*((one, ()) for one in joint), *((one, exits) for one in joint for exits in self._exit_sets(one))]
        return list(dict.fromkeys(plan))

    def _exit_sets(self, variant: Variant) -> list[tuple[str, ...]]:
        """Sets of exit names that are tried with a net: each glance alone, each other exit alone, all other exits, and
        all other exits behind each glance. Two glances are not tried together: one of them always stayed closed."""
        exits = [one for one in self.exits_of(variant) if self.shows_empty_photos or not one.empty]
        glances = [one.name for one in exits if one.pixels is not None]
        others = tuple(one.name for one in exits if one.pixels is None)
        sets = [(one,) for one in glances]
        if others:
            sets += [*((one,) for one in others), others, *((one, *others) for one in glances)]
        return list(dict.fromkeys(sets))

    def is_empty(self, variant: Variant, names: Sequence[str]) -> bool:
        return all(one.empty for one in self.exits_of(variant) if one.name in names)

    def _net(self, variant: Variant) -> Net:
        """The net of a variant. Only the latest net is kept in memory, since recordings are on disk."""
        if self._nets.keys() != {variant}:
            recorded = self._recorded(variant)
            self._nets = {variant: Net(variant, recorded, recorded.replay("CALIB"), self._policy_photos(variant))}
        return self._nets[variant]

    def _recorded(self, variant: Variant) -> Recorded:
        own = self.architecture.image_size
        architecture, state = self.architecture, self.model.state_dict()
        if variant.fine_tuned:
            architecture, state = self._fine_tuned
        elif variant.joint:
            architecture, state = self._jointly_trained
        elif variant.fold == "compact":
            architecture, state = self._compact
        trained = architecture.trained_size or own
        exits = self.exits_of(variant)
        architecture = dataclasses.replace(architecture, image_size=variant.size, trained_size=trained, exits=exits)
        model = architecture.build().to(self.device).eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        folder = self.out / "recordings" / str(variant).replace(" ", "_")
        return Recorded(self.cfg, model, architecture, self.info, self.sets, self.repeats, folder)

    def _policy_photos(self, variant: Variant) -> Replay:
        """The recording that policies are fitted on: of the base detector, or of the trained net at the detector's own
        size."""
        fold = variant.fold if variant.fine_tuned or variant.joint else OWN_HEAD
        source = dataclasses.replace(variant, size=self.architecture.image_size, fold=fold)
        if source not in self._photos:
            self._photos[source] = self._recorded(source).replay("TRAIN")
        return self._photos[source]

    @functools.cached_property
    def _fine_tuned(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The full path with the best head, fine-tuned at all tried sizes and at the sizes of the glances."""
        if self.best_head == "compact":
            architecture, state = self._compact
        else:
            architecture, own = self.architecture, self.architecture.image_size
            state = resize_detector(self.model, architecture, own).state_dict()
        architecture = dataclasses.replace(architecture, exits=())
        sizes = [*self.sizes(fine_tuned=True), *(pixels for pixels, _ in self.glances if self.shows_empty_photos)]
        student = architecture.build().to(self.device)
        student.load_state_dict(state)
        fine_tune(self.cfg, student, architecture, self.model, sizes, self.sets["CALIB"], self.out / "fine_tuned")
        return architecture, student.state_dict()

    @functools.cached_property
    def _jointly_trained(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The detector with the configured exits after its last phase, which is the joint one."""
        values = {"OUTPUT_DIR": str(self.out / "joint"), "CALIBRATION.TARGET": ""}
        model, architecture, _ = load_model(train_phases(with_values(self.cfg, values)))
        return architecture, model.state_dict()

    @functools.cached_property
    def _compact(self) -> tuple[Architecture, dict[str, torch.Tensor]]:
        """The full path with a compact head (`earlyexit_ssd.modeling.heads`), at its own size."""
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

    # Measurement.

    def measure(self, variant: Variant, exits: tuple[str, ...]) -> Found:
        net = self._net(variant).with_exits(exits)
        if not exits:
            costs = measure_cost_model(self.cfg, net.recorded.model, ExitRouter(0), self.base.recorded.model)
            choice = np.zeros(len(net.calib.recording), np.int64)
            return Found(self._judged(net, (), choice, costs.paths[()], costs.plain), net)
        found = [self._with_policy(net, policy) for policy in self._policies(net)]
        return min(found, key=lambda one: (not one.candidate.holds, one.candidate.ms or np.inf))

    def _policies(self, net: Net) -> list[str]:
        """Policies to try. An empty exit needs a policy that reads the tap, so ROUTING.POLICY is for branches only."""
        empty = net.recorded.model.empty
        if all(empty):
            return ["foreseen_emptiness"]
        return ["learned_gain"] if any(empty) else list(dict.fromkeys([self.cfg.ROUTING.POLICY, "learned_gain"]))

    def _with_policy(self, net: Net, policy: str) -> Found:
        model, cfg = net.recorded.model, self.cfg
        fitted = fit_temperatures(cfg, model.exit_names, net.calib)
        train = net.train if needs_training_photos(policy) else None
        temperatures, goal = temperatures_of(fitted, model.exit_names), Target("ap_drop", self.goal.ap_drop)
        router, cross_fitted = fit_router(cfg, policy, goal, temperatures, train, net.calib)
        costs = measure_cost_model(cfg, model, router, self.base.recorded.model)
        target = self._target(costs)
        search = Search(
            cfg, target, router, net.calib, train=None, costs=costs, baseline=self.reference, cross_fitted=cross_fitted
        )
        try:
            chosen = search.run()
        except EarlyExitError:  # the wanted speed is impossible even if every photo leaves at the first exit
            search = dataclasses.replace(search, target=Target("ap_drop", self.goal.ap_drop, self.goal.delta))
            chosen = search.run()
        open_ = tuple(n for n, t in zip(model.exit_names, chosen.thresholds, strict=False) if t < CLOSED)
        ms = float(costs.per_exit(chosen.thresholds)[chosen.exits].mean())
        candidate = self._judged(net, open_, chosen.exits, ms, costs.plain, chosen.measured.AP50_lost_bound)
        name = candidate.name if open_ else f"{candidate.name} ({', '.join(model.exit_names[:-1])} closed)"
        # the name has the open exits only; the fields ``exits`` and ``thresholds`` have all
        candidate = dataclasses.replace(candidate, name=name, policy=policy, thresholds=chosen.thresholds)
        return Found(dataclasses.replace(candidate, exits=model.exit_names[:-1]), net, search, chosen)

    def _target(self, costs: CostModel) -> Target:
        """Target of the threshold search: the wanted speed, otherwise the accuracy budget."""
        if self.goal.speedup is not None:
            return Target("speedup", self.goal.speedup)
        if self.goal.ms is not None:
            return Target("speedup", costs.plain / self.goal.ms)
        return Target("ap_drop", self.goal.ap_drop, self.goal.delta)

    def _judged(
        self,
        net: Net,
        exits: tuple[str, ...],
        choice: np.ndarray,
        ms: float,
        base_ms: float,
        bound: float | None = None,
    ) -> Candidate:
        """The candidate in which calib photo i takes exit ``choice[i]``. ``bound`` is its ``lost_bound``, if known."""
        matches, base_choice = net.calib.matches_beside(self.reference)
        before, after = (ap_of_choice(matches, one, ap50_only=True).AP50 for one in (base_choice, choice))
        if bound is None:
            base, routed = bootstrap_choices(matches, [base_choice, choice], seed=self.cfg.SEED)
            bound = float(np.nanquantile(base.AP50 - routed.AP50, 1 - self.goal.delta))
        holds, ap_bound = bound <= self.goal.ap_drop, None
        if holds and self.goal.coco_ap_drop is not None:
            base, routed = bootstrap_choices(matches, [base_choice, choice], seed=self.cfg.SEED, ap50_only=False)
            ap_bound = float(np.nanquantile(base.AP - routed.AP, 1 - self.goal.delta))
            holds = ap_bound <= self.goal.coco_ap_drop
        truth, found = net.calib.ground_truth, net.calib.detections_of(choice)
        kept = agreement(truth, self.reference, found, self.cfg.EVAL.SCORE, self.cfg.EVAL.IOU)
        return Candidate(
            name=net.variant.describe(exits, self.architecture.image_size),
            image_size=net.variant.size,
            fold=net.variant.fold,
            fine_tuned=net.variant.fine_tuned,
            joint=net.variant.joint,
            exits=exits,
            AP50=after,
            lost=None if before is None or after is None else before - after,
            lost_bound=bound,
            objects=kept.objects,
            objects_kept=kept.kept,
            ms=ms,
            speedup=base_ms / ms,
            holds=holds,
            AP_lost_bound=ap_bound,
        )

    def rivals(self) -> list[Candidate]:
        """Detectors from ONNX files (EVAL.RIVALS.ONNX) on the calib split, for the chart; they are never chosen."""
        cfg, dataset = self.cfg, self.sets["CALIB"]
        settings, found = build_evaluation(cfg), []
        for rival in onnx_rivals(cfg, self.architecture.classes):
            loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)
            detections = collect_detections(rival.detector, loader)
            networks = [rival.network, PlainPath(self.base.recorded.model)]
            examples = [rival.example, example_input(self.base.recorded.model)]
            runs, threads = settings.timing_runs, settings.timing_threads
            timing, base = time_in_runtime(networks, examples, ONNX_RUNTIME, runs, threads)
            matches, rival_choice = self.base.calib.matches_beside(detections)
            base_choice = rival_choice - 1  # in the matches the rival is the last exit, behind the full path
            after = ap_of_choice(matches, rival_choice, ap50_only=True).AP50
            before = ap_of_choice(matches, base_choice, ap50_only=True).AP50
            lost = None if before is None or after is None else before - after
            ms = {"ms": timing.ms, "speedup": base.ms / timing.ms, "mmacs": rival.mmacs}
            size = int(rival.example.shape[-1])
            found.append(Candidate(rival.name, size, "its own", AP50=after, lost=lost, **ms, rival=True))
        return found


def _base_config(cfg: CfgNode) -> CfgNode:
    """A copy of the configuration without a compact head and without branches, since branches would be untrained."""
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

    @property
    def speedup(self) -> float | None:
        return self.ms_base / self.ms if self.ms and self.ms_base else None

    @property
    def base_detects(self) -> bool:
        """Whether the base detector finds objects at all."""
        return self.AP50_base is not None and self.AP50_base >= DETECTS_AP50


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
    32 bits divided by a speed: that of 8 bits relative to 32 bits, from photo to detections.

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
    for variant, exits in progress(plan, desc="candidates"):
        if found and goal.minutes is not None and time.monotonic() - started > 60 * goal.minutes:
            logger.warning("stopped after %g minutes: %d of %d candidates tried", goal.minutes, len(found), len(plan))
            break
        name = f"{variant} {' '.join(exits)}"
        if name in found or (exits and _skipped(search, found.values(), variant, exits)):
            continue
        found[name] = search.measure(variant, exits).candidate
        candidates = {name: one.to_json() for name, one in found.items()}
        write_json(out / "candidates.json", {"key": search.key, "candidates": candidates})
        logger.info("%s", found[name])
    measured, rivals = list(found.values()), search.rivals()
    chosen = choose_candidate(measured, goal)
    outcome = _write(search, measured[0], chosen, (*measured, *rivals))
    write_json(out / "optimize.json", outcome.to_json())
    write_text(out / "summary.txt", outcome.summary + "\n")
    write_image(out / "candidates.png", candidates_chart(outcome.candidates, outcome.chosen, cfg.EVAL.RUNTIME))
    with never_failing(out / "report.html"):
        path = out / "test" / "metrics.json"
        results = Results.from_json(read_json(path, "figures", "delete it")) if outcome.test else None
        page = search_page(outcome.candidates, outcome.chosen, outcome.summary, outcome.ship, results, BASE_FILE)
        write_page(out / "report.html", page)
    return outcome


def _skipped(search: Optimizer, measured: Iterable[Candidate], variant: Variant, exits: Sequence[str]) -> bool:
    """Whether a net is not tried with these exits.

    There are two cases. The net loses too much without exits (`HOPELESS`). Or the exits are empty, the net has the
    detector's own head, and some net with a compact head holds the budget. Then these exits are tried with the compact
    head only.
    """
    without = {Variant(one.image_size, one.fold, one.fine_tuned, one.joint): one for one in measured if not one.exits}
    net = without.get(variant)
    if net is not None and net.lost is not None and net.lost > HOPELESS * search.goal.ap_drop:
        return True
    compact_holds = any(one.fold == "compact" and one.holds for one in without.values())
    return compact_holds and variant.fold == OWN_HEAD and search.is_empty(variant, exits)


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

    def fast(one: Candidate) -> bool:
        return (goal.speedup is None or one.speedup >= goal.speedup) and (goal.ms is None or one.ms <= goal.ms)

    known = [one for one in candidates[1:] if one.ms is not None and one.lost is not None and one.speedup > 1]
    # with all exits closed it equals the candidate without exits
    known = [one for one in known if not one.exits or min(one.thresholds) < CLOSED]
    holding = [one for one in known if one.holds]
    if holding and (fast(best := max(holding, key=lambda one: one.speedup)) or not any(map(fast, known))):
        return best
    asked = [one for one in known if fast(one)] if goal.speedup or goal.ms else []
    return min(asked, key=lambda one: one.lost, default=max(holding, key=lambda one: one.speedup, default=None))


def _read_candidates(path: Path, key: str) -> dict[str, Candidate]:
    """The candidates that a stopped search has measured, by name. A file with another key is of another search and is
    ignored."""
    content = read_json(path, "candidates of a search", "delete it") if path.is_file() else None
    if not isinstance(content, dict) or content.get("key") != key:
        return {}
    return {name: Candidate.from_json(one) for name, one in content["candidates"].items()}


def _write(search: Optimizer, base: Candidate, chosen: Candidate | None, candidates: Sequence[Candidate]) -> Outcome:
    """Write the chosen model, and evaluate it and the base detector on the test split."""
    out = search.out
    if chosen is None:
        least = min((one for one in candidates if not one.rival and one is not base and one.lost is not None),
                    key=lambda one: one.lost_bound, default=None)  # fmt: skip
        nearest = "" if least is None else f"; the nearest: {least} (bound {least.lost_bound:.3f})"
        asked = f"no faster candidate holds {search.goal.ap_drop:g} AP50 lost on the calib split"
        summary = f"{asked}: ship the detector as it is{nearest}"
        return Outcome(base, None, tuple(candidates), None, False, summary)
    # candidates.json has only figures: build the net and its certificate again
    found = search.measure(Variant(chosen.image_size, chosen.fold, chosen.fine_tuned, chosen.joint), chosen.exits)
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
    int8 = None
    if search.cfg.EVAL.RUNTIME == OPENVINO:
        export_detector(open_any(out / "model.pth"), out / "detector.xml", "openvino", photos)
        int8 = _in_8_bits(search, chosen)
    plain = dataclasses.replace(search.architecture, exits=())
    detector = resize_detector(search.model, search.architecture, search.architecture.image_size)
    save_model(out / BASE_FILE, plain.add_exits(detector), plain, {})
    rivals = (*search.cfg.EVAL.RIVALS.FULL_PATHS, str(out / BASE_FILE))
    cfg = with_values(search.cfg, {"EVAL.RIVALS.ENABLED": True, "EVAL.RIVALS.FULL_PATHS": rivals})
    results = evaluate_model(cfg, out / "model.pth", out / "test", compare=False)
    test = _test_figures(results)
    if int8 is not None:
        candidates, test = (*candidates, int8), _test_in_8_bits(search, test, chosen.ms / int8.ms)
        chosen = int8
    ship = test.speedup is not None and test.ms < test.ms_base_interval[0] and test.base_detects
    ship = ship and test.AP50 is not None and test.AP50_base - test.AP50 <= search.goal.ap_drop
    ship = ship and (search.goal.coco_ap_drop is None or test.AP_base - test.AP <= search.goal.coco_ap_drop)
    return Outcome(base, chosen, tuple(candidates), test, ship, _summary(chosen, test, ship, search.goal))


def _in_8_bits(search: Optimizer, chosen: Candidate) -> Candidate | None:
    """The chosen candidate in 8 bits; its file replaces detector.xml. None if the candidate in 8 bits does not hold the
    budget, is not faster, or cannot be made."""
    try:
        if search.goal.coco_ap_drop is not None:
            raise EarlyExitError("the loss of COCO's AP is limited (--coco-ap-drop), and 8 bits are not checked for it")
        figures = export_int8(
            open_any(search.out / "model.pth"),
            search.out / "detector.xml",
            "openvino",
            search.sets["CALIB"],
            search.goal.ap_drop,
            [record.path for record in search.sets["TRAIN"].records],
            search.reference,
            search.goal.delta,
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
    loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)
    base = collect_detections(open_any(search.out / BASE_FILE), loader)
    matches = exit_matches(
        to_coco(dataset), [base, detect(Predictor(search.out / "detector.xml", OPENVINO), dataset)], cfg.EVAL.IOU
    )
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


def _test_figures(results: Results) -> TestFigures:
    routed = results.routed
    base = next(one for one in results.rivals if one.source == BASE_FILE)
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
    lost = "undefined" if test.AP50 is None else f"{test.AP50_base - test.AP50:.3f}"
    interval = "" if test.AP50_lost_interval is None else " [{:.3f}, {:.3f}]".format(*test.AP50_lost_interval)
    ap_lost = (
        "" if test.AP is None or test.AP_base is None else f", {round(test.AP_base - test.AP, 3) + 0.0:.3f} AP lost"
    )
    times = f"{test.ms:.1f} ms against {test.ms_base:.1f}, {test.runtime}, {test.threads} thread"
    found = f"{test.objects_found} objects found where your detector finds {test.objects_found_base}"
    figures = (
        f"{chosen.name}: {test.speedup:.2f} times as fast as your detector ({times}), {lost} AP50 lost{interval}"
        f"{ap_lost}, {found}, on {test.photos} test photos ({', '.join(test.splits)})"
    )
    if ship:
        return f"ship it. {figures}."
    if not test.base_detects:
        return f"do not ship it: your detector itself does not detect (AP50 {test.AP50_base or 0:.3f}). {figures}."
    budget = f"{goal.ap_drop:g} AP50 lost" + (
        "" if goal.coco_ap_drop is None else f" and {goal.coco_ap_drop:g} AP lost"
    )
    return f"do not ship it: on the test photos it does not hold {budget}, or is no faster. {figures}."

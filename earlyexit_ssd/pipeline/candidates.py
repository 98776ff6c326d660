"""The candidates of a search for a faster detector: what is tried, which one is chosen, and whether it is shipped.

The *base detector* is the given detector, unchanged and without exits. A *net* is a full path at one input size, with
one kind of head, with the given weights or with newly trained ones. A *candidate* is a net with or without exits. A
*glance* is an early exit that runs the first trunk layers on a small copy of the photo before the full-size pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.calibration.thresholds import MOST_EXITS
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.config.check import SMALLEST_SIDE
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.results import JsonDataclass, Results
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.modeling import Architecture, Exit, describe_exits
from earlyexit_ssd.modeling.detector import DETECTORS
from earlyexit_ssd.pipeline.build import build_exits
from earlyexit_ssd.pipeline.calibrate import CalibrationTarget

GLANCES = ((128, 12), (160, 12), (192, 12))
"""(pixels, layer) of the tried glances if EXITS.GLANCES is empty, for an input of 320 pixels. For other inputs the
pixels are scaled and rounded to multiples of 16."""
EMPTY_EXITS = (12,)
"""Trunk layers of the tried empty exits, alone and behind a glance, if the detector has no exits of its own."""
BASE_FILE = "base.pth"
"""File of the base detector in the folder of the search: a rival in the evaluation of the chosen candidate."""
CUT, COMPACT, OWN_HEAD = HEADS = ("cut", "compact", "as it is")
"""Kinds of a net's head, the fewest outputs first: wanted classes, wanted and competing classes, all classes."""
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Tried input sides as shares of the detector's own side. The last is tried with the given weights only if the share
before it holds the budget."""
FINE_STEP = 16  # distance in pixels of the input sides that are tried with fine-tuned weights
HOPELESS = 2.0
"""A net that loses more than this multiple of the budget without exits is not tried with exits, because exits rarely
reduce the loss."""


@dataclass(frozen=True)
class Goal:
    """The goal of a search: an accuracy budget, and the wanted speed; as fast as possible if no speed is given."""

    ap_drop: float = 0.01  # largest AP50 lost against the base detector, in 1 - ``delta`` of the bootstrap draws
    delta: float = 0.05
    speedup: float | None = None  # wanted speed relative to the base detector
    ms: float | None = None  # wanted milliseconds per photo
    minutes: float | None = None  # time after which no further candidate is started; None: no limit
    train: bool = False  # also try trained nets: fine-tuned nets, and nets of the joint phase if it is configured
    coco_ap_drop: float | None = None  # as ``ap_drop``, for COCO's AP (IoU 0.5 to 0.95); None: not limited
    int8: bool = False  # also try the chosen candidate in 8 bits
    block: int | None = None  # consecutive photos of a folder that count as one draw; None: 1

    def __post_init__(self) -> None:
        _ = self.budget  # raises if ap_drop or delta is out of range
        if self.coco_ap_drop is not None and not 0 <= self.coco_ap_drop <= 1:
            raise EarlyExitError(f"coco_ap_drop is {self.coco_ap_drop:g}, expected a number in [0, 1]")
        for name in ("speedup", "ms", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise EarlyExitError(f"{name} is {value:g}, expected a finite number above 0")

    @property
    def wants_speed(self) -> bool:
        return self.speedup is not None or self.ms is not None

    @property
    def budget(self) -> CalibrationTarget:
        """The accuracy budget as the target of a threshold search."""
        return CalibrationTarget("ap_drop", self.ap_drop, self.delta, self.block)

    def target(self, base_ms: float) -> CalibrationTarget:
        """Return the target of a threshold search: the wanted speed if it is above the base detector's, otherwise the
        accuracy budget."""
        speedup = self.speedup or 0 if self.ms is None else base_ms / self.ms
        return CalibrationTarget("speedup", speedup) if speedup > 1 else self.budget


@dataclass(frozen=True)
class Candidate(JsonDataclass):
    """One variant of the detector and, after its measurement, its figures on the calib split."""

    name: str  # such as "288 px, compact head, glance at 128 px"; empty before the measurement
    image_size: int  # side of the input in pixels
    fold: str  # kind of the head in `HEADS`, or "its own" for a rival
    exits: tuple[str, ...] = ()  # names in the order of computation
    policy: str | None = None
    thresholds: tuple[float, ...] = ()
    AP50: float | None = None
    lost: float | None = None  # AP50 lost against the base detector
    lost_bound: float | None = None  # upper bound of ``lost`` with confidence 1 - delta
    objects: int | None = None  # number of detections of the base detector at EVAL.SCORE
    objects_kept: int | None = None  # number of these that the candidate finds too
    mmacs: float | None = None  # millions of multiply-accumulates; rivals only
    ms: float | None = None  # mean milliseconds per photo: those of the base detector / ``speedup``
    speedup: float | None = None  # speed relative to the base detector in the same run
    holds: bool = False  # whether ``lost_bound`` and ``AP_lost_bound`` are within the budget
    rival: bool = False  # whether it is a detector from an ONNX file, which is never chosen
    fine_tuned: bool = False  # whether the net is fine-tuned
    joint: bool = False  # whether the net's weights are from the joint phase
    # as ``lost_bound``, for COCO's AP; None if the goal does not limit it or ``lost_bound`` is too large
    AP_lost_bound: float | None = None

    @property
    def net(self) -> Candidate:
        """The candidate's net, without exits and figures."""
        return Candidate("", self.image_size, self.fold, fine_tuned=self.fine_tuned, joint=self.joint)

    @property
    def key(self) -> str:
        """Net and exits as text, unique within a search."""
        training = " fine-tuned" if self.fine_tuned else " joint" if self.joint else ""
        return " ".join([f"{self.image_size} {self.fold}{training}", *self.exits])

    def describe(self, opened: Sequence[str], own_size: int) -> str:
        """Return the name for the report. ``opened`` are the names of the open exits. The base detector's input side
        ``own_size``, in pixels, is left out."""
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
class Plan:
    """Decides which candidates a search tries for a detector of this architecture."""

    cfg: CfgNode
    goal: Goal
    architecture: Architecture

    def candidates(self, with_empty_exits: bool) -> list[Candidate]:
        """Return all candidates, in the order in which they are tried.

        1. Nets without exits: the base detector, then all sizes with a cut head, then with the best head.
        2. With ``goal.train`` the fine-tuned nets without exits, at many sizes.
        3. Nets with a cut head and exits, then with the best head and exits.
        4. Nets with the detector's own head and exits: at all sizes if it has branches, otherwise at its own size.
        5. With ``goal.train`` the fine-tuned nets with exits.
        6. If the joint phase is tried, its nets: without exits, then with exits.
        """

        def nets(sizes: Iterable[int], fold: str, **training: bool) -> list[Candidate]:
            return [Candidate("", size, fold, **training) for size in sorted(set(sizes), reverse=True)]

        def with_exits(nets: Sequence[Candidate]) -> list[Candidate]:
            pairs = ((net, exits) for net in nets for exits in self._exit_sets(net, with_empty_exits))
            return [dataclasses.replace(net, exits=exits) for net, exits in pairs]

        base = nets([self.architecture.image_size], OWN_HEAD)
        best = nets(self.sizes(), self.best_head)
        cut = nets(self.sizes(), CUT) if self.best_head == COMPACT else []
        own_head = nets(self.sizes(), OWN_HEAD) if self.has_branches else base
        plan, trained = [*base, *cut, *best], []
        if self.goal.train:
            sizes = self.sizes()
            between = range(sizes[0], sizes[-1] - 1, -FINE_STEP)  # the net also works between its training sizes
            trained = nets(sizes, self.best_head, fine_tuned=True)
            plan += [*trained, *nets(between, self.best_head, fine_tuned=True)]
        plan += with_exits([*cut, *best, *own_head, *trained])
        if self.trains_jointly:
            fold = COMPACT if self.cfg.MODEL.FOLD == COMPACT else OWN_HEAD
            joint = nets([*self.sizes(), *self.cfg.JOINT.SIZES], fold, joint=True)
            plan += [*joint, *with_exits(joint)]
        return list(dict.fromkeys(plan))

    @property
    def best_head(self) -> str:
        """The head that keeps the scores with the fewest outputs: the compact head if the detector's head folds
        classes, otherwise its own."""
        return COMPACT if self.architecture.folded_rows else OWN_HEAD

    @property
    def has_branches(self) -> bool:
        """Whether the detector has an exit that is not empty."""
        return not all(exit_.empty for exit_ in self.architecture.exits)

    @property
    def trains_jointly(self) -> bool:
        """Whether the joint phase is tried: the goal allows training, and the configuration has it and branches."""
        branches = set(self.cfg.EXITS.LAYERS) - set(self.cfg.EXITS.EMPTY)
        return self.goal.train and bool(branches) and "joint" in self.cfg.PHASES and self.cfg.JOINT.EPOCHS > 0

    def sizes(self) -> list[int]:
        """Return the tried sides of the input in pixels, largest first."""
        own = self.architecture.image_size
        step = 32 if own >= 256 else 16
        any_size = DETECTORS.find(self.architecture.detector).any_size
        smaller = [max(SMALLEST_SIDE, round(share * own / step) * step) for share in SHARES] if any_size else []
        return sorted({own, *(self.cfg.EVAL.RIVALS.SIZES or smaller)}, reverse=True)

    @property
    def glances(self) -> list[tuple[int, int]]:
        """(pixels, layer) of the tried glances."""
        own = self.architecture.image_size
        scaled = [(round(pixels * own / 320 / 16) * 16, layer) for pixels, layer in GLANCES]
        return list(self.cfg.EXITS.GLANCES or dict.fromkeys(scaled))  # of a small input, two may be equal

    def exits_of(self, net: Candidate) -> tuple[Exit, ...]:
        """Return all exits that may be tried with a net: glances smaller than its input, then the other exits.

        The other exits are

        - for a jointly trained net: the configured ones;
        - if the detector has branches: its own exits for nets with its head and weights, none for other nets;
        - otherwise: empty exits, at the layers of the detector's own exits or at `EMPTY_EXITS`.
        """
        glances = describe_exits((), glances=[glance for glance in self.glances if glance[0] < net.image_size])
        own = [exit_ for exit_ in self.architecture.exits if exit_.pixels is None]
        if net.joint:
            return (*glances, *(exit_ for exit_ in build_exits(self.cfg) if exit_.pixels is None))
        if self.has_branches:
            return (*glances, *own) if net.fold == OWN_HEAD and not net.fine_tuned else glances
        last_layer = DETECTORS.find(self.architecture.detector).last_layer
        layers = [exit_.layer for exit_ in own] or [layer for layer in EMPTY_EXITS if layer < last_layer]
        return (*glances, *describe_exits(layers, empty=layers))

    def _exit_sets(self, net: Candidate, with_empty_exits: bool) -> list[tuple[str, ...]]:
        """Return the sets of exits that are tried with a net: each glance alone, each other exit alone, all other
        exits, and all other exits behind each glance. Two glances are not tried together, because one of them always
        stayed closed in our tests. Sets of more than `MOST_EXITS` are left out."""
        exits = [exit_ for exit_ in self.exits_of(net) if with_empty_exits or not exit_.empty]
        glances = [(exit_.name,) for exit_ in exits if exit_.pixels is not None]
        others = tuple(exit_.name for exit_ in exits if exit_.pixels is None)
        sets = [*glances, *((name,) for name in others), others, *((*glance, *others) for glance in glances)]
        return [names for names in sets if 0 < len(names) <= MOST_EXITS]

    def skips(self, candidate: Candidate, measured: Iterable[Candidate]) -> bool:
        """Return whether a candidate is not worth trying after the ``measured`` ones.

        A cut head is tried only if it holds the budget at the detector's own size, without exits. For the smallest size
        see `SHARES`. A candidate with exits is also skipped in three cases:

        - Its net without exits loses too much (`HOPELESS`).
        - It has only empty exits and the given weights, and a net with fewer outputs of the head holds the budget.
          Empty exits are then tried with that head only.
        - No speed is wanted, and its first exit was tried alone and stayed closed. With more exits behind it, it would
          save even less.
        """
        measured = [*measured]
        trained = candidate.fine_tuned or candidate.joint
        own = Candidate("", self.architecture.image_size, CUT)
        if candidate.fold == CUT and any(other.key == own.key and not other.holds for other in measured):
            return True
        sizes = self.sizes()
        if candidate.image_size == sizes[-1] < sizes[0] and not trained and not self.cfg.EVAL.RIVALS.SIZES:
            larger = Candidate("", sizes[-2], candidate.fold)
            if not any(other.key == larger.key and other.holds for other in measured):
                return True
        if not candidate.exits:
            return False
        alone = dataclasses.replace(candidate, exits=candidate.exits[:1]).key
        if not self.goal.wants_speed and any(net.key == alone and net.thresholds == (CLOSED,) for net in measured):
            return True
        nets = [other for other in measured if not other.exits]
        lost = next((net.lost for net in nets if net.net == candidate.net), None)
        if lost is not None and lost > HOPELESS * self.goal.ap_drop:
            return True
        smaller = () if trained else HEADS[: HEADS.index(candidate.fold)]
        empty = all(exit_.empty for exit_ in self.exits_of(candidate) if exit_.name in candidate.exits)
        return empty and any(net.fold in smaller and net.holds for net in nets)


def choose_candidate(candidates: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """Return the candidate to ship. It must be faster than the base detector, which is ``candidates[0]``.

    1. The fastest candidate that holds the budget, if it reaches the wanted speed or no candidate reaches it.
    2. Otherwise the candidate that loses least AP50, of those that reach the wanted speed.
    3. None if neither exists.
    """
    faster = [each for each in candidates[1:] if each.ms is not None and each.lost is not None and each.speedup > 1]
    # with all exits closed a candidate equals its net without exits
    faster = [each for each in faster if not each.exits or min(each.thresholds) < CLOSED]
    fastest = max((each for each in faster if each.holds), key=lambda each: each.speedup, default=None)
    if not goal.wants_speed:
        return fastest
    reaching = [each for each in faster if each.speedup >= (goal.speedup or 0) and each.ms <= (goal.ms or np.inf)]
    if fastest in reaching or not reaching:
        return fastest
    return min(reaching, key=lambda each: each.lost)


@dataclass(frozen=True)
class TestFigures(JsonDataclass):
    """Figures of the chosen candidate and of the base detector (``_base``) on the test split; intervals are 95 %. The
    split has an object, so AP is defined."""

    splits: list[str]
    photos: int
    AP: float
    AP_base: float
    AP50: float
    AP50_base: float
    AP50_lost_interval: list[float]
    objects_found: int
    objects_found_base: int
    mmacs: float
    mmacs_base: float
    ms: float
    ms_base: float
    ms_base_interval: list[float]
    runtime: str
    threads: int

    @classmethod
    def of(cls, results: Results) -> TestFigures:
        """Take the figures from an evaluation in which the base detector is the rival `BASE_FILE`."""
        base = next(rival for rival in results.rivals if rival.source == BASE_FILE)
        figures: dict[str, float | None] = {}
        for row, suffix in ((results.routed, ""), (base, "_base")):
            figures |= {f"AP{suffix}": row.number("AP"), f"AP50{suffix}": row.ap50, f"mmacs{suffix}": row.mmacs}
            figures |= {f"objects_found{suffix}": row.number("true_positives"), f"ms{suffix}": row.ms}
        (low, high), context = base.routed_minus_rival_AP50_interval, results.context
        return cls(
            splits=context.splits,
            photos=context.images,
            **figures,
            AP50_lost_interval=[-high, -low],
            ms_base_interval=base.ms_interval,
            runtime=context.runtime,
            threads=context.threads,
        )

    @property
    def speedup(self) -> float:
        return self.ms_base / self.ms

    @property
    def faster(self) -> bool:
        return self.ms < self.ms_base_interval[0]

    @property
    def base_detects(self) -> bool:
        """Whether the base detector reaches the AP50 of a detector that finds objects at all."""
        return self.AP50_base >= DETECTS_AP50

    def worth_shipping(self, goal: Goal) -> bool:
        """Return whether the candidate should be shipped.

        The base detector must detect, and the candidate must be faster. The losses of AP50 and AP measured on the test
        split must be within the budget. Unlike in `Candidate.holds`, these losses are not upper bounds.
        """
        ap_holds = goal.coco_ap_drop is None or self.AP_base - self.AP <= goal.coco_ap_drop
        return self.faster and self.base_detects and self.AP50_base - self.AP50 <= goal.ap_drop and ap_holds

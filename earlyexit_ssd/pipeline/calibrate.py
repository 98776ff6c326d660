"""Calibrate the routing of a trained model on the CALIB split, for a target that the user chooses.

The network runs once over each split, and the search uses the stored outputs. `ModelOnSplits` holds the model and its
splits. For each split it has a `Replay`: the outputs, with the labels.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

from earlyexit_ssd.bounds import BOUNDS, MAX_PHOTOS, photos_needed
from earlyexit_ssd.calibration.certificate import Certificate, CertifiedTarget, Measured
from earlyexit_ssd.calibration.risk import certify, threshold_path
from earlyexit_ssd.calibration.thresholds import (
    CurvePoint,
    Grid,
    best_within,
    learned_grid,
    pareto_path,
    threshold_grid,
)
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.console import progress
from earlyexit_ssd.data.duplicates import blocks_of
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.engine.processes import is_main
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.matches import DetectionsById, ap_of_choice, bootstrap_choices
from earlyexit_ssd.evaluation.outputs import exit_share
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.files import require_not_input
from earlyexit_ssd.modeling.checkpoint import save_model, weights_hash
from earlyexit_ssd.pipeline import replay
from earlyexit_ssd.pipeline.build import open_thresholds, shares_processes, trained_temperatures
from earlyexit_ssd.pipeline.evaluate import PAGE, attention_of, calibrate_command
from earlyexit_ssd.pipeline.run import RunFolder
from earlyexit_ssd.report.page import calibration_page, never_failing, write_page
from earlyexit_ssd.report.page_photos import OpenCosts, PagePhotos
from earlyexit_ssd.report.tables import write_calibration
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES

logger = logging.getLogger(__name__)

SMALLEST_DROP = 0.005  # `draws_needed` replaces a smaller target by this loss of AP50, the smallest that is measurable


@dataclass(frozen=True)
class CalibrationTarget:
    """The target of a calibration.

    Attributes:
        kind: ``speedup``: mean cost of the detector without exits / routed mean cost is at least ``value``.
            ``ap_drop``: the full path's AP50 - the routed AP50 is at most ``value`` in 1 - delta of the bootstrap draws
            of the calibration photos. ``risk``: the expected loss of a photo is at most ``value`` with probability
            1 - delta.
        value: above 1 for a speedup, in [0, 1] for an ap_drop, in (0, 1) for a risk.
        delta: in (0, 1).
        block: number of consecutive photos of a folder, such as frames of a video, that count as one draw; None: 1.
        learned: whether thresholds are learned by gradient descent instead of chosen from a grid.
    """

    kind: Literal["speedup", "ap_drop", "risk"]
    value: float
    delta: float = 0.05
    block: int | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "speedup": ("a number above 1, such as 1.4", self.value > 1),
            "ap_drop": ("a number in [0, 1]", 0 <= self.value <= 1),
            "risk": ("a number in (0, 1)", 0 < self.value < 1),
        }
        if self.kind not in ranges:
            raise EarlyExitError(f"the target's kind is {self.kind!r:.60}, expected one of {', '.join(ranges)}")
        expected, in_range = ranges[self.kind]
        if not in_range:
            raise EarlyExitError(f"{self.kind} is {self.value:g}, expected {expected}")
        if not 0 < self.delta < 1:
            raise EarlyExitError(f"delta is {self.delta:g}, expected a number in (0, 1), such as 0.05")
        if self.block is not None and self.kind == "speedup":
            raise EarlyExitError("--block is for --risk and --ap-drop; leave it out with --speedup")


def build_target(cfg: CfgNode) -> CalibrationTarget:
    """Return the target of the CALIBRATION section."""
    section = cfg.CALIBRATION
    return CalibrationTarget(section.TARGET, section.VALUE, section.DELTA)


@dataclass(frozen=True)
class FoundThresholds:
    """The result of a search."""

    thresholds: tuple[float, ...]  # one per early exit
    exits: np.ndarray  # exit of each calibration photo, [n]
    measured: Measured  # figures of the search
    curve: tuple[CurvePoint, ...] = ()  # combinations of thresholds that were compared, for the report


@dataclass(frozen=True)
class ThresholdSearch:
    """The search for thresholds that meet the target.

    Attributes:
        router, confidences: the results of `fit_router`.
        calib: recorded outputs of the n calibration photos.
        train: recorded outputs of the training photos. Only a risk needs them, to order the thresholds that it tests.
        blocks: number (from 0) of the block of each calibration photo, [n]; None: every photo is a block.
        baseline: detections on the calibration photos. An ap_drop is a loss against their AP50. None: the full path's.
    """

    cfg: CfgNode
    target: CalibrationTarget
    router: ExitRouter
    confidences: list[np.ndarray]
    calib: replay.Replay
    train: replay.Replay | None
    costs: replay.CostModel
    blocks: np.ndarray | None = None
    baseline: DetectionsById | None = None

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """Loss of each calibration photo at each exit, [n, exits]."""
        return self.calib.losses(self.cfg.CALIBRATION.REFERENCE)

    @property
    def draws(self) -> int:
        """Number of blocks of calibration photos."""
        return len(self.calib) if self.blocks is None else int(self.blocks.max()) + 1

    @property
    def draws_name(self) -> str:
        block = self.target.block
        return "calibration photos" if block is None else f"blocks of {block} calibration photos"

    def run(self) -> FoundThresholds:
        """Find the thresholds. Raise an EarlyExitError if a speed-up cannot be reached."""
        return getattr(self, f"_for_{self.target.kind}")()

    def _grid(self, confidences: list[np.ndarray], losses: np.ndarray) -> Grid:
        """Return the combinations of thresholds to choose from: all of a grid, or learned ones."""
        if not self.target.learned:
            return threshold_grid(confidences)
        budgets = [self.costs.plain / self.target.value] if self.target.kind == "speedup" else []
        return learned_grid(confidences, losses, self.costs.per_exit, budgets)

    def _calib_grid(self) -> tuple[Grid, np.ndarray, int]:
        """Return the grid of the calibration photos, the mean cost of each of its rows, and the row in which all exits
        are closed."""
        grid = self._grid(self.confidences, self.losses)
        mean_costs = grid.mean_cost(self.costs.of_each(grid.thresholds))
        return grid, mean_costs, int((grid.thresholds >= CLOSED).all(1).argmax())

    def _for_risk(self) -> FoundThresholds:
        target, costs, settings = self.target, self.costs, self.cfg.CALIBRATION
        confidences, losses = self.train.confidences(self.router), self.train.losses(settings.REFERENCE)
        path = threshold_path(confidences, losses, costs.of_each, self._grid(confidences, losses))
        certified = certify(
            path, self.confidences, self.losses, costs.of_each(path), target.value, target.delta, settings.BOUND,
            self.cfg.SEED, self.blocks, with_curve=True,
        )  # fmt: skip
        too_few = None
        if certified.step == 0:  # the step with all exits closed is the cheapest that passed
            fix = "fit the policy on more training photos" if all(self.calib.empty) else "train them longer"
            advice = f"the exits are not accurate enough: allow a larger risk, or {fix}"
            fewest = fewest_draws(target, settings.BOUND)
            if certified.passed:
                advice = "thresholds within the risk do not save cost: try another policy, cheaper branches, more risk"
            elif self.draws < fewest:
                too_few = fewest
                advice = f"at least {fewest} are needed, even if no detection changes"
            elif certified.photos_needed:
                needed = max(certified.photos_needed, self.draws + 1)
                advice = f"about {needed} {self.draws_name} like these would be enough"
            logger.warning(
                "all exits stay closed: none can be opened at a risk of %g with probability %g on %d %s; %s",
                target.value, 1 - target.delta, self.draws, self.draws_name, advice,
            )  # fmt: skip
        measured = Measured(loss_bound=certified.point.bound, steps=certified.passed, photos_needed=too_few)
        return FoundThresholds(certified.point.thresholds, certified.choice, measured, certified.curve)

    def _for_speedup(self) -> FoundThresholds:
        grid, mean_costs, closed = self._calib_grid()
        ap50 = self.calib.ap50_of(grid.choices, "thresholds")
        best = best_within(mean_costs, -ap50, self.costs.plain / self.target.value)
        if best is None:
            cheapest = f"the cheapest thresholds give {self.costs.plain / mean_costs.min():.2f}"
            fix = "choose a smaller one, or train a shallower exit (EXITS.LAYERS)"
            raise EarlyExitError(f"a speed-up of {self.target.value:g} is out of reach: {cheapest}; {fix}")
        lost = ap50[closed] - ap50
        curve = _curve(grid, mean_costs, lost, pareto_path(lost, mean_costs), {})
        return FoundThresholds(tuple(grid.thresholds[best].tolist()), grid.choices[best], Measured(), curve)

    def _for_ap_drop(self) -> FoundThresholds:
        """Find the cheapest combination that loses at most the target in 1 - delta of the bootstrap draws.

        On other photos the chosen combination tends to lose more, because it was chosen on these. The quantile of the
        draws is a margin for this, not a guarantee. Combinations are tested if they are Pareto-optimal in cost and
        AP50, or in cost and mean loss.
        """
        target, count = self.target, len(self.calib)
        matches, baseline_exit = self.calib.matches_with_extra_exit(self.baseline)
        needed = draws_needed(target)
        too_few = self.draws < needed
        if too_few:
            logger.warning(
                "%d %s are too few for at most %g AP50 lost in %g of the bootstrap draws; use at least %d, or allow a "
                "larger loss",
                self.draws, self.draws_name, target.value, 1 - target.delta, needed,
            )  # fmt: skip
        exits = self.calib.early_exits
        # with all exits closed nothing is lost against the full path, but perhaps against another baseline
        bound_closed = 0.0 if self.baseline is None else None
        measured = Measured(AP50_lost_bound=bound_closed, photos_needed=needed if too_few else None)
        all_closed = FoundThresholds((CLOSED,) * exits, np.full(count, exits), measured)
        ap50_before = ap_of_choice(matches, baseline_exit, ap50_only=True).AP50 or 0.0
        if ap50_before < DETECTS_AP50:  # without this, every exit would be opened, since there is no AP50 to lose
            logger.warning(
                "all exits stay closed: the full path does not detect (AP50 %.3f on the calibration photos, expected "
                "at least %g); train it first, or check MODEL.WEIGHTS and DATA.CLASSES",
                ap50_before, DETECTS_AP50,
            )  # fmt: skip
            return all_closed
        grid, mean_costs, closed = self._calib_grid()
        lost = ap50_before - self.calib.ap50_of(grid.choices, "thresholds")
        path = np.union1d(pareto_path(lost, mean_costs), pareto_path(grid.mean(self.losses), mean_costs))
        # against another baseline the row with all exits closed is tested too
        cheaper = np.less if self.baseline is None else np.less_equal
        tested = path[(lost[path] <= target.value) & cheaper(mean_costs[path], mean_costs[closed])]
        draw = functools.partial(bootstrap_choices, matches, seed=self.cfg.SEED, blocks=self.blocks)
        (baseline_draws,) = draw([baseline_exit])
        bounds: dict[int, float] = {}
        for candidate in progress(tested[np.argsort(mean_costs[tested], kind="stable")].tolist(), desc="AP50 lost"):
            (draws,) = draw([grid.choices[candidate]])
            bounds[candidate] = bound = float(np.nanquantile(baseline_draws.AP50 - draws.AP50, 1 - target.delta))
            if bound <= target.value:
                measured = replace(measured, AP50_lost_bound=bound)
                thresholds = tuple(grid.thresholds[candidate].tolist())
                curve = _curve(grid, mean_costs, lost, tested, bounds)
                return FoundThresholds(thresholds, grid.choices[candidate], measured, curve)
        logger.warning("all exits stay closed: opening them saves no cost at %g AP50 lost or less", target.value)
        return replace(all_closed, curve=_curve(grid, mean_costs, lost, tested, bounds))


def _curve(
    grid: Grid, costs: np.ndarray, losses: np.ndarray, path: np.ndarray, bounds: Mapping[int, float]
) -> tuple[CurvePoint, ...]:
    """Return the rows ``path`` of the grid by rising cost. ``bounds``: row -> bound of its loss, where computed."""
    order = path[np.argsort(costs[path], kind="stable")].tolist()
    return tuple(
        CurvePoint(tuple(grid.thresholds[row].tolist()), float(costs[row]), float(losses[row]), bounds.get(row))
        for row in order
    )


def draws_needed(target: CalibrationTarget) -> int:
    """Return the number of draws that contain at least one photo of a rare kind with probability 1 - delta. A share
    ``target.value`` of all photos is of this kind."""
    return math.ceil(math.log(target.delta) / math.log1p(-min(max(target.value, SMALLEST_DROP), 0.99)))


def fewest_draws(target: CalibrationTarget, bound: str) -> int:
    """Return the smallest number of calibration photos, or blocks of them, with which a risk can be certified: the
    number that is enough if no photo has a loss. ``bound`` is a name in `BOUNDS`."""
    return photos_needed(np.zeros(1), target.value, target.delta, BOUNDS[bound]) or MAX_PHOTOS


@shares_processes("out_dir")
def calibrate(
    cfg: CfgNode, weights: str | os.PathLike[str], target: CalibrationTarget, out_dir: str | os.PathLike[str]
) -> Certificate | None:
    """Fit temperatures and policy, search thresholds, and write certificate.json, calibration.txt, reliability.png,
    report.html and model.pth with this routing to ``out_dir``.

    If the calibration photos have no labels, the detections of the full path replace them. The report then has the
    agreement with the full path instead of AP. The classes are those of the weights, not DATA.CLASSES.

    Returns:
        The certificate; None on processes other than the first, which only record their share of the photos.

    Raises:
        EarlyExitError: unusable weights, data or settings, splits that share photos, or a target out of reach.
    """
    out = Path(out_dir)
    require_not_input(out / "model.pth", [weights])
    # a guarantee needs independent draws, so near-duplicates count once; frames within a block may look alike
    near_duplicates_count_once = target.kind != "speedup" and target.block is None
    recorded = replay.open_model_on_splits(
        cfg, weights, out, unlabelled=True, include_near_duplicates=near_duplicates_count_once
    )
    cfg, model, folder = recorded.cfg, recorded.model, Path(weights).absolute().parent
    if RunFolder(folder.parent).gate(folder.name).get("passed") is False:
        logger.warning("%s: its gate failed (gate.json), so its exits may not open; train it longer first", weights)
    uses_train = target.kind == "risk" or POLICIES.find(cfg.ROUTING.POLICY).needs_training_photos
    _require_labels(cfg, target, recorded, ("CALIB", "TRAIN") if uses_train else ("CALIB",))
    replay.require_deciding(cfg.ROUTING.POLICY, model.empty, weights)
    blocks = blocks_of(recorded.sets["CALIB"], target.block)
    _warn_of_few_draws(
        target, cfg.CALIBRATION.BOUND, len(recorded.sets["CALIB"]) if blocks is None else blocks.max() + 1
    )
    calib, train = recorded.replay("CALIB"), recorded.replay("TRAIN") if uses_train else None
    if not is_main():
        return None
    fitted = replay.fit_temperatures(cfg, calib)
    trained = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    # the router must not be fitted on the photos that test a risk, so temperatures fitted on them are only reported
    temperatures = trained if target.kind == "risk" else replay.temperatures_of(fitted, model.exit_names)
    router, confidences = replay.fit_router(
        cfg, cfg.ROUTING.POLICY, temperatures, calib, train, cross_fit=target.kind != "risk", groups=blocks
    )
    costs = replay.measure_cost_model(cfg, model, router)
    search = ThresholdSearch(cfg, target, router, confidences, calib, train, costs, blocks)
    chosen = search.run()
    certificate = certificate_of(recorded, search, chosen)
    _warn_if_objects_are_lost(certificate)
    write_calibration(out, certificate, fitted)
    routing = {"router": certificate.router, "certificate": certificate.to_dict(), "trained_temperatures": trained}
    save_model(out / "model.pth", model, recorded.architecture, {**recorded.info, **routing})
    with never_failing(out / PAGE):
        photos, command = _page_photos(recorded, search, chosen), calibrate_command(sys.argv, weights)
        write_page(out / PAGE, calibration_page(certificate, fitted, chosen.curve, photos, command))
    return certificate


def _warn_of_few_draws(target: CalibrationTarget, bound: str, draws: int) -> None:
    """Warn before the photos are recorded if a risk cannot be certified on so few of them."""
    if target.kind == "risk" and draws < (fewest := fewest_draws(target, bound)):
        name = "photos" if target.block is None else f"blocks of {target.block} photos"
        text = "all exits will stay closed: a risk of %g needs at least %d calibration %s, but there are %d"
        logger.warning(text, target.value, fewest, name, draws)


def _warn_if_objects_are_lost(certificate: Certificate) -> None:
    """Warn if the routing loses most of the objects that the full path finds. If few photos show an object, the mean
    loss per photo is small all the same."""
    objects, kept = (certificate.measured.agreement[name] for name in ("objects", "kept"))
    if kept < objects / 2:
        text = "this routing keeps only %d of %d objects (score %g); ask for a smaller loss or speed-up"
        logger.warning(text, kept, objects, certificate.target.score)


def _require_labels(
    cfg: CfgNode, target: CalibrationTarget, recorded: replay.ModelOnSplits, used: Sequence[str]
) -> None:
    """Raise an EarlyExitError if one of the ``used`` splits has no labels, and the target or REFERENCE needs them."""
    for name in used:
        if recorded.sets[name].labelled:
            continue
        photos = f"DATA.{name} ({', '.join(cfg.DATA[name]):.100}) has unlabelled photos"
        if cfg.CALIBRATION.REFERENCE == "labels":
            fix = "set it to full, or name data sets with boxes"
            raise EarlyExitError(f"CALIBRATION.REFERENCE is labels, but {photos}; {fix}")
        if target.kind == "ap_drop" and name == "CALIB":
            raise EarlyExitError(f"--ap-drop needs boxes, but {photos}; use --risk or --speedup, which need none")


def certificate_of(recorded: replay.ModelOnSplits, search: ThresholdSearch, chosen: FoundThresholds) -> Certificate:
    """Return the certificate of the chosen thresholds, with figures on the calibration photos."""
    cfg, duplicates, names = recorded.cfg, recorded.duplicates["CALIB"], recorded.model.exit_names
    target, calib, costs, count = search.target, search.calib, search.costs, len(chosen.exits)
    photos = tuple(sorted(digest[:16] for digest in (*calib.photos_sha256, *duplicates.near_sha256)))
    exits = chosen.exits.astype(np.int64)

    def ap50(choice: np.ndarray) -> float | None:
        return ap_of_choice(calib.matches, choice, ap50_only=True).AP50 if calib.labelled else None

    measured = replace(
        chosen.measured,
        photos=count,
        loss=float(search.losses[np.arange(count), exits].mean()),
        labelled=calib.labelled,
        AP50=ap50(exits),
        AP50_full=ap50(np.full(count, len(names) - 1)),
        agreement=dataclasses.asdict(calib.agreement(exits)),
        equal_photos=duplicates.equal,
        near_equal_photos=duplicates.near,
        exit_share=exit_share(exits, names),
        cost=float(costs.per_exit(chosen.thresholds)[exits].mean()),
        speedup=costs.speedup(exits, chosen.thresholds),
        blocks=None if search.blocks is None else search.draws,
    )
    risk = target.kind == "risk"
    certified_target = CertifiedTarget(
        kind=target.kind,
        **({"epsilon": target.value, "bound": cfg.CALIBRATION.BOUND} if risk else {"value": target.value}),
        delta=None if target.kind == "speedup" else target.delta,
        block=target.block,
        learned=target.learned or None,
        reference=cfg.CALIBRATION.REFERENCE,
        score=cfg.EVAL.SCORE,
        iou=cfg.EVAL.IOU,
    )
    return Certificate(
        router={**search.router.to_dict(), "thresholds": list(chosen.thresholds)},
        target=certified_target,
        measured=measured,
        cost_model=costs.certified(chosen.thresholds),
        weights_sha256=weights_hash(recorded.model),
        photos_sha256=photos,
        photo_list_sha256=hashlib.sha256("".join(photos).encode()).hexdigest(),
        drift=DriftReference.from_decisions(names, exits, search.confidences),
        versions={"torch": torch.__version__, "torchvision": torchvision.__version__},
    )


def _page_photos(recorded: replay.ModelOnSplits, search: ThresholdSearch, chosen: FoundThresholds) -> PagePhotos:
    model, calib, costs = recorded.model, search.calib, search.costs
    return PagePhotos(
        ground_truth=calib.ground_truth,
        matches=calib.matches,
        exit_names=model.exit_names,
        confidences=np.array(search.confidences),
        thresholds=list(chosen.thresholds),
        costs=[
            OpenCosts(opened, **{costs.unit: costs.per_exit(open_thresholds(opened)).tolist()})
            for opened in itertools.product((True, False), repeat=model.num_early_exits)
        ],
        **{f"plain_{unit}": costs.plain if unit == costs.unit else None for unit in ("mmacs", "ms")},
        score=calib.score,
        labelled=calib.labelled,
        chosen_here=True,
        attention=attention_of(model, recorded.sets["CALIB"], calib.matches, calib.score),
    )

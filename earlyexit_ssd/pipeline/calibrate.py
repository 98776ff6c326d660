"""Calibrate the routing of a trained model on the calib split, for a target that the user chooses.

The network runs once over each split; the search computes nothing anew. `Recording`: the outputs of one split.
`Replay`: a Recording plus labels. `Recorded`: the model plus its splits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

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
from earlyexit_ssd.data.repeats import block_of_each
from earlyexit_ssd.drift import Reference
from earlyexit_ssd.engine.processes import is_main
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.matches import Detections, ap_of_choice, bootstrap_choices
from earlyexit_ssd.evaluation.outputs import exit_share
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.modeling.checkpoint import save_model, weights_hash
from earlyexit_ssd.pipeline.build import shares_processes, trained_temperatures
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Recorded,
    Replay,
    fit_router,
    fit_temperatures,
    measure_cost_model,
    open_recorded,
    require_deciding,
    temperatures_of,
)
from earlyexit_ssd.pipeline.reports import write_calibration_page
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.tables import write_calibration
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import needs_training_photos, require_known

logger = logging.getLogger(__name__)

LEAST_DROP = 0.005  # smallest loss of AP50 that `draws_needed` uses; a smaller one cannot be measured


@dataclass(frozen=True)
class Target:
    """The target of a calibration.

    Attributes:
        kind: ``speedup``: the mean cost of the detector without exits / the routed mean cost is at least ``value``.
            ``ap_drop``: the full path's AP50 - the routed AP50 is at most ``value`` in 1 - delta of the bootstrap draws
            of the calibration photos. ``risk``: the expected loss per photo is at most ``value`` with probability
            1 - delta.
        value: above 0 for a speedup, in [0, 1] for an ap_drop, in (0, 1) for a risk.
        delta: of a risk, the probability that the guarantee fails. Of an ap_drop, the share of the bootstrap draws that
            may lose more. In (0, 1).
        block: number of consecutive photos of a folder, such as frames of a video, that count as one draw; None: 1.
        learned: learn the thresholds by gradient descent instead of a search over all combinations.
    """

    kind: Literal["speedup", "ap_drop", "risk"]
    value: float
    delta: float = 0.05
    block: int | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        known = {
            "speedup": ("a number above 0", self.value > 0),
            "ap_drop": ("a number in [0, 1]", 0 <= self.value <= 1),
            "risk": ("a number in (0, 1)", 0 < self.value < 1),
        }
        if self.kind not in known:
            raise EarlyExitError(f"the target's kind is {self.kind!r:.60}, expected one of {', '.join(known)}")
        expected, fits = known[self.kind]
        if not fits:
            raise EarlyExitError(f"{self.kind} is {self.value:g}, expected {expected}")
        if not 0 < self.delta < 1:
            raise EarlyExitError(f"delta is {self.delta:g}, expected a number in (0, 1), such as 0.05")
        if self.block is not None and self.kind == "speedup":
            raise EarlyExitError("--block is for --risk and --ap-drop; a speed-up is fitted and has no guarantee")


def build_target(cfg: CfgNode) -> Target:
    """The target in the CALIBRATION section."""
    section = cfg.CALIBRATION
    return Target(section.TARGET, section.VALUE, section.DELTA)


@dataclass(frozen=True)
class Chosen:
    """Thresholds, the exit of every calibration photo [n], figures that the search measured, and for the report the
    curve of loss against cost that it was chosen from."""

    thresholds: tuple[float, ...]
    exits: np.ndarray
    measured: Measured
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Search:
    """The search for thresholds that meet the target.

    Attributes:
        router: the router with its fitted policy.
        confidences: of the n calibration photos, an array [n] per early exit, see `fit_router`.
        calib: recorded outputs of the calibration photos.
        train: recorded outputs of the training photos, which only a risk needs, for its path of thresholds.
        costs: the costs of the exits.
        blocks: number (from 0) of the block of each calibration photo, [n]; None: every photo is a block.
        baseline: detections on the calibration photos that an ap_drop is measured against; None: the full path's.
    """

    cfg: CfgNode
    target: Target
    router: ExitRouter
    confidences: list[np.ndarray]
    calib: Replay
    train: Replay | None
    costs: CostModel
    blocks: np.ndarray | None = None
    baseline: Detections | None = None

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """Losses of the calibration photos, [n, exits]."""
        return self.calib.losses(self.cfg.CALIBRATION.REFERENCE)

    @property
    def draws(self) -> int:
        """Number of independent draws: the blocks of calibration photos."""
        return len(self.calib.recording) if self.blocks is None else int(self.blocks.max()) + 1

    @property
    def draws_name(self) -> str:
        """What the draws are called in messages."""
        block = self.target.block
        return "calibration photos" if block is None else f"blocks of {block} calibration photos"

    def run(self) -> Chosen:
        """Find the thresholds; an EarlyExitError if a speed-up cannot be reached."""
        return getattr(self, f"_for_{self.target.kind}")()

    def _grid(self, confidences: list[np.ndarray], losses: np.ndarray) -> tuple[Grid, np.ndarray]:
        """The combinations of thresholds to choose from (the whole grid, or learnt ones) and their mean costs."""
        if self.target.learned:
            budgets = [self.costs.plain / self.target.value] if self.target.kind == "speedup" else []
            grid = learned_grid(confidences, losses, self.costs.per_exit, budgets)
        else:
            grid = threshold_grid(confidences)
        return grid, grid.mean_cost(self.costs.of_each(grid.thresholds))

    def _for_risk(self) -> Chosen:
        target, costs, settings = self.target, self.costs, self.cfg.CALIBRATION
        confidences, losses = self.train.confidences(self.router), self.train.losses(settings.REFERENCE)
        path = threshold_path(confidences, losses, costs.of_each, self._grid(confidences, losses)[0])
        found = certify(
            path, self.confidences, self.losses, costs.of_each(path), target.value, target.delta, settings.BOUND,
            self.cfg.SEED, self.blocks, with_curve=True,
        )  # fmt: skip
        if found.step == 0:
            advice = "the exits are not good enough for it: allow a larger risk, or train them longer"
            if found.passed:
                advice = "what passed costs more than the full path: another policy, cheaper branches or a larger risk"
            elif found.photos_needed:
                advice = f"{max(found.photos_needed, self.draws + 1)} {self.draws_name} like these would do"
            logger.warning(
                "no exit is opened at a risk of %g with probability %g on %d %s: all stay closed; %s",
                target.value, 1 - target.delta, self.draws, self.draws_name, advice,
            )  # fmt: skip
        measured = Measured(loss_bound=found.point.bound, steps=found.passed)
        return Chosen(found.point.thresholds, found.choice, measured, found.curve)

    def _for_speedup(self) -> Chosen:
        grid, mean_costs = self._grid(self.confidences, self.losses)
        ap50 = self.calib.ap50_of(grid.choices, "thresholds")
        best = best_within(mean_costs, -ap50, self.costs.plain / self.target.value)
        if best is None:
            raise EarlyExitError(
                f"a speed-up of {self.target.value:g} is out of reach: the cheapest thresholds give "
                f"{self.costs.plain / mean_costs.min():.2f}; ask for less, or train a shallower exit (EXITS.LAYERS)"
            )
        lost = ap50[(grid.thresholds >= CLOSED).all(1).argmax()] - ap50
        curve = _curve(grid, mean_costs, lost, pareto_path(lost, mean_costs), {})
        return Chosen(tuple(grid.thresholds[best].tolist()), grid.choices[best], Measured(), curve)

    def _for_ap_drop(self) -> Chosen:
        """Find the cheapest combination that loses at most the target in 1 - delta of the bootstrap draws.

        On other photos it will lose more than on those that it was chosen on. The quantile of the draws is a margin for
        that, not a guarantee. Only combinations that no other beats in cost and either AP50 or loss are tested.
        """
        target, count = self.target, len(self.calib.recording)
        matches, baseline_exit = self.calib.matches_beside(self.baseline)
        needed = draws_needed(target) if self.draws < draws_needed(target) else None
        if needed:
            logger.warning(
                "%d %s are few for at most %g AP50 lost in %g of bootstrap draws: take at least %d, or allow more",
                self.draws, self.draws_name, target.value, 1 - target.delta, needed,
            )  # fmt: skip
        exits = self.calib.recording.early_exits
        closed = Chosen((CLOSED,) * exits, np.full(count, exits), Measured(AP50_lost_bound=0.0, photos_needed=needed))
        ap50_full = ap_of_choice(matches, baseline_exit, ap50_only=True).AP50 or 0.0
        if ap50_full < DETECTS_AP50:  # there is no AP50 to lose
            logger.warning(
                "the full path does not detect: AP50 %.3f on the calibration photos, expected %g or more: all exits "
                "stay closed; train it first, or look at MODEL.WEIGHTS and DATA.CLASSES",
                ap50_full, DETECTS_AP50,
            )  # fmt: skip
            return closed
        grid, mean_costs = self._grid(self.confidences, self.losses)
        lost = ap50_full - self.calib.ap50_of(grid.choices, "thresholds")
        path = np.union1d(pareto_path(lost, mean_costs), pareto_path(grid.mean(self.losses), mean_costs))
        # Closed exits lose nothing against the full path. Against another baseline they may: then they are tested.
        closed_cost = mean_costs[(grid.thresholds >= CLOSED).all(1).argmax()]
        cheaper = np.less if self.baseline is None else np.less_equal
        tested = path[(lost[path] <= target.value) & cheaper(mean_costs[path], closed_cost)]
        draw = functools.partial(bootstrap_choices, matches, seed=self.cfg.SEED, blocks=self.blocks)
        (baseline_draws,) = draw([baseline_exit])
        bounds: dict[int, float] = {}
        for candidate in progress(tested[np.argsort(mean_costs[tested], kind="stable")].tolist(), desc="AP50 lost"):
            (draws,) = draw([grid.choices[candidate]])
            bounds[candidate] = bound = float(np.nanquantile(baseline_draws.AP50 - draws.AP50, 1 - target.delta))
            if bound <= target.value:
                measured = replace(closed.measured, AP50_lost_bound=bound)
                curve = _curve(grid, mean_costs, lost, tested, bounds)
                return Chosen(tuple(grid.thresholds[candidate].tolist()), grid.choices[candidate], measured, curve)
        logger.warning("no exit can be opened at %g AP50 lost on these photos: all stay closed", target.value)
        return replace(closed, curve=_curve(grid, mean_costs, lost, tested, bounds))


def _curve(
    grid: Grid, costs: np.ndarray, losses: np.ndarray, path: np.ndarray, bounds: Mapping[int, float]
) -> tuple[CurvePoint, ...]:
    """The combinations ``path`` of the grid by rising cost, with the bounds of those that were tested."""
    order = path[np.argsort(costs[path], kind="stable")].tolist()
    return tuple(
        CurvePoint(tuple(grid.thresholds[one].tolist()), float(costs[one]), float(losses[one]), bounds.get(one))
        for one in order
    )


def draws_needed(target: Target) -> int:
    """Least number n of draws for an ap_drop: n photos contain at least one of a rare kind, which a share
    ``target.value`` of all photos is of, with probability 1 - delta."""
    return math.ceil(math.log(target.delta) / math.log1p(-min(max(target.value, LEAST_DROP), 0.99)))


@shares_processes("out_dir")
def calibrate(
    cfg: CfgNode, weights: str | os.PathLike[str], target: Target, out_dir: str | os.PathLike[str]
) -> Certificate | None:
    """Fit temperatures and policy, search thresholds, and write certificate.json, reports, a diagram and model.pth
    (the model with this routing).

    If the calibration photos have no labels, the detections of the full path replace them. The report then has the
    agreement with the full path instead of AP.

    Args:
        cfg: its DATA, ROUTING, CALIBRATION and EVAL sections are used; the classes are those of the weights.
        weights: model file of this project.
        target: the target of the calibration.
        out_dir: folder of the results and of the recorded outputs.

    Returns:
        the certificate; None on processes other than the first, which only record their share of the photos.

    Raises:
        EarlyExitError: unusable weights, data or settings, splits that share photos, or a target out of reach.
    """
    out = Path(out_dir)
    require_known(cfg.ROUTING.POLICY)
    # a promise needs independent photos, so near-duplicates count once; frames of a block may look alike
    near_duplicates_count_once = target.kind != "speedup" and target.block is None
    recorded = open_recorded(cfg, weights, out, unlabelled=True, include_near_duplicates=near_duplicates_count_once)
    cfg, model = recorded.cfg, recorded.model
    uses_train = target.kind == "risk" or needs_training_photos(cfg.ROUTING.POLICY)
    _require_labels(cfg, target, recorded, ("CALIB", "TRAIN") if uses_train else ("CALIB",))
    require_deciding(cfg.ROUTING.POLICY, model, weights)
    calib, train = recorded.replay("CALIB"), recorded.replay("TRAIN") if uses_train else None
    if not is_main():
        return None
    fitted = fit_temperatures(cfg, calib)
    trained = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    # what is tested on the calibration photos must not be fitted on them: a risk only reports the fitted temperatures
    temperatures = trained if target.kind == "risk" else temperatures_of(fitted, model.exit_names)
    blocks = None
    if target.block is not None:
        paths = [record.path for record in recorded.sets["CALIB"].records]
        blocks = block_of_each(paths, target.block)[calib.order]
    settings = {"cross_fit": target.kind != "risk", "groups": blocks}
    router, confidences = fit_router(cfg, cfg.ROUTING.POLICY, temperatures, calib, train, **settings)
    costs = measure_cost_model(cfg, model, router)
    search = Search(cfg, target, router, confidences, calib, train, costs, blocks)
    chosen = search.run()
    certificate = certificate_of(recorded, search, chosen)
    write_calibration(out, certificate, fitted)
    routing = {"router": certificate.router, "certificate": certificate.to_dict(), "trained_temperatures": trained}
    save_model(out / "model.pth", model, recorded.architecture, {**recorded.info, **routing})
    write_calibration_page(out, weights, recorded, search, chosen.curve, certificate, fitted)
    return certificate


def _require_labels(cfg: CfgNode, target: Target, recorded: Recorded, used: Sequence[str]) -> None:
    """Raise an EarlyExitError if a split that is ``used`` has no labels, but the target or REFERENCE needs them."""
    for name in used:
        if recorded.sets[name].labelled:
            continue
        photos = f"DATA.{name} ({', '.join(cfg.DATA[name]):.100}) has photos that nobody labelled"
        if cfg.CALIBRATION.REFERENCE == "labels":
            raise EarlyExitError(
                f"CALIBRATION.REFERENCE is labels, and {photos}; set it to full, or name sets with boxes"
            )
        if target.kind == "ap_drop" and name == "CALIB":
            raise EarlyExitError(
                f"--ap-drop needs boxes, and {photos}; use --risk or --speedup, which compare with the full path"
            )


def certificate_of(recorded: Recorded, search: Search, chosen: Chosen) -> Certificate:
    """The certificate of the chosen thresholds, with the figures on the calibration photos."""
    cfg, repeats, names = recorded.cfg, recorded.repeats["CALIB"], recorded.model.exit_names
    target, calib, costs, count = search.target, search.calib, search.costs, len(chosen.exits)
    photos = tuple(sorted(digest[:16] for digest in (*calib.photos_sha256, *repeats.near_sha256)))
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
        equal_photos=repeats.equal,
        near_equal_photos=repeats.near,
        exit_share=exit_share(torch.from_numpy(exits), names),
        cost=float(costs.per_exit(chosen.thresholds)[exits].mean()),
        speedup=costs.speedup(exits, chosen.thresholds),
        blocks=None if search.blocks is None else search.draws,
    )
    risk = target.kind == "risk"
    asked = CertifiedTarget(
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
        target=asked,
        measured=measured,
        cost_model=costs.certified(chosen.thresholds),
        weights_sha256=weights_hash(recorded.model),
        photos_sha256=photos,
        photo_list_sha256=hashlib.sha256("".join(photos).encode()).hexdigest(),
        drift=Reference.from_decisions(names, exits, search.confidences),
        versions={"torch": torch.__version__, "torchvision": torchvision.__version__},
    )

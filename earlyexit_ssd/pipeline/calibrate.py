"""Calibrate a trained model's routing on the calib split, to a target that the user states."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.calibration.drift import Reference
from earlyexit_ssd.calibration.risk import Certified, certify, safe_to_bold
from earlyexit_ssd.calibration.thresholds import Grid, cheapest_within, learned_grid, pareto_path, threshold_grid
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data.repeats import Block, block_of_each
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.matches import ap_of_choice, bootstrap_choices
from earlyexit_ssd.files import locks_folder
from earlyexit_ssd.modeling.checkpoint import save_model, weights_hash
from earlyexit_ssd.pipeline.build import trained_temperatures
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Recorded,
    Replay,
    fit_policy,
    fit_temperatures,
    measure_cost_model,
    open_recorded,
    per_exit,
    require_deciding,
)
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.results import write_calibration
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import needs_training_photos, require_known

logger = logging.getLogger(__name__)

LEAST_DROP = 0.005
"""Of AP50: less than this no number of photos tells apart."""


@dataclass(frozen=True)
class Target:
    """What calibration is to reach.

    Attributes:
        kind: ``speedup`` (at least, against the detector without exits, in mean cost), ``ap_drop`` (AP50 lost against
            the full path, at most, in 1 - delta of the draws of calibration photos) or ``risk`` (mean loss per photo,
            at most, with probability 1 - delta).
        value: the number.
        delta: of an ap_drop or risk target, in (0, 1).
        block: consecutive photos of a folder that are one draw, such as frames of a video; None: every photo is one.
        learned: thresholds are learnt with a soft exit instead of searched for among all combinations.
    """

    kind: str
    value: float
    delta: float = 0.05
    block: Block | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        expected = {
            "speedup": ("a number above 0", self.value > 0),
            "ap_drop": ("a number in [0, 1]", 0 <= self.value <= 1),
            "risk": ("a number in (0, 1)", 0 < self.value < 1),
        }
        if self.kind not in expected:
            raise EarlyExitError(f"target {self.kind!r}: expected one of {', '.join(expected)}")
        text, fits = expected[self.kind]
        if not fits:
            raise EarlyExitError(f"{self.kind} is {self.value:g}, expected {text}")
        if not 0 < self.delta < 1:
            raise EarlyExitError(f"delta is {self.delta:g}, expected a number in (0, 1), such as 0.05")
        if self.block is not None and self.kind == "speedup":
            raise EarlyExitError("--block is for --risk and --ap-drop; a speed-up is fitted and promises nothing")


@dataclass(frozen=True)
class Found:
    """Thresholds, the exit of every calibration photo [n], and what more is to be said about the target."""

    thresholds: tuple[float, ...]
    choice: np.ndarray
    more: dict[str, Any]


@locks_folder("out_dir")
def calibrate(
    cfg: CfgNode, weights: str | os.PathLike[str], target: Target, out_dir: str | os.PathLike[str]
) -> Certificate:
    """Fit temperatures and policy, search thresholds, and write certificate.json, a report, a diagram and model.pth,
    the model with this routing in it.

    Where nobody labelled the calibration photos, the full path's answers stand for labels: agreement with it is
    reported, and no AP.

    Args:
        cfg: its DATA, ROUTING, CALIBRATION and EVAL sections are used; the classes are those of the weights.
        weights: a model of this project.
        target: what to reach.
        out_dir: for the certificate and the recordings of the splits.

    Raises:
        EarlyExitError: unusable weights, data or settings, splits that share photos, or a target out of reach.
    """
    out = Path(out_dir)
    require_known(cfg.ROUTING.POLICY)
    near = target.kind != "speedup" and target.block is None  # frames of a video do look equal, as those to come will
    recorded = open_recorded(cfg, weights, out, unlabelled=True, near=near)
    cfg, model = recorded.cfg, recorded.model
    _require_reference(cfg, target, recorded)
    require_deciding(cfg.ROUTING.POLICY, model, weights)
    calib = recorded.replay("CALIB")
    trains = target.kind == "risk" or needs_training_photos(cfg.ROUTING.POLICY)
    train = recorded.replay("TRAIN") if trains else None
    fitted = fit_temperatures(cfg, model.exit_names, calib)
    temperatures = per_exit(fitted, model.exit_names)
    if target.kind == "risk":  # what is fitted on the calibration photos may not be tested on them
        temperatures = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    router = fit_policy(cfg, cfg.ROUTING.POLICY, temperatures, calib if train is None else train)
    costs = measure_cost_model(cfg, model, router)
    blocks = None
    if target.block is not None:
        paths = [record.path for record in recorded.sets["CALIB"].records]
        blocks = block_of_each(paths, target.block.photos)[calib.order]
    found = _search(cfg, target, router, calib, train, costs, blocks)
    certificate = _certificate(recorded, target, router, calib, costs, found)
    write_calibration(out, certificate, fitted)
    info = {**recorded.info, "router": certificate.router, "certificate": certificate.to_dict()}
    info["trained_temperatures"] = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    save_model(out / "model.pth", model, recorded.architecture, info)
    return certificate


def _require_reference(cfg: CfgNode, target: Target, recorded: Recorded) -> None:
    """What needs boxes is refused on photos that nobody labelled."""
    for name in ("CALIB", "TRAIN"):
        if recorded.sets[name].labelled:
            continue
        photos = f"DATA.{name} ({', '.join(cfg.DATA[name]):.100}) has photos that nobody labelled"
        if cfg.CALIBRATION.REFERENCE == "labels":
            raise EarlyExitError(
                f"CALIBRATION.REFERENCE is labels, and {photos}; set it to full, or name sets with boxes"
            )
        if target.kind == "ap_drop" and name == "CALIB":
            raise EarlyExitError(
                f"--ap-drop needs boxes, and {photos}; use --risk or --speedup, which go by what the full path says"
            )


def _grid(target: Target, confidences: list[np.ndarray], losses: np.ndarray, costs: CostModel) -> Grid:
    """The combinations to choose from: all of them, or those learnt with a soft exit at even mean costs."""
    if not target.learned:
        return threshold_grid(confidences)
    budgets = [costs.plain / target.value] if target.kind == "speedup" else []
    return learned_grid(confidences, losses, costs.per_exit, budgets)


def _search(
    cfg: CfgNode,
    target: Target,
    router: ExitRouter,
    calib: Replay,
    train: Replay | None,
    costs: CostModel,
    blocks: np.ndarray | None,
) -> Found:
    confidences, reference = calib.confidences(router), cfg.CALIBRATION.REFERENCE
    draws = len(calib.recording) if blocks is None else int(blocks.max()) + 1
    more = {} if blocks is None else {"blocks": draws}
    if target.kind == "risk":
        seen, seen_losses = train.confidences(router), train.losses(reference)
        path = safe_to_bold(seen, seen_losses, costs.of_each, _grid(target, seen, seen_losses, costs))
        losses, step_costs, bound = calib.losses(reference), costs.of_each(path), cfg.CALIBRATION.BOUND
        found = certify(
            path, confidences, losses, step_costs, target.value, target.delta, bound, cfg.SEED, groups=blocks
        )
        if found.step == 0:
            _warn_closed(target, found, draws)
        return Found(found.thresholds, found.choice, {"loss_bound": found.bound, "steps": found.passed, **more})
    grid = _grid(target, confidences, calib.losses(reference), costs)
    mean_costs = grid.mean_cost(costs.of_each(grid.thresholds))
    ap50 = calib.ap50_of(grid.choices, "thresholds")
    if target.kind == "speedup":
        chosen = cheapest_within(mean_costs, -ap50, costs.plain / target.value)
        if chosen is None:
            raise EarlyExitError(
                f"a speed-up of {target.value:g} is out of reach: with every photo at the first exit it is "
                f"{costs.plain / mean_costs.min():.2f}; ask for less, or plan a shallower exit (tools/plan_exits.py)"
            )
        return Found(tuple(float(value) for value in grid.thresholds[chosen]), grid.choices[chosen], {})
    needed = _photos_for(target)
    if draws < needed:
        more["photos_needed"] = needed
        logger.warning(
            "%d %s are few for %g AP50 lost with probability %g: %d would do; take more, or allow a larger loss",
            draws, _units(target), target.value, 1 - target.delta, needed,
        )  # fmt: skip
    mean_losses = grid.mean(calib.losses(reference))
    found = _cheapest_that_keeps(target, calib, grid, mean_costs, mean_losses, ap50, cfg.SEED, blocks)
    return Found(found.thresholds, found.choice, {**found.more, **more})


def _cheapest_that_keeps(
    target: Target,
    calib: Replay,
    grid: Grid,
    mean_costs: np.ndarray,
    mean_losses: np.ndarray,
    ap50: np.ndarray,
    seed: int,
    blocks: np.ndarray | None = None,
) -> Found:
    """The least cost at which the AP50 lost stays within the target in 1 - delta of the draws of photos (bootstrap).

    The best of thousands of combinations looks better on the photos that chose it than on others; a bound that holds
    on most draws of them makes up for that. Looked at are those that no other beats in cost and either AP50 or loss.
    """
    full = np.full(len(calib.recording), calib.recording.early_exits)
    lost = (ap_of_choice(calib.matches, full, ap50_only=True).AP50 or 0.0) - ap50
    path = np.unique(np.concatenate([pareto_path(values, mean_costs) for values in (lost, mean_losses)]))
    closed = (grid.thresholds >= CLOSED).all(1).argmax()  # what costs more than all closed is not worth opening
    path = path[(lost[path] <= target.value) & (mean_costs[path] < mean_costs[closed])]
    affordable = path[np.argsort(mean_costs[path], kind="stable")]
    kept = bootstrap_choices(calib.matches, [full], seed=seed, groups=blocks)[0]
    for candidate in progress(affordable, desc="AP50 lost"):
        routed = bootstrap_choices(calib.matches, [grid.choices[candidate]], seed=seed, groups=blocks)[0]
        bound = float(np.nanquantile(kept.AP50 - routed.AP50, 1 - target.delta))
        thresholds = tuple(float(value) for value in grid.thresholds[candidate])
        if bound <= target.value:
            return Found(thresholds, grid.choices[candidate], {"AP50_lost_bound": bound})
    logger.warning("no exit can be opened at %g AP50 lost on these photos: all stay closed", target.value)
    return Found((CLOSED,) * calib.recording.early_exits, full, {"AP50_lost_bound": 0.0})


def _units(target: Target) -> str:
    return "calibration photos" if target.block is None else f"blocks of {target.block.photos} calibration photos"


def _photos_for(target: Target) -> int:
    """The photos among which a fault as frequent as the target allows shows at all with probability 1 - delta."""
    return math.ceil(math.log(target.delta) / math.log1p(-min(max(target.value, LEAST_DROP), 0.99)))


def _warn_closed(target: Target, found: Certified, photos: int) -> None:
    needed = found.photos_needed
    if found.passed:
        advice = "what passed costs more than the full path alone: another policy, cheaper branches or a larger risk"
    elif needed:
        advice = f"{max(needed, photos + 1)} {_units(target)} like these would do"
    else:
        advice = "the exits are not good enough for it: allow a larger risk, or train them longer"
    logger.warning(
        "no exit is opened at a risk of %g with probability %g on %d %s: all stay closed; %s",
        target.value,
        1 - target.delta,
        photos,
        _units(target),
        advice,
    )


def _ap50(calib: Replay, choice: np.ndarray) -> float | None:
    """None where nobody labelled the photos."""
    return ap_of_choice(calib.matches, choice, ap50_only=True).AP50 if calib.labelled else None


def _certificate(
    recorded: Recorded, target: Target, router: ExitRouter, calib: Replay, costs: CostModel, found: Found
) -> Certificate:
    cfg, model, repeats = recorded.cfg, recorded.model, recorded.repeats["CALIB"]
    exits = len(model.exit_names)
    losses = calib.losses(cfg.CALIBRATION.REFERENCE)
    confidences = calib.confidences(router)
    photos = tuple(sorted(digest[:16] for digest in (*calib.photos_sha256, *repeats.near_sha256)))
    rows = np.arange(len(found.choice))
    measured = {
        "photos": len(found.choice),
        "loss": float(losses[rows, found.choice].mean()),
        "labelled": calib.labelled,
        "AP50": _ap50(calib, found.choice),
        "AP50_full": _ap50(calib, np.full(len(rows), exits - 1)),
        "agreement": dataclasses.asdict(calib.agreement(found.choice)),
        "equal_photos": repeats.equal,
        "near_equal_photos": repeats.near,
        "exit_share": dict(
            zip(model.exit_names, (np.bincount(found.choice, minlength=exits) / len(rows)).tolist(), strict=True)
        ),
        "cost": float(costs.per_exit(found.thresholds)[found.choice].mean()),
        "speedup": costs.speedup(found.choice, found.thresholds),
        **found.more,
    }
    risk = {"epsilon": target.value, "delta": target.delta, "bound": cfg.CALIBRATION.BOUND}
    return Certificate(
        router={**router.to_dict(), "thresholds": list(found.thresholds)},
        target={
            "kind": target.kind,
            **(risk if target.kind == "risk" else {"value": target.value}),
            **({"delta": target.delta} if target.kind == "ap_drop" else {}),
            **({"block": target.block.photos} if target.block else {}),
            **({"learned": True} if target.learned else {}),
            "reference": cfg.CALIBRATION.REFERENCE,
            "score": cfg.EVAL.SCORE,
            "iou": cfg.EVAL.IOU,
        },
        measured=measured,
        cost_model=costs.to_dict(found.thresholds),
        weights_sha256=weights_hash(model),
        photos_sha256=photos,
        photo_list_sha256=hashlib.sha256("".join(photos).encode()).hexdigest(),
        drift=Reference.from_decisions(model.exit_names, found.choice.astype(np.int64), confidences).to_dict(),
        versions={"torch": torch.__version__, "torchvision": torchvision.__version__},
    )

"""Calibrate a trained model's routing on the calib split, to a target that the user states."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices
from earlyexit_ssd.evaluation.choices import ap_of_choice
from earlyexit_ssd.files import locks_folder
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.pipeline.build import trained_temperatures
from earlyexit_ssd.pipeline.cost_model import CostModel, measure_cost_model
from earlyexit_ssd.pipeline.fit_router import fit_policy, fit_temperatures, learns, per_exit, require_deciding
from earlyexit_ssd.pipeline.replay import Replay, open_recorded
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.calibration import write_calibration
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.certificate import Certificate
from earlyexit_ssd.routing.certify import Certified, certify, safe_to_bold
from earlyexit_ssd.routing.drift_reference import Reference
from earlyexit_ssd.routing.policies import require_known
from earlyexit_ssd.routing.search import Grid, cheapest_within, pareto_path, threshold_grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What calibration is to reach.

    Attributes:
        kind: ``speedup`` (at least, against the detector without exits, in mean cost), ``ap_drop`` (AP50 lost against
            the full path, at most, in 1 - delta of the draws of calibration photos) or ``risk`` (mean loss per photo,
            at most, with probability 1 - delta).
        value: the number.
        delta: of an ap_drop or risk target, in (0, 1).
    """

    kind: str
    value: float
    delta: float = 0.05

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
    """Fit temperatures and policy, search thresholds, and write certificate.json, a report and a diagram.

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
    recorded = open_recorded(cfg, weights, out)
    cfg, model = recorded.cfg, recorded.model
    require_deciding(cfg.ROUTING.POLICY, model, weights)
    calib = recorded.replay("CALIB")
    needs_train = target.kind == "risk" or learns(cfg.ROUTING.POLICY)
    train = recorded.replay("TRAIN") if needs_train else None
    fitted = fit_temperatures(cfg, model.exit_names, calib)
    temperatures = per_exit(fitted, model.exit_names)
    counted = calib
    if target.kind == "risk":  # what is fitted on the calibration photos may not be tested on them
        temperatures, counted = trained_temperatures(cfg, recorded.info, model.num_early_exits), train
    router = fit_policy(cfg, cfg.ROUTING.POLICY, temperatures, train, counted)
    costs = measure_cost_model(cfg, model, router)
    found = _search(cfg, target, router, calib, train, costs)
    certificate = _certificate(cfg, model, target, router, calib, costs, found)
    write_calibration(out, certificate, fitted)
    return certificate


def _search(
    cfg: CfgNode, target: Target, router: ExitRouter, calib: Replay, train: Replay | None, costs: CostModel
) -> Found:
    confidences = calib.confidences(router)
    if target.kind == "risk":
        reference = cfg.CALIBRATION.REFERENCE
        path = safe_to_bold(train.confidences(router), train.losses(reference), costs.of_each)
        losses, step_costs = calib.losses(reference), costs.of_each(path)
        found = certify(
            path, confidences, losses, step_costs, target.value, target.delta, cfg.CALIBRATION.BOUND, cfg.SEED
        )
        if found.step == 0:
            _warn_closed(target, found, len(calib.recording))
        return Found(found.thresholds, found.choice, {"loss_bound": found.bound, "steps": found.passed})
    grid = threshold_grid(confidences)
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
    mean_losses = grid.mean(calib.losses(cfg.CALIBRATION.REFERENCE))
    return _cheapest_that_keeps(target, calib, grid, mean_costs, mean_losses, ap50, cfg.SEED)


def _cheapest_that_keeps(
    target: Target,
    calib: Replay,
    grid: Grid,
    mean_costs: np.ndarray,
    mean_losses: np.ndarray,
    ap50: np.ndarray,
    seed: int,
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
    kept = bootstrap_choices(calib.matches, [full], seed=seed)[0]
    for candidate in progress(affordable, desc="AP50 lost"):
        routed = bootstrap_choices(calib.matches, [grid.choices[candidate]], seed=seed)[0]
        bound = float(np.nanquantile(kept.AP50 - routed.AP50, 1 - target.delta))
        thresholds = tuple(float(value) for value in grid.thresholds[candidate])
        if bound <= target.value:
            return Found(thresholds, grid.choices[candidate], {"AP50_lost_bound": bound})
    logger.warning("no exit can be opened at %g AP50 lost on these photos: all stay closed", target.value)
    return Found((CLOSED,) * calib.recording.early_exits, full, {"AP50_lost_bound": 0.0})


def _warn_closed(target: Target, found: Certified, photos: int) -> None:
    needed = found.photos_needed
    if found.passed:
        advice = "what passed costs more than the full path alone: another policy, cheaper branches or a larger risk"
    elif needed:
        advice = f"{max(needed, photos + 1)} calibration photos like these would do"
    else:
        advice = "the exits are not good enough for it: allow a larger risk, or train them longer"
    logger.warning(
        "no exit is opened at a risk of %g with probability %g on %d photos: all stay closed; %s",
        target.value,
        1 - target.delta,
        photos,
        advice,
    )


def _certificate(
    cfg: CfgNode,
    model: EarlyExitSSDLite,
    target: Target,
    router: ExitRouter,
    calib: Replay,
    costs: CostModel,
    found: Found,
) -> Certificate:
    exits = len(model.exit_names)
    losses = calib.losses(cfg.CALIBRATION.REFERENCE)
    confidences = calib.confidences(router)
    photos = tuple(sorted(digest[:16] for digest in calib.photos_sha256))
    rows = np.arange(len(found.choice))
    measured = {
        "photos": len(found.choice),
        "loss": float(losses[rows, found.choice].mean()),
        "AP50": ap_of_choice(calib.matches, found.choice, ap50_only=True).AP50,
        "AP50_full": ap_of_choice(calib.matches, np.full(len(rows), exits - 1), ap50_only=True).AP50,
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

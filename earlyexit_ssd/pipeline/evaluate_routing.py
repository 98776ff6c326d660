"""How much of the way from a coin to an oracle each policy goes, at equal mean costs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.bootstrap import interval
from earlyexit_ssd.evaluation.choices import ap_of_choice, bootstrap_choices
from earlyexit_ssd.evaluation.reference_lines import (
    coin,
    gap_closed,
    line_of,
    oracle_over_exits,
    overthinking,
    pooled_gap,
    resampled_leads,
)
from earlyexit_ssd.evaluation.scoring_time import time_scoring
from earlyexit_ssd.evaluation.throughput import mixed_throughput
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.cost_model import CostModel, measure_cost_model
from earlyexit_ssd.pipeline.fit_router import fit_policy, fit_temperatures, per_exit
from earlyexit_ssd.pipeline.replay import Replay, open_recorded
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.routing import best_policy, write_routing
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.budgets import even_budgets, msdnet_shares, thresholds_for_shares
from earlyexit_ssd.routing.policies import FITTED_POLICIES, POLICIES, get_policy
from earlyexit_ssd.routing.search import cheapest_within, choose, threshold_grid
from earlyexit_ssd.routing.soft_exit import learn_thresholds

REFERENCE_POLICY = "max_foreground"
MSDNET_Q = np.geomspace(0.1, 10, 25)


@dataclass(frozen=True)
class Splits:
    """What chooses (calib), what is reported (test), and the exits' costs."""

    calib: Replay
    test: Replay
    costs: CostModel
    exit_names: tuple[str, ...]
    seed: int


def evaluate_routing(
    cfg: CfgNode, weights: str | os.PathLike[str], out_dir: str | os.PathLike[str], policies: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare policies on DATA.TEST with thresholds from DATA.CALIB; write routing.json, the table and the charts.

    Args:
        cfg: its DATA, ROUTING, CALIBRATION and EVAL sections are used.
        weights: a model of this project.
        out_dir: for the results and the recordings of the splits.
        policies: names; by default all. ``max_foreground`` is always among them.

    Returns:
        what is in routing.json.

    Raises:
        EarlyExitError: unusable weights, data or settings, or splits that share photos.
    """
    policies = list(dict.fromkeys([*(policies or [*POLICIES, *FITTED_POLICIES]), REFERENCE_POLICY]))
    for name in set(policies) - set(FITTED_POLICIES):
        get_policy(name)
    out = Path(out_dir)
    recorded = open_recorded(cfg, weights, out)
    cfg, model = recorded.cfg, recorded.model
    calib, test = recorded.replay("CALIB"), recorded.replay("TEST")
    train = recorded.replay("TRAIN") if set(policies) & set(FITTED_POLICIES) else None
    temperatures = per_exit(fit_temperatures(cfg, model.exit_names, calib), model.exit_names)
    found: dict[str, Any] = {}
    costs: dict[bool, CostModel] = {}
    routers: dict[str, ExitRouter] = {}
    for name in policies:
        router = routers[name] = fit_policy(cfg, name, temperatures, train)
        if router.compares not in costs:  # who compares with the exit before needs it, closed or not
            costs[router.compares] = measure_cost_model(cfg, model, router)
        splits = Splits(calib, test, costs[router.compares], model.exit_names, cfg.SEED)
        found[name] = _evaluate_policy(splits, calib.confidences(router), test.confidences(router), name)
    best = best_policy(found)
    splits = dataclasses.replace(splits, costs=costs[routers[best].compares])
    results = {
        "context": _context(cfg, splits),
        "exits": _exits(splits),
        "throughput": _throughput(cfg, model, routers[best], found[best]),
        "overthinking": dict(zip(model.exit_names, overthinking(test.errors), strict=False)),
        "scoring_ms": {name: _scoring_ms(cfg, router, test) for name, router in routers.items()},
        "policies": found,
        "learnt_thresholds": {best: _with_learnt_thresholds(splits, routers[best], cfg.CALIBRATION.REFERENCE)},
    }
    write_routing(out, results)
    return results


def _context(cfg: CfgNode, splits: Splits) -> dict[str, Any]:
    return {
        "calib": list(cfg.DATA.CALIB),
        "test": list(cfg.DATA.TEST),
        "calib_photos": len(splits.calib.recording),
        "images": len(splits.test.recording),
        "score": cfg.EVAL.SCORE,
        "iou": cfg.EVAL.IOU,
        "seed": cfg.SEED,
        "reference": cfg.CALIBRATION.REFERENCE,
        "cost_model": splits.costs.to_dict(),
    }


def _exits(splits: Splits) -> list[dict[str, Any]]:
    """Every exit alone, with no other open before it."""
    photos, entries = len(splits.test.recording), []
    for index, name in enumerate(splits.exit_names):
        choice = np.full(photos, index)
        values = bootstrap_choices(splits.test.matches, [choice], seed=splits.seed)[0]
        only = [CLOSED] * index + [0.0] * (len(splits.exit_names) - 1 - index)
        line = line_of(splits.test.matches, choice, splits.costs.per_exit(only))
        entries.append({"name": name, **asdict(line), "AP50_interval": interval(values)})
    return entries


def _scoring_ms(cfg: CfgNode, router: ExitRouter, replay: Replay) -> float:
    """Of one photo at the last early exit."""
    last = replay.recording.early_exits - 1
    return time_scoring(router, next(replay.recording.signals(last)), last, cfg.EVAL.TIMING_THREADS).ms


def _throughput(cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter, found: dict[str, Any]) -> dict[str, Any]:
    """Of mixed batches at a policy's middle budget, in eager PyTorch."""
    shares = list(found["budgets"][2]["exit_share"].values())
    threads = cfg.EVAL.TIMING_THREADS
    timed = mixed_throughput(model, router.to(next(model.parameters()).device), shares, threads=threads)
    return {"exit_share": dict(zip(model.exit_names, shares, strict=True)), "threads": threads, **asdict(timed)}


def _evaluate_policy(splits: Splits, calib: list[np.ndarray], test: list[np.ndarray], name: str) -> dict[str, Any]:
    """At five equal budgets with searched thresholds, and along MSDNet's curve of shares.

    Args:
        calib, test: per early exit the policy's confidences [n].
    """
    grid, costs = threshold_grid(calib), splits.costs.per_exit()
    closed = splits.costs.per_exit([CLOSED] * len(calib))  # above its cost there is nothing to route for
    mean_costs = grid.mean_cost(splits.costs.of_each(grid.thresholds))
    ap50 = splits.calib.ap50_of(grid.choices, f"thresholds of {name}")
    budgets, resampled = [], []
    for budget in even_budgets(costs[0], closed[-1]):
        thresholds = grid.thresholds[cheapest_within(mean_costs, -ap50, budget)]
        entry, leads = _at_thresholds(splits, test, thresholds)
        budgets.append({"budget": budget, **entry})
        resampled.append(leads)
    gaps = [entry["gap_closed"] for entry in budgets]
    return {
        "budgets": budgets,
        "gap_closed": None if None in gaps else float(np.mean(gaps)),
        "pooled_gap": None if None in gaps else float(pooled_gap([_leads(entry) for entry in budgets])),
        "pooled_gap_interval": None if None in gaps else interval(pooled_gap(resampled)),
        "msdnet": [_at_shares(splits, calib, test, msdnet_shares(len(costs), q)) for q in MSDNET_Q],
        "leak": _leak(splits, calib, test, budgets),
    }


def _at_thresholds(splits: Splits, test: list[np.ndarray], thresholds: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The figures, and what router and oracle have more than a coin in draws of the photos, [2, resamples]."""
    matches, costs = splits.test.matches, splits.costs.per_exit(thresholds)
    choice = choose(test, thresholds).astype(np.int64)
    router, chance = line_of(matches, choice, costs), coin(matches, choice, costs, splits.seed)
    oracle_exits, oracle_costs = oracle_over_exits(splits.test.errors, splits.costs.per_exit, router.cost)
    oracle = line_of(matches, oracle_exits, oracle_costs)
    values = bootstrap_choices(matches, [choice, np.full(len(choice), len(costs) - 1)], seed=splits.seed)
    rows = np.arange(len(choice))
    entry = {
        "thresholds": [float(value) for value in thresholds],
        **asdict(router),
        "AP50_interval": interval(values[0]),
        "AP50_below_full_interval": interval(values[1] - values[0]),
        "coin": asdict(chance),
        "oracle": asdict(oracle),
        "gap_closed": gap_closed(router, chance, oracle),
        "speedup": splits.costs.speedup(choice, thresholds),
        "loss": float(splits.test.losses("full")[rows, choice].mean()),
        "exit_share": dict(
            zip(splits.exit_names, (np.bincount(choice, minlength=len(costs)) / len(rows)).tolist(), strict=True)
        ),
    }
    return entry, resampled_leads(matches, choice, oracle_exits, seed=splits.seed)


def _leads(entry: dict[str, Any]) -> tuple[float, float]:
    chance = entry["coin"]["AP50"]
    return entry["AP50"] - chance, entry["oracle"]["AP50"] - chance


def _with_learnt_thresholds(splits: Splits, router: ExitRouter, reference: str) -> list[dict[str, Any]]:
    """At the same budgets with thresholds by gradient instead of search."""
    calib, test = splits.calib.confidences(router), splits.test.confidences(router)
    costs, losses = splits.costs.per_exit(), splits.calib.losses(reference)
    closed = splits.costs.per_exit([CLOSED] * len(calib))
    entries = []
    for budget in progress(even_budgets(costs[0], closed[-1]), desc="learnt thresholds"):
        thresholds = learn_thresholds(calib, losses, costs, budget)
        choice = choose(test, thresholds).astype(np.int64)
        line = line_of(splits.test.matches, choice, splits.costs.per_exit(thresholds))
        entries.append({"budget": budget, "thresholds": thresholds.tolist(), **asdict(line)})
    return entries


def _at_shares(
    splits: Splits, calib: list[np.ndarray], test: list[np.ndarray], shares: Sequence[float]
) -> dict[str, float | None]:
    thresholds = thresholds_for_shares(calib, shares)
    choice = choose(test, thresholds).astype(np.int64)
    return {
        "cost": float(splits.costs.per_exit(thresholds)[choice].mean()),
        "AP50": ap_of_choice(splits.test.matches, choice, ap50_only=True).AP50,
    }


def _leak(
    splits: Splits, calib: list[np.ndarray], test: list[np.ndarray], budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Percentiles of the reported photos' own scores (DynamicDet) against those of the calibration photos, at the
    shares that the search chose."""
    entries = []
    for entry in budgets:
        choice = choose(calib, entry["thresholds"])
        shares = (np.bincount(choice, minlength=len(splits.exit_names)) / len(choice)).tolist()
        entries.append(
            {"calib": _at_shares(splits, calib, test, shares), "test": _at_shares(splits, test, test, shares)}
        )
    return entries

"""How much of the way from a coin to an oracle each policy goes, at equal mean costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.reference_lines import line_of, overthinking
from earlyexit_ssd.evaluation.scoring_time import time_scoring
from earlyexit_ssd.evaluation.throughput import mixed_throughput
from earlyexit_ssd.files import locks_folder
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.cost_model import CostModel, measure_cost_model
from earlyexit_ssd.pipeline.fit_router import fit_policy, fit_temperatures, learns, per_exit, require_deciding
from earlyexit_ssd.pipeline.policy_evaluation import (
    Lines,
    Splits,
    add_intervals,
    ap_intervals,
    best_policy,
    evaluate_policy,
)
from earlyexit_ssd.pipeline.replay import Replay, open_recorded
from earlyexit_ssd.progress import progress
from earlyexit_ssd.report.routing import write_routing
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import FITTED_POLICIES, POLICIES, foresees, require_known
from earlyexit_ssd.routing.search import choose
from earlyexit_ssd.routing.soft_exit import learn_open_exits

REFERENCE_POLICY = "max_foreground"


@locks_folder("out_dir")
def evaluate_routing(
    cfg: CfgNode, weights: str | os.PathLike[str], out_dir: str | os.PathLike[str], policies: Sequence[str] = ()
) -> dict[str, Any]:
    """Compare policies on DATA.TEST with thresholds from DATA.CALIB; write routing.json, the table and the charts.

    Args:
        cfg: its DATA, ROUTING, CALIBRATION and EVAL sections are used.
        weights: a model of this project.
        out_dir: for the results and the recordings of the splits.
        policies: names; by default all. ``max_foreground`` is always among them, but where every exit is empty.

    Returns:
        what is in routing.json.

    Raises:
        EarlyExitError: unusable weights, data or settings, or splits that share photos.
    """
    names, out = _known(policies), Path(out_dir)
    recorded = open_recorded(cfg, weights, out, measured=("CALIB", "TEST"))
    cfg, model = recorded.cfg, recorded.model
    names = _deciding(names, policies, model, weights)
    calib, test = recorded.replay("CALIB"), recorded.replay("TEST")
    train = recorded.replay("TRAIN") if any(map(learns, names)) else None
    temperatures = per_exit(fit_temperatures(cfg, model.exit_names, calib), model.exit_names)
    routers = {name: fit_policy(cfg, name, temperatures, train, calib) for name in names}
    # before the evaluation fragments the memory, as no process that serves photos does
    scoring_ms = _scoring_ms(cfg, routers, test)
    found, splits, lines = _evaluate_each(cfg, model, routers, calib, test)
    best = best_policy(found)
    for name in {best, REFERENCE_POLICY} & set(found):
        add_intervals(splits[name], found[name], lines[name])
    results = {
        "context": _context(cfg, splits[best]),
        "exits": _exits(splits[best]),
        "throughput": _throughput(cfg, model, routers[best], found[best]["budgets"]),
        "overthinking": dict(zip(model.exit_names, overthinking(test.errors), strict=False)),
        "scoring_ms": scoring_ms,
        "best": best,
        "policies": found,
        "learnt_thresholds": {best: _with_learnt_thresholds(cfg, splits[best], routers[best], found[best]["budgets"])},
    }
    write_routing(out, results)
    return results


def _evaluate_each(
    cfg: CfgNode, model: EarlyExitSSDLite, routers: Mapping[str, ExitRouter], calib: Replay, test: Replay
) -> tuple[dict[str, Any], dict[str, Splits], dict[str, list[Lines]]]:
    """By policy: its figures, the splits with the costs that it was held against, and what its figures come from."""
    found, splits, lines = {}, {}, {}
    costs: dict[bool, CostModel] = {}
    for name, router in routers.items():
        # who compares with the exit before needs it, closed or not; else one stands for all, so that budgets are equal
        if router.compares not in costs:
            costs[router.compares] = measure_cost_model(cfg, model, router)
        splits[name] = Splits(calib, test, costs[router.compares], model.exit_names, tuple(model.empty), cfg.SEED)
        confidences = calib.confidences(router), test.confidences(router)
        found[name], lines[name] = evaluate_policy(splits[name], *confidences, name)
    return found, splits, lines


def _known(policies: Sequence[str]) -> list[str]:
    """The wanted policies, or all, and the one that is always there; raises where there is no such policy."""
    names = list(dict.fromkeys([REFERENCE_POLICY, *(policies or [*POLICIES, *FITTED_POLICIES])]))
    for name in names:
        require_known(name)
    return names


def _deciding(
    names: list[str], wanted: Sequence[str], model: EarlyExitSSDLite, weights: str | os.PathLike[str]
) -> list[str]:
    """Those that let photos leave: where every exit is empty, the policies that look at the trunk alone.

    Raises:
        EarlyExitError: one of the ``wanted`` is none of them.
    """
    if not all(model.empty):
        return names
    for name in wanted:
        require_deciding(name, model, weights)
    return [name for name in names if foresees(name)]


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
    choices = [np.full(len(splits.test.recording), index) for index in range(len(splits.exit_names))]
    intervals, entries = ap_intervals(splits, choices), []
    for index, name in enumerate(splits.exit_names):
        choice = choices[index]
        only = [CLOSED] * index + [0.0] * (len(splits.exit_names) - 1 - index)
        line = line_of(splits.test.matches, choice, splits.costs.per_exit(only))
        entries.append({"name": name, **asdict(line), **intervals[index]})
    return entries


def _scoring_ms(cfg: CfgNode, routers: Mapping[str, ExitRouter], replay: Replay) -> dict[str, float]:
    """Of one photo at the last early exit, by policy; at one with a branch, if there is any."""
    early = range(replay.recording.early_exits)
    last = max((index for index in early if not replay.recording.empty[index]), default=early[-1])
    signals = next(replay.recording.signals(last))
    timings = time_scoring(list(routers.values()), signals, last, cfg.EVAL.TIMING_THREADS)
    return {name: timing.ms for name, timing in zip(routers, timings, strict=True)}


def _throughput(
    cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter, budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of batches mixed as at each of a policy's budgets, in eager PyTorch."""
    threads, timed = cfg.EVAL.TIMING_THREADS, []
    router = ExitRouter(**router.to_dict()).to(next(model.parameters()).device)  # the given one stays where it is
    for entry in progress(budgets, desc="batches"):
        speed = mixed_throughput(model, router, list(entry["exit_share"].values()), threads=threads)
        timed.append(
            {"budget": entry["budget"], "exit_share": entry["exit_share"], "threads": threads, **asdict(speed)}
        )
    return timed


def _with_learnt_thresholds(
    cfg: CfgNode, splits: Splits, router: ExitRouter, budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """At the same budgets with thresholds by gradient instead of search."""
    calib, test = splits.calib.confidences(router), splits.test.confidences(router)
    costs_with, losses = splits.costs.per_exit, splits.calib.losses(cfg.CALIBRATION.REFERENCE)
    entries = []
    for budget in progress([entry["budget"] for entry in budgets], desc="learnt thresholds"):
        thresholds = learn_open_exits(calib, losses, costs_with, budget)
        choice = choose(test, thresholds).astype(np.int64)
        line = line_of(splits.test.matches, choice, costs_with(thresholds))
        entries.append({"budget": budget, "thresholds": thresholds.tolist(), **asdict(line)})
    return entries

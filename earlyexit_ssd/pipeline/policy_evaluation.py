"""One policy at five equal mean costs, and along the curves of published rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices, interval
from earlyexit_ssd.evaluation.choices import ap_of_choice
from earlyexit_ssd.evaluation.reference_lines import (
    Line,
    coin,
    gap_closed,
    line_of,
    oracle_over_exits,
    pooled_gap,
    resampled_leads,
    tosses,
)
from earlyexit_ssd.pipeline.cost_model import CostModel
from earlyexit_ssd.pipeline.replay import Replay
from earlyexit_ssd.progress import progress
from earlyexit_ssd.routing.budgets import even_budgets, msdnet_shares, thresholds_for_shares
from earlyexit_ssd.routing.search import cheapest_within, choose, threshold_grid

MSDNET_Q = np.geomspace(0.1, 10, 25)


@dataclass(frozen=True)
class Splits:
    """What chooses (calib), what is reported (test), the exits' costs, and which early exits are empty."""

    calib: Replay
    test: Replay
    costs: CostModel
    exit_names: tuple[str, ...]
    empty: tuple[bool, ...]
    seed: int

    def budgets(self) -> list[float]:
        """Mean costs between that of the first exit where any policy may let photos leave, one with a branch if there
        is any, and that of the full path alone; above it there is nothing to route for."""
        first = 0 if all(self.empty) else self.empty.index(False)
        return even_budgets(self.costs.per_exit()[first], self.costs.per_exit([CLOSED] * len(self.empty))[-1])


@dataclass(frozen=True)
class Lines:
    """A router on a split, and a coin and oracles at its cost.

    choice: the router's exits, [n].
    oracles: ``oracle``, of least error, and ``best_oracle``, of most AP50 among such: exits [n] and line of each.
    """

    choice: np.ndarray
    router: Line
    chance: Line
    oracles: dict[str, tuple[np.ndarray, Line]]

    def leads(self, oracle: str, figure: str = "AP50") -> tuple[float, float]:
        """Of the router and one of the oracles over the coin, in ``AP50`` or ``AP``; NaN without an object."""
        values = [getattr(line, figure) for line in (self.router, self.chance, self.oracles[oracle][1])]
        router, chance, best = (np.nan if value is None else value for value in values)
        return router - chance, best - chance


def best_policy(policies: Mapping[str, Any]) -> str:
    """The one that closes most of the gap on the calib photos; those of the test split choose nothing."""
    gaps = {name: found["calib_pooled_gap"] for name, found in policies.items()}
    return max(gaps, key=lambda name: -np.inf if gaps[name] is None else gaps[name])


def evaluate_policy(
    splits: Splits, calib: list[np.ndarray], test: list[np.ndarray], name: str
) -> tuple[dict[str, Any], list[Lines]]:
    """At five equal budgets with searched thresholds, and along MSDNet's curve of shares; and what each budget's
    figures on the test photos come from.

    Args:
        calib, test: per early exit the policy's confidences [n].
    """
    grid = threshold_grid(calib)
    mean_costs = grid.mean_cost(splits.costs.of_each(grid.thresholds))
    ap50 = splits.calib.ap50_of(grid.choices, f"thresholds of {name}")
    budgets, lines_of_test, lines_of_calib = [], [], []
    for budget in splits.budgets():
        thresholds = grid.thresholds[cheapest_within(mean_costs, -ap50, budget)]
        lines = _lines(splits, splits.test, test, thresholds)
        budgets.append({"budget": budget, **_figures(splits, lines, thresholds)})
        lines_of_test.append(lines)
        lines_of_calib.append(_lines(splits, splits.calib, calib, thresholds))
    gaps = [entry["gap_closed"] for entry in budgets]
    by_oracle = _pooled(splits, lines_of_test)
    found = {
        "budgets": budgets,
        "gap_closed": None if None in gaps else float(np.mean(gaps)),
        "pooled_gap": by_oracle["oracle"],
        "pooled_gap_of_best_oracle": by_oracle["best_oracle"],
        "pooled_gap_by_AP": _number(pooled_gap([lines.leads("best_oracle", "AP") for lines in lines_of_test])),
        "calib_pooled_gap": _number(pooled_gap([lines.leads("best_oracle") for lines in lines_of_calib])),
        "msdnet": [_at_shares(splits, calib, test, msdnet_shares(len(splits.exit_names), q)) for q in MSDNET_Q],
        "leak": _leak(splits, calib, test, budgets),
    }
    return found, lines_of_test


def add_intervals(splits: Splits, found: dict[str, Any], lines: Sequence[Lines]) -> None:
    """Put bootstrap intervals of AP and AP50 into ``found``: router, one toss of the coin, oracles at every budget.

    Args:
        found, lines: of `evaluate_policy`.
    """
    for entry, one in zip(progress(found["budgets"], desc="intervals"), lines, strict=True):
        choices = [one.choice, tosses(one.choice, 1, splits.seed)[0], *(exits for exits, _ in one.oracles.values())]
        rows = [entry, entry["coin"], *(entry[name] for name in one.oracles)]
        for row, intervals in zip(rows, ap_intervals(splits, choices), strict=True):
            row.update(intervals)


def ap_intervals(splits: Splits, choices: Sequence[np.ndarray]) -> list[dict[str, tuple[float, float] | None]]:
    """Of AP and AP50, where the test photos take these exits, [n] each."""
    found = bootstrap_choices(splits.test.matches, choices, seed=splits.seed, ap50_only=False)
    return [{"AP_interval": interval(draws.AP), "AP50_interval": interval(draws.AP50)} for draws in found]


def _lines(splits: Splits, split: Replay, confidences: list[np.ndarray], thresholds: Sequence[float]) -> Lines:
    costs = splits.costs.per_exit(thresholds)
    choice = choose(confidences, thresholds).astype(np.int64)
    router = line_of(split.matches, choice, costs)
    rows = np.arange(len(choice))
    values = {
        "oracle": lambda exits: 1 - split.errors[rows, exits].mean(),
        "best_oracle": lambda exits: ap_of_choice(split.matches, exits, ap50_only=True).AP50,
    }
    oracles = {}
    for name, value in values.items():
        exits, exit_costs = oracle_over_exits(split.errors, splits.costs.per_exit, router.cost, value)
        oracles[name] = exits, line_of(split.matches, exits, exit_costs)
    return Lines(choice, router, coin(split.matches, choice, costs, splits.seed), oracles)


def _pooled(splits: Splits, lines: Sequence[Lines]) -> dict[str, dict[str, Any]]:
    """By oracle, the pooled gap of all budgets and its bootstrap interval."""
    names = list(lines[0].oracles)
    resampled = [
        resampled_leads(splits.test.matches, one.choice, [exits for exits, _ in one.oracles.values()], seed=splits.seed)
        for one in lines
    ]
    pooled = {}
    for name, draws in zip(names, zip(*resampled, strict=True), strict=True):
        value = _number(pooled_gap([one.leads(name) for one in lines]))
        pooled[name] = {"value": value, "interval": None if value is None else interval(pooled_gap(draws))}
    return pooled


def _figures(splits: Splits, lines: Lines, thresholds: np.ndarray) -> dict[str, Any]:
    """The figures on the test photos."""
    matches, choice = splits.test.matches, lines.choice
    full = len(splits.exit_names) - 1
    routed, kept = bootstrap_choices(matches, [choice, np.full(len(choice), full)], seed=splits.seed)
    shares = np.bincount(choice, minlength=full + 1) / len(choice)
    return {
        "thresholds": [float(value) for value in thresholds],
        **asdict(lines.router),
        "AP50_interval": interval(routed.AP50),
        "AP50_below_full_interval": interval(kept.AP50 - routed.AP50),
        "coin": asdict(lines.chance),
        **{name: asdict(line) for name, (_, line) in lines.oracles.items()},
        "gap_closed": gap_closed(lines.router, lines.chance, lines.oracles["oracle"][1]),
        "speedup": splits.costs.speedup(choice, thresholds),
        "loss": float(splits.test.losses("full")[np.arange(len(choice)), choice].mean()),
        "exit_share": dict(zip(splits.exit_names, shares.tolist(), strict=True)),
    }


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


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

"""Published early-exit rules beside the best policy, on the same exits and photos, at equal mean costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from earlyexit_ssd.report.numbers import figure

BRANCHYNET, MSDNET = "entropy", "max_foreground"
"""The policies that stand for BranchyNet (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018)."""


def published_rules_table(policies: Mapping[str, Any], best: str, unit: str) -> str:
    """AP50 at the mean costs of the policy ``best``; curves are interpolated, "-" where they do not reach.

    Args:
        policies: of routing.json, by name: ``budgets``, ``msdnet`` and ``leak``.
        unit: of the costs.
    """
    entries = policies[best]["budgets"]
    costs = [entry["cost"] for entry in entries]
    rows = [(f"{best}, searched thresholds", [entry["AP50"] for entry in entries])]
    if BRANCHYNET in policies and best != BRANCHYNET:
        rows.append(("BranchyNet: entropy, searched thresholds", _at(costs, _curve(policies[BRANCHYNET]["budgets"]))))
    if MSDNET in policies and best != MSDNET:
        rows.append(("MSDNet: shares q^k of max_foreground", _at(costs, _curve(policies[MSDNET]["msdnet"]))))
    rows.append((f"MSDNet: shares q^k of {best}", _at(costs, _curve(policies[best]["msdnet"]))))
    leaks = policies[best]["leak"]
    rows.append((f"percentiles of {best} from calib", [leak["calib"]["AP50"] for leak in leaks]))
    rows.append(("DynamicDet: the same percentiles of the reported photos", [leak["test"]["AP50"] for leak in leaks]))
    lines = [
        "| " + " | ".join(["rule", *(f"{cost:.0f} {unit}" for cost in costs)]) + " |",
        "| " + " | ".join(["---", *["---:"] * len(costs)]) + " |",
    ]
    lines += ["| " + " | ".join([name, *map(figure, values)]) + " |" for name, values in rows]
    return "\n".join(lines)


def _curve(points: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The points (cost, AP50) by rising cost."""
    return sorted((point["cost"], point["AP50"]) for point in points if point["AP50"] is not None)


def _at(costs: Sequence[float], curve: Sequence[tuple[float, float]]) -> list[float | None]:
    if not curve:
        return [None] * len(costs)
    x, y = zip(*curve, strict=True)
    return [float(np.interp(cost, x, y)) if x[0] <= cost <= x[-1] else None for cost in costs]

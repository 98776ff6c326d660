"""The chosen policy between a coin and an oracle, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from earlyexit_ssd.report.numbers import figure

NAMES = {"best_oracle": "best oracle"}


def reference_lines_table(policies: Mapping[str, Any], names: Sequence[str]) -> str:
    """AP and AP50 with 95 % intervals at every budget: each policy of ``names``, coin and oracles at the first's cost.

    Args:
        policies: of routing.json, by name; those named have intervals.
    """
    first = policies[names[0]]["budgets"]
    lines = [
        (names[0], first),
        *((line, [entry[line] for entry in first]) for line in ("coin", "oracle", "best_oracle")),
    ]
    lines += [(name, policies[name]["budgets"]) for name in names[1:]]
    rows = [
        "| " + " | ".join(["line", "figure", *(f"budget {entry['budget']:.1f}" for entry in first)]) + " |",
        "| " + " | ".join(["---", "---", *["---:"] * len(first)]) + " |",
    ]
    for name, entries in lines:
        for key in ("AP", "AP50"):
            rows.append(
                "| "
                + " | ".join([NAMES.get(name, name), key, *(with_interval(entry, key) for entry in entries)])
                + " |"
            )
    return "\n".join(rows)


def with_interval(entry: Mapping[str, Any], key: str) -> str:
    """``0.713 [0.678, 0.751]``; the figure alone where there is no interval."""
    bounds = entry[f"{key}_interval"]
    return figure(entry[key]) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")

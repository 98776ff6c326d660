"""The chosen policy between a coin and oracles, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_ssd.report.numbers import figure

LINES = {"coin": "coin", "oracle": "oracle", "best_oracle": "best oracle"}
"""What a policy is held against: its key, and its name."""


def reference_lines_table(policies: Mapping[str, Any], best: str) -> str:
    """AP and AP50 with 95 % intervals at every budget: the policy ``best``, coin and oracles at its cost, and the
    other policies that have such intervals.

    Args:
        policies: of routing.json, by name.
    """
    first = policies[best]["budgets"]
    others = {name: one["budgets"] for name, one in policies.items() if name != best}
    lines = {best: first} | {name: [entry[key] for entry in first] for key, name in LINES.items()}
    lines |= {name: entries for name, entries in others.items() if "AP_interval" in entries[0]}
    rows = [
        "| " + " | ".join(["line", "figure", *(f"budget {entry['budget']:.1f}" for entry in first)]) + " |",
        "| " + " | ".join(["---", "---", *["---:"] * len(first)]) + " |",
    ]
    for name, entries in lines.items():
        for key in ("AP", "AP50"):
            rows.append("| " + " | ".join([name, key, *(with_interval(entry, key) for entry in entries)]) + " |")
    return "\n".join(rows)


def with_interval(entry: Mapping[str, Any], key: str) -> str:
    """``0.713 [0.678, 0.751]``; the figure alone where there is no interval."""
    bounds = entry[f"{key}_interval"]
    return figure(entry[key]) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")

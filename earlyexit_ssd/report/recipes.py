"""Recipes for the exits as a Markdown table, seeds of a recipe in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any


def recipe_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row per recipe: minutes of a training, then of each early exit AP50 (mean, and range over the seeds), the
    MMACs of a photo that leaves there, and the parameters of its branch in millions.

    Args:
        rows: of :func:`earlyexit_ssd.pipeline.recipes.compare_recipes`.
    """
    by_recipe: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    exits = list(dict.fromkeys(name for row in rows for name in row["parameters"]))
    figures = [f"{name} {what}" for name in exits for what in ("AP50", "MMAC", "M param.")]
    heads = ["recipe", "seeds", "minutes", *figures]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for recipe, trials in by_recipe.items():
        cells = [recipe, str(len(trials)), f"{mean(trial['minutes'] for trial in trials):.1f}"]
        for name in exits:
            cells += _exit_cells(trials, name)
        lines.append(_line(cells))
    return "\n".join(lines)


def _exit_cells(trials: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    if name not in trials[0]["parameters"]:
        return ["-", "-", "-"]
    values = [trial["AP50"][name] or 0.0 for trial in trials]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return [
        f"{mean(values):.3f}{spread}",
        f"{trials[0]['mmacs'][name]:.0f}",
        f"{trials[0]['parameters'][name] / 1e6:.2f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

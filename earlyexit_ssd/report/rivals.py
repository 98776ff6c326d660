"""The chart of exits and static rivals: accuracy against time and against operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from earlyexit_ssd.report.labels import place_labels
from earlyexit_ssd.report.plot import EXITS, PLAIN, ROUTED, data_title, draw_charts
from earlyexit_ssd.report.rows import Row, exit_rows, static_rows, timing_title, with_branches

STYLES = {
    "single_exit": ("#00838f", "v"),
    "plain": (PLAIN, "s"),
    "cut_head": ("#8d6e63", "p"),
    "onnx": ("#805ad5", "^"),
}
"""Kinds of rivals -> colour and marker."""


def accuracy_against_cost(metrics: Mapping[str, Any]) -> Image.Image:
    """AP and AP50 (rows) against milliseconds and MMACs (columns); undefined points are left out.

    What was timed in another runtime than the exits has a hollow marker in the column of milliseconds.
    """
    return draw_charts(lambda axes: _draw(axes, metrics), 2, 2, (13, 9))


def _draw(all_axes: np.ndarray, metrics: Mapping[str, Any]) -> None:
    for axes, quality in zip(all_axes, ("AP", "AP50"), strict=True):
        axes[0].set_ylabel(quality)
        for one, cost in zip(axes, ("ms", "mmacs"), strict=True):
            _draw_points(one, metrics, quality, cost)
    for axes, title in zip(all_axes[-1], (f"ms per image ({timing_title(metrics)})", "MMAC per image"), strict=True):
        axes.set_xlabel(title)
    all_axes[0, 0].set_title(data_title(metrics), loc="left")
    all_axes[0, 0].figure.draw_without_rendering()  # now it is settled where points are
    for axes, quality in zip(all_axes, ("AP", "AP50"), strict=True):
        for one, cost in zip(axes, ("ms", "mmacs"), strict=True):
            _name_points(one, metrics, quality, cost)


def _draw_points(axes: Axes, metrics: Mapping[str, Any], quality: str, cost: str) -> None:
    families = [(_family(metrics, kind, cost), STYLES[kind][0]) for kind in ("plain", "cut_head")]
    for rows, color in ((with_branches(metrics["exits"]), EXITS), *families):
        line = _points(rows, quality, cost)
        axes.plot([x for x, _ in line], [y for _, y in line], color=color, alpha=0.3, zorder=1)
    for row, color, marker in _styled(metrics):
        for x, y in _points([row], quality, cost):
            filled = cost != "ms" or not row.get("other_runtime")
            axes.plot(x, y, marker, color=color, markersize=8, markerfacecolor=color if filled else "white", zorder=2)
    axes.margins(0.12)


def _name_points(axes: Axes, metrics: Mapping[str, Any], quality: str, cost: str) -> None:
    """After all points of the row and column, which share their scales."""
    named = [(row, color) for row, color, _ in _styled(metrics) if _points([row], quality, cost)]
    texts = [_name(row, cost) for row, _ in named]
    place_labels(axes, _points([row for row, _ in named], quality, cost), texts, [color for _, color in named])


def _styled(metrics: Mapping[str, Any]) -> list[tuple[Row, str, str]]:
    """Rows with colour and marker."""
    *exits, routed = exit_rows(metrics)
    ours = [*((row, EXITS, "o") for row in with_branches(exits)), (routed, ROUTED, "D")]
    return [*ours, *((row, *STYLES[row.get("kind", "plain")]) for row in static_rows(metrics))]


def _points(rows: Sequence[Row], quality: str, cost: str) -> list[tuple[float, float]]:
    return [(row[cost], row[quality]) for row in rows if row[cost] is not None and row[quality] is not None]


def _family(metrics: Mapping[str, Any], kind: str, cost: str) -> list[Row]:
    """One network at several sizes, which a line may join: no other file's."""
    rows = (row for row in static_rows(metrics) if row.get("kind", "plain") == kind and row.get("source") is None)
    return sorted(rows, key=lambda row: row[cost])


def _name(row: Row, cost: str) -> str:
    other = row.get("other_runtime") if cost == "ms" else None
    return f"{row['name']} ({other})" if other else row["name"]

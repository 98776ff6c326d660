"""Charts: their common frame, accuracy against time and operations, and the curves of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import Interval, Results, Row, data_title, exit_rows, static_rows, timing_title

EXITS, ROUTED, PLAIN = "#2b6cb0", "#dd6b20", "#4a5568"
STYLES = {
    "exit": (EXITS, "o"),
    "routed": (ROUTED, "D"),
    "single_exit": ("#00838f", "v"),
    "plain": (PLAIN, "s"),
    "cut_head": ("#8d6e63", "p"),
    "onnx": ("#805ad5", "^"),
}
"""Kinds of rows -> colour and marker."""


def draw_charts(
    draw: Callable[[np.ndarray], None], rows: int = 1, columns: int = 1, inches: tuple[float, float] = (7.5, 5)
) -> Image.Image:
    """What ``draw`` puts on the axes [rows, columns], those of a row and of a column with one scale, at 128 dpi."""
    figure = Figure(figsize=inches, dpi=128, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, columns, sharex="col", sharey="row", squeeze=False)
    for axes in all_axes.flat:
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    draw(all_axes)
    make_drawable(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def make_drawable(artist: Artist) -> None:
    """Take all texts in it as they are: a name is no formula, and bytes in it that are no character are escaped."""
    for text in artist.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())


def accuracy_against_cost(results: Results) -> Image.Image:
    """AP and AP50 (rows) against milliseconds and MMACs (columns) of the exits, routing and the static detectors.

    Bars are 95 % intervals; undefined points and empty exits are left out. What was timed in another runtime than the
    exits has a hollow marker in the column of milliseconds.
    """
    rows = [row for row in (*exit_rows(results), *static_rows(results)) if not row.empty]
    panels = [(quality, cost) for quality in ("AP", "AP50") for cost in ("ms", "mmacs")]

    def draw(all_axes: np.ndarray) -> None:
        for axes, panel in zip(all_axes.flat, panels, strict=True):
            _draw_points(axes, rows, *panel)
        all_axes[1, 0].set_xlabel(f"ms per image ({timing_title(results)})")
        all_axes[1, 1].set_xlabel("MMAC per image")
        for axes, quality in zip(all_axes[:, 0], ("AP", "AP50"), strict=True):
            axes.set_ylabel(quality)
        all_axes[0, 0].set_title(data_title(results), loc="left")
        all_axes[0, 1].set_title("bars: 95 % intervals", loc="right", fontsize=9)
        make_drawable(all_axes[0, 0].figure)
        all_axes[0, 0].figure.draw_without_rendering()  # now it is settled where points are
        for axes, (quality, cost) in zip(all_axes.flat, panels, strict=True):
            named = [row for row in rows if _points([row], quality, cost)]
            other = [f" ({row.other_runtime})" if cost == "ms" and row.other_runtime else "" for row in named]
            texts = [row.name + runtime for row, runtime in zip(named, other, strict=True)]
            place_labels(axes, _points(named, quality, cost), texts, [STYLES[row.kind][0] for row in named])

    return draw_charts(draw, 2, 2, (13, 9))


def _draw_points(axes: Axes, rows: Sequence[Row], quality: str, cost: str) -> None:
    for kind in ("exit", "plain", "cut_head"):  # a line joins one network at several costs: no other file's
        family = [row for row in rows if row.kind == kind and row.source is None]
        line = _points(family if kind == "exit" else sorted(family, key=lambda row: row.number(cost)), quality, cost)
        axes.plot([x for x, _ in line], [y for _, y in line], color=STYLES[kind][0], alpha=0.3, zorder=1)
    for row in rows:
        color, marker = STYLES[row.kind]
        for x, y in _points([row], quality, cost):
            across = _bars(x, row.ms_interval if cost == "ms" else None)
            along = _bars(y, row.figures.get(f"{quality}_interval"))
            axes.errorbar(x, y, along, across, fmt="none", ecolor=color, elinewidth=1, alpha=0.5, zorder=1)
            filled = cost != "ms" or not row.other_runtime
            axes.plot(x, y, marker, color=color, markersize=8, markerfacecolor=color if filled else "white", zorder=2)
    axes.margins(0.12)


def _bars(value: float, interval: Interval) -> list[list[float]] | None:
    """Lengths below and above ``value``; a percentile interval may miss the value itself."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


def _points(rows: Sequence[Row], quality: str, cost: str) -> list[tuple[float, float]]:
    points = [(row.number(cost), row.number(quality)) for row in rows]
    return [point for point in points if None not in point]


LABEL_GAP, MARKER = 7, 9  # points between marker and text; pixels around a marker that are its own
PLACES = [
    (x * LABEL_GAP * far, y * LABEL_GAP * far, horizontal, vertical)
    for far in (1, 2.2, 3.6)
    for x, y, horizontal, vertical in (
        (1, -0.6, "left", "top"),
        (-1, 0.6, "right", "bottom"),
        (1, 0.6, "left", "bottom"),
        (-1, -0.6, "right", "top"),
        (1.2, 0, "left", "center"),
        (-1.2, 0, "right", "center"),
        (0, 1, "center", "bottom"),
        (0, -1, "center", "top"),
    )
]
"""Offsets in points and alignments, the most wanted first."""
SHIFTS = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
"""Alignment -> how far a text moves left or down, in its own width or height."""


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[str]
) -> None:
    """Write each text near its point (data coordinates), at the first of `PLACES` that covers least of the others.

    Limits and layout are to be final: draw the figure once before.
    """
    centres = axes.transData.transform(points) if len(points) else []
    taken = [Bbox([[x - MARKER, y - MARKER], [x + MARKER, y + MARKER]]) for x, y in centres]
    frame = axes.get_window_extent()
    for point, text, color in zip(points, texts, colors, strict=True):
        label = axes.annotate(text, point, textcoords="offset points", xytext=(0, 0), color=color, fontsize=9)
        make_drawable(label)
        label.set_in_layout(False)
        label.set(ha="left", va="bottom")
        own, scale = label.get_window_extent(), axes.figure.dpi / 72
        extents = [
            own.translated(x * scale - SHIFTS[horizontal] * own.width, y * scale - SHIFTS[vertical] * own.height)
            for x, y, horizontal, vertical in PLACES
        ]
        costs = [_area(box) - _area(Bbox.intersection(box, frame)) for box in extents]  # what the frame cuts off
        costs = [
            round(cost + sum(_area(Bbox.intersection(box, other)) for other in taken), 3)
            for cost, box in zip(costs, extents, strict=True)
        ]
        best = costs.index(min(costs))
        label.xyann = PLACES[best][:2]
        label.set(ha=PLACES[best][2], va=PLACES[best][3])
        taken.append(extents[best])


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box else 0.0


_CURVES = {"AP50": "AP50", "share": "share of photos", "temperature": "temperature"}


def training_curves(phases: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Image.Image | None:
    """AP50 of every exit, the share of the photos that leave there and its temperature, epoch by epoch.

    Args:
        phases: name -> lines of its log, in the order of training; the epochs are counted on from phase to phase.

    Returns:
        the picture, with a row for each of the three that was measured; None where none was.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {kind: {} for kind in _CURVES}
    starts, start = {}, 0.0
    for phase, lines in phases.items():
        starts[phase] = start
        for line in lines:
            for key, value in line.items():
                kind, _, name = key.partition("/")
                if kind in curves and value is not None:
                    curves[kind].setdefault(name, []).append((start + line["epoch"], value))
        start += max((line["epoch"] for line in lines), default=0.0)
    curves = {kind: points for kind, points in curves.items() if points}
    if not curves:
        return None
    names = list(dict.fromkeys(name for points in curves.values() for name in points))
    names.sort(key=lambda name: (name == "full", int(name.removeprefix("exit")) if name != "full" else 0))

    def draw(axes: np.ndarray) -> None:
        for row, (kind, points) in zip(axes[:, 0], curves.items(), strict=True):
            for name in (name for name in names if name in points):
                color = PLAIN if name == "full" else f"C{names.index(name)}"
                row.plot(*zip(*points[name], strict=True), color=color, marker=".", label=name)
            row.set_ylabel(_CURVES[kind])
            for begin in list(starts.values())[1:]:
                row.axvline(begin, color=PLAIN, linewidth=0.8, linestyle=":")
        above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9, "color": PLAIN}
        for phase, begin in starts.items():
            axes[0, 0].annotate(phase, (begin, 1.0), (3, 3), **above)
        axes[0, 0].legend(loc="best", frameon=False)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].set_xlim(0, 1.02 * start)

    return draw_charts(draw, len(curves), 1, (7.5, 1.0 + 2.2 * len(curves)))


class Candidate(Protocol):
    """What the chart of a search shows."""

    name: str
    exits: Sequence[str]
    AP50: float | None
    ms: float | None
    rival: bool


def candidates_chart(candidates: Sequence[Candidate], chosen: Candidate | None, runtime: str) -> Image.Image:
    """AP50 on the calib split against mean milliseconds of every candidate; the frontier is drawn, rivals are squares.

    Args:
        candidates: with ``name``, ``AP50``, ``ms``, ``exits`` and ``rival``, the detector as it is first.
        chosen: the one to ship.
        runtime: that measured them.
    """
    known = [one for one in candidates if one.ms is not None and one.AP50 is not None]
    own = sorted((one for one in known if not one.rival), key=lambda one: one.ms)
    best = np.maximum.accumulate([one.AP50 for one in own]) if own else []
    frontier = [one for one, before in zip(own, [-1.0, *best[:-1]], strict=True) if before < one.AP50] if own else []

    def draw(axes: Axes) -> None:
        axes.plot([one.ms for one in frontier], [one.AP50 for one in frontier], color=EXITS, alpha=0.4, zorder=1)
        for one in known:
            color = ROUTED if one == chosen else PLAIN if one.rival or not one.exits else EXITS
            axes.plot(one.ms, one.AP50, "s" if one.rival else "o", color=color, markersize=6, zorder=2)
            if one in frontier or one.rival or one is candidates[0]:
                bold = {"fontweight": "bold"} if one == chosen else {}
                place = {"textcoords": "offset points", "fontsize": 7, "color": color}
                axes.annotate(one.name, (one.ms, one.AP50), (5, -9), **place, **bold)
        axes.set_xlabel(f"ms per image, mean over the calib photos ({RUNTIME_TITLES[runtime]})")
        axes.set_ylabel("AP50 on the calib split")

    return draw_charts(lambda all_axes: draw(all_axes[0, 0]))

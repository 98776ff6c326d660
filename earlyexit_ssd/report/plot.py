"""Charts: their common frame, and accuracy against time of the exits, the routed detector and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from earlyexit_ssd.report.labels import make_drawable
from earlyexit_ssd.report.rows import timing_title, with_branches

EXITS, ROUTED, PLAIN = "#2b6cb0", "#dd6b20", "#4a5568"


def draw_chart(draw: Callable[[Axes], None]) -> Image.Image:
    """What ``draw`` puts on the axes, as a picture of 960 x 640 pixels."""
    return draw_charts(lambda axes: draw(axes[0, 0]), 1, 1, (7.5, 5))


def draw_charts(
    draw: Callable[[np.ndarray], None], rows: int, columns: int, inches: tuple[float, float]
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
    for text in figure.findobj(Text):
        make_drawable(text)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def accuracy_against_time(metrics: Mapping[str, Any]) -> Image.Image:
    """AP50 against milliseconds; bars are 95 % intervals, undefined points are left out."""
    return draw_chart(lambda axes: _draw_accuracy(axes, metrics))


def _draw_accuracy(axes: Axes, metrics: Mapping[str, Any]) -> None:
    exits, plain, routed = metrics["exits"], metrics["without_exits"], metrics["routed"]
    defined = [one for one in with_branches(exits) if one["AP50"] is not None]
    times, values = [one["ms"] for one in defined], [one["AP50"] for one in defined]
    axes.plot(times, values, color=EXITS, alpha=0.35, zorder=1)
    for one in defined:
        _point(axes, one, one["name"], EXITS, "o")
    _point(axes, {**exits[-1], **plain}, "without exits", PLAIN, "s", above=True)
    _point(axes, routed, "routed", ROUTED, "D", above=True)
    _label(axes, metrics)


def _point(axes: Axes, row: Mapping[str, Any], label: str, color: str, marker: str, above: bool = False) -> None:
    """A marker with its bars; the exits' curve rises, so above to the left and below to the right are free."""
    if row["AP50"] is None or row["ms"] is None:
        return
    x, y = row["ms"], row["AP50"]
    axes.errorbar(
        x,
        y,
        xerr=_bars(x, row.get("ms_interval")),
        yerr=_bars(y, row.get("AP50_interval")),
        fmt=marker,
        color=color,
        markersize=8,
        elinewidth=1.2,
        capsize=3,
        zorder=2,
    )
    offset, horizontal, vertical = ((-8, 7), "right", "bottom") if above else ((8, -7), "left", "top")
    place = {"textcoords": "offset points", "ha": horizontal, "va": vertical}
    axes.annotate(f"{label}  {y:.3f}", (x, y), offset, color=color, **place)


def _bars(value: float, interval: list[float] | None) -> list[list[float]] | None:
    """Lengths below and above ``value``; a percentile interval may miss the value itself."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


def _label(axes: Axes, metrics: Mapping[str, Any]) -> None:
    axes.set_xlabel(f"ms per image ({timing_title(metrics)})")
    axes.set_ylabel("AP50")
    axes.set_title(data_title(metrics), loc="left")
    axes.set_title("bars: 95 % intervals", loc="right", fontsize=9, color="#718096")


def training_curves(phases: Mapping[str, Sequence[Mapping[str, Any]]]) -> Image.Image | None:
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

    def draw(axes: np.ndarray) -> None:
        names = list(dict.fromkeys(name for points in curves.values() for name in points))
        names.sort(key=lambda name: (name == "full", int(name.removeprefix("exit")) if name != "full" else 0))
        for row, (kind, points) in zip(axes[:, 0], curves.items(), strict=True):
            for name in (name for name in names if name in points):
                color = PLAIN if name == "full" else f"C{names.index(name)}"
                row.plot(*zip(*points[name], strict=True), color=color, marker=".", label=name)
            row.set_ylabel(_CURVES[kind])
            for begin in list(starts.values())[1:]:
                row.axvline(begin, color=PLAIN, linewidth=0.8, linestyle=":")
        for phase, begin in starts.items():
            axes[0, 0].annotate(phase, (begin, 1.0), (3, 3), xycoords=("data", "axes fraction"), **_ABOVE)
        axes[0, 0].legend(loc="best", frameon=False)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].set_xlim(0, 1.02 * start)

    return draw_charts(draw, len(curves), 1, (7.5, 1.0 + 2.2 * len(curves)))


_CURVES = {"AP50": "AP50", "share": "share of photos", "temperature": "temperature"}
_ABOVE = {"textcoords": "offset points", "fontsize": 9, "color": PLAIN}


def data_title(metrics: Mapping[str, Any]) -> str:
    """What was evaluated."""
    context = metrics["context"]
    return f"{', '.join(context['splits']) or 'unnamed data'}: {context['images']} photos"

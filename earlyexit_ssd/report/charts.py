"""Charts: their common frame, and accuracy against time of the exits, the routed detector and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import Interval, Results
from earlyexit_ssd.report.pictures import make_drawable, place_labels
from earlyexit_ssd.report.tables import Row, data_title, exit_rows, static_rows, timing_title

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
    make_drawable(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def accuracy_against_time(results: Results) -> Image.Image:
    """AP50 against milliseconds; bars are 95 % intervals, undefined points are left out."""
    return draw_chart(lambda axes: _draw_accuracy(axes, results))


def _draw_accuracy(axes: Axes, results: Results) -> None:
    *exits, routed = exit_rows(results)
    exits = _with_branches(exits)
    line = _points(exits, "AP50", "ms")
    axes.plot([x for x, _ in line], [y for _, y in line], color=EXITS, alpha=0.35, zorder=1)
    for one in exits:
        _point(axes, one, EXITS, "o")
    _point(axes, static_rows(results)[0], PLAIN, "s", above=True)
    _point(axes, routed, ROUTED, "D", above=True)
    axes.set_xlabel(f"ms per image ({timing_title(results)})")
    axes.set_ylabel("AP50")
    axes.set_title(data_title(results), loc="left")
    axes.set_title("bars: 95 % intervals", loc="right", fontsize=9, color="#718096")


def _point(axes: Axes, row: Row, color: str, marker: str, above: bool = False) -> None:
    """A marker with its bars; the exits' curve rises, so above to the left and below to the right are free."""
    for x, y in _points([row], "AP50", "ms"):
        bars = {"xerr": _bars(x, row.ms_interval), "yerr": _bars(y, row.figures.get("AP50_interval"))}
        axes.errorbar(x, y, **bars, fmt=marker, color=color, markersize=8, elinewidth=1.2, capsize=3, zorder=2)
        offset, horizontal, vertical = ((-8, 7), "right", "bottom") if above else ((8, -7), "left", "top")
        place = {"textcoords": "offset points", "ha": horizontal, "va": vertical}
        axes.annotate(f"{row.name}  {y:.3f}", (x, y), offset, color=color, **place)


def _bars(value: float, interval: Interval) -> list[list[float]] | None:
    """Lengths below and above ``value``; a percentile interval may miss the value itself."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


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


# The chart of exits and static rivals: accuracy against time and against operations.

STYLES = {
    "exit": (EXITS, "o"),
    "routed": (ROUTED, "D"),
    "single_exit": ("#00838f", "v"),
    "plain": (PLAIN, "s"),
    "cut_head": ("#8d6e63", "p"),
    "onnx": ("#805ad5", "^"),
}
"""Kinds of rows -> colour and marker."""


def accuracy_against_cost(results: Results) -> Image.Image:
    """AP and AP50 (rows) against milliseconds and MMACs (columns); undefined points are left out.

    What was timed in another runtime than the exits has a hollow marker in the column of milliseconds.
    """
    return draw_charts(lambda axes: _draw_cost(axes, results), 2, 2, (13, 9))


def _draw_cost(all_axes: np.ndarray, results: Results) -> None:
    rows = _with_branches([*exit_rows(results), *static_rows(results)])
    panels = [
        (all_axes[row, column], rows, quality, cost)
        for row, quality in enumerate(("AP", "AP50"))
        for column, cost in enumerate(("ms", "mmacs"))
    ]
    for panel in panels:
        _draw_points(*panel)
    for axes, title in zip(all_axes[-1], (f"ms per image ({timing_title(results)})", "MMAC per image"), strict=True):
        axes.set_xlabel(title)
    for axes, title in zip(all_axes[:, 0], ("AP", "AP50"), strict=True):
        axes.set_ylabel(title)
    all_axes[0, 0].set_title(data_title(results), loc="left")
    make_drawable(all_axes[0, 0].figure)
    all_axes[0, 0].figure.draw_without_rendering()  # now it is settled where points are
    for panel in panels:
        _name_points(*panel)


def _draw_points(axes: Axes, rows: Sequence[Row], quality: str, cost: str) -> None:
    for kind in ("exit", "plain", "cut_head"):  # a line joins one network at several costs: no other file's
        family = [row for row in rows if row.kind == kind and row.source is None]
        line = _points(family if kind == "exit" else sorted(family, key=lambda row: row.number(cost)), quality, cost)
        axes.plot([x for x, _ in line], [y for _, y in line], color=STYLES[kind][0], alpha=0.3, zorder=1)
    for row in rows:
        color, marker = STYLES[row.kind]
        for x, y in _points([row], quality, cost):
            filled = cost != "ms" or not row.other_runtime
            axes.plot(x, y, marker, color=color, markersize=8, markerfacecolor=color if filled else "white", zorder=2)
    axes.margins(0.12)


def _name_points(axes: Axes, rows: Sequence[Row], quality: str, cost: str) -> None:
    """After all points of the row and column, which share their scales."""
    named = [row for row in rows if _points([row], quality, cost)]
    texts = [f"{row.name} ({row.other_runtime})" if cost == "ms" and row.other_runtime else row.name for row in named]
    place_labels(axes, _points(named, quality, cost), texts, [STYLES[row.kind][0] for row in named])


def _with_branches(rows: Sequence[Row]) -> list[Row]:
    """The rows without empty exits, which have no accuracy to draw."""
    return [row for row in rows if not row.empty]


def _points(rows: Sequence[Row], quality: str, cost: str) -> list[tuple[float, float]]:
    points = [(row.number(cost), row.number(quality)) for row in rows]
    return [point for point in points if None not in point]


# The placement advisor's findings as a table and a chart.

Plan = Mapping[str, Any]


def placement_report(plan: Plan) -> str:
    """Table of the layers, and in words which of them can give the wanted speed-up."""
    context, shares = plan["context"], list(plan["placements"][0]["speedups"])
    heads = [f"{float(share):.0%}" for share in shares]
    wanted = f"share for {plan['speedup']:g}x"
    lines = [
        f"one exit; ms of one image in {RUNTIME_TITLES[context['runtime']]}, {context['threads']} thread(s); "
        f"the detector without exits takes {plan['plain_ms']:.1f} ms",
        "speed-up if that share of the photos leaves there:",
        "",
        f"layer  MMAC     ms  {'  '.join(head.rjust(5) for head in heads)}  {wanted}   AP50",
    ]
    for row in plan["placements"]:
        speedups = "  ".join(f"{row['speedups'][share]:4.2f}x" for share in shares)
        share = row["share_for_speedup"]
        needed = ("never" if share is None else f"{share:.0%}").rjust(len(wanted))
        ap50 = "-" if row["AP50"] is None else f"{row['AP50']:.3f}"
        lines.append(f"{row['layer']:5d}  {row['mmacs']:4.0f}  {row['ms']:5.1f}  {speedups}  {needed}  {ap50:>5}")
    return "\n".join([*lines, "", _advice(plan)])


def _advice(plan: Plan) -> str:
    able = [str(row["layer"]) for row in plan["placements"] if row["share_for_speedup"] is not None]
    if not able:
        return f"no exit can reach {plan['speedup']:g}x, even if every photo leaves there: a smaller detector may"
    line = f"{plan['speedup']:g}x can be reached by exits behind layers {', '.join(able)}, if enough photos leave"
    proposal = plan["proposal"]
    if plan["full_AP50"] is None:
        return f"{line}; --probe-epochs 3 would say how well they detect"
    if proposal is None:
        return f"{line}; none is proposed, since none was found to detect"
    layers = proposal["layers"]
    names = [*(f"exit{layer}" for layer in layers), "full"]
    shares = ", ".join(f"{share:.0%} at {name}" for name, share in zip(names, proposal["shares"], strict=True))
    return (
        f"{line}\nproposed: EXITS.LAYERS {list(layers)}: AP50 {proposal['AP50']:.3f} of {plan['full_AP50']:.3f} "
        f"if chance chose who leaves ({shares}); short probes, so more can be expected of a full training"
    )


def placement_chart(plan: Plan) -> Image.Image:
    """Speed-up against layer, a line for each share of photos that leave."""
    return draw_chart(lambda axes: _draw_placements(axes, plan))


def _draw_placements(axes: Axes, plan: Plan) -> None:
    layers = [row["layer"] for row in plan["placements"]]
    for share in plan["placements"][0]["speedups"]:
        values = [row["speedups"][share] for row in plan["placements"]]
        axes.plot(layers, values, marker="o", label=f"{float(share):.0%} of the photos leave")
    axes.axhline(plan["speedup"], color=PLAIN, linestyle="--", linewidth=1, label="wanted")
    axes.axhline(1.0, color=PLAIN, linewidth=1)
    axes.set_xlabel("trunk layer behind which the exit leaves")
    axes.set_ylabel("speed-up against the detector without exits")
    axes.set_xticks(layers)
    axes.legend(frameon=False)


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

    return draw_chart(draw)

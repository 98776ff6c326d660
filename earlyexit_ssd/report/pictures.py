"""The pictures that jobs write: charts, and photos with their boxes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw
from torch import Tensor

from earlyexit_ssd.calibration.thresholds import FittedTemperature, Reliability
from earlyexit_ssd.engine.hooks import LogLine
from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import Interval, Results, Row, data_title, exit_rows, static_rows, timing_title
from earlyexit_ssd.images import color_of, draw_boxes, font_of

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
    _make_drawable(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _make_drawable(artist: Artist) -> None:
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
    panels = list(itertools.product(("AP", "AP50"), ("ms", "mmacs")))

    def draw(all_axes: np.ndarray) -> None:
        for axes, (quality, cost) in zip(all_axes.flat, panels, strict=True):
            _draw_points(axes, _known(rows, quality, cost), quality, cost)
        all_axes[1, 0].set_xlabel(f"ms per image ({timing_title(results)})")
        all_axes[1, 1].set_xlabel("MMAC per image")
        all_axes[0, 0].set_ylabel("AP")
        all_axes[1, 0].set_ylabel("AP50")
        all_axes[0, 0].set_title(data_title(results), loc="left")
        all_axes[0, 1].set_title("bars: 95 % intervals", loc="right", fontsize=9)
        _make_drawable(all_axes[0, 0].figure)
        all_axes[0, 0].figure.draw_without_rendering()  # now it is settled where points are
        for axes, (quality, cost) in zip(all_axes.flat, panels, strict=True):
            known = _known(rows, quality, cost)
            other = [f" ({row.other_runtime})" if cost == "ms" and row.other_runtime else "" for row in known]
            texts = [row.name + runtime for row, runtime in zip(known, other, strict=True)]
            points = [(row.number(cost), row.number(quality)) for row in known]
            place_labels(axes, points, texts, [STYLES[row.kind][0] for row in known])

    return draw_charts(draw, 2, 2, (13, 9))


def _known(rows: Sequence[Row], quality: str, cost: str) -> list[Row]:
    return [row for row in rows if row.number(quality) is not None and row.number(cost) is not None]


def _draw_points(axes: Axes, rows: Sequence[Row], quality: str, cost: str) -> None:
    for kind in ("exit", "plain", "cut_head"):  # a line joins one network at several costs: no other file's
        family = [row for row in rows if row.kind == kind and row.source is None]
        family = family if kind == "exit" else sorted(family, key=lambda row: row.number(cost))
        x, y = ([row.number(name) for row in family] for name in (cost, quality))
        axes.plot(x, y, color=STYLES[kind][0], alpha=0.3, zorder=1)
    for row in rows:
        color, marker = STYLES[row.kind]
        x, y = row.number(cost), row.number(quality)
        across = _bars(x, row.ms_interval if cost == "ms" else None)
        along = _bars(y, row.figures.get(f"{quality}_interval"))
        axes.errorbar(x, y, along, across, fmt="none", ecolor=color, elinewidth=1, alpha=0.5, zorder=1)
        filled = cost != "ms" or not row.other_runtime
        axes.plot(x, y, marker, color=color, markersize=8, markerfacecolor=color if filled else "white", zorder=2)
    axes.margins(0.12)


def _bars(value: float, interval: Interval) -> list[list[float]] | None:
    """Lengths below and above ``value``; a percentile interval may miss the value itself."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


LABEL_GAP, MARKER = 7, 9  # points between marker and text; pixels around a marker that are its own
PLACES = [
    (x * LABEL_GAP * far, y * LABEL_GAP * far)
    for far in (1, 2.2, 3.6)
    for x, y in ((1, -0.6), (-1, 0.6), (1, 0.6), (-1, -0.6), (1.2, 0), (-1.2, 0), (0, 1), (0, -1))
]
"""Places of a text beside its point, the most wanted first: offsets in points to the right and up."""


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[str]
) -> None:
    """Write each text near its point (data coordinates), at the first of `PLACES` that covers least of the others.

    Limits and layout are to be final: draw the figure once before.
    """
    centres = axes.transData.transform(points) if len(points) else []
    taken = [Bbox([[x - MARKER, y - MARKER], [x + MARKER, y + MARKER]]) for x, y in centres]
    frame, scale = axes.get_window_extent(), axes.figure.dpi / 72
    for point, text, color in zip(points, texts, colors, strict=True):
        label = axes.annotate(
            text, point, (0, 0), textcoords="offset points", color=color, fontsize=9, ha="left", va="bottom"
        )
        _make_drawable(label)
        label.set_in_layout(False)
        own, found = label.get_window_extent(), []
        for x, y in PLACES:
            left, down = (1 - np.sign(x)) / 2 * own.width, (1 - np.sign(y)) / 2 * own.height
            box = own.translated(x * scale - left, y * scale - down)
            cut_off = box.width * box.height - _shared(box, frame)
            found.append((round(cut_off + sum(_shared(box, other) for other in taken), 3), x, y, box))
        _, x, y, box = min(found, key=lambda one: one[0])
        label.xyann = x, y
        label.set(ha={1: "left", 0: "center", -1: "right"}[np.sign(x)])
        label.set(va={1: "bottom", 0: "center", -1: "top"}[np.sign(y)])
        taken.append(box)


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both else 0.0


Curves = dict[str, dict[str, list[tuple[float, float]]]]  # figure -> curve -> points (epoch, value)


def log_curves(logs: Mapping[str, Sequence[LogLine]]) -> tuple[Curves, list[float]]:
    """The curves of all figures in the ``logs`` (phase -> lines, in the order of training), by exit; the figures
    ``loss`` (total) and ``parts`` (of the loss) have curves of their own in each phase.

    Returns:
        the curves, whose epochs are counted on from phase to phase, and the epochs between which the phases lie.
    """
    curves: Curves = defaultdict(lambda: defaultdict(list))
    ends = [0.0]
    for phase, lines in logs.items():
        for line in lines:
            for key, value in line.items():
                kind, _, name = key.partition("/")
                if kind == "loss":
                    kind, name = "parts" if name else "loss", f"{name or 'total'} ({phase})"
                if value is not None:
                    curves[kind][name].append((ends[-1] + line["epoch"], value))
        ends.append(ends[-1] + max((line["epoch"] for line in lines), default=0.0))
    return curves, ends


def training_curves(logs: Mapping[str, Sequence[LogLine]]) -> Image.Image | None:
    """AP50 of every exit, the share of the photos that leave there and its temperature, epoch by epoch, with a row for
    each of the three that was measured; None where none was. ``logs`` as in :func:`log_curves`."""
    curves, ends = log_curves(logs)
    titles = {"AP50": "AP50", "share": "share of photos", "temperature": "temperature"}
    titles = {kind: title for kind, title in titles.items() if kind in curves}
    if not titles:
        return None
    names = {name for kind in titles for name in curves[kind]}
    names = sorted(names, key=lambda name: (name == "full", len(name), name))  # exit8, exit12, full

    def draw(axes: np.ndarray) -> None:
        for row, (kind, title) in zip(axes[:, 0], titles.items(), strict=True):
            for index, name in enumerate(names):
                if points := curves[kind].get(name):
                    color = PLAIN if name == "full" else f"C{index}"
                    row.plot(*zip(*points, strict=True), color=color, marker=".", label=name)
            row.set_ylabel(title)
            for begin in ends[1:-1]:
                row.axvline(begin, color=PLAIN, linewidth=0.8, linestyle=":")
        above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9, "color": PLAIN}
        for phase, begin in zip(logs, ends, strict=False):
            axes[0, 0].annotate(phase, (begin, 1.0), (3, 3), **above)
        axes[0, 0].legend(loc="best", frameon=False)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].set_xlim(0, 1.02 * ends[-1])

    return draw_charts(draw, len(titles), 1, (7.5, 1.0 + 2.2 * len(titles)))


def reliability_diagram(temperatures: Sequence[FittedTemperature]) -> Image.Image:
    """Per exit, how often the most probable class is right where it has this probability, before and after."""

    def draw(all_axes: np.ndarray) -> None:
        for axes, fitted in zip(all_axes[0], temperatures, strict=True):
            axes.plot([0, 1], [0, 1], color=PLAIN, linestyle=":", linewidth=1)
            after = ROUTED if fitted.temperature != 1 else EXITS
            for color, label, found in ((PLAIN, "before", fitted.before), (after, "after", fitted.after)):
                label = f"{label}, error {found.expected_error:.3f}"
                axes.plot(*reliability_points(found), color=color, marker="o", label=label)
            axes.set_title(f"{fitted.exit_name}, temperature {fitted.temperature:.2f}")
            axes.set_xlabel("probability of the class")
            axes.legend(frameon=False)
        all_axes[0, 0].set_ylabel("share that is right")

    return draw_charts(draw, 1, len(temperatures), (4.2 * len(temperatures), 4))


def reliability_points(found: Reliability) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of the bins that are not empty."""
    filled = [index for index, count in enumerate(found.count) if count]
    return [found.confidence[index] for index in filled], [found.accuracy[index] for index in filled]


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
        candidates: the detector as it is first.
        chosen: the one to ship.
        runtime: that measured them.
    """
    known = [one for one in candidates if one.ms is not None and one.AP50 is not None]
    frontier: list[Candidate] = []
    for one in sorted((one for one in known if not one.rival), key=lambda one: one.ms):
        if not frontier or one.AP50 > frontier[-1].AP50:
            frontier.append(one)

    def draw(all_axes: np.ndarray) -> None:
        axes = all_axes[0, 0]
        axes.plot([one.ms for one in frontier], [one.AP50 for one in frontier], color=EXITS, alpha=0.4, zorder=1)
        for one in known:
            color = ROUTED if one == chosen else PLAIN if one.rival or not one.exits else EXITS
            axes.plot(one.ms, one.AP50, "s" if one.rival else "o", color=color, markersize=6, zorder=2)
            if one in frontier or one.rival or one is candidates[0]:
                weight = "bold" if one == chosen else "normal"
                text = {"textcoords": "offset points", "fontsize": 7, "color": color, "fontweight": weight}
                axes.annotate(one.name, (one.ms, one.AP50), (5, -9), **text)
        axes.set_xlabel(f"ms per image, mean over the calib photos ({RUNTIME_TITLES[runtime]})")
        axes.set_ylabel("AP50 on the calib split")

    return draw_charts(draw)


# Photos with their boxes.

TILE = 320  # width of a tile and its largest height, pixels; photos keep their shape inside it
GAP = 8
HEADER = 30
BACKGROUND, PADDING, INK, FRAME, IGNORED = "#ffffff", "#edf2f7", "#1a202c", "#dd6b20", "#718096"


@dataclass(frozen=True)
class Example:
    """One row of the picture.

    image: float [3,H,W] in [0, 1].
    target: ``boxes`` [G,4] xyxy pixels, ``labels`` [G], ``iscrowd`` [G] (ignored objects are drawn grey); None where
        the truth is not known.
    detections: per exit, shallow to deep, ``boxes`` [N,4], ``scores`` [N], ``labels`` [N].
    exit_index: the exit that the router takes, whose tile is framed; None frames none.
    """

    image: Tensor
    target: Mapping[str, Tensor] | None
    detections: Sequence[Mapping[str, Tensor]]
    exit_index: int | None = None


def detection_grid(
    examples: Sequence[Example], exit_names: Sequence[str], classes: Sequence[str], score: float = 0.4
) -> Image.Image:
    """The picture of all ``examples``, one a row, under a line of column names; without the column of the ground truth
    if no example has one.

    Args:
        exit_names: names of the columns behind the ground truth, shallow to deep; classes: of the labels 1..K.
        score: detections below it are not drawn.
    """
    first = 0 if examples and all(example.target is None for example in examples) else 1
    columns = ["ground truth", *exit_names][1 - first :]
    rows = [_tiles(example, classes, score, TILE)[1 - first :] for example in examples]
    width = GAP + len(columns) * (TILE + GAP)
    picture = Image.new("RGB", (width, HEADER + sum(row[0].height + GAP for row in rows)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (TILE + GAP), HEADER / 2), name, INK, font_of(16), anchor="lm")
    if any(example.exit_index is not None for example in examples):
        draw.text((width - GAP, HEADER / 2), "framed: the exit routed to", FRAME, font_of(12), anchor="rm")
    top = HEADER
    for example, row in zip(examples, rows, strict=True):
        for column, one in enumerate(row):
            left = GAP + column * (TILE + GAP)
            picture.paste(one, (left, top))
            if example.exit_index is not None and column == example.exit_index + first:  # in the gap: it hides nothing
                x, y = left - GAP // 2, top - GAP // 2
                box = (x, y, x + one.width + GAP - 1, y + one.height + GAP - 1)
                draw.rectangle(box, outline=FRAME, width=GAP // 2)
        top += row[0].height + GAP
    return picture


def photo_grid(
    samples: Sequence[tuple[Tensor, Mapping[str, Tensor]]], classes: Sequence[str], columns: int = 4, tile: int = 240
) -> Image.Image:
    """Photos with their boxes, ``columns`` a row: what a training sees, augmentation included.

    Args:
        samples: image float [3,H,W] in [0, 1] and target, as an `Example` has them; classes: of the labels 1..K.
        tile: width of a photo and its largest height, pixels.
    """
    rows = -(-len(samples) // columns)
    picture = Image.new("RGB", (GAP + columns * (tile + GAP), GAP + rows * (tile + GAP)), BACKGROUND)
    for place, (image, target) in enumerate(samples):
        row, column = divmod(place, columns)
        photo = _tiles(Example(image, target, ()), classes, 0.0, tile)[0]
        picture.paste(photo, (GAP + column * (tile + GAP), GAP + row * (tile + GAP)))
    return picture


def choose_examples(chosen: Sequence[int], empty: Sequence[bool], count: int, seed: int = 0) -> list[int]:
    """Indices of up to ``count`` photos that show every exit taken (``chosen``), a quarter of them without an object
    (``empty``); ``seed`` is of the shuffle that picks among the photos of an exit."""
    order = np.random.default_rng(seed).permutation(len(chosen)).tolist()
    with_object = _in_turns([index for index in order if not empty[index]], chosen)
    without = _in_turns([index for index in order if empty[index]], chosen)
    number_without = min(len(without), max(count // 4, count - len(with_object)))
    return with_object[: count - number_without] + without[:number_without]


def _in_turns(indices: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Reorder so that the exits take turns."""
    turns: dict[int, Iterator[int]] = defaultdict(itertools.count)
    return sorted(indices, key=lambda index: (next(turns[chosen[index]]), chosen[index]))


def as_picture(image: Tensor) -> Image.Image:
    """A photo, float [3, H, W] in [0, 1], in 8 bits."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _tiles(example: Example, classes: Sequence[str], score: float, tile: int) -> list[Image.Image]:
    """The photo with its ground truth, then with what each exit found."""
    photo = as_picture(example.image)
    scale = tile / max(photo.size)
    width, height = (max(round(side * scale), 1) for side in photo.size)
    blank = Image.new("RGB", (tile, height), PADDING)
    blank.paste(photo.resize((width, height), Image.Resampling.LANCZOS))

    def drawn(boxes: Tensor, texts: list[str], colors: list[str]) -> Image.Image:
        return draw_boxes(blank.copy(), (boxes * scale).tolist(), texts, colors)

    def name(label: int) -> str:
        return classes[label - 1] if 1 <= label <= len(classes) else f"label {label}"

    target = example.target or {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    labels = target["labels"].tolist()
    ignored = target["iscrowd"].tolist() if "iscrowd" in target else [0] * len(labels)
    colors = [IGNORED if skip else color_of(label) for label, skip in zip(labels, ignored, strict=True)]
    tiles = [drawn(target["boxes"], list(map(name, labels)), colors)]
    for found in example.detections:
        order = found["scores"].argsort(descending=True)
        order = order[found["scores"][order] >= score]
        labels, scores = found["labels"][order].tolist(), found["scores"][order].tolist()
        texts = [f"{name(label)} {value:.2f}" for label, value in zip(labels, scores, strict=True)]
        tiles.append(drawn(found["boxes"][order], texts, list(map(color_of, labels))))
    return tiles

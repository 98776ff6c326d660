"""The pictures that jobs write: charts, and photos with their boxes."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from earlyexit_ssd.calibration.thresholds import FittedTemperature, Reliability
from earlyexit_ssd.engine.loop import LogLine
from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import Results, SearchOutcome, TableRow, data_title, table_rows, timing_title
from earlyexit_ssd.images import color_of, draw_boxes, font_of

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#4a5568"
STYLES = {
    "exit": (BLUE, "o"),
    "routed": (ORANGE, "D"),
    "single_exit": ("#00838f", "v"),
    "plain": (GREY, "s"),
    "cut_head": ("#8d6e63", "p"),
    "onnx": ("#805ad5", "^"),
}
"""`TableRow.kind` -> colour and marker."""


def draw_charts(
    draw: Callable[[np.ndarray], None], rows: int = 1, columns: int = 1, inches: tuple[float, float] = (7.5, 5)
) -> Image.Image:
    """Call ``draw`` with the axes [rows, columns] of a new figure, and return its picture at 128 dpi. The axes of a row
    share the y scale, those of a column the x scale."""
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
    """Make all texts drawable, whatever names they contain: "$" starts no formula, and invalid Unicode is escaped."""
    for text in artist.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())


def accuracy_against_cost(results: Results) -> Image.Image:
    """Draw AP and AP50 (rows) against milliseconds and MMACs (columns) of the exits, the routed detector, the detector
    without exits and the rivals.

    Bars are 95 % intervals. Undefined points and empty exits are left out. In the column of milliseconds, markers of
    rivals in another runtime are hollow.
    """
    rows = [row for row in table_rows(results) if not row.empty]

    def draw(all_axes: np.ndarray) -> None:
        panels = []
        kinds = itertools.product(("AP", "AP50"), ("ms", "mmacs"))
        for axes, (quality, cost) in zip(all_axes.flat, kinds, strict=True):
            defined = [row for row in rows if row.number(quality) is not None and row.number(cost) is not None]
            panels.append((axes, defined, quality, cost))
            _draw_points(axes, defined, quality, cost)
        all_axes[1, 0].set_xlabel(f"ms per image ({timing_title(results)})")
        all_axes[1, 1].set_xlabel("MMAC per image")
        all_axes[0, 0].set_ylabel("AP")
        all_axes[1, 0].set_ylabel("AP50")
        all_axes[0, 0].set_title(data_title(results), loc="left")
        all_axes[0, 1].set_title("bars: 95 % intervals", loc="right", fontsize=9)
        _make_drawable(all_axes[0, 0].figure)
        all_axes[0, 0].figure.draw_without_rendering()  # fixes the layout, which place_labels needs
        for axes, defined, quality, cost in panels:
            other = [f" ({row.other_runtime})" if cost == "ms" and row.other_runtime else "" for row in defined]
            texts = [row.name + runtime for row, runtime in zip(defined, other, strict=True)]
            points = [(row.number(cost), row.number(quality)) for row in defined]
            place_labels(axes, points, texts, [STYLES[row.kind][0] for row in defined])

    return draw_charts(draw, 2, 2, (13, 9))


def _draw_points(axes: Axes, rows: Sequence[TableRow], quality: str, cost: str) -> None:
    for kind in ("exit", "plain", "cut_head"):  # a line joins the points of one network, not of rivals from other files
        network = [row for row in rows if row.kind == kind and row.source is None]
        network = network if kind == "exit" else sorted(network, key=lambda row: row.number(cost))
        x, y = ([row.number(name) for row in network] for name in (cost, quality))
        axes.plot(x, y, color=STYLES[kind][0], alpha=0.3, zorder=1)
    for row in rows:
        color, marker = STYLES[row.kind]
        x, y = row.number(cost), row.number(quality)
        x_bars = _bars(x, row.ms_interval if cost == "ms" else None)
        y_bars = _bars(y, row.figures.get(f"{quality}_interval"))
        axes.errorbar(x, y, y_bars, x_bars, fmt="none", ecolor=color, elinewidth=1, alpha=0.5, zorder=1)
        filled = cost != "ms" or not row.other_runtime
        axes.plot(x, y, marker, color=color, markersize=8, markerfacecolor=color if filled else "white", zorder=2)
    axes.margins(0.12)


def _bars(value: float, interval: list[float] | None) -> list[list[float]] | None:
    """Return the lengths of the error bars below and above ``value``. A value outside its interval, which is possible
    with a bootstrap, has a bar of length 0 on one side."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


LABEL_GAP = 7  # points between a marker and its text
MARKER = 9  # pixels from a point to the edge of its marker
PLACES = [
    (x * LABEL_GAP * distance, y * LABEL_GAP * distance)
    for distance in (1, 2.2, 3.6)
    for x, y in ((1, -0.6), (-1, 0.6), (1, 0.6), (-1, -0.6), (1.2, 0), (-1.2, 0), (0, 1), (0, -1))
]
"""Offsets of a text from its point, in typographic points to the right and up. The first is preferred."""


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[str]
) -> None:
    """Write each text near its point (data coordinates), at the first of `PLACES` where it overlaps least with markers,
    other texts and the outside of the axes. The figure must have been drawn once, because the layout must be final."""
    centres = axes.transData.transform(np.reshape(points, (-1, 2)))
    taken = [Bbox([[x - MARKER, y - MARKER], [x + MARKER, y + MARKER]]) for x, y in centres]
    frame, scale = axes.get_window_extent(), axes.figure.dpi / 72
    for point, text, color in zip(points, texts, colors, strict=True):
        label = axes.annotate(
            text, point, (0, 0), textcoords="offset points", color=color, fontsize=9, ha="left", va="bottom"
        )
        _make_drawable(label)
        label.set_in_layout(False)
        extent, candidates = label.get_window_extent(), []
        for x, y in PLACES:  # a text to the left of its point ends there, a text below has its top there
            left, down = (1 - np.sign(x)) / 2 * extent.width, (1 - np.sign(y)) / 2 * extent.height
            box = extent.translated(x * scale - left, y * scale - down)
            outside = box.width * box.height - _overlap(box, frame)
            candidates.append((round(outside + sum(_overlap(box, other) for other in taken), 3), x, y, box))
        _, x, y, box = min(candidates, key=lambda candidate: candidate[0])
        label.xyann = x, y
        label.set(ha={1: "left", 0: "center", -1: "right"}[np.sign(x)])
        label.set(va={1: "bottom", 0: "center", -1: "top"}[np.sign(y)])
        taken.append(box)


def _overlap(first: Bbox, second: Bbox) -> float:
    both = Bbox.intersection(first, second)
    return both.width * both.height if both else 0.0


Curves = dict[str, dict[str, list[tuple[float, float]]]]  # figure -> curve -> points (epoch, value)


def log_curves(logs: Mapping[str, Sequence[LogLine]]) -> tuple[Curves, list[float]]:
    """Return the curves of all figures in the ``logs`` (phase -> lines, in the order of training), and the epochs at
    which the phases begin and end. Epochs are numbered across all phases.

    A figure such as AP50 has one curve for each exit. ``loss`` (total) and ``parts`` (of the loss) have separate curves
    for each phase.
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
    """Draw AP50 of every exit, the share of the photos that leave there, and its temperature, by epoch. Figures that
    are not in the ``logs`` (see `log_curves`) have no row. Return None if none is in the logs."""
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
                    color = GREY if name == "full" else f"C{index}"
                    row.plot(*zip(*points, strict=True), color=color, marker=".", label=name)
            row.set_ylabel(title)
            for begin in ends[1:-1]:
                row.axvline(begin, color=GREY, linewidth=0.8, linestyle=":")
        above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9, "color": GREY}
        for phase, begin in zip(logs, ends, strict=False):
            axes[0, 0].annotate(phase, (begin, 1.0), (3, 3), **above)
        axes[0, 0].legend(loc="best", frameon=False)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].set_xlim(0, 1.02 * ends[-1])

    return draw_charts(draw, len(titles), 1, (7.5, 1.0 + 2.2 * len(titles)))


def reliability_diagram(temperatures: Sequence[FittedTemperature]) -> Image.Image:
    """Draw for each exit how often the most probable class of a default box is right, against its probability, before
    and after the fit of the temperature."""

    def draw(all_axes: np.ndarray) -> None:
        for axes, fitted in zip(all_axes[0], temperatures, strict=True):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
            after = ORANGE if fitted.temperature != 1 else BLUE
            for color, time, reliability in ((GREY, "before", fitted.before), (after, "after", fitted.after)):
                label = f"{time}, error {reliability.expected_error:.3f}"
                axes.plot(*reliability_points(reliability), color=color, marker="o", label=label)
            axes.set_title(f"{fitted.exit_name}, temperature {fitted.temperature:.2f}")
            axes.set_xlabel("probability of the class")
            axes.legend(frameon=False)
        all_axes[0, 0].set_ylabel("share that is right")

    return draw_charts(draw, 1, len(temperatures), (4.2 * len(temperatures), 4))


def reliability_points(reliability: Reliability) -> tuple[list[float], list[float]]:
    """Return confidence and accuracy of the bins that are not empty."""
    filled = [index for index, count in enumerate(reliability.count) if count]
    return [reliability.confidence[index] for index in filled], [reliability.accuracy[index] for index in filled]


def candidate_rows(outcome: SearchOutcome) -> list[TableRow]:
    """Return the candidates of a search that have AP50 and milliseconds. ``outcome`` is the content of optimize.json. A
    row's kind is ``chosen``, ``rival``, ``exit`` (the candidate has exits) or ``plain``."""
    rows = []
    for each in outcome["candidates"]:
        if each["ms"] is not None and each["AP50"] is not None:
            kind = "rival" if each["rival"] else "exit" if each["exits"] else "plain"
            kind = "chosen" if each == outcome["chosen"] else kind
            rows.append(TableRow(each["name"], kind, {"AP50": each["AP50"]}, None, each["ms"]))
    return rows


def candidates_chart(outcome: SearchOutcome, runtime: str) -> Image.Image:
    """Draw AP50 on the calib split against mean milliseconds (in this ``runtime``) of the `candidate_rows`, and the
    Pareto frontier. The first row is the unchanged detector. Rivals are squares."""
    rows, frontier = candidate_rows(outcome), []
    for row in sorted((row for row in rows if row.kind != "rival"), key=lambda row: row.ms):
        if not frontier or row.number("AP50") > frontier[-1].number("AP50"):
            frontier.append(row)

    def draw(all_axes: np.ndarray) -> None:
        axes = all_axes[0, 0]
        axes.plot([row.ms for row in frontier], [row.number("AP50") for row in frontier], color=BLUE, alpha=0.4)
        for row in rows:
            color, place = {"chosen": ORANGE, "exit": BLUE}.get(row.kind, GREY), (row.ms, row.number("AP50"))
            axes.plot(*place, "s" if row.kind == "rival" else "o", color=color, markersize=6, zorder=2)
            if row in frontier or row.kind == "rival" or row is rows[0]:
                text = {"textcoords": "offset points", "fontsize": 7, "color": color}
                text["fontweight"] = "bold" if row.kind == "chosen" else "normal"
                axes.annotate(row.name, place, (5, -9), **text)
        axes.set_xlabel(f"ms per image, mean over the calib photos ({RUNTIME_TITLES[runtime]})")
        axes.set_ylabel("AP50 on the calib split")

    return draw_charts(draw)


# Photos with their boxes.

TILE, PHOTO_TILE = 320, 240  # longer side of a photo in `detection_grid` and in `photo_grid`, pixels
PHOTO_COLUMNS = 4  # photos in a row of `photo_grid`
GAP = 8  # pixels between photos
HEADER = 30  # height of the column titles, pixels
BACKGROUND, PADDING, INK, FRAME, IGNORED = "#ffffff", "#edf2f7", "#1a202c", "#dd6b20", "#718096"


@dataclass(frozen=True)
class Example:
    """A row of `detection_grid`."""

    image: Tensor  # float [3, H, W] in [0, 1]
    # ``boxes`` [G, 4] xyxy pixels, ``labels`` [G] and optionally ``iscrowd`` [G] (drawn grey); None if unknown
    target: Mapping[str, Tensor] | None
    detections: Sequence[Mapping[str, Tensor]]  # per exit: ``boxes`` [N, 4], ``scores`` [N], ``labels`` [N]
    exit_index: int | None = None  # exit that the router takes; its tile gets a frame


def detection_grid(
    examples: Sequence[Example], exit_names: Sequence[str], classes: Sequence[str], score: float = 0.4
) -> Image.Image:
    """Draw each example in a row: the photo with the ground truth, then with the detections of each exit that have at
    least this ``score``. ``classes`` are the names of the labels 1..K. The column of the ground truth is left out if no
    example has one."""
    has_truth = not examples or any(example.target is not None for example in examples)
    columns = ["ground truth", *exit_names] if has_truth else list(exit_names)
    rows = []
    for example in examples:
        tiles = enumerate(_tiles(example, classes, score, TILE), start=-1)
        shown = [(index, tile) for index, tile in tiles if has_truth or index >= 0]
        colors = [FRAME if index == example.exit_index else BACKGROUND for index, _ in shown]
        rows.append([ImageOps.expand(tile, GAP // 2, color) for (_, tile), color in zip(shown, colors, strict=True)])
    step = TILE + GAP
    picture = _join(rows, len(columns) * step, HEADER)
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(columns):
        draw.text((column * step + GAP // 2, HEADER / 2), name, INK, font_of(16), anchor="lm")
    if any(example.exit_index is not None for example in examples):
        draw.text((picture.width - GAP, HEADER / 2), "framed: the exit routed to", FRAME, font_of(12), anchor="rm")
    return picture


def photo_grid(samples: Sequence[tuple[Tensor, Mapping[str, Tensor]]], classes: Sequence[str]) -> Image.Image:
    """Draw augmented training photos with their boxes. ``samples`` are pairs of image and target, as in `Example`, and
    ``classes`` the names of the labels 1..K."""
    photos = [_tiles(Example(image, target, ()), classes, 0.0, PHOTO_TILE)[0] for image, target in samples]
    photos = [ImageOps.expand(photo, GAP // 2, BACKGROUND) for photo in photos]
    rows = [photos[start : start + PHOTO_COLUMNS] for start in range(0, len(photos), PHOTO_COLUMNS)]
    return _join(rows, PHOTO_COLUMNS * (PHOTO_TILE + GAP))


def _join(rows: Sequence[Sequence[Image.Image]], width: int, header: int = 0) -> Image.Image:
    """Return a picture of pictures in rows, below an empty header. The pictures of a row are side by side."""
    heights = [max(part.height for part in row) for row in rows]
    picture, top = Image.new("RGB", (width, header + sum(heights)), BACKGROUND), header
    for row, height in zip(rows, heights, strict=True):
        for column, part in enumerate(row):
            picture.paste(part, (column * part.width, top))
        top += height
    return picture


def choose_examples(chosen: Sequence[int], empty: Sequence[bool], count: int, seed: int = 0) -> list[int]:
    """Return the indices of up to ``count`` random photos, about a quarter of them without objects (``empty``). All
    exits occur if ``count`` allows it. ``chosen`` is the exit of each photo."""
    order = np.random.default_rng(seed).permutation(len(chosen)).tolist()
    with_object = _in_turns([index for index in order if not empty[index]], chosen)
    without = _in_turns([index for index in order if empty[index]], chosen)
    number_without = min(len(without), max(count // 4, count - len(with_object)))
    return with_object[: count - number_without] + without[:number_without]


def _in_turns(indices: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Reorder photos so that their exits take turns."""
    turns: dict[int, Iterator[int]] = defaultdict(itertools.count)
    return sorted(indices, key=lambda index: (next(turns[chosen[index]]), chosen[index]))


def as_picture(image: Tensor) -> Image.Image:
    """Convert a photo, float [3, H, W] in [0, 1], to 8 bits."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _tiles(example: Example, classes: Sequence[str], score: float, tile: int) -> list[Image.Image]:
    """Return the photo with its ground truth, then with the detections of each exit."""
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
    ignored = target.get("iscrowd", torch.zeros_like(target["labels"])).tolist()
    colors = [IGNORED if skip else color_of(label) for label, skip in zip(labels, ignored, strict=True)]
    tiles = [drawn(target["boxes"], list(map(name, labels)), colors)]
    for found in example.detections:
        order = found["scores"].argsort(descending=True)
        order = order[found["scores"][order] >= score]
        labels, scores = found["labels"][order].tolist(), found["scores"][order].tolist()
        texts = [f"{name(label)} {value:.2f}" for label, value in zip(labels, scores, strict=True)]
        tiles.append(drawn(found["boxes"][order], texts, list(map(color_of, labels))))
    return tiles

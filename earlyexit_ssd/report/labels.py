"""Names beside points, where they cover least."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

GAP, MARKER = 7, 9
"""Points between marker and text; pixels around a marker that are its own."""
PLACES = [
    (x * GAP * far, y * GAP * far, horizontal, vertical)
    for far in (1, 2.2, 3.6)
    for x, horizontal, y, vertical in (
        (1, "left", -0.6, "top"),
        (-1, "right", 0.6, "bottom"),
        (1, "left", 0.6, "bottom"),
        (-1, "right", -0.6, "top"),
        (1.2, "left", 0, "center"),
        (-1.2, "right", 0, "center"),
        (0, "center", 1, "bottom"),
        (0, "center", -1, "top"),
    )
]
"""Offsets in points and alignments, the most wanted first."""


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
        costs = [_cost(_extent(label, place), taken, frame) for place in PLACES]
        taken.append(_extent(label, PLACES[costs.index(min(costs))]))


def make_drawable(text: Text) -> None:
    """A name of a file is no formula, and may hold bytes that are no character."""
    text.set_parse_math(False)
    text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())


def _extent(label: Annotation, place: tuple[float, float, str, str]) -> Bbox:
    """Put the label there; what it covers, pixels."""
    x, y, horizontal, vertical = place
    label.xyann = (x, y)
    label.set(ha=horizontal, va=vertical)
    return label.get_window_extent()


def _cost(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Square pixels that the label shares with others, or has outside the frame."""
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    shared = (Bbox.intersection(box, other) for other in taken)
    return round(outside + sum(one.width * one.height for one in shared if one), 3)

"""Boxes with their names on a picture."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

PALETTE = ("#e53e3e", "#3182ce", "#38a169", "#d69e2e", "#805ad5", "#00a3c4", "#d53f8c", "#975a16")
BANNER = "#1a202c"
SMALLEST_TEXT = 12


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[str],
    text_size: int = SMALLEST_TEXT,
    banner: str = "",
) -> Image.Image:
    """Draw xyxy ``boxes`` (N of them, in the image's pixels), the most important first, into ``image``, and return it.

    A box's text stands above it, or inside at the top edge; it is left out where it would cover another text, since
    in a crowd the texts would hide the photo. ``banner`` stands in the upper left corner, on everything.
    """
    draw, font, boxes = ImageDraw.Draw(image), font_of(text_size), [tuple(box) for box in boxes]
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=color, width=max(2, text_size // 6))
    height = sum(font.getmetrics())
    taken: list[tuple[float, float, float]] = []
    for (x1, y1, *_), text, color in zip(boxes, texts, colors, strict=True):
        width = draw.textlength(text, font) + 6
        x = min(max(x1, 0), max(image.width - width, 0))
        y = y1 - height if y1 >= height else max(y1, 0)
        if any(x < end and start < x + width and abs(y - other) < height for start, end, other in taken):
            continue
        taken.append((x, x + width, y))
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + 3, y), text, "white", font)
    if banner:
        draw.rectangle((0, 0, draw.textlength(banner, font) + 6, height), fill=BANNER)
        draw.text((3, 0), banner, "white", font)
    return image


def color_of(label: int) -> str:
    """Of a class; labels count from 1."""
    return PALETTE[(label - 1) % len(PALETTE)]


@functools.lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that no font file is needed."""
    return ImageFont.load_default(size)

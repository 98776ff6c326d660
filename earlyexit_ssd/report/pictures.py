"""Photos with their boxes: one photo a row, with ground truth, every exit and the full path in columns."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from earlyexit_ssd.images import color_of, draw_boxes, font_of

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
    """The picture of all ``examples`` under a line of column names, without the ground truth if no example has one.

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
            corner = (GAP + column * (TILE + GAP), top)
            picture.paste(one, corner)
            if example.exit_index is not None and column == example.exit_index + first:  # in the gap: it hides nothing
                left, above = corner[0] - GAP // 2, corner[1] - GAP // 2
                box = (left, above, left + one.width + GAP - 1, above + one.height + GAP - 1)
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


def _tiles(example: Example, classes: Sequence[str], score: float, tile: int) -> list[Image.Image]:
    """The photo with its ground truth, then with what each exit found."""
    pixels = (example.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    photo = Image.fromarray(np.ascontiguousarray(pixels))
    scale = tile / max(photo.size)
    width, height = (max(round(side * scale), 1) for side in photo.size)
    fitted = photo.resize((width, height), Image.Resampling.LANCZOS)
    photo = Image.new("RGB", (tile, height), PADDING)
    photo.paste(fitted, (0, 0))
    target = example.target or {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    labels = target["labels"].tolist()
    ignored = target["iscrowd"].tolist() if "iscrowd" in target else [0] * len(labels)
    colors = [IGNORED if skip else color_of(label) for label, skip in zip(labels, ignored, strict=True)]
    names = [_name(label, classes) for label in labels]
    tiles = [draw_boxes(photo.copy(), (target["boxes"] * scale).tolist(), names, colors)]
    for found in example.detections:
        order = found["scores"].argsort(descending=True)
        order = order[found["scores"][order] >= score]
        boxes, scores, labels = (found[key][order] for key in ("boxes", "scores", "labels"))
        labels, scores = labels.tolist(), scores.tolist()
        texts = [f"{_name(label, classes)} {value:.2f}" for label, value in zip(labels, scores, strict=True)]
        tiles.append(draw_boxes(photo.copy(), (boxes * scale).tolist(), texts, [color_of(label) for label in labels]))
    return tiles


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label - 1] if 1 <= label <= len(classes) else f"label {label}"

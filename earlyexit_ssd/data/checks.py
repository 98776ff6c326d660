"""Boxes are checked on the way in, whichever reader they come from."""

from __future__ import annotations

import dataclasses
import math

from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record

# Boxes out of the photo by no more than this many pixels are rounding (COCO has such): clipped in silence.
OUTSIDE_TOLERANCE = 1.0
# Thinner boxes have no area in float32 at the photo sizes in use.
SMALLEST_SIDE = 0.01

Box = tuple[float, float, float, float]


def check_boxes(raw: RawDataset, problems: Problems) -> RawDataset:
    """``raw`` with boxes that are finite, inside their photo and of positive area, and labels in 1..K.

    Raises:
        DataError: in mode "refuse", one line that names file, photo, annotation and value.
    """
    records = [_checked(record, len(raw.classes), problems) for record in raw.records]
    return dataclasses.replace(raw, records=tuple(r for r in records if problems.keeps(r.image_id)))


def _checked(record: Record, num_classes: int, problems: Problems) -> Record:
    annotations = []
    for annotation in record.annotations:
        kind = _problem(annotation, record, num_classes)
        if kind is not None:
            problems.add(kind, _describe(annotation, record, num_classes, kind), record.image_id)
        if kind in (None, "box outside the photo"):
            box = clip(annotation.box, record.width, record.height)
            if has_area(box):
                unchanged = box == annotation.box
                annotations.append(annotation if unchanged else dataclasses.replace(annotation, box=box))
    return dataclasses.replace(record, annotations=tuple(annotations))


def _problem(annotation: Annotation, record: Record, num_classes: int) -> str | None:
    x1, y1, x2, y2 = annotation.box
    if not 1 <= annotation.label <= num_classes:
        return "unknown label"
    if not all(math.isfinite(value) for value in annotation.box):
        return "box with NaN or infinity"
    if not has_area(annotation.box):
        return "box without area"
    outside = max(-x1, -y1, x2 - record.width, y2 - record.height)
    if outside > OUTSIDE_TOLERANCE or not has_area(clip(annotation.box, record.width, record.height)):
        return "box outside the photo"
    return None


def _describe(annotation: Annotation, record: Record, num_classes: int, kind: str) -> str:
    place = describe(record, annotation.id)
    if kind == "unknown label":
        return f"{place} has label {annotation.label}, expected 1 to {num_classes}"
    box = ", ".join(f"{value:g}" for value in annotation.box)
    return f"{place} has box x1, y1, x2, y2 = {box} in a photo of {record.width} x {record.height}"


def describe(record: Record, annotation_id: int | str | None = None) -> str:
    """``"instances.json: photo cat.jpg (id 3), annotation 7"``."""
    text = f"{record.source or record.path.parent}: photo {record.path.name} (id {record.image_id})"
    return text if annotation_id is None else f"{text}, annotation {annotation_id}"


def clip(box: Box, width: int, height: int) -> Box:
    """The part of an xyxy box that lies inside a photo of ``width`` x ``height`` pixels."""
    x1, y1, x2, y2 = box
    return (min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height))


def has_area(box: Box) -> bool:
    """Whether an xyxy box is at least ``SMALLEST_SIDE`` wide and high."""
    return box[2] - box[0] >= SMALLEST_SIDE and box[3] - box[1] >= SMALLEST_SIDE

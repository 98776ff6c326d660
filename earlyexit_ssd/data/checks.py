"""Boxes are checked on the way in, whichever reader they come from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, canonical
from earlyexit_ssd.errors import DataError, shown
from earlyexit_ssd.images import read_header
from earlyexit_ssd.progress import progress

# COCO files give x and width to two decimals, so that x + width can be 0.01 outside: clipped without being counted.
# Of 17,700 boxes of COCO, VOC and Roboflow 57 are 0.01 outside, none is more.
OUTSIDE_TOLERANCE = 0.02
# Thinner boxes have no area in float32 at the photo sizes in use.
SMALLEST_SIDE = 0.01

Box = tuple[float, float, float, float]


_FLAGS = {"true": True, "yes": True, "false": False, "no": False, "unspecified": False, "": False}


def flag(value: object) -> bool | None:
    """What a flag of a file says, as number (0 or 1), boolean or text in any case; None stands for anything else."""
    text = "" if value is None else str(value).strip().lower() if isinstance(value, str | int | float) else "?"
    with contextlib.suppress(ValueError):
        return {0.0: False, 1.0: True}.get(float(text))
    return _FLAGS.get(text)


def read_flags(flags: dict[str, object], where: str, problems: Problems, image_id: int) -> bool:
    """Whether any of an object's flags (name -> value) is set; unusable ones are counted once an object."""
    read = {name: flag(value) for name, value in flags.items()}
    if unusable := [name for name, state in read.items() if state is None]:
        found = f"{where} has {unusable[0]} {shown(flags[unusable[0]])}, expected 0 or 1"
        problems.add("unusable flag", found, image_id)
    return any(read.values())


def annotated_size(
    width: object, height: object, where: str, path: Path, number: int, problems: Problems, kind: Any = int | float
) -> tuple[int, int]:
    """Width and height as a file gives them, as numbers or another ``kind``; the photo's own where it gives none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        size = int(float(width)), int(float(height))
        if min(size) >= 1 and all(isinstance(side, kind) and not isinstance(side, bool) for side in (width, height)):
            return size
    found = f"{where} has width {shown(width)} and height {shown(height)}"
    problems.add("photo without width and height", found, number)
    try:
        return read_header(path).size
    except DataError:
        return 1, 1  # the check of the files reports it


def check_names(names: Iterable[str], source: Path, problems: Problems) -> None:
    """Classes of one file that our comparison of names takes for one may be two for their author."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(canonical(name), name)
        if other != name:
            message = f"{source}: classes {shown(other)} and {shown(name)} are one but for case, blanks or VOC's words"
            problems.add("two names of one class", message)


def are_shares(box: Box) -> bool:
    """Whether the four numbers that a file gives look like shares of the photo; in pixels that would be one pixel."""
    return all(-0.05 <= value <= 1.05 for value in box)


def check_unit(
    suspects: Sequence[tuple[str, int]],
    total: int,
    source: Path,
    problems: Problems,
    kind: str = "box in shares of the photo",
    advice: str = "lie in 0..1 and look like shares of the photo; multiply them by its width and height",
) -> None:
    """Count the boxes of a file that look like being in another unit (message, number of the photo). A DataError in
    every mode where they are most of the file's ``total``."""
    if 2 * len(suspects) > total:
        raise DataError(f"{source}: {len(suspects)} of {total} boxes {advice}")
    for message, image_id in suspects:
        problems.add(kind, message, image_id)


def check_boxes(raw: RawDataset, problems: Problems) -> RawDataset:
    """``raw`` with boxes that are finite and of positive area, and labels in 1..K.

    Whether the boxes are inside their photo is for :func:`clip_boxes`, once the photo's size is certain.
    """

    def usable(one: Annotation, record: Record) -> bool:
        if not 1 <= one.label <= len(raw.classes):
            found = f"{describe(record, one.id)} has label {one.label}, expected 1 to {len(raw.classes)}"
            problems.add("unknown label", found, record.image_id)
        elif not (finite := all(map(math.isfinite, one.box))) or not has_area(one.box):
            kind = "box without area" if finite else "box with NaN or infinity"
            problems.add(kind, _describe_box(one, record), record.image_id)
        else:
            return True
        return False

    _note_small_boxes(raw, problems)
    records = [r.holding(one for one in r.annotations if usable(one, r)) for r in raw.records]
    return dataclasses.replace(raw, records=problems.kept(records))


def _note_small_boxes(raw: RawDataset, problems: Problems) -> None:
    """Boxes in percent or thousandths stay in one corner of large photos. They may be right, so nothing is refused."""
    shown_on = [record for record in raw.records if record.annotations]
    corners = [max(one.box[2:]) for record in shown_on for one in record.annotations]
    for top in (100, 1000):
        large = all(min(record.width, record.height) > 3 * top for record in shown_on)
        if large and len(corners) > 3 and max(corners) <= top:
            message = f"{raw.name}: all {len(corners)} boxes lie in 0..{top}, the photos are more than 3 times as large"
            return problems.note("set with small boxes only", message)


def _describe_box(annotation: Annotation, record: Record) -> str:
    box, place = ", ".join(f"{value:g}" for value in annotation.box), describe(record, annotation.id)
    return f"{place} has box x1, y1, x2, y2 = {box} in a photo of {record.width} x {record.height}"


def clip_boxes(records: Sequence[Record], problems: Problems) -> list[Record]:
    """The photos with boxes inside them and of positive area; boxes must be finite, sizes those of the files.

    Boxes outside by no more than ``OUTSIDE_TOLERANCE`` are clipped without being counted.
    """
    return list(problems.kept([record.holding(_inside(record, problems)) for record in records]))


def _inside(record: Record, problems: Problems) -> Iterator[Annotation]:
    width, height = record.width, record.height
    for annotation in record.annotations:
        x1, y1, x2, y2 = annotation.box
        box = (min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height))
        outside = max(-x1, -y1, x2 - width, y2 - height)
        if outside > OUTSIDE_TOLERANCE or not has_area(box):
            # scaled to the photo's true size, a box can become too thin
            kind = "box outside the photo" if outside > 0 else "box without area"
            problems.add(kind, _describe_box(annotation, record), record.image_id)
        if has_area(box):
            yield annotation if box == annotation.box else dataclasses.replace(annotation, box=box)


def describe(record: Record, annotation_id: int | str | None = None) -> str:
    """``"instances.json: photo cat.jpg (id 3), annotation 7"``."""
    text = f"{record.source or record.path.parent}: photo {record.path.name} (id {record.image_id})"
    return text if annotation_id is None else f"{text}, annotation {annotation_id}"


def has_area(box: Box) -> bool:
    """Whether an xyxy box is at least ``SMALLEST_SIDE`` wide and high."""
    return box[2] - box[0] >= SMALLEST_SIDE and box[3] - box[1] >= SMALLEST_SIDE


def check_photos(records: Sequence[Record], problems: Problems) -> list[Record]:
    """The records whose photo can be used, boxes and size in the pixels of the picture that will be read.

    Only headers and file ends are read, so damage in the middle of a file is found when the photo is decoded.
    """
    title = "checking photos" if len(records) >= 5000 else None  # headers are read at some thousands a second
    checked = [_check(record, problems) for record in progress(records, title)]
    return list(problems.kept(filter(None, checked)))


def file_identity(path: Path) -> Hashable:
    """Equal for names of one file, links too; None where there is no such file."""
    try:
        there = os.stat(path)
    except (OSError, ValueError):
        return None
    return (there.st_dev, there.st_ino) if there.st_ino else os.path.realpath(path)


def drop_repeated_files(raw: RawDataset, problems: Problems) -> RawDataset:
    """The data set with each photo file once; with none of two entries for one file whose objects differ, as where an
    export merges the frames of two videos."""
    first: dict[Hashable, Record] = {}
    for record in raw.records:
        identity = file_identity(record.path)
        other = record if identity is None else first.setdefault(identity, record)
        if other is not record:
            same = f"{describe(record)} is the file of id {other.image_id}"
            problems.add("one file under two ids", same, record.image_id)
            problems.leave_out(record.image_id)
            mine, its = (sorted((one.box, one.label, one.ignore) for one in r.annotations) for r in (record, other))
            if mine != its:
                problems.leave_out(other.image_id)
    return dataclasses.replace(raw, records=problems.kept(raw.records))


def _check(record: Record, problems: Problems) -> Record | None:
    size = (record.width, record.height)
    try:
        actual, peculiarities = read_header(record.path, size)
    except DataError as error:
        kind = "unreadable photo file" if os.path.exists(record.path) else "missing photo file"
        problems.add(kind, f"{describe(record)}: {error}", record.image_id)
        return None
    for kind, value in peculiarities.items():
        problems.add(kind, f"{describe(record)} has {value}", record.image_id)
    if actual == size:
        return record
    swapped = actual == size[::-1]
    kind = "photo with width and height swapped" if swapped else "photo of another size than annotated"
    sizes = f"is {actual[0]} x {actual[1]}, annotated as {size[0]} x {size[1]}"
    problems.add(kind, f"{describe(record)} {sizes}", record.image_id)
    return dataclasses.replace(record, width=actual[0], height=actual[1]) if swapped else resize_record(record, *actual)


def resize_record(record: Record, width: int, height: int) -> Record:
    """The record for the same photo at another size."""
    across, down = width / record.width, height / record.height

    def resized(one: Annotation) -> Annotation:
        x1, y1, x2, y2 = one.box
        area = None if one.area is None else one.area * across * down
        return dataclasses.replace(one, box=(x1 * across, y1 * down, x2 * across, y2 * down), area=area)

    return dataclasses.replace(record, width=width, height=height).holding(map(resized, record.annotations))

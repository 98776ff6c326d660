"""Photo files are checked before anything trains: they exist, open, are whole and have the right size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from earlyexit_ssd.data.checks import describe
from earlyexit_ssd.data.images import read_header
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.progress import progress

# Headers are read at some thousands a second; a bar is shown where that is felt.
_MANY = 5000


def check_photos(records: Sequence[Record], problems: Problems) -> list[Record]:
    """The records whose photo can be used, boxes and size in the pixels of the picture that will be read.

    Only headers and file ends are read, so damage in the middle of a file is found when the photo is decoded.

    Raises:
        DataError: in mode "refuse", one line that names the file.
    """
    many: Iterable[Record] = progress(records, desc="checking photos") if len(records) >= _MANY else records
    checked = (_check(record, problems) for record in many)
    return [record for record in checked if record is not None and problems.keeps(record.image_id)]


def file_identity(path: Path) -> Hashable:
    """Equal for names of one file, links too; None where there is no such file."""
    try:
        there = os.stat(path)
    except (OSError, ValueError):
        return None
    return (there.st_dev, there.st_ino) if there.st_ino else os.path.realpath(path)


def drop_repeated_files(raw: RawDataset, problems: Problems) -> RawDataset:
    """The data set with each photo file once.

    Where two entries name one file and give the same objects, one of them stays; where they give others, as an export
    that merges the frames of two videos, neither does: nobody knows whose objects the file shows.

    Raises:
        DataError: in mode "refuse".
    """
    first: dict[Hashable, Record] = {}
    for record in raw.records:
        identity = file_identity(record.path)
        other = record if identity is None else first.setdefault(identity, record)
        if other is record:
            continue
        problems.add(
            "one file under two ids", f"{describe(record)} is the file of id {other.image_id}", record.image_id
        )
        problems.leave_out(record.image_id)
        if _objects(record) != _objects(other):
            problems.leave_out(other.image_id)
    return dataclasses.replace(raw, records=tuple(r for r in raw.records if problems.keeps(r.image_id)))


def _objects(record: Record) -> list[tuple]:
    return sorted((one.box, one.label, one.ignore) for one in record.annotations)


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
    swapped = actual == (size[1], size[0])
    kind = "photo with width and height swapped" if swapped else "photo of another size than annotated"
    sizes = f"is {actual[0]} x {actual[1]}, annotated as {size[0]} x {size[1]}"
    problems.add(kind, f"{describe(record)} {sizes}", record.image_id)
    if swapped:
        return dataclasses.replace(record, width=actual[0], height=actual[1])
    return resize_record(record, *actual)


def resize_record(record: Record, width: int, height: int) -> Record:
    """The record for the same photo at another size."""
    horizontal, vertical = width / record.width, height / record.height
    annotations = tuple(_scale(annotation, horizontal, vertical) for annotation in record.annotations)
    return dataclasses.replace(record, width=width, height=height, annotations=annotations)


def _scale(annotation: Annotation, horizontal: float, vertical: float) -> Annotation:
    x1, y1, x2, y2 = annotation.box
    box = (x1 * horizontal, y1 * vertical, x2 * horizontal, y2 * vertical)
    area = None if annotation.area is None else annotation.area * horizontal * vertical
    return dataclasses.replace(annotation, box=box, area=area)

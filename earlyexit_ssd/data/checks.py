"""Checks and repairs of boxes and photo files, the same for all annotation formats."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from earlyexit_ssd.console import progress
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, canonical
from earlyexit_ssd.errors import DataError, shown
from earlyexit_ssd.images import read_header

OUTSIDE_TOLERANCE = 0.02
"""Boxes that are outside by at most this many pixels are clipped without being counted. COCO files round x and width to
two decimals, so x + width can be 0.01 outside. Of 17,700 boxes of COCO, VOC and Roboflow, 57 are 0.01 outside and no
box is further outside."""
SMALLEST_SIDE = 0.01  # pixels; the area of a thinner box can round to 0 in float32

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

_FLAGS = {"true": True, "yes": True, "false": False, "no": False, "unspecified": False, "": False}


def parse_flag(value: object) -> bool | None:
    """Return the value of a flag given as 0 or 1, boolean or text such as "No"; None if it is anything else."""
    text = "" if value is None else str(value).strip().lower() if isinstance(value, str | int | float) else "?"
    with contextlib.suppress(ValueError):
        return {0.0: False, 1.0: True}.get(float(text))
    return _FLAGS.get(text)


def any_flag_set(flags: dict[str, object], where: str, problems: Problems, image_id: int) -> bool:
    """Return whether any of an object's flags (name -> value) is set. Count an object with unusable flags once."""
    parsed = {name: parse_flag(value) for name, value in flags.items()}
    if unusable := [name for name, state in parsed.items() if state is None]:
        message = f"{where} has {unusable[0]} {shown(flags[unusable[0]])}, expected 0 or 1"
        problems.add("unusable flag", message, image_id)
    return any(parsed.values())


def annotated_size(
    width: object, height: object, where: str, path: Path, image_id: int, problems: Problems, types: Any = int | float
) -> tuple[int, int]:
    """Return width and height from an annotation file if they are of ``types`` (str in XML) and at least 1. Otherwise
    count a problem and read the size of the photo ``path``."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        size = int(float(width)), int(float(height))
        if min(size) >= 1 and all(isinstance(side, types) and not isinstance(side, bool) for side in (width, height)):
            return size
    message = f"{where} has width {shown(width)} and height {shown(height)}, expected pixels, 1 or more"
    problems.add("photo without width and height", message, image_id)
    try:
        return read_header(path).size
    except DataError:
        return 1, 1  # check_photos reports the file


def check_names(names: Iterable[str], source: Path, problems: Problems) -> None:
    """Count names of one file that `canonical` makes equal, because they may be two classes for the file's author."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(canonical(name), name)
        if other != name:
            reason = "are the same but for case, spaces or VOC's names, expected different names"
            message = f"{source}: classes {shown(other)} and {shown(name)} {reason}"
            problems.add("two names of one class", message)


def looks_normalized(box: Box) -> bool:
    """Return whether the four numbers of a box look like fractions of the photo's width and height. In pixels, the box
    would be inside a single pixel."""
    return all(-0.05 <= value <= 1.05 for value in box)


def check_unit(
    suspects: Sequence[tuple[str, int]],
    total: int,
    source: Path,
    problems: Problems,
    kind: str = "normalized box",
    advice: str = "lie in 0..1 and look normalized, expected pixels; multiply them by the photo's width and height",
) -> None:
    """Count the boxes of a file that seem to be in another unit. ``suspects`` has the message and the image id of each.

    If more than half of the file's ``total`` boxes are suspects, raise DataError in every mode. ``kind`` is the kind of
    problem that is counted. ``advice`` is the error's text: what is wrong, and the fix.
    """
    if 2 * len(suspects) > total:
        raise DataError(f"{source}: {len(suspects)} of {total} boxes {advice}")
    for message, image_id in suspects:
        problems.add(kind, message, image_id)


def check_boxes(raw: RawDataset, problems: Problems) -> RawDataset:
    """Return the data set without boxes that are not finite or have no area, and without labels outside 1..K. Boxes
    outside their photo stay, because :func:`clip_boxes` needs the size of the photo file."""

    def is_usable(annotation: Annotation, record: Record) -> bool:
        finite = all(map(math.isfinite, annotation.box))
        if not 1 <= annotation.label <= len(raw.classes):
            where = describe(record, annotation.id)
            message = f"{where} has label {annotation.label}, expected 1 to {len(raw.classes)}"
            problems.add("unknown label", message, record.image_id)
        elif not finite or not has_area(annotation.box):
            kind = "box without area" if finite else "box with NaN or infinity"
            problems.add(kind, _describe_box(annotation, record), record.image_id)
        else:
            return True
        return False

    _note_small_boxes(raw, problems)
    records = [r.with_annotations(a for a in r.annotations if is_usable(a, r)) for r in raw.records]
    return dataclasses.replace(raw, records=problems.kept(records))


def _note_small_boxes(raw: RawDataset, problems: Problems) -> None:
    """Note a set of large photos whose boxes all lie in 0..100 or 0..1000: they may be in percent or thousandths."""
    annotated = [record for record in raw.records if record.annotations]
    corners = [max(annotation.box[2:]) for record in annotated for annotation in record.annotations]
    for limit in (100, 1000):
        large = all(min(record.width, record.height) > 3 * limit for record in annotated)
        if large and len(corners) > 3 and max(corners) <= limit:
            message = f"{raw.name}: all {len(corners)} boxes lie in 0..{limit}, but photos are over 3 times as large"
            return problems.note("set with small boxes only", message)


def _describe_box(annotation: Annotation, record: Record) -> str:
    box = ", ".join(f"{value:g}" for value in annotation.box)
    expected = f"x1 < x2 and y1 < y2 inside {record.width} x {record.height} pixels"
    return f"{describe(record, annotation.id)} has box x1, y1, x2, y2 = {box}, expected {expected}"


def clip_boxes(records: Sequence[Record], problems: Problems) -> list[Record]:
    """Clip finite boxes to their photo, whose size must be that of its file, and drop boxes that are left without area.
    Boxes outside by at most ``OUTSIDE_TOLERANCE`` pixels are not counted."""

    def clipped(record: Record) -> Iterator[Annotation]:
        width, height = record.width, record.height
        for annotation in record.annotations:
            x1, y1, x2, y2 = annotation.box
            box = (min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height))
            outside = max(-x1, -y1, x2 - width, y2 - height)
            if outside > OUTSIDE_TOLERANCE or not has_area(box):
                # check_photos may have scaled the box to less than SMALLEST_SIDE
                kind = "box outside the photo" if outside > 0 else "box without area"
                problems.add(kind, _describe_box(annotation, record), record.image_id)
            if has_area(box):
                yield annotation if box == annotation.box else dataclasses.replace(annotation, box=box)

    return list(problems.kept([record.with_annotations(clipped(record)) for record in records]))


def describe(record: Record, annotation_id: int | str | None = None) -> str:
    """Return the place of a record for messages, such as "instances.json: photo cat.jpg (id 3), annotation 7"."""
    image_id = record.image_id if record.source_id is None else record.source_id
    text = f"{record.source or record.path.parent}: photo {record.path.name} (id {image_id})"
    return text if annotation_id is None else f"{text}, annotation {annotation_id}"


def has_area(box: Box) -> bool:
    """Return whether an xyxy box is at least ``SMALLEST_SIDE`` wide and high."""
    return box[2] - box[0] >= SMALLEST_SIDE and box[3] - box[1] >= SMALLEST_SIDE


def check_photos(records: Sequence[Record], problems: Problems) -> list[Record]:
    """Return the records whose photo can be read, with size and boxes in pixels of the image from `read_image`. JPEG
    and PNG files are not decoded, so damage inside a JPEG file is found only when the photo is used."""
    title = "checking photos" if len(records) >= 5000 else None  # fewer photos take about a second
    checked = [_check_photo(record, problems) for record in progress(records, title)]
    return list(problems.kept(filter(None, checked)))


def file_identity(path: Path) -> Hashable:
    """Return a key that is equal for all paths and links to the same file, or None if there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def drop_repeated_files(raw: RawDataset, problems: Problems) -> RawDataset:
    """Keep the first of several records of one photo file. Keep none of them if their objects differ, as in an export
    that has merged frames of two videos under the same file names."""
    first: dict[Hashable, Record] = {}
    for record in raw.records:
        identity = file_identity(record.path)
        other = record if identity is None else first.setdefault(identity, record)
        if other is not record:
            message = f"{describe(record)} is the same file as id {other.image_id}, expected one id per file"
            problems.add("one file under two ids", message, record.image_id)
            problems.leave_out(record.image_id)
            objects, others = (sorted((a.box, a.label, a.ignore) for a in r.annotations) for r in (record, other))
            if objects != others:
                problems.leave_out(other.image_id)
    return dataclasses.replace(raw, records=problems.kept(raw.records))


def _check_photo(record: Record, problems: Problems) -> Record | None:
    annotated = (record.width, record.height)
    try:
        actual, peculiarities = read_header(record.path, annotated)
    except DataError as error:
        kind = "unreadable photo file" if os.path.exists(record.path) else "missing photo file"
        problems.add(kind, f"{describe(record)}: {error}", record.image_id)
        return None
    for kind, value in peculiarities.items():
        problems.add(kind, f"{describe(record)} has {value}, expected upright 8-bit RGB", record.image_id)
    if actual == annotated:
        return record
    swapped = actual == annotated[::-1]
    kind = "photo with width and height swapped" if swapped else "photo of another size than annotated"
    sizes = f"is {actual[0]} x {actual[1]}, annotated as {annotated[0]} x {annotated[1]}"
    problems.add(kind, f"{describe(record)} {sizes}", record.image_id)
    return dataclasses.replace(record, width=actual[0], height=actual[1]) if swapped else resize_record(record, *actual)


def resize_record(record: Record, width: int, height: int) -> Record:
    """Return the record of the photo resized to ``width`` x ``height``, with boxes and areas scaled."""
    sx, sy = width / record.width, height / record.height

    def resize(annotation: Annotation) -> Annotation:
        x1, y1, x2, y2 = annotation.box
        area = None if annotation.area is None else annotation.area * sx * sy
        return dataclasses.replace(annotation, box=(x1 * sx, y1 * sy, x2 * sx, y2 * sy), area=area)

    return dataclasses.replace(record, width=width, height=height).with_annotations(map(resize, record.annotations))

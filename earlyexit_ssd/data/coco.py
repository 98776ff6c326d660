"""COCO JSON files -> photos with boxes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from earlyexit_ssd.data.checks import annotated_size, are_shares, check_names, check_unit, read_flags
from earlyexit_ssd.data.folder import photo_path
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, shown

_SECTIONS = ("images", "annotations", "categories")
_NEEDED = ("image_id", "category_id", "bbox")
_FLAGS = ("iscrowd", "difficult", "ignore")
_LARGEST_ID = 2**53  # exact in the floats that pycocotools and JSON make of numbers
_Entry = dict[str, Any]  # an object of the file, unchecked


# any file that no format registered later recognises
@register_format("coco", lambda annotations, path: bool(annotations) and not os.path.isdir(path))
def read_coco(
    name: str, annotations: Path, images: Path, problems: Problems, allow_outside: bool = False
) -> RawDataset:
    """Read a COCO detection file.

    Labels are places in the file's ``categories``, whatever their ids are. ``iscrowd``, ``difficult`` and ``ignore``
    all become ``Annotation.ignore``. ``file_name`` is relative to the folder ``images``, and with ``allow_outside`` may
    lead outside. ``problems`` takes what is wrong with single records.

    Raises:
        DataError: the file is missing or not COCO JSON, or (mode "refuse") a record is broken.
    """
    tree = _load(annotations)
    labels = _read_categories(tree["categories"], annotations)
    check_names((entry["name"] for entry in tree["categories"]), annotations, problems)
    classes = tuple(" ".join(entry["name"].split()) for entry in tree["categories"])
    photos = _read_photos(tree["images"], annotations, images, problems, allow_outside)
    objects = _read_annotations(tree["annotations"], annotations, photos, labels, problems)
    records = [photo.holding(objects[photo.image_id]) for photo in problems.kept(photos.values())]
    return RawDataset(name, classes, tuple(records))


def _load(path: Path) -> dict[str, list[_Entry]]:
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such annotation file; correct its path in DATA.DATASETS, or DATA.ROOT")
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); write it anew, as COCO JSON in UTF-8") from None
    for section in _SECTIONS:
        if not isinstance(tree, dict) or not isinstance(tree.get(section), list):
            raise DataError(f"{path}: no list {section!r}; a COCO detection file has {', '.join(_SECTIONS)}")
        for place, entry in enumerate(tree[section]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {section}[{place}] is {shown(entry)}, expected an object with keys")
    return tree


def _read_categories(entries: list[_Entry], source: Path) -> dict[Any, int]:
    """The label of each category id."""
    labels: dict[Any, int] = {}
    for place, entry in enumerate(entries):
        name = entry.get("name")
        if _hashable(entry.get("id")) is None or not isinstance(name, str) or not name.strip():
            expected = "an id (number or text) and a name"
            raise DataError(f"{source}: categories[{place}] is {shown(entry)}, expected {expected}")
        if entry["id"] in labels:
            raise DataError(f"{source}: categories[{place}] repeats id {shown(entry['id'])}; give each its own")
        labels[entry["id"]] = place + 1
    return labels


def _read_photos(
    entries: list[_Entry], source: Path, folder: Path, problems: Problems, allow_outside: bool
) -> dict[Any, Record]:
    """The file's image id -> the photo, without objects yet."""
    keep_ids = all(isinstance(one := entry.get("id"), int) and abs(one) < _LARGEST_ID for entry in entries)
    photos: dict[Any, Record] = {}
    for place, entry in enumerate(entries):
        where = f"{source}: images[{place}]"
        photo_id, file_name = entry.get("id"), entry.get("file_name")
        if not isinstance(photo_id, int | str) or not isinstance(file_name, str):
            problems.add("malformed photo entry", f"{where} is {shown(entry)}, expected an id and a file_name")
            continue
        inside = photo_path(folder, file_name, allow_outside)
        path = inside or folder / file_name
        if photo_id in photos:
            problems.add("duplicate photo id", f"{where} ({file_name}) repeats id {shown(photo_id)}")
            if photos[photo_id].path != path:
                problems.leave_out(photos[photo_id].image_id)  # whose boxes are they?
            continue
        number, size = photo_id if keep_ids else place + 1, (1, 1)
        if inside is None:
            problems.add("photo outside the photo folder", f"{where} has file_name {shown(file_name)}", number)
            problems.leave_out(number)
        else:
            where = f"{where} ({path.name})"
            size = annotated_size(entry.get("width"), entry.get("height"), where, path, number, problems)
        photos[photo_id] = Record(number, path, *size, source=source)
    return photos


def _read_annotations(
    entries: list[_Entry], source: Path, photos: dict[Any, Record], labels: dict[Any, int], problems: Problems
) -> dict[int, list[Annotation]]:
    """Image id -> its objects."""

    def where(entry: _Entry) -> str:
        photo = photos.get(_hashable(entry.get("image_id")))
        return f"{source}: annotation {shown(entry.get('id'))}" + (f" of photo {photo.path.name}" if photo else "")

    objects: dict[int, list[Annotation]] = {photo.image_id: [] for photo in photos.values()}
    seen: dict[Any, _Entry] = {}
    shares: list[tuple[str, int]] = []  # message, image id
    total = 0
    for place, entry in enumerate(entries):
        photo = photos.get(_hashable(entry.get("image_id")))
        number = photo.image_id if photo else None
        annotation_id = entry.get("id", f"[{place}]")
        if isinstance(annotation_id, list | dict):
            problems.add("malformed annotation id", f"{where(entry)}: its id is to be a number or text", number)
            annotation_id = f"[{place}]"
        if annotation_id in seen:
            problems.add("duplicate annotation id", f"{where(entry)} repeats id {shown(annotation_id)}", number)
            if all(seen[annotation_id].get(key) == entry.get(key) for key in _NEEDED):
                continue
        seen[annotation_id] = entry
        if problem := _problem(entry, photo, labels):
            problems.add(problem[0], f"{where(entry)} has {problem[1]}", number)
            continue
        x, y, width, height = map(_number, entry["bbox"])
        total += 1
        if min(width, height) > 0 and are_shares((x, y, width, height)):
            shares.append((f"{where(entry)} has bbox {shown(entry['bbox'])}", number))
            continue
        flags = {key: entry[key] for key in _FLAGS if entry.get(key)}
        ignore = bool(flags) and read_flags(flags, where(entry), problems, number)
        area = None if entry.get("area") is None else _number(entry["area"])
        if area is not None and not 0 < area < math.inf:
            problems.add("unusable area", f"{where(entry)} has area {shown(entry['area'])}", number)
            area = None
        box = (x, y, x + width, y + height)
        objects[number].append(Annotation(box, labels[entry["category_id"]], ignore, area, annotation_id))
    check_unit(shares, total, source, problems)
    return objects


def _problem(entry: _Entry, photo: Record | None, labels: dict[Any, int]) -> tuple[str, str] | None:
    """(kind, value) of what makes an annotation unusable, if anything does."""
    if missing := [key for key in _NEEDED if key not in entry]:
        return "annotation without a needed key", f"no {missing[0]!r}"
    if photo is None:
        return "annotation of an unknown photo", f"image_id {shown(entry['image_id'])}"
    if _hashable(entry["category_id"]) not in labels:
        return "unknown label", f"category_id {shown(entry['category_id'])}, which is none of the file's categories"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "malformed box", f"bbox {shown(box)}, expected [x, y, width, height]"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A JSON number as float, infinity where it is too large for one, as 1e400 is; NaN for anything else."""
    try:
        return float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.inf


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else None

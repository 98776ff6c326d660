"""Reader of COCO detection files (JSON)."""

import json
import math
import os
from pathlib import Path
from typing import Any

from earlyexit_ssd.data.checks import annotated_size, any_flag_set, check_names, check_unit, looks_normalized
from earlyexit_ssd.data.folder import photo_path, report_outside
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, shown

_SECTIONS = ("images", "annotations", "categories")
_REQUIRED_KEYS = ("image_id", "category_id", "bbox")
_FLAGS = ("iscrowd", "difficult", "ignore")
_LARGEST_ID = 2**53  # larger integers are not exact as float64, which pycocotools uses
_Entry = dict[str, Any]  # a JSON object of the file, its values unchecked


# this format takes every file that no other format recognises
@register_format("coco", lambda annotations, path: bool(annotations) and not os.path.isdir(path))
def read_coco(
    name: str, annotations: Path, images: Path, problems: Problems, allow_outside: bool = False
) -> RawDataset:
    """Read a COCO detection file.

    Label i is the i-th of the file's ``categories``, whatever its id is. ``iscrowd``, ``difficult`` and ``ignore`` all
    set ``Annotation.ignore``. A ``file_name`` is relative to the folder ``images``. Raise DataError if the file is
    missing or is not COCO JSON, or (mode "refuse") a record is broken.
    """
    tree = _load(annotations)
    labels = _read_categories(tree["categories"], annotations)
    check_names((entry["name"] for entry in tree["categories"]), annotations, problems)
    classes = tuple(" ".join(entry["name"].split()) for entry in tree["categories"])
    photos = _read_photos(tree["images"], annotations, images, problems, allow_outside)
    objects = _read_annotations(tree["annotations"], annotations, photos, labels, problems)
    records = [photo.with_annotations(objects[photo.image_id]) for photo in problems.kept(photos.values())]
    return RawDataset(name, classes, tuple(records))


def _load(path: Path) -> dict[str, list[_Entry]]:
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such annotation file; correct its path in DATA.DATASETS, or correct DATA.ROOT")
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); export it again as COCO JSON in UTF-8") from None
    for section in _SECTIONS:
        if not isinstance(tree, dict) or not isinstance(tree.get(section), list):
            raise DataError(f"{path}: no list {section!r}, expected a COCO detection file with {', '.join(_SECTIONS)}")
        for index, entry in enumerate(tree[section]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {section}[{index}] is {shown(entry)}, expected a JSON object")
    return tree


def _read_categories(entries: list[_Entry], source: Path) -> dict[Any, int]:
    """Return category id -> label."""
    labels: dict[Any, int] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name")
        if _hashable(entry.get("id")) is None or not isinstance(name, str) or not name.strip():
            expected = "an id (number or text) and a name"
            raise DataError(f"{source}: categories[{index}] is {shown(entry)}, expected {expected}")
        if entry["id"] in labels:
            raise DataError(f"{source}: categories[{index}] repeats id {shown(entry['id'])}; use each id once")
        labels[entry["id"]] = index + 1
    return labels


def _read_photos(
    entries: list[_Entry], source: Path, folder: Path, problems: Problems, allow_outside: bool
) -> dict[Any, Record]:
    """Return image id of the file -> record without objects.

    ``Record.image_id`` is this id if all ids are integers below `_LARGEST_ID`. Otherwise records are numbered.
    """
    keep_ids = all(isinstance(value := entry.get("id"), int) and abs(value) < _LARGEST_ID for entry in entries)
    photos: dict[Any, Record] = {}
    for index, entry in enumerate(entries):
        where = f"{source}: images[{index}]"
        photo_id, file_name = entry.get("id"), entry.get("file_name")
        if not isinstance(photo_id, int | str) or not isinstance(file_name, str):
            problems.add("malformed photo entry", f"{where} is {shown(entry)}, expected an id and a file_name")
            continue
        allowed_path = photo_path(folder, file_name, allow_outside)
        path = allowed_path or folder / file_name
        if photo_id in photos:
            message = f"{where} ({file_name}) repeats id {shown(photo_id)}, expected one entry per id"
            problems.add("duplicate photo id", message)
            if photos[photo_id].path != path:
                problems.leave_out(photos[photo_id].image_id)  # its boxes may belong to either photo
            continue
        image_id, size = photo_id if keep_ids else index + 1, (1, 1)
        if allowed_path is None:
            report_outside(problems, f"{where} has file_name {shown(file_name)}", folder, image_id)
            problems.leave_out(image_id)
        else:
            where = f"{where} ({path.name})"
            size = annotated_size(entry.get("width"), entry.get("height"), where, path, image_id, problems)
        photos[photo_id] = Record(image_id, path, *size, source=source)
    return photos


def _read_annotations(
    entries: list[_Entry], source: Path, photos: dict[Any, Record], labels: dict[Any, int], problems: Problems
) -> dict[int, list[Annotation]]:
    """Return ``Record.image_id`` -> objects of that photo."""

    def where(entry: _Entry) -> str:
        photo = photos.get(_hashable(entry.get("image_id")))
        return f"{source}: annotation {shown(entry.get('id'))}" + (f" of photo {photo.path.name}" if photo else "")

    objects: dict[int, list[Annotation]] = {photo.image_id: [] for photo in photos.values()}
    seen: dict[Any, _Entry] = {}
    normalized: list[tuple[str, int]] = []  # message, image id
    total = 0
    for index, entry in enumerate(entries):
        photo = photos.get(_hashable(entry.get("image_id")))
        image_id = photo.image_id if photo else None
        annotation_id = entry.get("id", f"[{index}]")
        if isinstance(annotation_id, list | dict):
            problems.add("malformed annotation id", f"{where(entry)}, expected a number or text as id", image_id)
            annotation_id = f"[{index}]"
        if annotation_id in seen:
            message = f"{where(entry)} repeats id {shown(annotation_id)}, expected one entry per id"
            problems.add("duplicate annotation id", message, image_id)
            if all(seen[annotation_id].get(key) == entry.get(key) for key in _REQUIRED_KEYS):
                continue
        seen[annotation_id] = entry
        if problem := _find_problem(entry, photo, labels):
            kind, found = problem
            problems.add(kind, f"{where(entry)} has {found}", image_id)
            continue
        x, y, width, height = map(_to_float, entry["bbox"])
        total += 1
        if min(width, height) > 0 and looks_normalized((x, y, width, height)):
            normalized.append((f"{where(entry)} has bbox {shown(entry['bbox'])}, expected pixels", image_id))
            continue
        flags = {key: entry[key] for key in _FLAGS if entry.get(key)}
        ignore = bool(flags) and any_flag_set(flags, where(entry), problems, image_id)
        area = None if entry.get("area") is None else _to_float(entry["area"])
        if area is not None and not 0 < area < math.inf:
            message = f"{where(entry)} has area {shown(entry['area'])}, expected square pixels above 0"
            problems.add("unusable area", message, image_id)
            area = None
        box = (x, y, x + width, y + height)
        objects[image_id].append(Annotation(box, labels[entry["category_id"]], ignore, area, annotation_id))
    check_unit(normalized, total, source, problems)
    return objects


def _find_problem(entry: _Entry, photo: Record | None, labels: dict[Any, int]) -> tuple[str, str] | None:
    """Return kind and description of the problem that makes an annotation unusable, or None."""
    if missing := [key for key in _REQUIRED_KEYS if key not in entry]:
        return "annotation without a needed key", f"no {missing[0]!r}"
    if photo is None:
        return "annotation of an unknown photo", f"image_id {shown(entry['image_id'])}, expected an id of images"
    if _hashable(entry["category_id"]) not in labels:
        return "unknown label", f"category_id {shown(entry['category_id'])}, expected an id of categories"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "malformed box", f"bbox {shown(box)}, expected [x, y, width, height]"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_float(value: Any) -> float:
    """Return a JSON number as float: infinity if it is too large, NaN if it is not a number."""
    try:
        return float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.inf


def _hashable(value: Any) -> Any:
    """Return an id that can be a key, or None for any other value."""
    return value if isinstance(value, int | str) else None

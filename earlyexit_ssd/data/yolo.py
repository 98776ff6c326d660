"""YOLO labels (a data.yaml, and a text file for each photo with boxes in shares of it) -> photos with boxes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from earlyexit_ssd.data.checks import check_names, check_unit
from earlyexit_ssd.data.folder import photo_path, read_list
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, nearest, shown
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files, read_header
from earlyexit_ssd.plain import read_bytes, read_yaml
from earlyexit_ssd.progress import progress

# So far outside 0..1 are shares that were rounded and outlines along the border; Ultralytics takes as much.
_TOLERANCE = 0.01


@register_format(
    "yolo",
    lambda annotations, path: path.suffix.lower() in (".yaml", ".yml"),
    names_split=True,
    box_in_pixels="dropped; divide x by the photo's width and y by its height",
    malformed_line_of_labels="dropped",
    duplicate_line_of_labels="copies dropped",
    photo_without_a_file_of_labels="taken as one without objects",
)
def read_yolo(name: str, description: Path, split: str, problems: Problems, allow_outside: bool = False) -> RawDataset:
    """Read a split of a data set in Ultralytics' layout.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``; the last folder named images counts, and without one they
    lie beside the photo. A line is ``class cx cy w h`` in shares of the upright photo, class 0 the first of ``names``.
    A line of more points is an outline, taken as the box around it. Where data.yaml has ``kpt_shape``, keypoints follow
    the box and are left out. A photo without a file of labels shows no object.

    Args:
        description: data.yaml: ``names``, ``path`` where the data are in another folder, and splits. A split is a
            folder of photos, a text file that lists some, or several of these.
        problems: takes what is wrong with single photos and lines.
        allow_outside: read photos that are not below the folder of data.yaml.

    Raises:
        DataError: data.yaml or the split cannot be used, or (mode "refuse") a photo or line is broken.
    """
    tree = read_yaml(description, "description of YOLO data", "write path, train, val and names into it", DataError)
    if not isinstance(tree, Mapping):
        raise DataError(f"{description}: has {shown(tree)}, expected the keys names, train and val")
    classes = _read_names(tree.get("names"), description)
    check_names(classes, description, problems)
    folder = Path(os.path.abspath(description.parent))
    photos = _list_photos(tree, description, folder, split, problems, allow_outside)
    records, in_pixels = list[Record](), list[tuple[str, int]]()  # the latter: message, number of the photo
    for number, photo in enumerate(progress(photos, desc=f"read {name}"), start=1):
        labels = _label_path(photo, folder)
        try:
            size = read_header(photo).size
            text = read_bytes(labels).decode("utf-8-sig")
        except DataError as error:
            kind = "unreadable photo file" if os.path.exists(photo) else "missing photo file"
            problems.add(kind, str(error), number)
            continue
        except FileNotFoundError:
            problems.note("photo without a file of labels", f"{photo}: no {labels}")
            text = ""
        except (OSError, ValueError) as error:
            problems.add("unreadable annotation file", f"{labels}: {error}", number)
            continue
        record = Record(number, photo, *size, source=labels)
        records.append(_with_labels(record, text, len(classes), "kpt_shape" in tree, in_pixels, problems))
    total = len(in_pixels) + sum(len(record.annotations) for record in records)
    advice = "lie outside 0..1 and look like pixels; divide them by the photo's width and height"
    check_unit(in_pixels, total, description, problems, "box in pixels", advice)
    return RawDataset(name, classes, problems.kept(records))


def _read_names(names: object, source: Path) -> tuple[str, ...]:
    """A list of names, or a mapping from 0, 1, ... to them."""
    if isinstance(names, Mapping) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{source}: names is {shown(names)}, expected a list of classes, or 0: first, 1: second, ...")
    for place, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            raise DataError(f"{source}: names has {shown(name)} as class {place}, expected text; put it in quotes")
    return tuple(" ".join(str(name).split()) for name in names)


def _list_photos(
    tree: Mapping, description: Path, folder: Path, split: str, problems: Problems, allow_outside: bool
) -> list[Path]:
    """The photos of a split, in the order of its sources."""
    given, base = tree.get(split), tree.get("path") or ""
    sources = given if isinstance(given, list) and given else [given]
    if not all(isinstance(text, str) and text for text in (*sources, base or ".")):
        expected = "a folder of photos, a text file that lists them, or several"
        keys = [key for key in map(str, tree) if key not in ("path", "names", "nc")]
        has = f"path is {shown(base)}, {split} is {shown(given)}"
        raise DataError(f"{description}: {has}, expected {expected}{nearest(split, keys)}")
    photos: list[Path] = []
    for source in sources:
        name = os.path.join(base, source)
        if source.startswith("../") and not os.path.exists(folder / name):
            beside = os.path.join(base, source[3:])  # as Roboflow writes what lies beside data.yaml
            name = beside if os.path.exists(folder / beside) else name
        place = photo_path(folder, name, allow_outside)
        if place is None:
            fix = f"delete the key path if the photos are below {folder}, or set DATA.ALLOW_OUTSIDE True"
            raise DataError(f"{description}: {split} leads to {shown(name)}, outside its folder; {fix}")
        if os.path.isdir(place):
            inside, others = find_files(place, PHOTO_SUFFIXES)
            photos += inside
            for path in others:
                if path.suffix not in (".txt", ".cache"):
                    problems.note("file of another kind", str(path))
        elif os.path.isfile(place) and place.suffix == ".txt":
            for line in filter(None, map(str.strip, read_list(place))):
                photo = photo_path(folder, os.path.join(place.parent, line), allow_outside)
                if photo is None:
                    problems.add("photo outside the photo folder", f"{place}: has {shown(line)}")
                else:
                    photos.append(photo)
        else:
            raise DataError(f"{description}: {split} is {place}, no folder of photos and no text file with a list")
    if not photos:
        raise DataError(f"{description}: {split} has no photo ({', '.join(PHOTO_SUFFIXES)})")
    return photos


def _label_path(photo: Path, folder: Path) -> Path:
    """Only names below ``folder`` are looked at, where the photo is there."""
    parts, start = list(photo.parts), len(folder.parts) if photo.is_relative_to(folder) else 0
    if "images" in parts[start:-1]:
        parts[max(place for place in range(start, len(parts) - 1) if parts[place] == "images")] = "labels"
    return Path(*parts[:-1], f"{photo.stem}.txt")


def _with_labels(
    record: Record, text: str, classes: int, keypoints: bool, in_pixels: list[tuple[str, int]], problems: Problems
) -> Record:
    """``in_pixels`` takes the lines (message, number of the photo) whose values are no shares."""
    found: dict[tuple[float, ...], Annotation] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        message = f"{record.source}: line {number} is {shown(line.strip())}"
        try:
            label, *values = map(float, line.split())
        except ValueError:
            label, values = 0.0, []
        values = values[:4] if keypoints else values
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            problems.add("malformed line of labels", f"{message}, expected class cx cy w h", record.image_id)
        elif not (label.is_integer() and 0 <= label < classes):
            problems.add("unknown label", f"{message}, expected a class of 0 to {classes - 1}", record.image_id)
        elif not all(map(math.isfinite, values)):
            problems.add("box with NaN or infinity", message, record.image_id)
        elif not -_TOLERANCE <= min(values) <= max(values) <= 1 + _TOLERANCE:
            in_pixels.append((f"{message}, expected shares of 0 to 1", record.image_id))
        elif (label, *values) in found:
            problems.add("duplicate line of labels", message, record.image_id)
        else:
            box = _box(values, record.width, record.height)
            found[(label, *values)] = Annotation(box, int(label) + 1, id=number)
    return record.holding(found.values())


def _box(values: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Of cx, cy, w, h or the points of an outline, cut at the photo's border where that is within the tolerance."""
    if len(values) == 4:
        x, y, w, h = values
        return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    x, y = ([min(max(value, 0), 1) for value in values[start::2]] for start in (0, 1))
    return min(x) * width, min(y) * height, max(x) * width, max(y) * height

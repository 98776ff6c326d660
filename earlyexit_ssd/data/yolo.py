"""Reader of YOLO data sets: a data.yaml, and a text file with normalized boxes for each photo."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

from earlyexit_ssd.console import progress
from earlyexit_ssd.data.checks import check_names, check_unit
from earlyexit_ssd.data.folder import photo_path, read_list, report_outside
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, shown, suggest
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files, read_header
from earlyexit_ssd.plain import read_bytes, read_yaml

# Coordinates may be this far outside 0..1, because of rounding. Ultralytics has the same tolerance.
_TOLERANCE = 0.01


@register_format(
    "yolo",
    lambda annotations, path: path.suffix.lower() in (".yaml", ".yml"),
    names_split=True,
    box_in_pixels="dropped; divide it by the photo's width and height",
    malformed_label_line="dropped",
    duplicate_label_line="duplicates dropped",
    photo_without_a_label_file="treated as a photo without objects",
)
def read_yolo(name: str, description: Path, split: str, problems: Problems, allow_outside: bool = False) -> RawDataset:
    """Read a split of a data set in Ultralytics' layout.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``. Only the last folder called images of a path is replaced.
    Without a folder images, labels are in the folder of the photo. A photo without a label file has no objects.

    A line is ``class cx cy w h``. Classes count from 0. The box is normalized to the size of the upright photo. A line
    with three or more points is a polygon, and its bounding box is used. If data.yaml has ``kpt_shape``, the keypoints
    after the box are ignored.

    ``description`` is data.yaml, with ``names``, splits, and ``path`` if the data are in another folder. A split is a
    folder of photos, a text file that lists photos, or a list of folders and text files. Raise DataError if data.yaml
    or the split is invalid, or (mode "refuse") a photo or line is broken.
    """
    tree = read_yaml(description, "description of YOLO data", "write the keys path, train, val and names", DataError)
    if not isinstance(tree, Mapping):
        raise DataError(f"{description}: is {shown(tree)}, expected the keys names, train and val")
    classes = _read_names(tree.get("names"), description)
    check_names(classes, description, problems)
    if tree.get("nc", len(classes)) != len(classes):
        raise DataError(f"{description}: nc is {shown(tree['nc'])}, but names has {len(classes)} classes; correct it")
    folder = Path(os.path.abspath(description.parent))
    photos = _list_photos(tree, description, folder, split, problems, allow_outside)
    records: list[Record] = []
    in_pixels: list[tuple[str, int]] = []  # lines with boxes in pixels: message, image id
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
            problems.note("photo without a label file", f"{photo}: no {labels}")
            text = ""
        except (OSError, ValueError) as error:
            problems.add("unreadable annotation file", f"{labels}: {error}", number)
            continue
        record = Record(number, photo, *size, source=labels)
        records.append(_with_labels(record, text, len(classes), "kpt_shape" in tree, in_pixels, problems))
    total = len(in_pixels) + sum(len(record.annotations) for record in records)
    advice = "lie outside 0..1, expected normalized boxes; divide them by the photo's width and height"
    check_unit(in_pixels, total, description, problems, "box in pixels", advice)
    return RawDataset(name, classes, problems.kept(records))


def _read_names(names: object, source: Path) -> tuple[str, ...]:
    """Return the names of a list, or of a mapping with the keys 0, 1, ..."""
    if isinstance(names, Mapping) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{source}: names is {shown(names)}, expected a list of classes, or 0: first, 1: second, ...")
    for index, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            raise DataError(f"{source}: names has {shown(name)} as class {index}, expected text; put it in quotes")
    names = tuple(" ".join(str(name).split()) for name in names)
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(f"{source}: names has {shown(name)} as class {names.index(name)} and {index}; name it once")
    return names


def _list_photos(
    tree: Mapping, description: Path, folder: Path, split: str, problems: Problems, allow_outside: bool
) -> list[Path]:
    """Return the photos of a split, in the order of the split's folders and lists."""
    value, base = tree.get(split), tree.get("path") or ""
    sources = value if isinstance(value, list) and value else [value]
    if not all(isinstance(text, str) and text for text in (*sources, base or ".")):
        expected = "a folder of photos, a text file that lists photos, or a list of these"
        splits = [key for key in map(str, tree) if key not in ("path", "names", "nc")]
        found = f"path is {shown(base)}, {split} is {shown(value)}"
        raise DataError(f"{description}: {found}, expected {expected}{suggest(split, splits)}")
    photos: list[Path] = []
    for source in sources:
        name = os.path.join(base, source)
        if source.startswith("../") and not os.path.exists(folder / name):
            without_parent = os.path.join(base, source[3:])  # Roboflow writes ../train for train in this folder
            name = without_parent if os.path.exists(folder / without_parent) else name
        path = photo_path(folder, name, allow_outside)
        if path is None:
            fix = f"delete the key path if the photos are in {folder}, or set DATA.ALLOW_OUTSIDE to True"
            raise DataError(f"{description}: {split} is {shown(name)}, outside the folder of this file; {fix}")
        if os.path.isdir(path):
            found_photos, others = find_files(path, PHOTO_SUFFIXES)
            photos += found_photos
            for other in others:
                if other.suffix not in (".txt", ".cache"):
                    problems.note("file of another kind", str(other))
        elif os.path.isfile(path) and path.suffix == ".txt":
            for line in filter(None, map(str.strip, read_list(path))):
                photo = photo_path(folder, os.path.join(path.parent, line), allow_outside)
                if photo is None:
                    report_outside(problems, f"{path}: has {shown(line)}", folder)
                else:
                    photos.append(photo)
        else:
            expected = "a folder of photos or a text file (.txt) that lists photos"
            raise DataError(f"{description}: {split} is {path}, expected {expected}")
    if not photos:
        raise DataError(f"{description}: {split} has no photo, expected {', '.join(PHOTO_SUFFIXES)}")
    return photos


def _label_path(photo: Path, folder: Path) -> Path:
    """Return the label file of a photo. If the photo is in ``folder``, parents of ``folder`` called images are kept."""
    parts, start = list(photo.parts), len(folder.parts) if photo.is_relative_to(folder) else 0
    if "images" in parts[start:-1]:
        parts[max(index for index in range(start, len(parts) - 1) if parts[index] == "images")] = "labels"
    return Path(*parts[:-1], f"{photo.stem}.txt")


def _with_labels(
    record: Record, text: str, classes: int, keypoints: bool, in_pixels: list[tuple[str, int]], problems: Problems
) -> Record:
    """Return the record with the objects of the label file ``text``. Lines that are not normalized are appended to
    ``in_pixels``."""
    objects: dict[tuple[float, ...], Annotation] = {}
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
            problems.add("malformed label line", f"{message}, expected class cx cy w h", record.image_id)
        elif not (label.is_integer() and 0 <= label < classes):
            problems.add("unknown label", f"{message}, expected a class from 0 to {classes - 1}", record.image_id)
        elif not all(map(math.isfinite, values)):
            problems.add("box with NaN or infinity", f"{message}, expected values from 0 to 1", record.image_id)
        elif not -_TOLERANCE <= min(values) <= max(values) <= 1 + _TOLERANCE:
            in_pixels.append((f"{message}, expected values from 0 to 1", record.image_id))
        elif (label, *values) in objects:
            problems.add("duplicate label line", f"{message}, expected each line once", record.image_id)
        else:
            box = _box(values, record.width, record.height)
            objects[(label, *values)] = Annotation(box, int(label) + 1, id=number)
    return record.with_annotations(objects.values())


def _box(values: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Return the xyxy box in pixels of normalized cx, cy, w, h, or around the points of a polygon, clipped to 0..1."""
    if len(values) == 4:
        x, y, w, h = values
        return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    x, y = ([min(max(value, 0), 1) for value in values[start::2]] for start in (0, 1))
    return min(x) * width, min(y) * height, max(x) * width, max(y) * height

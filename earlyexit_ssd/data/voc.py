"""PASCAL VOC annotations (one XML file a photo, 1-based boxes) -> photos with boxes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from earlyexit_ssd.data.classes import ALIASES
from earlyexit_ssd.data.images import PHOTO_SUFFIXES, read_header
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record
from earlyexit_ssd.errors import DataError

# VOC's twenty classes under COCO's names, in VOC's (alphabetical) order.
VOC_CLASSES = tuple(
    ALIASES.get(name, name)
    for name in (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )
)  # fmt: skip
_PHOTO_SUFFIXES = (*PHOTO_SUFFIXES, *(suffix.upper() for suffix in PHOTO_SUFFIXES))

# (box, class name, difficult, number in the file)
_Object = tuple[tuple[float, float, float, float], str, bool, int]


def read_voc(name: str, devkit: Path, split: str, problems: Problems) -> RawDataset:
    """Read the photos that ``<devkit>/ImageSets/Main/<split>.txt`` lists; ``devkit`` is like VOC2012.

    Names are COCO's where the two differ. ``difficult`` becomes ``Annotation.ignore``. Photos are numbered by
    their line. A box of pixels xmin..xmax, counted from 1 and both inside, covers [xmin - 1, xmax].

    Raises:
        DataError: no such devkit or split, or (mode "refuse") a broken record.
    """
    listing = devkit / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        splits = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "no split at all"
        raise DataError(f"{listing}: no such list of photos; {listing.parent} has {splits}") from None
    # per-class lists carry a -1, 0 or 1 behind the name
    stems = [line.split()[0] for line in lines if line.strip()]
    return _read(name, devkit / "Annotations", devkit / "JPEGImages", stems, problems, VOC_CLASSES)


def read_xml_folder(name: str, annotations: Path, images: Path, problems: Problems) -> RawDataset:
    """Read every VOC XML file of a folder, the photos lying in another (as labelling tools write them).

    The classes are those that occur, sorted.

    Raises:
        DataError: as :func:`read_voc`.
    """
    stems = sorted(path.stem for path in annotations.glob("*.xml"))
    if not stems:
        raise DataError(f"{annotations}: no XML file in it, expected one VOC annotation file a photo")
    return _read(name, annotations, images, stems, problems)


def _read(
    name: str,
    annotations: Path,
    images: Path,
    stems: Sequence[str],
    problems: Problems,
    benchmark: tuple[str, ...] = (),
) -> RawDataset:
    found: list[tuple[Record, list[_Object]]] = []
    seen: set[str] = set()
    for number, stem in enumerate(stems, start=1):
        source = annotations / f"{stem}.xml"
        if stem in seen:
            problems.add("duplicate photo id", f"{source}: listed twice")
            continue
        seen.add(stem)
        try:
            tree = ElementTree.parse(source).getroot()
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: the encoding
            problems.add("unreadable annotation file", f"{source}: {error}", number)
            continue
        path = _find_photo(images, stem, tree)
        width, height = _read_size(tree, source, path, number, problems)
        objects = _read_objects(tree, source, number, problems)
        if problems.keeps(number):
            found.append((Record(number, path, width, height, source=source), objects))
    classes = _class_names((name for _, objects in found for _, name, _, _ in objects), benchmark)
    records = tuple(_labelled(record, objects, classes) for record, objects in found)
    return RawDataset(name, classes, records, open_classes=True)


def _class_names(names: Iterable[str], benchmark: tuple[str, ...]) -> tuple[str, ...]:
    """The names found, sorted; those of the benchmark where all that is found is among them."""
    found = set(names)
    return benchmark if found and found <= set(benchmark) else tuple(sorted(found))


def _labelled(record: Record, objects: list[_Object], classes: tuple[str, ...]) -> Record:
    annotations = tuple(
        Annotation(box, classes.index(name) + 1, difficult, None, number) for box, name, difficult, number in objects
    )
    return Record(record.image_id, record.path, record.width, record.height, annotations, record.source)


def _find_photo(images: Path, stem: str, tree: ElementTree.Element) -> Path:
    """The photo with the annotation's name, else the one that the annotation names."""
    for suffix in _PHOTO_SUFFIXES:
        if (images / f"{stem}{suffix}").is_file():
            return images / f"{stem}{suffix}"
    return images / (tree.findtext("filename") or f"{stem}.jpg")


def _read_size(tree: ElementTree.Element, source: Path, path: Path, number: int, problems: Problems) -> tuple[int, int]:
    texts = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    try:
        width, height = (int(float(text)) for text in texts)
        if min(width, height) >= 1:
            return width, height
    except (TypeError, ValueError, OverflowError):
        pass
    problems.add("photo without width and height", f"{source}: width and height are {texts}", number)
    try:
        return read_header(path).size
    except DataError:
        return 1, 1  # the check of the files reports it


def _read_objects(tree: ElementTree.Element, source: Path, photo_number: int, problems: Problems) -> list[_Object]:
    objects: list[_Object] = []
    for number, element in enumerate(tree.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if not name:
            message = f"{source}: object {number} has no name"
            problems.add("annotation without a needed key", message, photo_number)
            continue
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            xmin, ymin, xmax, ymax = (float(text) for text in texts)
        except (TypeError, ValueError):
            message = f"{source}: object {number} ({name}) has xmin, ymin, xmax, ymax = {texts}"
            problems.add("malformed box", message, photo_number)
            continue
        difficult = (element.findtext("difficult") or "0").strip() not in ("0", "")
        objects.append(((xmin - 1, ymin - 1, xmax, ymax), ALIASES.get(name, name), difficult, number))
    return objects

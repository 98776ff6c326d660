"""Readers of PASCAL VOC annotations: one XML file per photo, with 1-based boxes."""

import contextlib
import functools
import os
import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from earlyexit_ssd.data.checks import annotated_size, any_flag_set, check_names, check_unit, looks_normalized
from earlyexit_ssd.data.folder import photo_path, read_list, report_outside
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import ALIASES, Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, shown
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files

# COCO's names of VOC's 20 classes, in VOC's order
VOC_CLASSES = tuple(
    ALIASES.get(name, name)
    for name in (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )
)  # fmt: skip
_XML = (".xml",)
_CLASS_COLUMN = re.compile(r"[ \t]+(-1|0|1)$")  # in lists of one class: absent, difficult, present

_Object = tuple[tuple[float, float, float, float], str, bool, int]  # box, class name, difficult, number in the file


def _is_devkit(path: Path) -> bool:
    return os.path.isdir(path / "ImageSets" / "Main")


@register_format("voc", lambda annotations, path: bool(annotations) and _is_devkit(path), names_split=True)
def read_voc(name: str, devkit: Path, split: str, problems: Problems, allow_outside: bool = False) -> RawDataset:
    """Read the photos that ``<devkit>/ImageSets/Main/<split>.txt`` lists.

    VOC's class names become COCO's. ``difficult`` sets ``Annotation.ignore``. VOC counts pixels from 1 and
    includes both ends, so xmin..xmax becomes [xmin - 1, xmax]. Photos are numbered by their line, without empty lines.
    Raise DataError if the split is missing, or (mode "refuse") a record is broken.
    """
    listing, folder = devkit / "ImageSets" / "Main" / f"{split}.txt", devkit / "Annotations"
    if not os.path.isfile(listing):
        splits = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise DataError(f"{listing}: no such list of photos, expected one of the splits there: {splits}")
    lines = read_list(listing)
    xml_files = _file_index(_XML)
    sources = []
    for number, stem in enumerate(_stems(lines, lambda stem: bool(xml_files(folder / stem))), start=1):
        source = photo_path(folder, f"{stem}.xml", allow_outside)
        if source is None:
            report_outside(problems, f"{listing}: line {number} is {shown(stem)}", folder, number)
            continue
        sources.append((number, stem, (xml_files(folder / stem) or [source])[0]))
    return _XmlReader(folder, devkit / "JPEGImages", problems, allow_outside).read(name, sources, VOC_CLASSES)


@register_format("xml", lambda annotations, path: bool(annotations) and os.path.isdir(path) and not _is_devkit(path))
def read_xml_folder(
    name: str, annotations: Path, images: Path, problems: Problems, allow_outside: bool = False
) -> RawDataset:
    """Read all VOC XML files in the folder ``annotations`` and its subfolders. The photos are in ``images``. The
    classes are those of the objects, sorted. See :func:`read_voc` for boxes and errors."""
    xml_files, other_files = find_files(annotations, _XML)
    if not xml_files:
        raise DataError(f"{annotations}: no XML file here or in a subfolder, expected a VOC annotation file per photo")
    stems = sorted((path.relative_to(annotations).with_suffix("").as_posix(), path) for path in xml_files)
    sources = [(number, stem, path) for number, (stem, path) in enumerate(stems, start=1)]
    raw = _XmlReader(annotations, images, problems, allow_outside).read(name, sources)
    photos, others_of_photos = find_files(images, PHOTO_SUFFIXES)
    used, annotated = {record.path for record in raw.records}, {stem for _, stem, _ in sources}
    for path in photos:
        if path not in used and path.relative_to(images).with_suffix("").as_posix() not in annotated:
            problems.note("photo without annotations", str(path))
    for path in sorted({*other_files, *others_of_photos} - {*photos, *xml_files}):
        problems.note("file of another kind", str(path))
    return raw


def _stems(lines: Iterable[str], exists: Callable[[str], bool]) -> list[str]:
    """Return the name in each non-empty line of a list of photos.

    A name may contain spaces and may be quoted. The list of a class has a second column of -1, 0 or 1, so "cup 1" can
    be a name, or the name "cup" with a column. The list has this column if, for some line, ``exists`` is true without
    the column and false for the whole line.
    """
    stripped = [line for line in (line.strip(" \t\r") for line in lines) if line]
    pairs = [(_unquoted(line), _unquoted(_CLASS_COLUMN.sub("", line))) for line in stripped]
    has_column = any(full != cut and exists(cut) and not exists(full) for full, cut in pairs)
    return [cut if full != cut and has_column and (exists(cut) or not exists(full)) else full for full, cut in pairs]


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _file_index(suffixes: Sequence[str]) -> Callable[[Path], list[Path]]:
    """Return a function from a path without suffix to the files with one of the suffixes. It lists each folder once."""

    @functools.cache
    def listing(folder: Path) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        with contextlib.suppress(OSError, ValueError):  # no such folder
            for path in sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file()):
                if path.suffix.lower() in suffixes:
                    files.setdefault(path.stem, []).append(path)
        return files

    return lambda path: listing(path.parent).get(path.name, [])


@dataclass
class _XmlReader:
    """Reader of the XML files in ``annotations``, with the photos in ``images``."""

    annotations: Path
    images: Path
    problems: Problems
    allow_outside: bool
    normalized: list[tuple[str, int]] = field(default_factory=list)  # normalized boxes: message, image id
    photos: Callable[[Path], list[Path]] = field(default_factory=lambda: _file_index(PHOTO_SUFFIXES))

    def read(self, name: str, sources: Sequence[tuple[int, str, Path]], standard: Sequence[str] = ()) -> RawDataset:
        """Read ``sources``: image id, name relative to ``annotations`` without suffix, and XML file of each photo.
        ``standard`` are the classes of the data set if it has no other classes."""
        photos: list[tuple[Record, list[_Object]]] = []
        seen: set[Path] = set()
        for image_id, stem, source in sources:
            if source in seen:
                self.problems.add("duplicate photo id", f"{source}: listed twice, expected once")
                continue
            seen.add(source)
            try:
                if not os.path.isfile(source):
                    raise FileNotFoundError("no such file")
                tree = ElementTree.parse(source).getroot()
                if tree.tag != "annotation":
                    raise ValueError(f"its root is {shown(tree.tag)}, expected annotation")
            except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last two are of encodings
                self.problems.add("unreadable annotation file", f"{source}: {error}", image_id)
                continue
            path = self._find_photo(stem, tree, source, image_id)
            sides = tree.findtext("size/width"), tree.findtext("size/height")
            size = annotated_size(*sides, str(source), path, image_id, self.problems, str)
            photos.append((Record(image_id, path, *size, source=source), list(self._objects(tree, source, image_id))))
        total = len(self.normalized) + sum(len(objects) for _, objects in photos)
        check_unit(self.normalized, total, self.annotations, self.problems)
        photos = [(record, objects) for record, objects in photos if self.problems.keeps(record.image_id)]
        names = sorted({class_name for _, objects in photos for _, class_name, _, _ in objects})
        check_names(names, self.annotations, self.problems)
        present = {ALIASES.get(class_name, class_name) for class_name in names}
        classes = tuple(standard if present and present <= set(standard) else sorted(present))
        labels = {class_name: classes.index(ALIASES.get(class_name, class_name)) + 1 for class_name in names}
        records = tuple(
            record.with_annotations(
                Annotation(box, labels[label], ignore, None, index) for box, label, ignore, index in objects
            )
            for record, objects in photos
        )
        return RawDataset(name, classes, records, open_classes=True)

    def _find_photo(self, stem: str, tree: ElementTree.Element, source: Path, image_id: int) -> Path:
        """Return the photo in ``<filename>``, or otherwise the photo with the name of the XML file.

        Both are searched in the subfolder of ``images`` that corresponds to the XML file's, then in ``images`` itself.
        ``<filename>`` may be a path of another machine. Then its last part is searched.
        """
        images, problems = self.images, self.problems
        filename, parent = (tree.findtext("filename") or "").strip(), posixpath.dirname(stem)
        last = PureWindowsPath(filename).name
        names = (posixpath.join(parent, filename), filename, posixpath.join(parent, last), last) if filename else ()
        paths = [photo_path(images, name, self.allow_outside) for name in names]
        by_filename = next((path for path in paths if path is not None and os.path.isfile(path)), None)
        by_stem = self.photos(images / stem) or self.photos(images / posixpath.basename(stem))
        found = f"{source}: <filename> is {shown(filename)}"
        if by_filename is not None:
            if by_stem and by_filename not in by_stem:
                message = f"{found}, expected {by_stem[0].name}, the photo with the name of the XML file"
                problems.add("photo of another name than its annotations", message, image_id)
            return by_filename
        if len(by_stem) > 1:
            message = f"{found}, expected one of {', '.join(path.name for path in by_stem)}"
            problems.add("two photos of one name", message, image_id)
            problems.leave_out(image_id)
        elif filename and not by_stem and photo_path(images, filename, self.allow_outside) is None:
            report_outside(problems, found, images, image_id)
            problems.leave_out(image_id)
        return by_stem[0] if by_stem else images / (last or f"{stem}.jpg")

    def _objects(self, tree: ElementTree.Element, source: Path, image_id: int) -> Iterator[_Object]:
        for number, element in enumerate(tree.findall("object"), start=1):
            name = " ".join((element.findtext("name") or "").split())
            if not name:
                message = f"{source}: object {number} has no <name>, expected its class"
                self.problems.add("annotation without a needed key", message, image_id)
                continue
            texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            where = f"{source}: object {number} ({name})"
            message = f"{where} has xmin, ymin, xmax, ymax = {shown(texts)}, expected pixels"
            try:
                xmin, ymin, xmax, ymax = map(float, texts)
            except (TypeError, ValueError):
                self.problems.add("malformed box", message, image_id)
                continue
            if xmax > xmin and ymax > ymin and looks_normalized((xmin, ymin, xmax, ymax)):
                self.normalized.append((message, image_id))
                continue
            difficult = any_flag_set({"difficult": element.findtext("difficult")}, where, self.problems, image_id)
            yield (xmin - 1, ymin - 1, xmax, ymax), name, difficult, number

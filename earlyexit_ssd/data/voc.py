"""PASCAL VOC annotations (one XML file a photo, 1-based boxes) -> photos with boxes."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from earlyexit_ssd.data.checks import annotated_size, are_shares, check_names, check_unit, read_flags
from earlyexit_ssd.data.folder import photo_path, read_list
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import ALIASES, Annotation, RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError, shown
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files

# VOC's twenty classes under COCO's names, in VOC's (alphabetical) order.
VOC_CLASSES = tuple(
    ALIASES.get(name, name)
    for name in (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )
)  # fmt: skip
_XML = (".xml",)
_COLUMN = re.compile(r"[ \t]+(-1|0|1)$")

# (box, class name, difficult, number in the file)
_Object = tuple[tuple[float, float, float, float], str, bool, int]


def _is_devkit(path: Path) -> bool:
    return os.path.isdir(path / "ImageSets" / "Main")


@register_format("voc", lambda annotations, path: bool(annotations) and _is_devkit(path), names_split=True)
def read_voc(name: str, devkit: Path, split: str, problems: Problems, allow_outside: bool = False) -> RawDataset:
    """Read the photos that ``<devkit>/ImageSets/Main/<split>.txt`` lists; ``devkit`` is like VOC2012.

    Names are COCO's where the two differ. ``difficult`` becomes ``Annotation.ignore``. Photos are numbered by
    their line. A box of pixels xmin..xmax, counted from 1 and both inside, covers [xmin - 1, xmax].

    ``problems`` takes what is wrong with single records; ``allow_outside`` takes names that lead outside the folders.

    Raises:
        DataError: no such devkit or split, or (mode "refuse") a broken record.
    """
    listing, folder = devkit / "ImageSets" / "Main" / f"{split}.txt", devkit / "Annotations"
    if not os.path.isfile(listing):
        splits = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "no split at all"
        raise DataError(f"{listing}: no such list of photos; {listing.parent} has {splits}")
    lines = read_list(listing)
    look_up = _look_up(_XML)
    sources = []
    for number, stem in enumerate(_stems(lines, lambda stem: bool(look_up(folder / stem))), start=1):
        source = photo_path(folder, f"{stem}.xml", allow_outside)
        if source is None:
            problems.add("photo outside the photo folder", f"{listing}: line {number} is {shown(stem)}", number)
            continue
        sources.append((number, stem, (look_up(folder / stem) or [source])[0]))
    return _Folders(folder, devkit / "JPEGImages", problems, allow_outside).read(name, sources, VOC_CLASSES)


@register_format("xml", lambda annotations, path: bool(annotations) and os.path.isdir(path) and not _is_devkit(path))
def read_xml_folder(
    name: str, annotations: Path, images: Path, problems: Problems, allow_outside: bool = False
) -> RawDataset:
    """Read every VOC XML file in and below a folder, the photos lying in another (as labelling tools write them).

    The classes are those that occur, sorted. The rest is as of :func:`read_voc`.
    """
    found, others = find_files(annotations, _XML)
    if not found:
        raise DataError(f"{annotations}: no XML file in it, expected one VOC annotation file a photo")
    stems = sorted((path.relative_to(annotations).with_suffix("").as_posix(), path) for path in found)
    sources = [(number, stem, path) for number, (stem, path) in enumerate(stems, start=1)]
    raw = _Folders(annotations, images, problems, allow_outside).read(name, sources)
    photos, others_there = find_files(images, PHOTO_SUFFIXES)
    used, named = {record.path for record in raw.records}, {stem for _, stem, _ in sources}
    for path in photos:
        if path not in used and path.relative_to(images).with_suffix("").as_posix() not in named:
            problems.note("photo without annotations", str(path))
    for path in sorted({*others, *others_there} - {*photos, *found}):
        problems.note("file of another kind", str(path))
    return raw


def _stems(lines: Iterable[str], exists: Callable[[str], bool]) -> list[str]:
    """The names in a list of photos, once for each line.

    A name may hold blanks, and quotes may stand around it. Per-class lists carry a -1, 0 or 1 behind it; so that
    "cup 1" is one or the other, the list is such a one where a line is no name as a whole and is one without its last
    column.
    """
    whole = [line for line in (line.strip(" \t\r") for line in lines) if line]
    pairs = [(_unquoted(line), _unquoted(_COLUMN.sub("", line))) for line in whole]
    columns = any(full != cut and exists(cut) and not exists(full) for full, cut in pairs)
    return [cut if full != cut and columns and (exists(cut) or not exists(full)) else full for full, cut in pairs]


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _look_up(suffixes: Sequence[str]) -> Callable[[Path], list[Path]]:
    """A function from a path without suffix to the files of that name; each folder is listed once."""

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
class _Folders:
    """Reads the XML files of ``annotations``; the photos are in ``images``."""

    annotations: Path
    images: Path
    problems: Problems
    allow_outside: bool
    shares: list[tuple[str, int]] = field(default_factory=list)  # boxes that look like shares: message, photo
    photos: Callable[[Path], list[Path]] = field(default_factory=lambda: _look_up(PHOTO_SUFFIXES))

    def read(self, name: str, sources: Sequence[tuple[int, str, Path]], benchmark: Sequence[str] = ()) -> RawDataset:
        """``sources``: number, name without suffix below ``annotations``, XML file; classes are those of the
        ``benchmark`` where all that is found is among them."""
        found: list[tuple[Record, list[_Object]]] = []
        seen: set[Path] = set()
        for number, stem, source in sources:
            if source in seen:
                self.problems.add("duplicate photo id", f"{source}: listed twice")
                continue
            seen.add(source)
            try:
                if not os.path.isfile(source):
                    raise FileNotFoundError("no such file")
                tree = ElementTree.parse(source).getroot()
            except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: the encoding
                self.problems.add("unreadable annotation file", f"{source}: {error}", number)
                continue
            path = self._find_photo(stem, tree, source, number)
            sides = tree.findtext("size/width"), tree.findtext("size/height")
            size = annotated_size(*sides, str(source), path, number, self.problems, str)
            found.append((Record(number, path, *size, source=source), list(self._objects(tree, source, number))))
        total = len(self.shares) + sum(len(objects) for _, objects in found)
        check_unit(self.shares, total, self.annotations, self.problems)
        found = [(record, objects) for record, objects in found if self.problems.keeps(record.image_id)]
        names = sorted({one[1] for _, objects in found for one in objects})
        check_names(names, self.annotations, self.problems)
        occurring = {ALIASES.get(one, one) for one in names}
        classes = tuple(benchmark if occurring and occurring <= set(benchmark) else sorted(occurring))
        labels = {one: classes.index(ALIASES.get(one, one)) + 1 for one in names}
        records = tuple(
            record.holding(Annotation(box, labels[label], ignore, None, at) for box, label, ignore, at in objects)
            for record, objects in found
        )
        return RawDataset(name, classes, records, open_classes=True)

    def _find_photo(self, stem: str, tree: ElementTree.Element, source: Path, number: int) -> Path:
        """The photo that the annotation names, else the one with the annotation's own name.

        The photo is looked for in the folder that answers to the annotation's, then in ``images`` itself. Many tools
        write the path of another machine; its last part is taken then.
        """
        images, problems = self.images, self.problems
        named, parent = (tree.findtext("filename") or "").strip(), posixpath.dirname(stem)
        last = PureWindowsPath(named).name
        names = (posixpath.join(parent, named), named, posixpath.join(parent, last), last) if named else ()
        paths = [photo_path(images, name, self.allow_outside) for name in names]
        stated = next((path for path in paths if path is not None and os.path.isfile(path)), None)
        own = self.photos(images / stem) or self.photos(images / posixpath.basename(stem))
        if stated is not None:
            if own and stated not in own:
                message = f"{source}: <filename> says {shown(named)}, beside it is {own[0].name}"
                problems.add("photo of another name than its annotations", message, number)
            return stated
        if len(own) > 1:
            message = f"{source}: {' and '.join(path.name for path in own)} fit, <filename> says {shown(named)}"
            problems.add("two photos of one name", message, number)
            problems.leave_out(number)
        elif named and not own and photo_path(images, named, self.allow_outside) is None:
            problems.add("photo outside the photo folder", f"{source}: <filename> is {shown(named)}", number)
            problems.leave_out(number)
        return own[0] if own else images / (last or f"{stem}.jpg")

    def _objects(self, tree: ElementTree.Element, source: Path, photo_number: int) -> Iterator[_Object]:
        for number, element in enumerate(tree.findall("object"), start=1):
            name = " ".join((element.findtext("name") or "").split())
            if not name:
                found = f"{source}: object {number} has no name"
                self.problems.add("annotation without a needed key", found, photo_number)
                continue
            texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            where = f"{source}: object {number} ({name})"
            found = f"{where} has xmin, ymin, xmax, ymax = {shown(texts)}"
            try:
                xmin, ymin, xmax, ymax = map(float, texts)
            except (TypeError, ValueError):
                self.problems.add("malformed box", found, photo_number)
                continue
            if xmax > xmin and ymax > ymin and are_shares((xmin, ymin, xmax, ymax)):
                self.shares.append((found, photo_number))
                continue
            difficult = read_flags({"difficult": element.findtext("difficult")}, where, self.problems, photo_number)
            yield (xmin - 1, ymin - 1, xmax, ymax), name, difficult, number

"""Photos with boxes as the readers return them, independent of the file format."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from earlyexit_ssd.data.problems import REPAIRS
from earlyexit_ssd.errors import DataError, nearest, one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object. ``area`` decides whether it is small, medium or large; COCO gives the area inside the outline."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in absolute pixels of the photo, 0-based; width is x2 - x1
    label: int  # 1..K, the index of the class in the list of classes plus 1
    ignore: bool = False  # COCO crowd, VOC difficult: never a training target, and detections on it are not counted
    area: float | None = None  # square pixels; None: the area of the box
    id: int | str = 0  # of the object in its file, for messages


@dataclass(frozen=True, slots=True)
class Record:
    """One photo with its objects."""

    image_id: int
    path: Path
    width: int  # pixels of the picture that the boxes refer to
    height: int
    annotations: tuple[Annotation, ...] = ()
    source: Path | None = None  # the annotation file, for messages

    @property
    def has_targets(self) -> bool:
        """Whether any object is a training target; crowds and difficult objects are not."""
        return any(not annotation.ignore for annotation in self.annotations)

    def holding(self, annotations: Iterable[Annotation]) -> Record:
        """A copy with these objects."""
        return dataclasses.replace(self, annotations=tuple(annotations))


@dataclass(frozen=True)
class RawDataset:
    """The result of a reader, before checks and selection of classes."""

    name: str
    classes: tuple[str, ...]  # label i means classes[i - 1]
    records: tuple[Record, ...]
    open_classes: bool = False  # the format declares none: classes are those that occur, and a wanted one may be absent
    labelled: bool = True  # False if the photos have no annotations; a photo without boxes may then show objects


Reader = Callable[..., RawDataset]
"""``read(name, annotations, photos, problems, allow_outside)``; ``photos`` is a folder or the name of a split."""


@dataclass(frozen=True)
class Format:
    """An annotation format: how to recognise and read its entries (name, annotations, photos) in ``DATA.DATASETS``."""

    recognises: Callable[[str, Path], bool]  # the annotations as written in the entry, and their path
    names_split: bool  # whether the third part of an entry is the name of a split instead of a folder of photos
    read: Reader


FORMATS: dict[str, Format] = {}


def register_format(
    name: str, recognises: Callable[[str, Path], bool], names_split: bool = False, **repairs: str
) -> Callable[[Reader], Reader]:
    """Decorator that registers the reader of a `Format`. If several formats recognise an entry, the last one reads it.

    ``repairs``: kind of problem (with _ for a space) -> its repair in words, for problems that only this format has.
    """

    def register(read: Reader) -> Reader:
        REPAIRS.update({kind.replace("_", " "): done for kind, done in repairs.items()})
        FORMATS[name] = Format(recognises, names_split, read)
        return read

    return register


# VOC's names -> COCO's names of the same classes.
ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def canonical(name: str) -> str:
    """A class name for comparisons: lower case, and COCO's word if VOC uses another."""
    name = " ".join(name.lower().replace("_", " ").split())
    return ALIASES.get(name, ALIASES.get(name.replace(" ", ""), name))


def union_of_classes(raws: Sequence[RawDataset]) -> tuple[str, ...]:
    """Every class of the data sets, in order of first appearance."""
    names: dict[str, str] = {}
    for name in (name for raw in raws for name in raw.classes):
        names.setdefault(canonical(name), name)
    return tuple(names.values())


def select_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool = False) -> list[Record]:
    """The photos of all data sets with the objects of ``classes`` only, labelled 1..K in their order.

    Photos without such an object stay, as negatives. With several data sets the photos get new ids from 1. In
    training (``train``) a data set with ``open_classes`` must have the classes too.

    Raises:
        DataError: no data set has one of the classes, or a class is named twice.
    """
    labels = {canonical(name): label for label, name in enumerate(classes, start=1)}
    if len(labels) < len(classes):
        raise DataError(f"DATA.CLASSES is {tuple(classes)}: the same class twice; name each once")
    _check_classes(raws, classes, train)
    records: list[Record] = []
    for raw in raws:
        ours = {label: labels.get(canonical(name)) for label, name in enumerate(raw.classes, start=1)}
        for record in raw.records:
            wanted = [(one, ours.get(one.label)) for one in record.annotations]
            objects = tuple(dataclasses.replace(one, label=label) for one, label in wanted if label)
            image_id = record.image_id if len(raws) == 1 else len(records) + 1
            records.append(dataclasses.replace(record, image_id=image_id, annotations=objects))
    return records


def _check_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool) -> None:
    """A class that no set declares is an error. A class without a box in a set is a warning, since its objects may be
    unlabelled and would train as background."""
    there = union_of_classes(raws)
    known = {canonical(name) for name in there}
    may_lack_some = any(raw.open_classes and not (train and raw.labelled) for raw in raws)
    for name in classes:
        if canonical(name) not in known and not may_lack_some:
            sets, listed = ", ".join(raw.name for raw in raws), ", ".join(there[:20]) or "none"
            hint = nearest(name, there)
            raise DataError(f"DATA.CLASSES has {name!r}, which {sets} does not have{hint}; classes there: {listed}")
    for raw in (raw for raw in raws if raw.labelled):
        shown = {(one.label, one.ignore) for record in raw.records for one in record.annotations}
        named = {(canonical(raw.classes[label - 1]), flag) for label, flag in shown if 1 <= label <= len(raw.classes)}
        absent = [name for name in classes if (canonical(name), False) not in named]
        absent = [f"{name} (but some to ignore)" if (canonical(name), True) in named else name for name in absent]
        if absent:
            logger.warning("%s has no box of %s", raw.name, one_line(few(absent)))


def few(names: Sequence[str]) -> str:
    """The first eight names and the number of others, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def limit_negatives(records: list[Record], share: float, seed: int) -> list[Record]:
    """Drop random photos without an object until they are at most ``share`` of all photos, in [0, 1).

    -1 keeps all. If no photo has an object, all stay.
    """
    negatives = [place for place, record in enumerate(records) if not record.has_targets]
    wanted = round((len(records) - len(negatives)) * share / (1 - share))
    if share < 0 or len(negatives) <= wanted or len(negatives) == len(records):
        return records
    kept = set(random.Random(seed).sample(negatives, wanted))
    return [record for place, record in enumerate(records) if record.has_targets or place in kept]


def limit_photos(records: list[Record], limit: int, seed: int) -> list[Record]:
    """``limit`` random photos in their old order; 0 keeps all."""
    if not 0 < limit < len(records):
        return records
    return [records[place] for place in sorted(random.Random(seed).sample(range(len(records)), limit))]

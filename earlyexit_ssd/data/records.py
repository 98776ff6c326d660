"""Photos with boxes in the form that all readers return, and the registry of annotation formats."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from earlyexit_ssd.data.problems import REPAIRS
from earlyexit_ssd.errors import DataError, one_line, suggest
from earlyexit_ssd.registry import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of a photo."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in absolute pixels of the photo, 0-based; width is x2 - x1
    label: int  # 1..K; label i is classes[i - 1]
    ignore: bool = False  # COCO crowd or VOC difficult: not a training target; detections that match it are not counted
    area: float | None = None  # square pixels, in COCO files the area of the mask; None: the area of the box
    id: int | str = 0  # id of the object in its file, for messages


@dataclass(frozen=True, slots=True)
class Record:
    """One photo with its objects."""

    image_id: int
    path: Path
    width: int  # pixels, of the image that the boxes refer to
    height: int
    annotations: tuple[Annotation, ...] = ()
    source: Path | None = None  # the annotation file, for messages
    source_id: int | None = None  # the id in this file, if ``image_id`` is another

    @property
    def has_targets(self) -> bool:
        """Whether any object is a training target, so neither a crowd nor difficult."""
        return any(not annotation.ignore for annotation in self.annotations)

    def with_annotations(self, annotations: Iterable[Annotation]) -> Record:
        """Return a copy with these objects."""
        return dataclasses.replace(self, annotations=tuple(annotations))


@dataclass(frozen=True)
class RawDataset:
    """What a reader returns, before the checks and the selection of classes."""

    name: str
    classes: tuple[str, ...]  # label i is classes[i - 1]
    records: tuple[Record, ...]
    open_classes: bool = False  # True if the format declares no classes; `classes` are then those of the objects
    labelled: bool = True  # False if the photos have no annotations; a photo without boxes may then show objects


Reader = Callable[..., RawDataset]
"""``read(name, annotations, photos, problems, allow_outside)``. ``photos`` is a folder or the name of a split.
``problems`` collects the problems of single records. ``allow_outside`` accepts files outside the data set's folders."""


@dataclass(frozen=True)
class DataFormat:
    """An annotation format of the entries (name, annotations, photos or split) of ``DATA.DATASETS``."""

    recognises: Callable[[str, Path], bool]  # gets the annotations as written in the entry, and their full path
    names_split: bool  # True if the third part of an entry is the name of a split, False if it is a folder of photos
    read: Reader


DATA_FORMATS: Registry[DataFormat] = Registry("data format")


def register_format(
    name: str, recognises: Callable[[str, Path], bool], names_split: bool = False, **repairs: str
) -> Callable[[Reader], Reader]:
    """Return a decorator that registers a reader as `DataFormat` ``name``. The last registered format that recognises
    an entry reads it. ``repairs`` are added to `problems.REPAIRS`: kind of problem (_ for a space) -> its repair."""

    def register(read: Reader) -> Reader:
        DATA_FORMATS.register(name, DataFormat(recognises, names_split, read))
        REPAIRS.update({kind.replace("_", " "): repair for kind, repair in repairs.items()})
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
    """Return a class name in the form used for comparisons: lower case, single spaces, COCO's name for VOC's."""
    name = " ".join(name.lower().replace("_", " ").split())
    return ALIASES.get(name, ALIASES.get(name.replace(" ", ""), name))


def union_of_classes(raws: Sequence[RawDataset]) -> tuple[str, ...]:
    """Return the classes of all data sets in order of first appearance."""
    names: dict[str, str] = {}
    for name in (name for raw in raws for name in raw.classes):
        names.setdefault(canonical(name), name)
    return tuple(names.values())


def select_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool = False) -> list[Record]:
    """Return the photos of all data sets with the objects of ``classes`` only, which get the labels 1..K.

    Photos without these objects stay, as negatives. The photos of several data sets are numbered anew from 1. Raise
    DataError if a class is named twice, or is in no data set. A class may be missing if a data set has
    ``open_classes``, and with ``train`` no labels.
    """
    labels = {canonical(name): label for label, name in enumerate(classes, start=1)}
    if len(labels) < len(classes):
        raise DataError(f"DATA.CLASSES is {tuple(classes)}, which has the same class twice; name each class once")
    _check_classes(raws, classes, train)
    records: list[Record] = []
    for raw in raws:
        new_labels = {label: labels.get(canonical(name)) for label, name in enumerate(raw.classes, start=1)}
        for record in raw.records:
            relabelled = [(annotation, new_labels.get(annotation.label)) for annotation in record.annotations]
            objects = tuple(dataclasses.replace(annotation, label=label) for annotation, label in relabelled if label)
            record = dataclasses.replace(record, annotations=objects)
            if len(raws) > 1:
                record = dataclasses.replace(record, image_id=len(records) + 1, source_id=record.image_id)
            records.append(record)
    return records


def _check_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool) -> None:
    """Raise DataError for a class that no data set has. Warn of a class without boxes in one of the data sets, because
    unlabelled objects are trained as background."""
    available = union_of_classes(raws)
    available_canonical = {canonical(name) for name in available}
    may_be_missing = any(raw.open_classes and not (train and raw.labelled) for raw in raws)
    for name in classes:
        if canonical(name) not in available_canonical and not may_be_missing:
            hint, listed = suggest(name, available), ", ".join(available[:20]) or "none"
            unknown = f"{name!r}, which is not a class of {', '.join(raw.name for raw in raws)}{hint}"
            raise DataError(f"DATA.CLASSES or the model has {unknown}; classes: {listed}")
    for raw in (raw for raw in raws if raw.labelled):
        labels = {(a.label, a.ignore) for record in raw.records for a in record.annotations}
        present = {(canonical(raw.classes[i - 1]), flag) for i, flag in labels if 1 <= i <= len(raw.classes)}
        absent = [name for name in classes if (canonical(name), False) not in present]
        absent = [f"{name} (only boxes to ignore)" if (canonical(name), True) in present else name for name in absent]
        if absent:
            logger.warning("%s has no box of %s", raw.name, one_line(shortened(absent)))


def shortened(names: Sequence[str]) -> str:
    """Return the first eight names and the number of the others, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def limit_negatives(records: list[Record], share: float, seed: int) -> list[Record]:
    """Drop random negatives (photos without a training target) until their share of all photos is at most ``share``.

    ``share`` is in [0, 1), or -1 to keep all negatives. If all photos are negatives, all of them stay.
    """
    negatives = [index for index, record in enumerate(records) if not record.has_targets]
    limit = int((len(records) - len(negatives)) * share / (1 - share) + 1e-6)  # 5.999999 is 6
    if share < 0 or len(negatives) <= limit or len(negatives) == len(records):
        return records
    kept = set(random.Random(seed).sample(negatives, limit))
    return [record for index, record in enumerate(records) if record.has_targets or index in kept]


def limit_photos(records: list[Record], limit: int, seed: int) -> list[Record]:
    """Return ``limit`` random photos in their original order, or all photos if ``limit`` is 0."""
    if not 0 < limit < len(records):
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), limit))]

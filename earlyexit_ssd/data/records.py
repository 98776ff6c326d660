"""What a data set is once it is read: photos with boxes, whatever the file format was."""

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
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in absolute pixels of the photo, 0-based; width is ``x2 - x1``.
        label: 1..K, the class's place in the list of classes plus one; 0 is no class.
        ignore: COCO crowd or VOC difficult: never a training target, and detections on it are not counted.
        area: area in square pixels that sorts the object into small, medium and large; None: the box's own.
            (COCO gives the area of the object's outline, which is smaller.)
        id: the number of this object in its file, for messages.
    """

    box: tuple[float, float, float, float]
    label: int
    ignore: bool = False
    area: float | None = None
    id: int | str = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One photo with its objects; ``width`` and ``height`` are those of the picture that the boxes refer to.

    ``source`` is the file that the annotations came from, for messages.
    """

    image_id: int
    path: Path
    width: int
    height: int
    annotations: tuple[Annotation, ...] = ()
    source: Path | None = None

    @property
    def has_targets(self) -> bool:
        """Whether any object is a training target; crowds and difficult objects are not."""
        return any(not annotation.ignore for annotation in self.annotations)

    def holding(self, annotations: Iterable[Annotation]) -> Record:
        """The same photo with these objects."""
        return dataclasses.replace(self, annotations=tuple(annotations))


@dataclass(frozen=True)
class RawDataset:
    """What a reader returns, before checks and class filter; labels index ``classes``.

    ``open_classes``: the format declares no classes, so that ``classes`` are those that occur and others may not.
    ``labelled``: False for photos that nobody has looked at: that no box is there says nothing about them.
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    open_classes: bool = False
    labelled: bool = True


Reader = Callable[..., RawDataset]
"""(name, path of the annotations, folder of photos or name of a split, problems, allow_outside) -> data set."""


@dataclass(frozen=True)
class Format:
    """How the entries (name, annotations, photos or split) of ``DATA.DATASETS`` in this format are known and read."""

    recognises: Callable[[str, Path], bool]
    """(annotations as the entry has them, their path) -> whether they are in this format."""
    names_split: bool
    """The third part of an entry is the name of a split, not a folder of photos."""
    read: Reader


FORMATS: dict[str, Format] = {}


def register_format(
    name: str, recognises: Callable[[str, Path], bool], names_split: bool = False, **repairs: str
) -> Callable[[Reader], Reader]:
    """Decorate the reader of a format. Of several that recognise an entry the last one reads it.

    ``repairs``: what is done about kinds of problems that no other format has, with _ for blanks.
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
    """The form in which class names are compared: lower case, COCO's word where VOC has another."""
    name = " ".join(name.lower().replace("_", " ").split())
    return ALIASES.get(name, ALIASES.get(name.replace(" ", ""), name))


def union_of_classes(raws: Sequence[RawDataset]) -> tuple[str, ...]:
    """Every class of the data sets, in order of first appearance."""
    names: dict[str, str] = {}
    for raw in raws:
        for name in raw.classes:
            names.setdefault(canonical(name), name)
    return tuple(names.values())


def select_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool = False) -> list[Record]:
    """The photos of all data sets, with the wanted objects only, labelled 1..K in the order of ``classes``.

    Photos without a wanted object stay, as negatives. With more than one data set the photos are numbered anew from 1,
    since each set has its own numbers. To ``train``, sets with ``open_classes`` must show the classes too.

    Raises:
        DataError: a class that none of the data sets has, or a class named twice.
    """
    labels = {canonical(name): label for label, name in enumerate(classes, start=1)}
    if len(labels) < len(classes):
        raise DataError(f"DATA.CLASSES is {tuple(classes)}: the same class twice; name each once")
    _check_classes(raws, classes, train)
    records: list[Record] = []
    for raw in raws:
        ours = {label: labels.get(canonical(name)) for label, name in enumerate(raw.classes, start=1)}
        for record in raw.records:
            wanted = [(one, label) for one in record.annotations if (label := ours.get(one.label))]
            objects = (dataclasses.replace(one, label=label) for one, label in wanted)
            image_id = record.image_id if len(raws) == 1 else len(records) + 1
            records.append(dataclasses.replace(record, image_id=image_id).holding(objects))
    return records


def _check_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool) -> None:
    """Unknown classes are an error; absent ones a warning: a set without their labels teaches background."""
    there = union_of_classes(raws)
    known = set(map(canonical, there))
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
    """The first eight names for a message, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def limit_negatives(records: list[Record], share: float, seed: int) -> list[Record]:
    """Drop photos without an object, by a seeded choice, until they are at most ``share`` of the photos, in [0, 1).

    -1 keeps all. Where no photo has an object, all stay: there is nothing to be a share of.
    """
    negatives = [place for place, record in enumerate(records) if not record.has_targets]
    wanted = round((len(records) - len(negatives)) * share / (1 - share))
    if share < 0 or len(negatives) <= wanted or len(negatives) == len(records):
        return records
    kept = set(random.Random(seed).sample(negatives, wanted))
    return [record for place, record in enumerate(records) if record.has_targets or place in kept]


def limit_photos(records: list[Record], limit: int, seed: int) -> list[Record]:
    """A seeded choice of ``limit`` photos in their old order; 0 keeps all."""
    if not 0 < limit < len(records):
        return records
    return [records[place] for place in sorted(random.Random(seed).sample(range(len(records)), limit))]

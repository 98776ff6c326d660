"""Which classes are detected: filter, rename and number the classes of one data set or several."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence

from earlyexit_ssd.data.records import RawDataset, Record
from earlyexit_ssd.errors import DataError, nearest, one_line

logger = logging.getLogger(__name__)

NAMED = 8
"""Classes that a message names at most."""

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

    Photos without a wanted object stay, as negatives. With more than one data set the photos are numbered
    anew from 1, since each set has its own numbers.

    Args:
        train: the photos are to teach the classes, so that a set with ``open_classes`` must show them too.

    Raises:
        DataError: a class that none of the data sets has, or a class named twice.
    """
    labels = {canonical(name): label for label, name in enumerate(classes, start=1)}
    if len(labels) < len(classes):
        raise DataError(f"DATA.CLASSES is {tuple(classes)}: the same class twice; name each once")
    _check_classes(raws, classes, train)
    records = [_relabel(record, _label_map(raw, labels)) for raw in raws for record in raw.records]
    if len(raws) > 1:
        records = [dataclasses.replace(record, image_id=i) for i, record in enumerate(records, start=1)]
    return records


def _label_map(raw: RawDataset, labels: dict[str, int]) -> dict[int, int]:
    """The data set's label -> ours, for the wanted classes."""
    own = ((label, canonical(name)) for label, name in enumerate(raw.classes, start=1))
    return {label: labels[name] for label, name in own if name in labels}


def _relabel(record: Record, label_map: dict[int, int]) -> Record:
    annotations = tuple(
        dataclasses.replace(annotation, label=label_map[annotation.label])
        for annotation in record.annotations
        if annotation.label in label_map
    )
    return dataclasses.replace(record, annotations=annotations)


def _check_classes(raws: Sequence[RawDataset], classes: Sequence[str], train: bool) -> None:
    """Unknown classes are an error; absent ones a warning: a set without their labels teaches background."""
    known = {canonical(name) for raw in raws for name in raw.classes}
    may_lack_some = any(raw.open_classes and not (train and raw.labelled) for raw in raws)
    for name in classes:
        if canonical(name) not in known and not may_lack_some:
            sets = ", ".join(raw.name for raw in raws)
            listed = ", ".join(union_of_classes(raws)[:20]) or "none"
            raise DataError(
                f"DATA.CLASSES has {name!r}, which {sets} does not have"
                f"{nearest(name, union_of_classes(raws))}; classes there: {listed}"
            )
    for raw in (raw for raw in raws if raw.labelled):
        shown = {(one.label, one.ignore) for record in raw.records for one in record.annotations}
        named = {(canonical(raw.classes[label - 1]), flag) for label, flag in shown if 1 <= label <= len(raw.classes)}
        ignored = {name for name, flag in named if flag}
        absent = [name for name in classes if (canonical(name), False) not in named]
        absent = [f"{name} (but some to ignore)" if canonical(name) in ignored else name for name in absent]
        if absent:
            logger.warning("%s has no box of %s", raw.name, one_line(few(absent)))


def few(names: Sequence[str]) -> str:
    """The first ``NAMED`` names for a message, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def limit_negatives(records: list[Record], share: float, seed: int) -> list[Record]:
    """Drop photos without an object, by a seeded choice, until they are at most ``share`` of the photos.

    Where no photo has an object, all stay: there is nothing to be a share of.

    Args:
        share: in [0, 1); -1 keeps all.
    """
    if share < 0:
        return records
    negatives = [place for place, record in enumerate(records) if not record.has_targets]
    wanted = round((len(records) - len(negatives)) * share / (1 - share))
    if len(negatives) <= wanted or len(negatives) == len(records):
        return records
    kept = set(random.Random(seed).sample(negatives, wanted))
    return [record for place, record in enumerate(records) if record.has_targets or place in kept]


def limit_photos(records: list[Record], limit: int, seed: int) -> list[Record]:
    """A seeded choice of ``limit`` photos in their old order; 0 keeps all."""
    if not 0 < limit < len(records):
        return records
    return [records[place] for place in sorted(random.Random(seed).sample(range(len(records)), limit))]

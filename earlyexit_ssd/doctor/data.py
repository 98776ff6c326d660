"""Checks of the splits that a training, a calibration and an evaluation would read."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from earlyexit_ssd.data.records import Record
from earlyexit_ssd.data.repeats import PerceptualHashes
from earlyexit_ssd.doctor import findings
from earlyexit_ssd.evaluation.results import Record as Json

DATA_CHECKS: list[findings.Check] = []  # in the order of the table
check = functools.partial(findings.check, DATA_CHECKS)

MATCH = 0.5  # IoU at which torchvision assigns a default box to an object
ENOUGH_BOXES = 20  # with fewer boxes, a split's boxes are not judged as a whole


@dataclass(frozen=True)
class Split:
    """Photos of one split."""

    name: str  # ``TRAIN``, ``CALIB`` or ``TEST``
    classes: tuple[str, ...]  # names of the labels 1..K
    records: Sequence[Record]  # the photos with boxes as their files give them, not clipped
    labelled: bool  # False if some photos have no annotations; its boxes are not judged then
    sha256: Sequence[str]  # of the content of each photo's file
    looks: PerceptualHashes  # to find near-duplicates

    @property
    def objects(self) -> Counter[int]:
        """Label -> number of objects that count (no crowds, none that is difficult)."""
        return Counter(one.label for record in self.records for one in record.annotations if not one.ignore)

    def boxes(self) -> Tensor:
        """Boxes of objects that count, xyxy as shares of their photo's width and height, float64 [B, 4]."""
        counted = (
            (*one.box, record.width, record.height)
            for record in self.records
            for one in record.annotations
            if not one.ignore
        )
        values = torch.tensor(list(counted), dtype=torch.float64).reshape(-1, 6)
        return values[:, :4] / values[:, [4, 5, 4, 5]]


@dataclass(frozen=True)
class DataEvidence:
    """The splits, and the default boxes of the configured detector: [A, 4] xyxy in pixels of an input of ``size``."""

    splits: Sequence[Split]
    default_boxes: Tensor
    size: int = 320

    def best_ious(self, split: Split) -> Tensor:
        """IoU of each object with the default box that overlaps it most, [B]."""
        parts = (split.boxes() * self.size).float().clamp(0, self.size).split(256)
        return torch.cat([box_iou(part, self.default_boxes).amax(1) for part in parts] or [torch.zeros(0)])


@dataclass(frozen=True)
class Summary(Json):
    """Figures of a split that are neither good nor bad. Triples are the 5 %, 50 % and 95 % quantiles; None: no box.

    sides: photo pixels, the square root of width x height. aspects: width / height of the photos. object_sides: square
    root of the box's area in network pixels. best_ious: with the default boxes. objects: by class.
    """

    split: str
    photos: int
    boxes: int
    sides: list[float]
    aspects: list[float]
    object_sides: list[float] | None
    best_ious: list[float] | None
    objects: dict[str, int]

    def __str__(self) -> str:
        def three(values: list[float] | None, digits: int) -> str:
            return "-" if values is None else " / ".join(f"{value:.{digits}f}" for value in values)

        classes = ", ".join(f"{name} {count}" for name, count in list(self.objects.items())[:10])
        return (
            f"{self.split}: {self.photos} photos, {self.boxes} boxes; quantiles 5 / 50 / 95 % of:\n"
            f"     photos: side {three(self.sides, 0)} px, width / height {three(self.aspects, 2)}\n"
            f"     objects: side {three(self.object_sides, 0)} px in the network, best IoU with a default box "
            f"{three(self.best_ious, 2)}\n     boxes of: {classes or '-'}{', ...' if len(self.objects) > 10 else ''}"
        )


def summarise(evidence: DataEvidence, split: Split) -> Summary:
    def quantiles(values: Tensor | np.ndarray) -> list[float] | None:
        return np.quantile(np.asarray(values), [0.05, 0.5, 0.95]).tolist() if len(values) else None

    sizes = np.array([(record.width, record.height) for record in split.records], np.float64).reshape(-1, 2)
    boxes, counts = split.boxes() * evidence.size, split.objects
    sides = box_area(boxes).clamp(min=0).sqrt()
    named = {name: counts[label] for label, name in enumerate(split.classes, start=1)}
    photos = quantiles(sizes.prod(1) ** 0.5), quantiles(sizes[:, 0] / sizes[:, 1])
    objects = quantiles(sides), quantiles(evidence.best_ious(split))
    return Summary(split.name, len(split.records), len(boxes), *photos, *objects, named)


def per_split(measure: Callable[[Split, DataEvidence], float]) -> Callable[[DataEvidence], dict[str, float]]:
    """A check of the boxes of every labelled split by itself, where there are enough."""

    @functools.wraps(measure)
    def of_all(evidence: DataEvidence) -> dict[str, float]:
        judged = (one for one in evidence.splits if one.labelled and sum(one.objects.values()) >= ENOUGH_BOXES)
        return {one.name: measure(one, evidence) for one in judged}

    return of_all


# With 100 photos the 95 % interval of a share is up to 10 points to either side; with fewer no figure means much.
@check(
    least=100,
    meaning="so few photos say little: a share of them is known to 10 points at best",
    advice="add photos, or take some from another split",
)
def few_photos(evidence: DataEvidence) -> dict[str, float]:
    """Number of photos."""
    return {one.name: len(one.records) for one in evidence.splits}


# Negatives teach little each (torchvision's SSD: nothing). With 20 of them to each photo with an object, an epoch is
# nearly all of the former.
@check(
    most=0.95,
    meaning="hardly any photo shows an object, so training sees few of them and AP rests on few photos",
    advice="add photos with objects, or keep fewer without (DATA.NEGATIVE_SHARE)",
)
def empty_photos(evidence: DataEvidence) -> dict[str, float]:
    """Share of the photos without an object that counts."""
    judged = (one for one in evidence.splits if one.labelled and one.records)
    return {one.name: sum(not record.has_targets for record in one.records) / len(one.records) for one in judged}


@check(
    most=0,
    meaning="the same photos are in two splits, so figures on one of them are too high",
    advice="take them out of one of the two",
)
def copies_across_splits(evidence: DataEvidence) -> dict[str, float]:
    """Photos of the second split whose file has the content of one in the first."""
    pairs = combinations([one for one in evidence.splits if one.records], 2)
    return {f"{one.name}, {other.name}": sum(map(set(one.sha256).__contains__, other.sha256)) for one, other in pairs}


# AP moves by about the share of photos that are known already; 0.01 is as much as calibration and rivals resolve.
@check(
    most=0.01,
    meaning="photos of one split look like some of the other (saved anew, or frames of a video): figures are too high",
    advice="split by scene, video or room, and make augmented copies after the split",
)
def near_copies_across_splits(evidence: DataEvidence) -> dict[str, float]:
    """Share of the second split's photos that look like one of the first."""
    pairs = combinations([one for one in evidence.splits if one.records], 2)
    return {f"{one.name}, {other.name}": float(other.looks.duplicates_of(one.looks).mean()) for one, other in pairs}


# Some object reaches the far half of its photo in any set of photos. Boxes in shares (0 to 1), percent or thousandths
# stay in the corner. (Readers refuse most files with shares before this.)
@check(
    least=0.5,
    meaning="all boxes lie in the upper left quarter: they look like shares, percent or thousandths of the photo",
    advice="multiply them by the photo's width and height (and divide by 100 or 1000)",
)
@per_split
def boxes_in_shares(split: Split, evidence: DataEvidence) -> float:
    """95 % quantile of the larger of x2 / width and y2 / height."""
    return split.boxes()[:, 2:].amax(1).quantile(0.95).item()


# A box x, y, w, h that holds x2, y2 instead of w, h has w > x and h > y, and ends outside the photo unless its centre
# is in the upper left quarter. Of true boxes none ends outside by more than rounding.
@check(
    most=0.1,
    meaning="boxes end outside their photos as x, y, x2, y2 do where x, y, width, height are expected",
    advice="subtract x and y from the last two numbers of each box, or name the right format",
)
@per_split
def boxes_as_corners(split: Split, evidence: DataEvidence) -> float:
    """Share of the boxes wider than their x1, higher than their y1, that end outside by 2 % of the photo or more."""
    x1, y1, x2, y2 = split.boxes().unbind(1)
    return ((x2 - x1 >= x1) & (y2 - y1 >= y1) & (torch.maximum(x2, y2) > 1.02)).float().mean().item()


# Even where it lies best, IoU is at most the object's area / that of the smallest default box.
@check(
    most=0.25,
    meaning="many objects are too small for any default box at this input size and will hardly be found",
    advice="train at a larger MODEL.IMAGE_SIZE, cut photos into tiles, or leave these objects out",
)
@per_split
def too_small_objects(split: Split, evidence: DataEvidence) -> float:
    """Share of the objects whose area is less than half of the smallest default box's."""
    areas, smallest = box_area(split.boxes() * evidence.size), box_area(evidence.default_boxes).min()
    return (areas < MATCH * smallest).float().mean().item()


# An object that is matched by force trains one default box that fits it badly; others get several that fit.
@check(
    most=0.5,
    meaning="most objects overlap no default box by half: they are matched by force, to one that fits badly",
    advice="train at a larger MODEL.IMAGE_SIZE; for long or thin objects, box them otherwise or cut photos",
)
@per_split
def matched_by_force(split: Split, evidence: DataEvidence) -> float:
    """Share of the objects whose best IoU with a default box is below 0.5."""
    return (evidence.best_ious(split) < MATCH).float().mean().item()


# Measured: with 99 boxes of a class in training an exit reaches half of the full path's AP50 for it, with 400 nine
# tenths (docs/results/zoo_voc_animals, chair and cow).
@check(
    least=200,
    meaning="the rarest class has too few boxes to be learnt",
    advice="add photos, repeat them (DATA.REPEAT_THRESHOLD), or let the full path teach (LOSS.SUPERVISION teacher)",
)
def rare_class_in_training(evidence: DataEvidence) -> dict[str, float]:
    """Boxes of the rarest class in TRAIN."""
    return rarest([one for one in evidence.splits if one.name == "TRAIN"])


# The standard error of a recall on 25 objects is up to 0.1.
@check(
    least=25,
    meaning="the rarest class has too few objects for an AP: its standard error is 0.1 or more",
    advice="add photos of it, and do not read its AP alone",
)
def rare_class_in_evaluation(evidence: DataEvidence) -> dict[str, float]:
    """Objects of the rarest class in CALIB and TEST."""
    return rarest([one for one in evidence.splits if one.name != "TRAIN"])


def rarest(splits: Sequence[Split]) -> dict[str, float]:
    """``<split>, <class>`` -> objects that count of each labelled split's rarest class."""
    found = {}
    for one in splits:
        if one.labelled and one.classes:
            counts = {name: one.objects[label] for label, name in enumerate(one.classes, start=1)}
            name = min(counts, key=counts.get)
            found[f"{one.name}, {name}"] = counts[name]
    return found

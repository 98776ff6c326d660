"""Checks of the splits TRAIN, CALIB and TEST."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from earlyexit_ssd.data.duplicates import PerceptualHashes
from earlyexit_ssd.data.records import Record
from earlyexit_ssd.doctor import findings
from earlyexit_ssd.evaluation.results import JsonDataclass

DATA_CHECKS: dict[str, findings.Check] = {}  # in the order of the table
check = functools.partial(findings.check, DATA_CHECKS)

MATCH_IOU = 0.5  # IoU at which torchvision assigns a default box to an object
ENOUGH_BOXES = 20  # the boxes of a split with fewer boxes are not judged


@dataclass(frozen=True)
class Split:
    """Photos of one split."""

    name: str  # ``TRAIN``, ``CALIB`` or ``TEST``
    classes: tuple[str, ...]  # names of the labels 1..K
    records: Sequence[Record]  # photos with the boxes of their files, not clipped
    labelled: bool  # False if any photo is unlabelled; then the boxes are not judged
    sha256: Sequence[str]  # hash of each photo's file
    looks: PerceptualHashes  # to find near-duplicates

    @property
    def objects_by_class(self) -> dict[str, int]:
        """Number of objects by class, without crowds and difficult objects."""
        annotations = (annotation for record in self.records for annotation in record.annotations)
        counts = Counter(annotation.label for annotation in annotations if not annotation.ignore)
        return {name: counts[label] for label, name in enumerate(self.classes, start=1)}

    def boxes(self) -> Tensor:
        """Return the boxes of these objects: xyxy as fractions of the photo's width and height, float64 [B, 4]."""
        rows = [
            (*annotation.box, record.width, record.height)
            for record in self.records
            for annotation in record.annotations
            if not annotation.ignore
        ]
        values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
        return values[:, :4] / values[:, [4, 5, 4, 5]]


@dataclass(frozen=True)
class DataEvidence:
    """Input of the checks."""

    splits: Sequence[Split]
    default_boxes: Tensor  # of the configured detector, [A, 4] xyxy in network pixels
    size: int = 320  # side of the network's input, pixels

    @property
    def with_boxes(self) -> list[Split]:
        """The labelled splits with enough boxes to judge."""
        return [split for split in self.splits if split.labelled and len(split.boxes()) >= ENOUGH_BOXES]

    def best_ious(self, split: Split) -> Tensor:
        """Return the largest IoU of each object with a default box, [B]."""
        parts = (split.boxes() * self.size).float().clamp(0, self.size).split(256)
        return torch.cat([box_iou(part, self.default_boxes).amax(1) for part in parts] or [torch.zeros(0)])


@dataclass(frozen=True)
class Summary(JsonDataclass):
    """Figures of a split without thresholds. Lists are the 5 %, 50 % and 95 % quantiles; None without boxes."""

    split: str
    photos: int
    boxes: int
    sides: list[float]  # square root of width x height of the photos, pixels
    aspects: list[float]  # width / height of the photos
    object_sides: list[float] | None  # square root of the boxes' area, network pixels
    best_ious: list[float] | None  # of the objects with a default box
    objects: dict[str, int]  # number by class

    def __str__(self) -> str:
        def joined(values: list[float] | None, digits: int) -> str:
            return "-" if values is None else " / ".join(f"{value:.{digits}f}" for value in values)

        classes = ", ".join(f"{name} {count}" for name, count in list(self.objects.items())[:10])
        return (
            f"{self.split}: {self.photos} photos, {self.boxes} boxes; quantiles 5 / 50 / 95 % of:\n"
            f"     photos: side {joined(self.sides, 0)} px, width / height {joined(self.aspects, 2)}\n"
            f"     objects: side {joined(self.object_sides, 0)} px in the network, best IoU with a default box "
            f"{joined(self.best_ious, 2)}\n     boxes of: {classes or '-'}{', ...' if len(self.objects) > 10 else ''}"
        )


def summarise(evidence: DataEvidence, split: Split) -> Summary:
    """Return the figures of a split."""

    def quantiles(values: Tensor | np.ndarray) -> list[float] | None:
        return np.quantile(np.asarray(values), [0.05, 0.5, 0.95]).tolist() if len(values) else None

    sizes = np.array([(record.width, record.height) for record in split.records], np.float64).reshape(-1, 2)
    boxes = split.boxes() * evidence.size
    sides = box_area(boxes).clamp(min=0).sqrt()
    photos = quantiles(sizes.prod(1) ** 0.5), quantiles(sizes[:, 0] / sizes[:, 1])
    objects = quantiles(sides), quantiles(evidence.best_ious(split))
    return Summary(split.name, len(split.records), len(boxes), *photos, *objects, split.objects_by_class)


# With 100 photos, the 95 % interval of a share is up to 10 percentage points to either side.
@check(
    least=100,
    meaning="the figures of so few photos are uncertain, those of a share by 10 percentage points or more",
    advice="add photos, or move some from another split",
)
def few_photos(evidence: DataEvidence) -> dict[str, float]:
    """Number of photos."""
    return {split.name: len(split.records) for split in evidence.splits}


# A photo without objects adds little to the loss, in torchvision's SSD nothing. With 20 of them for each photo with
# objects, an epoch has hardly any other.
@check(
    most=0.95,
    meaning="hardly any photo shows an object, so training and AP depend on few photos",
    advice="add photos with objects, or keep fewer photos without (DATA.NEGATIVE_SHARE)",
)
def empty_photos(evidence: DataEvidence) -> dict[str, float]:
    """Share of the photos without an object, apart from crowds and difficult objects."""
    judged = [split for split in evidence.splits if split.labelled and split.records]
    return {split.name: float(np.mean([not record.has_targets for record in split.records])) for split in judged}


def split_pairs(evidence: DataEvidence) -> dict[str, tuple[Split, Split]]:
    """Return all pairs of splits with photos by their names."""
    pairs = combinations([split for split in evidence.splits if split.records], 2)
    return {f"{first.name}, {second.name}": (first, second) for first, second in pairs}


@check(
    most=0,
    meaning="the same photos are in two splits, so figures on one of them are too high",
    advice="remove them from one of the two",
)
def copies_across_splits(evidence: DataEvidence) -> dict[str, float]:
    """Number of photos of the second split whose file is also in the first split."""
    pairs = split_pairs(evidence).items()
    return {names: int(np.isin(second.sha256, first.sha256).sum()) for names, (first, second) in pairs}


# AP rises by about the share of photos that training has seen. Calibration and rivals resolve 0.01 AP at best.
@check(
    most=0.01,
    meaning="photos of the two splits look alike (saved anew, or frames of one video), so figures are too high",
    advice="split by scene, video or room, and make augmented copies after the split",
)
def near_copies_across_splits(evidence: DataEvidence) -> dict[str, float]:
    """Share of the second split's photos that look like a photo of the first."""
    pairs = split_pairs(evidence).items()
    return {names: float(second.looks.duplicates_of(first.looks).mean()) for names, (first, second) in pairs}


# In any set of photos, some objects reach the right or lower half. Boxes in fractions (0 to 1), percent or thousandths
# stay in the upper left corner. (Readers refuse most files with fractions earlier.)
@check(
    least=0.5,
    meaning="boxes lie in the upper left quarter, as if they were fractions, percent or thousandths of the photo",
    advice="multiply them by the photo's width and height (and divide by 100 or 1000)",
)
def boxes_in_shares(evidence: DataEvidence) -> dict[str, float]:
    """95 % quantile of the larger of x2 / width and y2 / height."""
    return {split.name: split.boxes()[:, 2:].amax(1).quantile(0.95).item() for split in evidence.with_boxes}


# A box x, y, w, h with x2, y2 in place of w, h has w > x and h > y. It ends outside the photo unless its centre is in
# the upper left quarter. Correct boxes end outside by rounding at most.
@check(
    most=0.1,
    meaning="boxes end outside their photos, as if they were x1, y1, x2, y2 instead of x, y, width, height",
    advice="if the last two numbers are x2, y2, subtract x and y; otherwise draw the boxes: x, y may be the centre, or "
    "boxes may be shifted or belong to other photos",
)
def boxes_as_corners(evidence: DataEvidence) -> dict[str, float]:
    """Share of the boxes with width >= x1 and height >= y1 that end outside by more than 2 % of the photo."""
    figures = {}
    for split in evidence.with_boxes:
        x1, y1, x2, y2 = split.boxes().unbind(1)
        suspicious = (x2 - x1 >= x1) & (y2 - y1 >= y1) & (torch.maximum(x2, y2) > 1.02)
        figures[split.name] = suspicious.float().mean().item()
    return figures


# The IoU of a small object with any default box is at most its area / the area of the smallest default box.
@check(
    most=0.25,
    meaning="many objects are too small for any default box at this input size and will hardly be found",
    advice="train at a larger MODEL.IMAGE_SIZE, cut photos into tiles, or leave these objects out",
)
def too_small_objects(evidence: DataEvidence) -> dict[str, float]:
    """Share of the objects with less than half the area of the smallest default box."""
    limit = MATCH_IOU * box_area(evidence.default_boxes).min()
    areas = {split.name: box_area(split.boxes() * evidence.size) for split in evidence.with_boxes}
    return {name: (values < limit).float().mean().item() for name, values in areas.items()}


# An object without a default box of IoU 0.5 is matched with the best one, which fits badly. Other objects are matched
# with several that fit.
@check(
    most=0.5,
    meaning="most objects overlap no default box with IoU 0.5, so each trains only one, which fits badly",
    advice="train at a larger MODEL.IMAGE_SIZE; cut photos into tiles, or label long or thin objects in parts",
)
def matched_by_force(evidence: DataEvidence) -> dict[str, float]:
    """Share of the objects whose best IoU with a default box is below 0.5."""
    ious = {split.name: evidence.best_ious(split) for split in evidence.with_boxes}
    return {name: (values < MATCH_IOU).float().mean().item() for name, values in ious.items()}


# Measured: an exit reaches 50 % of the full path's AP50 for a class with 99 training boxes, and 90 % for a class with
# 400 (docs/results/zoo_voc_animals, chair and cow).
@check(
    least=200,
    meaning="the rarest class has too few boxes to be learnt",
    advice="add photos, repeat them (DATA.REPEAT_THRESHOLD), or let the full path teach (LOSS.SUPERVISION teacher)",
)
def rare_class_in_training(evidence: DataEvidence) -> dict[str, float]:
    """Boxes of the rarest class in TRAIN."""
    return rarest([split for split in evidence.splits if split.name == "TRAIN"])


# The standard error of a recall on 25 objects is up to 0.1.
@check(
    least=25,
    meaning="the rarest class has too few objects for an AP: its standard error is 0.1 or more",
    advice="add photos of it, and do not rely on its AP alone",
)
def rare_class_in_evaluation(evidence: DataEvidence) -> dict[str, float]:
    """Objects of the rarest class in CALIB and TEST."""
    return rarest([split for split in evidence.splits if split.name != "TRAIN"])


def rarest(splits: Sequence[Split]) -> dict[str, float]:
    """Return the number of objects of each labelled split's rarest class, by ``<split>, <class>``."""
    figures = {}
    for split in splits:
        if split.labelled and split.classes:
            counts = split.objects_by_class
            name = min(counts, key=counts.get)
            figures[f"{split.name}, {name}"] = counts[name]
    return figures

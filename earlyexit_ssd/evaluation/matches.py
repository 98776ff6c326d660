"""Matches of detections with objects, by pycocotools' rules. Every figure of accuracy is computed from them.

Detections are matched in descending order of their scores, so a score threshold does not change the matches above it.
Therefore every exit is matched only once, for AP, its bootstrap, precision, recall, the losses of photos and the AP of
any choice of exits.

A *condition* is a size range of objects with an IoU threshold. Detections are matched under each condition. A *pair*
is a photo at an exit, with the index photo * K + exit for K exits. An object is *counted* under a condition if it is
not a crowd and its area is in the size range.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pycocotools import mask
from pycocotools.coco import COCO
from scipy.sparse import csr_array
from torch import Tensor

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.outputs import Collected

DetectionsById = Mapping[int, Mapping[str, Tensor]]
"""Image id -> ``boxes`` [N,4] (xyxy, photo pixels), ``scores`` [N] and ``labels`` [N] (category ids)."""

PhotoRow = dict[str, str | float | None]  # a row of photos.csv: column -> value

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's size ranges of objects: name -> smallest and largest area, in square pixels of the photo."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AP_DETECTIONS = 100  # AP uses this many detections of a photo and class, those with the highest scores
_NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


@dataclass(frozen=True)
class ExitMatches:
    """The D detections of all K ``exits`` in n photos, matched under each of C ``conditions`` (size, IoU).

    Detections are sorted by class, then by descending score. Equal scores keep the order of the photos, then of the
    exits, so the detections of any choice of exits are in pycocotools' order. Precision, recall and the losses of
    photos are computed under the last condition. Every array [n] of this module has the photos in the order of
    ``image_ids``.
    """

    classes: list[str]  # by ascending category id
    conditions: list[tuple[str, float]]
    image_ids: list[int]  # sorted
    exits: int
    objects_by_size: dict[str, np.ndarray]  # size -> counted objects of each class in each photo, int [classes, n]
    label: np.ndarray  # int [D]: index of the class
    photo: np.ndarray  # int [D]: index of the photo
    exit: np.ndarray  # int [D]: index of the exit
    rank: np.ndarray  # int [D]: number of earlier detections of the same photo, exit and class
    box: np.ndarray  # float [4, D]: x1, y1, x2, y2 in pixels of the photo
    score: np.ndarray  # float [D]
    overlap: np.ndarray  # float [D]: IoU of a true positive with its object under the last condition, otherwise 0
    true_positive: np.ndarray  # bool [C, D]
    false_positive: np.ndarray  # bool [C, D]; a detection on a crowd or outside the size range is neither
    _ranked: dict[int, list[tuple[np.ndarray, csr_array]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def photos(self) -> int:
        return len(self.image_ids)

    @property
    def ap50_condition(self) -> int:
        """Index of the condition of AP50: all sizes, IoU 0.5."""
        return self.conditions.index(("all", 0.5))

    @property
    def objects(self) -> np.ndarray:
        """Counted objects per photo, summed over the classes, int [n]."""
        return self.objects_by_size["all"].sum(axis=0)

    @property
    def pair(self) -> np.ndarray:
        """Pair of each detection, int [D]."""
        return self.photo * self.exits + self.exit

    def choose(self, choice: ArrayLike) -> ExitMatches:
        """Return the matches of the detector in which photo i takes exit ``choice[i]`` (int [n])."""
        keep = np.flatnonzero(self.exit == np.asarray(choice)[self.photo])
        names = ("label", "photo", "rank", "box", "score", "overlap", "true_positive", "false_positive")
        parts = {name: getattr(self, name)[..., keep] for name in names}
        return replace(self, exits=1, exit=np.zeros(len(keep), np.int64), **parts)

    def ranked_positives(self, condition: int) -> list[tuple[np.ndarray, csr_array]]:
        """Return the positives of each class by descending score. They determine AP under one condition, since AP
        depends only on the precision at true positives.

        Returns:
            For each class with T true positives: their pairs [T], and a sparse array [T, pairs] with the number of
            false positives of each pair between the previous true positive and this one.
        """
        if condition not in self._ranked:
            ranked = self._ranked[condition] = []
            pairs, in_limit = self.pair, self.rank < AP_DETECTIONS
            starts = np.searchsorted(self.label, np.arange(len(self.classes) + 1))
            for of_class in itertools.starmap(slice, itertools.pairwise(starts)):
                true, false = (
                    np.flatnonzero(positive[condition, of_class] & in_limit[of_class])
                    for positive in (self.true_positive, self.false_positive)
                )
                false = false[: np.searchsorted(false, true[-1])] if len(true) else false[:0]
                rows_and_columns = np.searchsorted(true, false), pairs[of_class][false]
                shape = len(true), self.photos * self.exits
                ranked.append((pairs[of_class][true], csr_array((np.ones(len(false)), rows_and_columns), shape=shape)))
        return self._ranked[condition]


def exit_matches(
    ground_truth: COCO, exits: Sequence[DetectionsById], iou: float = 0.5, sizes: Sequence[str] = ("all",)
) -> ExitMatches:
    """Match the detections of every exit, shallow to deep, with the objects.

    Each detection, in descending order of the scores, takes the free object of its class with the highest IoU, if this
    IoU reaches the threshold. Without such an object it is a false positive, except in three cases, in which it is
    ignored:

    - It reaches the threshold with a crowd (``iscrowd`` = 1: COCO's crowds, VOC's difficult). For a crowd the IoU is
      replaced by the share of the detection's area that the crowd covers. A crowd takes any number of detections.
    - It reaches the threshold with an object whose area is outside the size range.
    - Its own area is outside the size range.

    An image without an entry has no detections. Detections of labels that ``ground_truth`` does not have are left out.

    Args:
        iou: IoU threshold of precision and recall, in (0, 1].
        sizes: keys of `SIZES` for which AP is to be computed, ``all`` first. If empty, there is no AP.

    Raises:
        DataError: detections of an unknown image.
    """
    for image_id in itertools.chain(*exits):
        if image_id not in ground_truth.imgs:
            raise DataError(f"detections of image {image_id}: the ground truth has no image of this id")
    conditions = [(size, threshold) for size in sizes for threshold in IOU_THRESHOLDS.tolist()] + [("all", iou)]
    # below 1, so that equal boxes match at an IoU threshold of 1, as in pycocotools
    limits = [(min(threshold, 1 - 1e-10), *SIZES[size]) for size, threshold in conditions]
    limits = np.array(limits).T[:, :, None]
    image_ids, categories = sorted(ground_truth.getImgIds()), np.array(sorted(ground_truth.getCatIds()), np.int64)
    objects = [annotation for image_id in image_ids for annotation in ground_truth.imgToAnns.get(image_id, [])]
    objects = [annotation for annotation in objects if annotation["category_id"] in ground_truth.cats]
    photos = np.searchsorted(image_ids, [annotation["image_id"] for annotation in objects])
    boxes = np.array([annotation["bbox"] for annotation in objects], np.float64).reshape(-1, 4)
    labels = np.array([annotation["category_id"] for annotation in objects], np.int64)
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in objects], bool)
    areas = np.array([annotation["area"] for annotation in objects], np.float64)
    counted = ~crowd & (areas >= limits[1]) & (areas <= limits[2])
    counts = np.zeros((len(conditions), len(categories), len(image_ids)), np.int64)
    np.add.at(counts, (slice(None), np.searchsorted(categories, labels), photos), counted)
    # an entry without detections comes first, because np.concatenate needs an entry even if there is no photo
    pairs = [_match_photo(_NOTHING, boxes[:0], labels[:0], crowd[:0], counted[:, :0], limits)]
    starts = np.searchsorted(photos, np.arange(len(image_ids) + 1))
    for image_id, own in zip(image_ids, itertools.starmap(slice, itertools.pairwise(starts)), strict=True):
        truth = boxes[own], labels[own], crowd[own], counted[:, own]
        pairs += [_match_photo(detections.get(image_id, _NOTHING), *truth, limits) for detections in exits]
    pair = np.repeat(np.arange(len(pairs)) - 1, [len(labels) for labels, *_ in pairs])
    labels, boxes, scores, *parts = (np.concatenate(part, axis=-1) for part in zip(*pairs, strict=True))
    order = np.argsort(labels, kind="stable")
    order = order[np.isin(labels[order], categories)]  # by class, then pair, then descending score
    label, pair = np.searchsorted(categories, labels[order]), pair[order]
    group = label * len(pairs) + pair
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    by_score = np.lexsort((-scores[order], label))
    return ExitMatches(
        [ground_truth.cats[category]["name"] for category in categories.tolist()],
        conditions,
        image_ids,
        len(exits),
        {size: count for (size, _), count in zip(conditions, counts, strict=True)},
        label[by_score],
        *np.divmod(pair[by_score], len(exits)),
        rank[by_score],
        *(values[..., order[by_score]] for values in (boxes, scores, *parts)),
    )


def _match_photo(
    detections: Mapping[str, Tensor],
    objects: np.ndarray,
    classes: np.ndarray,
    crowd: np.ndarray,
    counted: np.ndarray,
    limits: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Return labels [D], xyxy boxes [4, D], scores and overlap [D], true and false positives [C, D] of a pair, by
    descending score.

    The photo's objects are boxes [G, 4] xywh, with ``classes`` and ``crowd`` [G] and ``counted`` [C, G]. ``limits``
    [3, C, 1] are each condition's IoU threshold, smallest and largest area.
    """
    thresholds, smallest, largest = limits
    scores = detections["scores"].double().numpy()
    order = np.argsort(-scores, kind="stable")
    labels, boxes = detections["labels"].numpy()[order], xywh(detections["boxes"]).double().numpy()[order]
    (true_positive, matched), overlap = np.zeros((2, len(thresholds), len(scores)), bool), np.zeros(len(scores))
    for label in np.intersect1d(classes, labels).tolist():
        of_class, same = np.flatnonzero(labels == label), np.flatnonzero(classes == label)
        is_crowd, is_counted = crowd[same], counted[:, same]
        ious = np.asarray(mask.iou(boxes[of_class], objects[same], is_crowd.astype(np.uint8).tolist()))
        free = np.ones(is_counted.shape, bool)
        for row in np.flatnonzero((ious >= thresholds.min()).any(axis=1)).tolist():
            possible = (ious[row] >= thresholds) & (free | is_crowd)
            has_match, has_counted_match = possible.any(axis=1), (possible & is_counted).any(axis=1)
            candidates = np.where(possible & (is_counted | ~has_counted_match[:, None]), ious[row], -1.0)
            # among equal IoUs the last object, as in pycocotools
            best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
            free[np.flatnonzero(has_match), best[has_match]] = False
            true_positive[:, of_class[row]], matched[:, of_class[row]] = has_counted_match, has_match
            overlap[of_class[row]] = ious[row][best[-1]] if has_counted_match[-1] else 0.0
    areas = boxes[:, 2] * boxes[:, 3]
    other_size = (areas < smallest) | (areas > largest)
    false_positive = ~(true_positive | matched | other_size)
    corners = detections["boxes"].float().numpy()[order].T  # NumPy has no bfloat16
    return labels, corners, scores[order], overlap, true_positive, false_positive


def xywh(boxes: Tensor) -> Tensor:
    """Convert xyxy boxes [N, 4] to COCO's xywh, in the same dtype, as torchvision's reference scripts do."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


# AP of any choice of exits, one per photo, and its bootstrap.


class APs(NamedTuple):
    """Average precisions in [0, 1]. A value is None if there are no objects, or if it was not computed.

    After a bootstrap each field is an array [resamples], with NaN instead of None.
    """

    AP: float | np.ndarray | None
    AP50: float | np.ndarray | None


def bootstrap_weights(photos: int, resamples: int, seed: int, blocks: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield for each of ``resamples`` bootstrap draws how often each photo is drawn, int [photos].

    Photos with the same number (from 0) in ``blocks`` [photos] are drawn together.
    """
    blocks = np.arange(photos) if blocks is None else blocks
    count = int(blocks.max()) + 1 if len(blocks) else 0
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(count, size=count) if count else [], minlength=count)[blocks]


def bootstrap_choices(
    matches: ExitMatches,
    choices: Sequence[ArrayLike],
    resamples: int = 200,
    seed: int = 0,
    *,
    ap50_only: bool = True,
    blocks: np.ndarray | None = None,
) -> list[APs]:
    """Return AP and AP50 of each choice of exits [n] in ``resamples`` bootstrap draws of the photos.

    The same seed draws the same photos, so values on one data set are paired. ``ap50_only`` leaves ``AP`` NaN, which is
    ten times as fast. ``blocks`` is explained at `bootstrap_weights`.
    """
    chosen = [matches.choose(choice) for choice in choices]
    only_exit = np.zeros(matches.photos, np.int64)
    values = [APs(*np.full((2, resamples), np.nan)) for _ in choices]
    for index, weights in enumerate(bootstrap_weights(matches.photos, resamples, seed, blocks)):
        for draws, detector in zip(values, chosen, strict=True):
            # numpy stores None as NaN
            draws.AP[index], draws.AP50[index] = ap_of_choice(detector, only_exit, weights, ap50_only=ap50_only)
    return values


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Return the central interval with the share ``level`` of the values that are not NaN; None if all are NaN."""
    values = values[~np.isnan(values)]
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist() if values.size else None


def ap_of_choice(
    matches: ExitMatches, choice: ArrayLike, weights: ArrayLike | None = None, *, ap50_only: bool = False
) -> APs:
    """Return AP and AP50 if photo i takes exit ``choice[i]`` (int [n]) and counts ``weights[i]`` times (int [n]).

    The figures are pycocotools' for the detections of the chosen exits. Classes without an object in photos of positive
    weight are left out. ``ap50_only`` leaves ``AP`` None, which is ten times as fast.
    """
    pairs = np.arange(matches.photos) * matches.exits + np.asarray(choice)
    weights = np.ones(matches.photos, np.int64) if weights is None else np.asarray(weights)
    conditions = [matches.ap50_condition] if ap50_only else range(len(IOU_THRESHOLDS))
    curves = [_curves(matches, index, pairs, weights) for index in conditions]
    return APs(None if ap50_only else mean_precision(curves), mean_precision(curves[:1]))


def precision_curves(matches: ExitMatches, size: str = "all") -> list[np.ndarray]:
    """Return the interpolated precision for each IoU threshold, [101 recalls, classes with objects]. ``matches`` have a
    single exit."""
    start = matches.conditions.index((size, IOU_THRESHOLDS[0]))
    pairs, weights = np.arange(matches.photos), np.ones(matches.photos, np.int64)
    return [_curves(matches, start + index, pairs, weights) for index in range(len(IOU_THRESHOLDS))]


def mean_precision(curves: Sequence[np.ndarray]) -> float | None:
    """Return the average precision in [0, 1]; None if no class has an object."""
    return float(np.mean(np.stack(curves))) if curves[0].size else None


def _curves(matches: ExitMatches, condition: int, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the interpolated precision at `RECALLS`, [101, classes with objects]. Only the detections of ``pairs`` [n]
    (one per photo) are used, and each photo counts ``weights`` [n] times."""
    size, pair_weights = matches.conditions[condition][0], np.zeros(matches.photos * matches.exits)
    pair_weights[pairs] = weights
    curves = []
    objects_of_class = (matches.objects_by_size[size] @ weights).tolist()
    for objects, (pairs_of_true, false) in zip(objects_of_class, matches.ranked_positives(condition), strict=True):
        if objects:
            tp, fp = np.cumsum(pair_weights[pairs_of_true]), np.cumsum(false @ pair_weights)
            precision = tp / (fp + tp + np.spacing(1))
            # the best precision at this recall or a higher one
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            position = np.searchsorted(tp / objects, RECALLS, side="left")
            curves.append(np.append(envelope, 0.0)[position])
    return np.stack(curves, axis=1) if curves else np.zeros((len(RECALLS), 0))


# Counts and losses of single photos, at a score threshold.


@dataclass(frozen=True)
class PhotoCounts:
    """Counts per photo and exit, int [n, K], summed over the classes."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @property
    def objects(self) -> np.ndarray:
        return self.true_positives + self.false_negatives

    @property
    def errors(self) -> np.ndarray:
        """False positives and false negatives together."""
        return self.false_positives + self.false_negatives

    def losses_against_labels(self) -> np.ndarray:
        """Return the loss of every photo at every exit, [n, K] in [0, 1], the last column 0.

        It is min(1, (max(0, FN - FN_full) + max(0, FP - FP_full)) / max(1, objects)), with FN_full and FP_full of the
        full path.
        """
        additional = sum(np.maximum(count - count[:, -1:], 0) for count in (self.false_negatives, self.false_positives))
        return np.minimum(additional / np.maximum(self.objects, 1), 1.0)


def photo_counts(matches: ExitMatches, score: float) -> PhotoCounts:
    """Count the detections with a score of at least ``score``, under the last condition of the matches."""
    above, pair, pairs = matches.score >= score, matches.pair, matches.photos * matches.exits
    true, false = (
        np.bincount(pair[positive[-1] & above], minlength=pairs).reshape(matches.photos, matches.exits)
        for positive in (matches.true_positive, matches.false_positive)
    )
    return PhotoCounts(true, false, matches.objects[:, None] - true)


def photo_list(
    counts: PhotoCounts, collected: Collected, chosen: Tensor, exit_names: Sequence[str], files: Callable[[int], object]
) -> list[PhotoRow]:
    """Return the rows of photos.csv, in the order of ``collected``. Photo i takes the exit ``chosen[i]``.

    ``lost`` are the false negatives and ``added`` the false positives beyond those of the full path. ``counts`` are of
    the same photos. ``files`` returns the path of the photo with an image id.
    """
    rows, exits = np.searchsorted(sorted(collected.image_ids), collected.image_ids), chosen.numpy()
    confidences = torch.stack(collected.confidences)[chosen, torch.arange(len(rows))].tolist()

    def beyond_full(values: np.ndarray) -> list[int]:
        return np.maximum(values[rows, exits] - values[rows, -1], 0).tolist()

    columns = {
        "file": [str(files(image_id)) for image_id in collected.image_ids],
        "exit": [exit_names[exit] for exit in exits.tolist()],
        "confidence": [value if value >= 0 else None for value in confidences],  # -1: the policy gives none
        "objects": counts.objects[rows, exits].tolist(),
        "found": counts.true_positives[rows, exits].tolist(),
        "lost": beyond_full(counts.false_negatives),
        "added": beyond_full(counts.false_positives),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _counts_against_full(
    template: COCO, full: DetectionsById, exits: Sequence[DetectionsById], score: float, iou: float
) -> PhotoCounts:
    """Return the counts if the full path's detections with a score of at least ``score`` are the objects."""
    return photo_counts(exit_matches(as_ground_truth(template, full, score), exits, iou, ()), score)


def losses_against_full(ground_truth: COCO, exits: Sequence[DetectionsById], score: float, iou: float) -> np.ndarray:
    """Return the loss of every photo at every exit against the full path, [n, exits] in [0, 1], the last column 0.

    It is min(1, (FN + FP) / max(1, objects)), if the full path's detections with a score of at least ``score`` are the
    objects. The objects of ``ground_truth`` are not used.
    """
    counts = _counts_against_full(ground_truth, exits[-1], exits, score, iou)
    return np.minimum(counts.errors / np.maximum(counts.objects, 1), 1.0)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a detector with the full path over all photos, at a score and IoU threshold."""

    objects: int  # detections of the full path
    kept: int  # detections of the full path that the detector finds too
    added: int  # detections that match no detection of the full path
    same_photos: float | None  # share of the photos with nothing lost or added; None without photos


def agreement(ground_truth: COCO, full: DetectionsById, found: DetectionsById, score: float, iou: float) -> Agreement:
    """Compare the detections ``found`` with those of the full path. The objects of ``ground_truth`` are not used."""
    counts = _counts_against_full(ground_truth, full, [found], score, iou)
    totals = (int(total.sum()) for total in (counts.objects, counts.true_positives, counts.false_positives))
    return Agreement(*totals, float((counts.errors == 0).mean()) if len(counts.errors) else None)


def as_ground_truth(template: COCO, detections: DetectionsById, score: float) -> COCO:
    """Return a ground truth with the template's photos and classes, whose objects are the detections of at least
    ``score``."""
    annotations: list[dict[str, int | float | list[float]]] = []
    for image_id, found in detections.items():
        keep = found["scores"].double() >= score  # in double precision, as in `photo_counts`
        for box, label in zip(xywh(found["boxes"][keep]).tolist(), found["labels"][keep].tolist(), strict=True):
            keys = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
            annotations.append({**keys, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    truth = COCO()
    truth.dataset = {**template.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth

"""Matches of detections with objects. Every figure of accuracy is counted from them.

Every exit is matched once, by pycocotools' rules. Detections are matched in falling order of their scores, so a score
threshold does not change the matches above it. AP, its bootstrap, precision, recall, the loss of a photo and the AP of
any choice of exits therefore use the same matches.

A *condition* is a size of objects with an IoU threshold; detections are matched under each condition. A *pair* is a
photo at an exit, with the index photo * K + exit for K exits. An object is *counted* under a condition if it is no
crowd and its area is within the size.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pycocotools import mask
from pycocotools.coco import COCO
from scipy.sparse import csr_array
from torch import Tensor

from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.outputs import Collected

Detections = Mapping[int, Mapping[str, Tensor]]
"""Image id -> ``boxes`` [N,4] (xyxy, photo pixels), ``scores`` [N] and ``labels`` [N] (category ids)."""

_HitsAndFalse = list[tuple[np.ndarray, csr_array]]  # per class, see `ExitMatches.hits_and_false`
PhotoRow = dict[str, str | float | None]  # a row of photos.csv, by column

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's sizes of objects -> least and largest area, square pixels of the photo."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AP_DETECTIONS = 100  # AP uses at most so many detections per photo and class, those with the highest scores


@dataclass(frozen=True)
class ClassMatches:
    """The matches of one class: D detections of all exits, under C conditions.

    Detections are in falling order of their scores. Equal scores keep the order of the photos, then of the exits, so
    the detections of any choice of exits are in pycocotools' order.
    """

    name: str
    hit: np.ndarray  # bool [C, D]: is it a true positive?
    ignored: np.ndarray  # bool [C, D]: is it neither a true nor a false positive (on a crowd, or not of the size)?
    overlap: np.ndarray  # float [D]: IoU of a hit with its object under the last condition; else 0
    photo: np.ndarray  # int [D]: index of the photo
    exit: np.ndarray  # int [D]: index of the exit
    rank: np.ndarray  # int [D]: how many detections of the same photo, exit and class come before
    score: np.ndarray  # float [D]
    objects_by_size: dict[str, np.ndarray]  # size -> counted objects per photo, int [n]

    @property
    def objects(self) -> np.ndarray:
        """Counted objects of all sizes per photo, int [n]."""
        return self.objects_by_size["all"]


@dataclass(frozen=True)
class ExitMatches:
    """The matches of all classes (by rising category id) and all K ``exits``.

    Detections and objects match under each of the ``conditions`` (size, IoU). Precision, recall and the losses of
    photos are counted under the last one. ``image_ids`` are sorted. Every array [n] of this module has the photos in
    this order.
    """

    classes: list[ClassMatches]
    conditions: list[tuple[str, float]]
    image_ids: list[int]
    exits: int
    _hits_and_false: dict[int, _HitsAndFalse] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def photos(self) -> int:
        return len(self.image_ids)

    @property
    def ap50_condition(self) -> int:
        """Index of the condition of AP50: all sizes, IoU 0.5."""
        return self.conditions.index(("all", 0.5))

    @functools.cached_property
    def objects(self) -> np.ndarray:
        """Counted objects per photo, int [n]; classes summed."""
        return sum((one.objects for one in self.classes), np.zeros(self.photos, np.int64))

    def choose(self, choice: ArrayLike) -> ExitMatches:
        """The matches of one detector: photo i takes exit ``choice[i]`` (int [n])."""
        choice = _one_each(self, "choice", choice, self.exits)
        classes = []
        for one in self.classes:
            keep = np.flatnonzero(one.exit == choice[one.photo])
            parts = (values[..., keep] for values in (one.hit, one.ignored, one.overlap, one.photo))
            exit = np.zeros(len(keep), np.int64)
            classes.append(ClassMatches(one.name, *parts, exit, one.rank[keep], one.score[keep], one.objects_by_size))
        return ExitMatches(classes, self.conditions, self.image_ids, 1)

    def hits_and_false(self, condition: int) -> _HitsAndFalse:
        """What AP under one condition is computed from: AP depends on the precision at hits only.

        Returns:
            per class with H hits: the pair of each hit by falling score, [H], and a sparse array [H, pairs] with the
            number of false positives that each pair has between the previous hit and this one.
        """
        if condition not in self._hits_and_false:
            found = self._hits_and_false[condition] = []
            for one in self.classes:
                pair, within_limit = one.photo * self.exits + one.exit, one.rank < AP_DETECTIONS
                hits = np.flatnonzero(one.hit[condition] & within_limit)
                false = np.flatnonzero(~(one.hit[condition] | one.ignored[condition]) & within_limit)
                false = false[: np.searchsorted(false, hits[-1])] if len(hits) else false[:0]
                places = np.searchsorted(hits, false), pair[false]
                shape = len(hits), self.photos * self.exits
                found.append((pair[hits], csr_array((np.ones(len(false)), places), shape=shape)))
        return self._hits_and_false[condition]


def exit_matches(
    ground_truth: COCO, exits: Sequence[Detections], iou: float = 0.5, sizes: Sequence[str] = ("all",)
) -> ExitMatches:
    """Match the detections of every exit, shallow to deep, with the objects, photo by photo and class by class.

    These are pycocotools' rules. In falling order of the scores each detection takes the free object of its class that
    it overlaps most, if their IoU reaches the threshold. A detection without such an object is ignored in three cases,
    where *overlaps* means that the IoU reaches the threshold:

    - It overlaps a crowd (``iscrowd`` = 1: COCO's crowds, VOC's difficult). Here the share of the detection's own area
      that the crowd covers takes the place of the IoU. One crowd takes any number of detections.
    - It overlaps an object whose area is outside the condition's size.
    - Its own area is outside the condition's size.

    Objects without a detection are missed. An image without an entry has no detections. Labels that are no category of
    ``ground_truth`` are left out.

    Args:
        iou: IoU threshold of precision and recall, in (0, 1].
        sizes: keys of `SIZES` that AP is computed for; empty: no AP.

    Raises:
        DataError: detections of an unknown image.
        EarlyExitError: ``exits`` is empty.
    """
    if not exits:
        raise EarlyExitError("no exits to choose from: give the detections of at least one")
    for unknown in (image_id for found in exits for image_id in found if image_id not in ground_truth.imgs):
        raise DataError(f"detections of image {unknown}: the ground truth has no image of this id")
    conditions = [(size, threshold) for size in sizes for threshold in IOU_THRESHOLDS.tolist()] + [("all", iou)]
    limits = [(min(threshold, 1 - 1e-10), *SIZES[size]) for size, threshold in conditions]  # equal boxes match at 1
    least_iou, smallest, largest = np.array(limits).T[:, :, None]
    image_ids, categories = sorted(ground_truth.getImgIds()), sorted(ground_truth.getCatIds())
    objects = np.zeros((len(categories), len(conditions), len(image_ids)), np.int64)
    # the first entry has no detections: np.concatenate needs one even if there is no photo
    pairs = [_match_photo(_Objects.of([], smallest, largest), None, least_iou)]
    for photo, image_id in enumerate(image_ids):
        truth = _Objects.of(ground_truth.imgToAnns.get(image_id, []), smallest, largest)
        for label in set(truth.labels.tolist()).intersection(categories):
            objects[categories.index(label), :, photo] = truth.counted[:, truth.labels == label].sum(axis=1)
        pairs += [_match_photo(truth, found.get(image_id), least_iou) for found in exits]
    # each entry: labels, scores, overlap [D], hit and ignored [C, D]
    pair_of = np.repeat(np.arange(len(pairs)) - 1, [len(scores) for _, scores, *_ in pairs])
    labels, scores, overlap, hit, ignored = (np.concatenate(one, axis=-1) for one in zip(*pairs, strict=True))
    classes = []
    for category, counts in zip(categories, objects, strict=True):
        own = np.flatnonzero(labels == category)
        rank = np.arange(len(own)) - np.searchsorted(pair_of[own], pair_of[own])
        order = np.argsort(-scores[own], kind="stable")
        own, rank = own[order], rank[order]
        by_size = {size: row for (size, _), row in zip(conditions, counts, strict=True)}
        name, matched = ground_truth.cats[category]["name"], (hit[:, own], ignored[:, own], overlap[own])
        photo_and_exit = np.divmod(pair_of[own], len(exits))
        classes.append(ClassMatches(name, *matched, *photo_and_exit, rank, scores[own], by_size))
    return ExitMatches(classes, conditions, image_ids, len(exits))


@dataclass(frozen=True)
class _Objects:
    """The G objects of a photo: boxes [G, 4] xywh, labels [G], crowd [G], and whether each is counted under each
    condition [C, G]. A condition counts areas from smallest [C, 1] to largest [C, 1]."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    counted: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(
        cls, annotations: Sequence[Mapping[str, float | list[float]]], smallest: np.ndarray, largest: np.ndarray
    ) -> _Objects:
        boxes = np.array([one["bbox"] for one in annotations], np.float64).reshape(-1, 4)
        labels = np.array([one["category_id"] for one in annotations], np.int64)
        crowd = np.array([bool(one.get("iscrowd", 0)) for one in annotations], bool)
        areas = np.array([one["area"] for one in annotations], np.float64)
        return cls(boxes, labels, crowd, ~crowd & (areas >= smallest) & (areas <= largest), smallest, largest)


def _match_photo(truth: _Objects, found: Mapping[str, Tensor] | None, least_iou: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels, scores, overlap [D], hit and ignored [C, D] of one photo and exit, in falling order of the scores."""
    count = 0 if found is None else len(found["scores"])
    (hit, matched), overlap = np.zeros((2, len(least_iou), count), bool), np.zeros(count)
    if not count:
        return np.zeros(0, np.int64), np.zeros(0), overlap, hit, matched
    scores = found["scores"].double().numpy()
    order = np.argsort(-scores, kind="stable")
    labels, boxes = found["labels"].numpy()[order], xywh(found["boxes"]).double().numpy()[order]
    for label in np.unique(truth.labels).tolist():
        of_class, objects = np.flatnonzero(labels == label), np.flatnonzero(truth.labels == label)
        if not len(of_class):
            continue
        crowd, counted = truth.crowd[objects], truth.counted[:, objects]
        overlaps = np.asarray(mask.iou(boxes[of_class], truth.boxes[objects], crowd.astype(np.uint8).tolist()))
        free = np.ones(counted.shape, bool)
        for row in np.flatnonzero((overlaps >= least_iou.min()).any(axis=1)).tolist():
            possible = (overlaps[row] >= least_iou) & (free | crowd)
            possible_hit = possible & counted
            is_hit, is_matched = possible_hit.any(axis=1), possible.any(axis=1)
            candidates = np.where(np.where(is_hit[:, None], possible_hit, possible), overlaps[row], -1.0)
            # of equal overlaps the last one, as in pycocotools
            best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
            free[np.flatnonzero(is_matched), best[is_matched]] = False
            hit[:, of_class[row]], matched[:, of_class[row]] = is_hit, is_matched
            overlap[of_class[row]] = overlaps[row][best[-1]] if is_hit[-1] else 0.0
    areas = boxes[:, 2] * boxes[:, 3]
    other_size = (areas < truth.smallest) | (areas > truth.largest)
    return labels, scores[order], overlap, hit, ~hit & (matched | other_size)


def xywh(boxes: Tensor) -> Tensor:
    """COCO's xywh of xyxy boxes [N,4], in the same dtype, as in torchvision's reference scripts."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


# AP of any choice of exits, one per photo, and its bootstrap.


class APs(NamedTuple):
    """Average precisions in [0, 1]; ``None`` without objects, or if the caller did not ask for it.

    After a bootstrap each field is an array [resamples]; NaN if undefined.
    """

    AP: float | np.ndarray | None
    AP50: float | np.ndarray | None


def bootstrap_choices(
    matches: ExitMatches,
    choices: Sequence[ArrayLike],
    resamples: int = 200,
    seed: int = 0,
    *,
    ap50_only: bool = True,
    blocks: np.ndarray | None = None,
) -> list[APs]:
    """AP and AP50 of each choice of exits [n] in ``resamples`` bootstrap draws of the photos.

    The same seed draws the same photos, so values on one data set are paired. ``ap50_only`` is ten times as fast.
    Photos with the same number (from 0) in ``blocks`` [n] are drawn together.
    """
    count = matches.photos if blocks is None or not len(blocks) else int(blocks.max()) + 1
    generator = np.random.default_rng(seed)
    chosen = [matches.choose(choice) for choice in choices]
    only_exit = np.zeros(matches.photos, np.int64)  # each element of ``chosen`` has one exit
    values = [APs(*np.full((2, resamples), np.nan)) for _ in choices]
    for index in range(resamples):
        weights = np.bincount(generator.integers(count, size=count) if count else [], minlength=count)
        weights = weights if blocks is None else weights[blocks]
        for draws, one in zip(values, chosen, strict=True):
            # numpy stores None as NaN
            draws.AP[index], draws.AP50[index] = ap_of_choice(one, only_exit, weights, ap50_only=ap50_only)
    return values


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """The percentile interval that holds the share ``level`` of ``values`` without NaN; None if none is left."""
    values = values[~np.isnan(values)]
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist() if values.size else None


def ap_of_choice(
    matches: ExitMatches, choice: ArrayLike, weights: ArrayLike | None = None, *, ap50_only: bool = False
) -> APs:
    """AP and AP50 where photo i takes exit ``choice[i]`` (int [n]) and counts ``weights[i]`` times (int [n]).

    The figures are pycocotools' for the detections of the chosen exits. Classes without an object among the
    weighted photos are left out. ``ap50_only`` leaves ``AP`` None, which is ten times as fast.
    """
    pairs = np.arange(matches.photos) * matches.exits + _one_each(matches, "choice", choice, matches.exits)
    weights = None if weights is None else _one_each(matches, "weights", weights)
    conditions = [matches.ap50_condition] if ap50_only else range(len(IOU_THRESHOLDS))
    curves = [_curves(matches, index, pairs, weights) for index in conditions]
    return APs(None if ap50_only else mean_precision(curves), mean_precision(curves[:1]))


def precision_curves(matches: ExitMatches, size: str = "all") -> list[np.ndarray]:
    """Interpolated precision of one detector: per IoU threshold [101 recalls, classes with an object of the size]."""
    start = matches.conditions.index((size, IOU_THRESHOLDS[0]))
    pairs = np.arange(matches.photos)
    return [_curves(matches, start + index, pairs, None) for index in range(len(IOU_THRESHOLDS))]


def mean_precision(curves: Sequence[np.ndarray]) -> float | None:
    """Average precision in [0, 1]; None without a class that has an object."""
    return float(np.mean(np.stack(curves))) if curves[0].size else None


def _one_each(matches: ExitMatches, name: str, values: ArrayLike, exits: int | None = None) -> np.ndarray:
    """A whole number for each photo (if ``exits`` is given, an exit) as int64 [n]; anything else is an error."""
    values = np.asarray(values)
    if values.shape != (matches.photos,) or (values.size and values.dtype.kind not in "iu"):
        raise EarlyExitError(f"{name} {values.dtype} {list(values.shape)}: give {matches.photos} whole numbers")
    if exits and values.size and not 0 <= values.min() <= values.max() < exits:
        raise EarlyExitError(f"{name} in {values.min()}..{values.max()}: exits are 0..{exits - 1}")
    return values.astype(np.int64)


def _curves(matches: ExitMatches, condition: int, pairs: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Interpolated precision at `RECALLS` of the classes with objects, [101, classes]. Only the detections of ``pairs``
    [n] (one per photo) are used, and each photo counts ``weights`` [n] times (None: once)."""
    size, pair_weights = matches.conditions[condition][0], np.zeros(matches.photos * matches.exits)
    pair_weights[pairs] = 1 if weights is None else weights
    curves = []
    for one, (hits, false) in zip(matches.classes, matches.hits_and_false(condition), strict=True):
        counts = one.objects_by_size[size]
        objects = int(counts.sum() if weights is None else weights @ counts)
        if objects:
            true, wrong = np.cumsum(pair_weights[hits]), np.cumsum(false @ pair_weights)
            precision = true / (wrong + true + np.spacing(1))
            # the best precision at this recall or a higher one
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            position = np.searchsorted(true / objects, RECALLS, side="left")
            curves.append(np.append(envelope, 0.0)[position])
    return np.stack(curves, axis=1) if curves else np.zeros((len(RECALLS), 0))


# Hits, misses, false positives and losses of single photos, at a score.


@dataclass(frozen=True)
class PhotoCounts:
    """Objects found, objects missed and false positives per photo and exit, int [n, K], summed over the classes."""

    hits: np.ndarray
    misses: np.ndarray
    false_positives: np.ndarray

    def losses_against_labels(self) -> np.ndarray:
        """Loss of every photo at every exit against its labels; [n, exits] in [0, 1], 0 in the last column.

        min(1, (max(0, m - m_full) + max(0, f - f_full)) / max(1, objects)) with m objects missed and f false
        positives; m_full and f_full are those of the full path.
        """
        additional = sum(np.maximum(one - one[:, -1:], 0) for one in (self.misses, self.false_positives))
        return np.minimum(additional / np.maximum(self.hits + self.misses, 1), 1.0)


def photo_counts(matches: ExitMatches, score: float) -> PhotoCounts:
    """Counts of the detections with a score of at least ``score``, under the last condition of the matches."""
    shape, pairs = (matches.photos, matches.exits), matches.photos * matches.exits
    hits, false = np.zeros(pairs, np.int64), np.zeros(pairs, np.int64)
    for one in matches.classes:
        pair, above = one.photo * matches.exits + one.exit, one.score >= score
        hits += np.bincount(pair[one.hit[-1] & above], minlength=pairs)
        false += np.bincount(pair[~(one.hit[-1] | one.ignored[-1]) & above], minlength=pairs)
    hits = hits.reshape(shape)
    return PhotoCounts(hits, matches.objects[:, None] - hits, false.reshape(shape))


def photo_list(
    counts: PhotoCounts, collected: Collected, chosen: Tensor, exit_names: Sequence[str], files: Callable[[int], object]
) -> list[PhotoRow]:
    """The rows of photos.csv, in the order of ``collected``; photo i takes the exit ``chosen[i]``.

    ``confidence`` is None if the policy has none. ``lost`` are objects missed and ``added`` false positives beyond
    those of the full path. ``counts`` are of the same photos; ``files`` finds the file of an image id.
    """
    row_of = {image_id: row for row, image_id in enumerate(sorted(collected.image_ids))}
    rows: list[PhotoRow] = []
    for place, (image_id, exit) in enumerate(zip(collected.image_ids, chosen.tolist(), strict=True)):
        row, confidence = row_of[image_id], float(collected.confidences[exit][place])
        hits, misses, false = (one[row].tolist() for one in (counts.hits, counts.misses, counts.false_positives))
        rows.append(
            {
                "file": str(files(image_id)),
                "exit": exit_names[exit],
                "confidence": confidence if confidence >= 0 else None,  # the router gives -1 if it has no confidence
                "objects": hits[exit] + misses[exit],
                "found": hits[exit],
                "lost": max(0, misses[exit] - misses[-1]),
                "added": max(0, false[exit] - false[-1]),
            }
        )
    return rows


def losses_against_full(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit against the full path; [n, exits] in [0, 1], 0 in the last column.

    min(1, (missed + added) / max(1, |F|)), with F the full path's detections of at least ``score``, missed the number
    of F that no detection of the exit matches at ``iou``, and added the number of the exit's detections that match none
    of F. Only the photos and classes of ``ground_truth`` are used, not its labels.
    """
    counts = photo_counts(exit_matches(as_ground_truth(ground_truth, exits[-1], score), exits, iou, ()), score)
    different, expected = counts.misses + counts.false_positives, counts.hits + counts.misses
    return np.minimum(different / np.maximum(expected, 1), 1.0)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a detector with the full path over all photos, at a score and an IoU."""

    objects: int  # detections of the full path
    kept: int  # of these, found by the detector too
    added: int  # detections that match none of them
    same_photos: float | None  # share of the photos with nothing lost and nothing added; None without a photo


def agreement(ground_truth: COCO, full: Detections, found: Detections, score: float, iou: float) -> Agreement:
    """Compare the detections ``found`` with those of the full path, without labels."""
    counts = photo_counts(exit_matches(as_ground_truth(ground_truth, full, score), [found], iou, ()), score)
    same = (counts.misses + counts.false_positives) == 0
    objects, kept = int((counts.hits + counts.misses).sum()), int(counts.hits.sum())
    return Agreement(objects, kept, int(counts.false_positives.sum()), float(same.mean()) if len(same) else None)


def as_ground_truth(template: COCO, detections: Detections, score: float) -> COCO:
    """A ground truth with the template's photos and classes, whose objects are the detections of at least ``score``."""
    annotations: list[dict[str, int | float | list[float]]] = []
    for image_id, found in detections.items():
        keep = found["scores"] >= score
        for box, label in zip(xywh(found["boxes"][keep]).tolist(), found["labels"][keep].tolist(), strict=True):
            place = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
            annotations.append({**place, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    truth = COCO()
    truth.dataset = {**template.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth

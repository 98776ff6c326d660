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
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

PhotoRow = dict[str, str | float | None]  # a row of photos.csv, by column

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's sizes of objects -> least and largest area, square pixels of the photo."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AP_DETECTIONS = 100  # AP uses at most this many detections per photo and class, those with the highest scores
_NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


@dataclass(frozen=True)
class ExitMatches:
    """The D detections of all K ``exits`` in n photos, matched under each of C ``conditions`` (size, IoU).

    Detections are sorted by class, then by falling score. Equal scores keep the order of the photos, then of the exits,
    so the detections of any choice of exits are in pycocotools' order. Precision, recall and the losses of photos are
    counted under the last condition. ``image_ids`` are sorted. Every array [n] of this module has the photos in this
    order.
    """

    classes: list[str]  # by rising category id
    conditions: list[tuple[str, float]]
    image_ids: list[int]
    exits: int
    objects_by_size: dict[str, np.ndarray]  # size -> counted objects of each class in each photo, int [classes, n]
    label: np.ndarray  # int [D]: index of the class
    photo: np.ndarray  # int [D]: index of the photo
    exit: np.ndarray  # int [D]: index of the exit
    rank: np.ndarray  # int [D]: how many detections of the same photo, exit and class come before
    score: np.ndarray  # float [D]
    overlap: np.ndarray  # float [D]: IoU of a hit with its object under the last condition; else 0
    hit: np.ndarray  # bool [C, D]: is it a true positive?
    false: np.ndarray  # bool [C, D]: is it a false positive? On a crowd, or not of the size, it is neither
    _hits_and_false: dict[int, list[tuple[np.ndarray, csr_array]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def photos(self) -> int:
        return len(self.image_ids)

    @property
    def ap50_condition(self) -> int:
        """Index of the condition of AP50: all sizes, IoU 0.5."""
        return self.conditions.index(("all", 0.5))

    @property
    def objects(self) -> np.ndarray:
        """Counted objects per photo, int [n]; classes summed."""
        return self.objects_by_size["all"].sum(axis=0)

    @property
    def pair(self) -> np.ndarray:
        """Pair of each detection, int [D]."""
        return self.photo * self.exits + self.exit

    def choose(self, choice: ArrayLike) -> ExitMatches:
        """The matches of one detector: photo i takes exit ``choice[i]`` (int [n])."""
        keep = np.flatnonzero(self.exit == _per_photo(self, "choice", choice, self.exits)[self.photo])
        names = ("label", "photo", "rank", "score", "overlap", "hit", "false")
        parts = {name: getattr(self, name)[..., keep] for name in names}
        return replace(self, exits=1, exit=np.zeros(len(keep), np.int64), **parts)

    def hits_and_false(self, condition: int) -> list[tuple[np.ndarray, csr_array]]:
        """What AP under one condition is computed from: AP depends on the precision at hits only.

        Returns:
            per class with H hits: the pair of each hit by falling score, [H], and a sparse array [H, pairs] with the
            number of false positives that each pair has between the previous hit and this one.
        """
        if condition not in self._hits_and_false:
            found = self._hits_and_false[condition] = []
            within_limit, pairs = self.rank < AP_DETECTIONS, self.pair
            starts = np.searchsorted(self.label, np.arange(len(self.classes) + 1))
            for of_class in itertools.starmap(slice, itertools.pairwise(starts)):
                pair, hit, false = pairs[of_class], self.hit[condition, of_class], self.false[condition, of_class]
                hits, false = (np.flatnonzero(one & within_limit[of_class]) for one in (hit, false))
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
    limits = np.array(limits).T[:, :, None]
    image_ids, categories = sorted(ground_truth.getImgIds()), np.array(sorted(ground_truth.getCatIds()), np.int64)
    objects = [
        (photo, one) for photo, image_id in enumerate(image_ids) for one in ground_truth.imgToAnns.get(image_id, [])
    ]
    photos = np.array([photo for photo, _ in objects], np.int64)
    boxes = np.array([one["bbox"] for _, one in objects], np.float64).reshape(-1, 4)
    labels = np.array([one["category_id"] for _, one in objects], np.int64)
    crowd = np.array([bool(one.get("iscrowd", 0)) for _, one in objects], bool)
    areas = np.array([one["area"] for _, one in objects], np.float64)
    counted = ~crowd & (areas >= limits[1]) & (areas <= limits[2])
    counts = np.zeros((len(conditions), len(categories), len(image_ids)), np.int64)
    known = np.isin(labels, categories)
    np.add.at(counts, (slice(None), np.searchsorted(categories, labels[known]), photos[known]), counted[:, known])
    # the first entry has no detections: np.concatenate needs one even if there is no photo
    pairs = [_match_photo(_NOTHING, boxes[:0], labels[:0], crowd[:0], counted[:, :0], limits)]
    starts = np.searchsorted(photos, np.arange(len(image_ids) + 1))
    for image_id, own in zip(image_ids, itertools.starmap(slice, itertools.pairwise(starts)), strict=True):
        truth = boxes[own], labels[own], crowd[own], counted[:, own]
        pairs += [_match_photo(found.get(image_id, _NOTHING), *truth, limits) for found in exits]
    pair = np.repeat(np.arange(len(pairs)) - 1, [len(found) for found, *_ in pairs])
    ids, *parts = (np.concatenate(one, axis=-1) for one in zip(*pairs, strict=True))
    order = np.argsort(ids, kind="stable")
    order = order[np.isin(ids[order], categories)]  # by class, then pair, then falling score
    label, pair = np.searchsorted(categories, ids[order]), pair[order]
    group = label * len(pairs) + pair
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    by_score = np.lexsort((-parts[0][order], label))
    return ExitMatches(
        [ground_truth.cats[category]["name"] for category in categories.tolist()],
        conditions,
        image_ids,
        len(exits),
        {size: count for (size, _), count in zip(conditions, counts, strict=True)},
        label[by_score],
        *np.divmod(pair[by_score], len(exits)),
        rank[by_score],
        *(values[..., order[by_score]] for values in parts),
    )


def _match_photo(
    found: Mapping[str, Tensor],
    objects: np.ndarray,
    classes: np.ndarray,
    crowd: np.ndarray,
    counted: np.ndarray,
    limits: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Labels, scores, overlap [D], hit and false [C, D] of one photo and exit, in falling order of the scores.

    The photo's objects are [G, 4] xywh, with ``classes`` and ``crowd`` [G], and are ``counted`` [C, G]. ``limits``
    [3, C, 1] are each condition's least IoU, smallest and largest area.
    """
    least_iou, smallest, largest = limits
    scores = found["scores"].double().numpy()
    order = np.argsort(-scores, kind="stable")
    labels, boxes = found["labels"].numpy()[order], xywh(found["boxes"]).double().numpy()[order]
    (hit, matched), overlap = np.zeros((2, len(least_iou), len(scores)), bool), np.zeros(len(scores))
    for label in np.intersect1d(classes, labels).tolist():
        of_class, same = np.flatnonzero(labels == label), np.flatnonzero(classes == label)
        is_crowd, is_counted = crowd[same], counted[:, same]
        overlaps = np.asarray(mask.iou(boxes[of_class], objects[same], is_crowd.astype(np.uint8).tolist()))
        free = np.ones(is_counted.shape, bool)
        for row in np.flatnonzero((overlaps >= least_iou.min()).any(axis=1)).tolist():
            possible = (overlaps[row] >= least_iou) & (free | is_crowd)
            possible_hit = possible & is_counted
            is_hit, is_matched = possible_hit.any(axis=1), possible.any(axis=1)
            candidates = np.where(np.where(is_hit[:, None], possible_hit, possible), overlaps[row], -1.0)
            # of equal overlaps the last one, as in pycocotools
            best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
            free[np.flatnonzero(is_matched), best[is_matched]] = False
            hit[:, of_class[row]], matched[:, of_class[row]] = is_hit, is_matched
            overlap[of_class[row]] = overlaps[row][best[-1]] if is_hit[-1] else 0.0
    areas = boxes[:, 2] * boxes[:, 3]
    other_size = (areas < smallest) | (areas > largest)
    return labels, scores[order], overlap, hit, ~(hit | matched | other_size)


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
    blocks = np.arange(matches.photos) if blocks is None else blocks
    count = int(blocks.max()) + 1 if len(blocks) else 0
    generator = np.random.default_rng(seed)
    chosen = [matches.choose(choice) for choice in choices]
    only_exit = np.zeros(matches.photos, np.int64)  # each element of ``chosen`` has one exit
    values = [APs(*np.full((2, resamples), np.nan)) for _ in choices]
    for index in range(resamples):
        weights = np.bincount(generator.integers(count, size=count) if count else [], minlength=count)[blocks]
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
    pairs = np.arange(matches.photos) * matches.exits + _per_photo(matches, "choice", choice, matches.exits)
    weights = np.ones(matches.photos, np.int64) if weights is None else _per_photo(matches, "weights", weights)
    conditions = [matches.ap50_condition] if ap50_only else range(len(IOU_THRESHOLDS))
    curves = [_curves(matches, index, pairs, weights) for index in conditions]
    return APs(None if ap50_only else mean_precision(curves), mean_precision(curves[:1]))


def precision_curves(matches: ExitMatches, size: str = "all") -> list[np.ndarray]:
    """Interpolated precision of one detector: per IoU threshold [101 recalls, classes with an object of the size]."""
    start = matches.conditions.index((size, IOU_THRESHOLDS[0]))
    pairs, weights = np.arange(matches.photos), np.ones(matches.photos, np.int64)
    return [_curves(matches, start + index, pairs, weights) for index in range(len(IOU_THRESHOLDS))]


def mean_precision(curves: Sequence[np.ndarray]) -> float | None:
    """Average precision in [0, 1]; None without a class that has an object."""
    return float(np.mean(np.stack(curves))) if curves[0].size else None


def _per_photo(matches: ExitMatches, name: str, values: ArrayLike, exits: int | None = None) -> np.ndarray:
    """A whole number for each photo (if ``exits`` is given, an exit) as int64 [n]; anything else is an error."""
    values = np.asarray(values)
    if values.shape != (matches.photos,) or (values.size and values.dtype.kind not in "iu"):
        raise EarlyExitError(f"{name} {values.dtype} {list(values.shape)}: give {matches.photos} whole numbers")
    if exits and values.size and not 0 <= values.min() <= values.max() < exits:
        raise EarlyExitError(f"{name} in {values.min()}..{values.max()}: exits are 0..{exits - 1}")
    return values.astype(np.int64)


def _curves(matches: ExitMatches, condition: int, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Interpolated precision at `RECALLS` of the classes with objects, [101, classes]. Only the detections of ``pairs``
    [n] (one per photo) are used, and each photo counts ``weights`` [n] times."""
    size, pair_weights = matches.conditions[condition][0], np.zeros(matches.photos * matches.exits)
    pair_weights[pairs] = weights
    curves = []
    objects_of_class = (matches.objects_by_size[size] @ weights).tolist()
    for objects, (hits, false) in zip(objects_of_class, matches.hits_and_false(condition), strict=True):
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
    above, pair, pairs = matches.score >= score, matches.pair, matches.photos * matches.exits
    hits, false = (
        np.bincount(pair[kind[-1] & above], minlength=pairs).reshape(matches.photos, matches.exits)
        for kind in (matches.hit, matches.false)
    )
    return PhotoCounts(hits, matches.objects[:, None] - hits, false)


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


def _counts_against_full(
    template: COCO, full: Detections, exits: Sequence[Detections], score: float, iou: float
) -> PhotoCounts:
    """Counts where the full path's detections of at least ``score`` are the objects."""
    return photo_counts(exit_matches(as_ground_truth(template, full, score), exits, iou, ()), score)


def losses_against_full(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit against the full path; [n, exits] in [0, 1], 0 in the last column.

    min(1, (missed + added) / max(1, |F|)), with F the full path's detections of at least ``score``, missed the number
    of F that no detection of the exit matches at ``iou``, and added the number of the exit's detections that match none
    of F. The labels of ``ground_truth`` are not used.
    """
    counts = _counts_against_full(ground_truth, exits[-1], exits, score, iou)
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
    counts = _counts_against_full(ground_truth, full, [found], score, iou)
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

"""How far AP50 would move with other photos of the same kind: a bootstrap over photos.

Matching never crosses photos, so it is done once (by pycocotools); a resample only weighs each photo by how
often it was drawn and accumulates again. Weighing gives what pycocotools gives for a data set with the
repeated photos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class ClassMatches:
    """The matches of one class at IoU 0.5, all sizes, 100 detections a photo, in falling order of the scores.

    hit: bool [D], true positive or false positive (ignored detections are left out).
    photo: int [D], index of the detection's photo.
    objects: int [n], counted objects per photo.
    """

    hit: np.ndarray
    photo: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class AP50Matches:
    """The matches of all classes, the recalls to interpolate at [R] and the number of photos."""

    classes: list[ClassMatches]
    recalls: np.ndarray
    photos: int


def ap50_matches(evaluation: COCOeval) -> AP50Matches:
    """Take the matches out of an evaluated ``COCOeval``."""
    params = evaluation.params
    photos, sizes = len(params.imgIds), len(params.areaRng)
    threshold = int(np.flatnonzero(np.isclose(params.iouThrs, 0.5))[0])
    classes = []
    for index in range(len(params.catIds)):
        start = index * sizes * photos  # evalImgs: [classes, sizes, photos], flat; size 0 is all
        classes.append(_class_matches(evaluation.evalImgs[start : start + photos], threshold))
    return AP50Matches(classes, np.asarray(params.recThrs), photos)


def weighted_ap50(matches: AP50Matches, weights: np.ndarray) -> float | None:
    """AP50 with photo i counted ``weights[i]`` times (int [n]); all ones give pycocotools' own AP50.

    Classes without an object among the weighted photos are left out; None when no class is left.
    """
    curves = [_precision_curve(one, weights, matches.recalls) for one in matches.classes]
    curves = [curve for curve in curves if curve is not None]
    return float(np.mean(np.stack(curves, axis=1))) if curves else None


def bootstrap_ap50(matches: AP50Matches, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """AP50 of ``resamples`` draws of as many photos with replacement, float [resamples]; NaN where undefined.

    The same seed draws the same photos, so the values of two detectors on one data set are paired.
    """
    generator = np.random.default_rng(seed)
    values = np.full(resamples, np.nan)
    for index in range(resamples):
        drawn = generator.integers(matches.photos, size=matches.photos) if matches.photos else []
        value = weighted_ap50(matches, np.bincount(drawn, minlength=matches.photos))
        values[index] = np.nan if value is None else value
    return values


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The central ``level`` of ``values`` (percentiles), NaN left out; None when nothing is left."""
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _class_matches(per_photo: list[dict | None], threshold: int) -> ClassMatches:
    present = [(photo, entry) for photo, entry in enumerate(per_photo) if entry is not None]
    objects = np.zeros(len(per_photo), dtype=np.int64)
    scores, hits, counted, photos = (
        [np.zeros(0)],
        [np.zeros(0, bool)],
        [np.zeros(0, bool)],
        [np.zeros(0, np.int64)],
    )
    for photo, entry in present:
        objects[photo] = np.count_nonzero(entry["gtIgnore"] == 0)
        scores.append(np.asarray(entry["dtScores"], dtype=np.float64))
        hits.append(entry["dtMatches"][threshold] != 0)
        counted.append(~entry["dtIgnore"][threshold].astype(bool))
        photos.append(np.full(len(entry["dtScores"]), photo))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    order = order[np.concatenate(counted)[order]]
    return ClassMatches(np.concatenate(hits)[order], np.concatenate(photos)[order], objects)


def _precision_curve(matches: ClassMatches, weights: np.ndarray, recalls: np.ndarray) -> np.ndarray | None:
    """Interpolated precision at ``recalls`` [R]; None without an object."""
    objects = int(weights @ matches.objects)
    if objects == 0:
        return None
    weight = weights[matches.photo]
    true = np.cumsum(np.where(matches.hit, weight, 0)).astype(float)
    false = np.cumsum(np.where(matches.hit, 0, weight)).astype(float)
    precision = true / (false + true + np.spacing(1))
    # the best precision at this recall or a higher one
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    position = np.searchsorted(true / objects, recalls, side="left")
    return np.append(envelope, 0.0)[np.minimum(position, len(envelope))]

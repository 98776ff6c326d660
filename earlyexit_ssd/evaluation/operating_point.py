"""What a user sees at one score threshold: hits, misses and false alarms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from torch import Tensor

from earlyexit_ssd.evaluation.coco import Detections, xywh


@dataclass(frozen=True)
class OperatingPoint:
    """Counts over all photos and classes at one score threshold, and the rates that follow from them.

    precision: tp / (tp + fp) in [0, 1]; None when nothing was detected.
    recall: tp / (tp + fn) in [0, 1]; 0.0 when nothing was found, None when there was nothing to find.
    f1: 2 tp / (2 tp + fp + fn); None when there is neither a detection nor an object.
    false_positives_per_image: fp / images; None without photos.
    false_positives_per_empty_image: the false positives on empty photos / empty photos. A photo is empty when
        it has no counted object of any evaluated class (it may hold ignored ones; see `empty_images`). None
        when no photo is empty.
    localization_error: 1 - mean IoU of the true positives with their objects, in [0, 1 - IoU threshold]; None
        without a true positive.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    false_positives_per_image: float | None
    false_positives_per_empty_image: float | None
    localization_error: float | None
    true_positives: int
    false_positives: int
    false_negatives: int
    images: int
    empty_images: int


@dataclass(frozen=True)
class Matches:
    """Outcome of one photo and class: IoU of each true positive, number of false positives and of misses."""

    ious: list[float]
    false_positives: int
    false_negatives: int


def operating_point(ground_truth: COCO, detections: Detections, score: float = 0.5, iou: float = 0.5) -> OperatingPoint:
    """Match per photo and class, in falling order of the scores, every detection with ``scores >= score``.

    Each detection takes the free counted object of its class that it overlaps most, if that IoU is at least
    ``iou``: a true positive. One that finds none but lies on an ignored object (``iscrowd`` = 1: COCO crowds,
    VOC difficult; intersection over the detection's own area at least ``iou``, any number of detections each)
    is dropped. The rest are false positives, counted objects left over are misses, and ignored objects are
    neither hit nor missed. These are pycocotools' rules, without its limit of 100 detections a photo. Labels
    that are no category of ``ground_truth`` are left out.
    """
    ious: list[float] = []
    false_positives = false_negatives = on_empty = 0
    category_ids = ground_truth.getCatIds()
    empty = set(empty_images(ground_truth))
    for image_id in ground_truth.getImgIds():
        objects = ground_truth.imgToAnns.get(image_id, [])
        for category_id in category_ids:
            matches = match_class(objects, detections.get(image_id), category_id, score, iou)
            ious += matches.ious
            false_positives += matches.false_positives
            false_negatives += matches.false_negatives
            on_empty += matches.false_positives if image_id in empty else 0
    images, true_positives = len(ground_truth.getImgIds()), len(ious)
    return OperatingPoint(
        precision=_ratio(true_positives, true_positives + false_positives),
        recall=_ratio(true_positives, true_positives + false_negatives),
        f1=_ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        false_positives_per_image=_ratio(false_positives, images),
        false_positives_per_empty_image=_ratio(on_empty, len(empty)),
        localization_error=1.0 - float(np.mean(ious)) if ious else None,
        true_positives=true_positives,
        false_positives=false_positives,
        false_negatives=false_negatives,
        images=images,
        empty_images=len(empty),
    )


def empty_images(ground_truth: COCO) -> list[int]:
    """Ids of the images without a counted object of a listed category (``iscrowd`` = 1 is not counted)."""
    categories = set(ground_truth.getCatIds())
    return [
        image_id
        for image_id in ground_truth.getImgIds()
        if not any(
            annotation["category_id"] in categories and not _ignored(annotation)
            for annotation in ground_truth.imgToAnns.get(image_id, [])
        )
    ]


def match(boxes: np.ndarray, objects: np.ndarray, ignored: np.ndarray, iou: float) -> Matches:
    """Match the ``boxes`` [D,4] of one photo and class, best score first, with its ``objects`` [G,4]; both
    xywh.

    ``ignored`` bool [G] marks the objects that are neither hit nor missed.
    """
    overlaps = _overlaps(boxes, objects, ignored)
    iou = min(iou, 1 - 1e-10)  # so that equal boxes match at 1, as in pycocotools
    free = ~ignored
    ious: list[float] = []
    false_positives = 0
    for row in overlaps:
        candidates = np.where(free, row, -1.0)
        # among equals the last one is taken, as pycocotools does
        best = len(row) - 1 - int(np.argmax(candidates[::-1])) if len(row) else -1
        if best >= 0 and candidates[best] >= iou:
            free[best] = False
            ious.append(float(row[best]))
        elif not (row[ignored] >= iou).any():
            false_positives += 1
    return Matches(ious, false_positives, int(free.sum()))


def match_class(
    objects: list[dict], found: Mapping[str, Tensor] | None, category_id: int, score: float, iou: float
) -> Matches:
    """`match` for the annotations ``objects`` of a photo and what was ``found`` there, one class."""
    own = [annotation for annotation in objects if annotation["category_id"] == category_id]
    truth = np.array([annotation["bbox"] for annotation in own], dtype=np.float64).reshape(-1, 4)
    ignored = np.array([_ignored(annotation) for annotation in own], dtype=bool)
    if found is None:
        boxes = np.zeros((0, 4))
    else:
        scores = found["scores"].double().numpy()
        keep = np.flatnonzero((found["labels"].numpy() == category_id) & (scores >= score))
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        boxes = xywh(found["boxes"]).double().numpy()[keep]
    return match(boxes, truth, ignored, iou)


def _overlaps(boxes: np.ndarray, objects: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """[D,G] IoU by pycocotools; with ignored objects, intersection over the detection's area."""
    if not len(boxes) or not len(objects):
        return np.zeros((len(boxes), len(objects)))
    return np.asarray(mask.iou(boxes, objects, ignored.astype(np.uint8).tolist()))


def _ignored(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd", 0))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

"""COCO's average precision, by pycocotools, as named numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from earlyexit_ssd.errors import DataError

Detections = Mapping[int, Mapping[str, Tensor]]
"""Image id -> ``boxes`` [N,4] (xyxy, photo pixels), ``scores`` [N] and ``labels`` [N] (category ids)."""


@dataclass(frozen=True)
class CocoMetrics:
    """Average precisions in [0, 1]; ``None`` where there is no object to find (pycocotools says -1).

    ``per_class`` maps a class name to its ``AP`` and ``AP50``, in the order of the category ids.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    per_class: dict[str, dict[str, float | None]]


def coco_metrics(ground_truth: COCO, detections: Detections) -> CocoMetrics:
    """The figures that pycocotools gives for the same boxes, digit for digit.

    Images without an entry in ``detections`` count as images without a detection; labels that are no category
    of ``ground_truth`` are left out, as pycocotools does.

    Raises:
        DataError: detections of an unknown image, or an annotation whose id pycocotools cannot represent.
    """
    return summarize(coco_evaluation(ground_truth, detections))


def coco_evaluation(ground_truth: COCO, detections: Detections) -> COCOeval:
    """An evaluated and accumulated ``COCOeval`` (bbox, its default parameters), made without printing."""
    _check(ground_truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, _as_results(ground_truth, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def summarize(evaluation: COCOeval) -> CocoMetrics:
    """Name the figures of an accumulated evaluation."""
    ap, ap50, ap75, small, medium, large = (_defined(value) for value in evaluation.stats[:6])
    # precision: [IoU thresholds, recalls, classes, sizes, detections per image]; size 0 is all, the last 100
    # a photo
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    at_half = np.isclose(evaluation.params.iouThrs, 0.5)
    categories = evaluation.cocoGt.loadCats([int(category) for category in evaluation.params.catIds])
    per_class = {
        category["name"]: {
            "AP": _mean(precision[:, :, index]),
            "AP50": _mean(precision[at_half, :, index]),
        }
        for index, category in enumerate(categories)
    }
    return CocoMetrics(ap, ap50, ap75, small, medium, large, per_class)


def xywh(boxes: Tensor) -> Tensor:
    """COCO's xywh of xyxy boxes [N,4], in their own precision, as torchvision's reference does it."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def _mean(precision: np.ndarray) -> float | None:
    """Mean over the defined entries; pycocotools marks the undefined ones with -1."""
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else None


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)


def _check(ground_truth: COCO, detections: Detections) -> None:
    unknown = [image_id for image_id in detections if image_id not in ground_truth.imgs]
    if unknown:
        raise DataError(f"detections of image {unknown[0]}: the ground truth has no image of this id")
    if 0 in ground_truth.anns:
        # pycocotools stores the matched id and reads 0 as "no match"
        raise DataError("annotation id 0: pycocotools counts its match as a miss; number annotations from 1")


def _as_results(ground_truth: COCO, detections: Detections) -> COCO:
    """pycocotools' result object; ``loadRes`` itself fails on an empty list."""
    records = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for image_id, found in detections.items()
        for box, label, score in zip(
            xywh(found["boxes"]).tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]
    if records:
        return ground_truth.loadRes(records)
    empty = COCO()
    empty.dataset = {
        "images": ground_truth.dataset["images"],
        "categories": ground_truth.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty

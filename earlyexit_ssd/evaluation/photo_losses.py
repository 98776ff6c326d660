"""What routing costs a single photo: objects that it loses and false ones that it adds, at the deployed score."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from torch import Tensor

from earlyexit_ssd.evaluation.coco import Detections, xywh
from earlyexit_ssd.evaluation.collect import Collected
from earlyexit_ssd.evaluation.operating_point import match_class
from earlyexit_ssd.evaluation.routed import routed_detections


@dataclass(frozen=True)
class PhotoCounts:
    """Per photo, int [n]: objects found, objects missed, detections that are none; classes summed."""

    hits: np.ndarray
    misses: np.ndarray
    false_positives: np.ndarray


def photo_counts(ground_truth: COCO, detections: Detections, score: float, iou: float) -> PhotoCounts:
    """The counts behind `operating_point`, photo by photo, by rising image id."""
    image_ids, category_ids = sorted(ground_truth.getImgIds()), ground_truth.getCatIds()
    counts = np.zeros((3, len(image_ids)), dtype=np.int64)
    for row, image_id in enumerate(image_ids):
        objects = ground_truth.imgToAnns.get(image_id, [])
        for category_id in category_ids:
            found = match_class(objects, detections.get(image_id), category_id, score, iou)
            counts[:, row] += len(found.ious), found.false_negatives, found.false_positives
    return PhotoCounts(*counts)


def photo_list(
    ground_truth: COCO,
    collected: Collected,
    chosen: Tensor,
    exit_names: Sequence[str],
    files: Callable[[int], object],
    score: float,
    iou: float,
) -> list[dict[str, Any]]:
    """A row for every photo, in the order of ``collected``, by the exit that it takes (``chosen`` [n]).

    ``file``, ``exit`` (its name), ``confidence`` (the router's there; None where its policy has none), ``objects``,
    ``found`` of them, ``lost`` (objects missed beyond what the full path misses there) and ``added`` (false positives
    beyond the full path's); all at ``score`` and ``iou``.

    Args:
        files: image id -> file.
    """
    routed = photo_counts(ground_truth, routed_detections(collected, chosen), score, iou)
    full = photo_counts(ground_truth, collected.detections[-1], score, iou)
    row_of = {image_id: row for row, image_id in enumerate(sorted(ground_truth.getImgIds()))}
    rows = []
    for place, (image_id, exit_index) in enumerate(zip(collected.image_ids, chosen.tolist(), strict=True)):
        row = row_of[image_id]
        confidence = float(collected.confidences[exit_index][place])
        rows.append(
            {
                "file": str(files(image_id)),
                "exit": exit_names[exit_index],
                "confidence": confidence if confidence >= 0 else None,
                "objects": int(routed.hits[row] + routed.misses[row]),
                "found": int(routed.hits[row]),
                "lost": max(0, int(routed.misses[row] - full.misses[row])),
                "added": max(0, int(routed.false_positives[row] - full.false_positives[row])),
            }
        )
    return rows


def losses_against_full(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit, against what the full path says there; [n, exits] in [0, 1].

    min(1, (missed + added) / max(1, |F|)): F are the full path's detections from ``score`` on, missed those of F that
    the exit's detections from ``score`` on do not match at ``iou``, added the exit's that match none of F. 0 in the
    last column. No label is needed.

    Args:
        ground_truth: names the photos and the classes; its objects are not looked at.
        exits: per exit, the full path last.
    """
    truth = as_ground_truth(ground_truth, exits[-1], score)
    return np.stack([_share(photo_counts(truth, found, score, iou)) for found in exits], axis=1)


def losses_against_labels(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit, against the objects in it; [n, exits] in [0, 1].

    min(1, (max(0, m - m_full) + max(0, f - f_full)) / max(1, objects)): m objects missed and f false positives, each
    beyond those of the full path. 0 in the last column.
    """
    counts = [photo_counts(ground_truth, found, score, iou) for found in exits]
    full = counts[-1]
    objects = np.maximum(full.hits + full.misses, 1)
    worse = [
        np.maximum(one.misses - full.misses, 0) + np.maximum(one.false_positives - full.false_positives, 0)
        for one in counts
    ]
    return np.stack([np.minimum(one / objects, 1.0) for one in worse], axis=1)


def _share(counts: PhotoCounts) -> np.ndarray:
    return np.minimum((counts.misses + counts.false_positives) / np.maximum(counts.hits + counts.misses, 1), 1.0)


@dataclass(frozen=True)
class Agreement:
    """How far a detector says what the full path says, at a score and an IoU.

    Attributes:
        objects: what the full path finds in all photos; kept: how many of them the detector finds.
        added: what it finds beyond them.
        same_photos: share of the photos with nothing lost and nothing added; None without a photo.
    """

    objects: int
    kept: int
    added: int
    same_photos: float | None


def agreement(ground_truth: COCO, full: Detections, found: Detections, score: float, iou: float) -> Agreement:
    """Of what a detector has found with what the full path has; no label is looked at."""
    counts = photo_counts(as_ground_truth(ground_truth, full, score), found, score, iou)
    same = (counts.misses + counts.false_positives) == 0
    objects, kept = int((counts.hits + counts.misses).sum()), int(counts.hits.sum())
    return Agreement(objects, kept, int(counts.false_positives.sum()), float(same.mean()) if len(same) else None)


def as_ground_truth(template: COCO, detections: Detections, score: float) -> COCO:
    """The detections from ``score`` on as objects of the template's photos and classes."""
    annotations: list[Mapping] = []
    for image_id, found in detections.items():
        keep = found["scores"] >= score
        for box, label in zip(xywh(found["boxes"][keep]).tolist(), found["labels"][keep].tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    truth = COCO()
    truth.dataset = {**template.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth

"""How well a set of detections does: every figure of quality, and how to measure."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices, interval
from earlyexit_ssd.evaluation.choices import matches_of
from earlyexit_ssd.evaluation.coco import Detections, coco_evaluation, summarize
from earlyexit_ssd.evaluation.operating_point import operating_point
from earlyexit_ssd.evaluation.runtime import EAGER


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    score, iou: where precision, recall and the like are counted, in [0, 1].
    timing_runs, timing_threads: single-image runs per exit, and the CPU threads they use.
    runtime: what runs the networks meanwhile, a key of `RUNTIME_TITLES`.
    resamples, seed: of the bootstrap over photos; 0 resamples leave the intervals out.
    """

    score: float = 0.5
    iou: float = 0.5
    timing_runs: int = 30
    timing_threads: int = 1
    runtime: str = EAGER
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """Figures of one set of detections, ready for JSON, and the bootstrap's AP50 values [resamples]."""

    figures: dict[str, Any]
    ap50_values: np.ndarray

    def ap50_minus(self, other: Quality) -> list[float] | None:
        """95 % interval of the difference in AP50, on the same draws of photos; None where it is undefined."""
        return listed_interval(self.ap50_values - other.ap50_values)


def evaluate_detections(ground_truth: COCO, detections: Detections, settings: EvaluationSettings) -> Quality:
    """The quality figures of one set of detections: AP by COCO, the operating point, intervals of AP and AP50."""
    evaluation = coco_evaluation(ground_truth, detections)
    point = asdict(operating_point(ground_truth, detections, settings.score, settings.iou))
    matches = matches_of([evaluation])
    everyone = np.zeros(matches.photos, dtype=np.int64)
    (draws,) = bootstrap_choices(matches, [everyone], settings.resamples, settings.seed, ap50_only=False)
    intervals = {"AP_interval": listed_interval(draws.AP), "AP50_interval": listed_interval(draws.AP50)}
    figures = asdict(summarize(evaluation)) | intervals | point
    del figures["images"], figures["empty_images"]  # the same for every exit: in the context
    return Quality(figures, draws.AP50)


def describe_boxes(ground_truth: COCO, detections: Detections) -> dict[str, Any]:
    """What every box of a detector has in common, whatever there is to find: it shows a detector that is broken.

    Returns:
        ``boxes`` (how many), ``score_mean``, ``score_std``, and ``outside_share``: of the boxes, those with less than
        half of their area inside the photo, or with none at all; None where there is no box.
    """
    scores = np.concatenate([np.zeros(0), *(found["scores"].numpy() for found in detections.values())])
    outside = [np.zeros(0, dtype=bool)]
    for image_id, found in detections.items():
        image, boxes = ground_truth.imgs.get(image_id, {}), found["boxes"].double().numpy()
        size = np.array([image.get("width", np.inf), image.get("height", np.inf)])
        inside = np.prod(np.maximum(np.minimum(boxes[:, 2:], size) - np.maximum(boxes[:, :2], 0), 0), axis=1)
        area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
        outside.append(~((inside > 0) & (inside >= area / 2)))  # NaN is outside
    if not scores.size:
        return {"boxes": 0, "score_mean": None, "score_std": None, "outside_share": None}
    return {
        "boxes": int(scores.size),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "outside_share": float(np.concatenate(outside).mean()),
    }


def evaluate_agreement(full_path: COCO, detections: Detections, settings: EvaluationSettings) -> Quality:
    """The same figures against what the full path says, where nobody labelled the photos; AP claims accuracy: None."""
    found = evaluate_detections(full_path, detections, dataclasses.replace(settings, resamples=0))
    figures = {key: None if key.startswith("AP") else value for key, value in found.figures.items()}
    figures["per_class"] = {name: dict.fromkeys(values) for name, values in figures["per_class"].items()}
    return Quality(figures, found.ap50_values)


def listed_interval(values: np.ndarray) -> list[float] | None:
    """The interval, as JSON has it."""
    bounds = interval(values)
    return list(bounds) if bounds else None

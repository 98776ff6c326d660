"""Figures of a model on one split, for the gates."""

from __future__ import annotations

from typing import Any

from earlyexit_ssd.data import DetectionDataset, build_loader, to_coco
from earlyexit_ssd.evaluation.collect import collect, collect_detections
from earlyexit_ssd.evaluation.quality import EvaluationSettings, evaluate_detections
from earlyexit_ssd.modeling import EarlyExitSSDLite

Figures = dict[str, Any]


class SplitQuality:
    """AP50, precision and recall on ``dataset``, of the full path or of every exit."""

    def __init__(self, dataset: DetectionDataset, settings: EvaluationSettings, batch_size: int, workers: int) -> None:
        self._loader = build_loader(dataset, batch_size, workers, train=False, seed=0)
        self._ground_truth = to_coco(dataset)
        self._settings = settings

    def of_full_path(self, model: EarlyExitSSDLite) -> Figures:
        """Figures of the model without routing."""
        router, model.router = model.router, None
        try:
            detections = collect_detections(model, self._loader)
        finally:
            model.router = router
        return evaluate_detections(self._ground_truth, detections, self._settings).figures

    def of_exits(self, model: EarlyExitSSDLite) -> list[Figures]:
        """Figures of every exit, the full path last."""
        detections = collect(model, self._loader).detections
        return [evaluate_detections(self._ground_truth, found, self._settings).figures for found in detections]

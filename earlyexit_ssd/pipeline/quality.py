"""Figures of a model on one split, for the gates and for the curves of a training."""

from __future__ import annotations

from typing import Any

from earlyexit_ssd.data import DetectionDataset, build_loader, to_coco
from earlyexit_ssd.evaluation.coco import Detections, coco_evaluation, summarize
from earlyexit_ssd.evaluation.collect import collect, collect_detections
from earlyexit_ssd.evaluation.quality import EvaluationSettings, evaluate_detections
from earlyexit_ssd.evaluation.routed import choose_exits, exit_share
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

    def curve_point(self, model: EarlyExitSSDLite) -> dict[str, float | None]:
        """``AP/<exit>`` and ``AP50/<exit>`` of the exits that have a branch; ``share/<exit>`` of the photos that leave
        there and ``temperature/<exit>``. Without a router, which comes with the exits, of the full path alone."""
        router = model.router
        if router is None:
            return self._ap("full", collect_detections(model, self._loader, title=None))
        collected = collect(model, self._loader, router, title=None)
        point: dict[str, float | None] = {}
        for name, empty, found in zip(model.exit_names, (*model.empty, False), collected.detections, strict=True):
            point |= {} if empty else self._ap(name, found)
        shares = exit_share(choose_exits(collected.confidences, router.thresholds.tolist()), model.exit_names)
        temperatures = dict(zip(model.exit_names, router.temperatures.tolist(), strict=False))
        named = {"share": shares, "temperature": temperatures}
        return point | {f"{key}/{name}": value for key, values in named.items() for name, value in values.items()}

    def _ap(self, name: str, found: Detections) -> dict[str, float | None]:
        figures = summarize(coco_evaluation(self._ground_truth, found))
        return {f"AP/{name}": figures.AP, f"AP50/{name}": figures.AP50}

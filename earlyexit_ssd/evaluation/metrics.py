"""Every figure of a detector with exits, as the dict that metrics.json holds (keys: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from torch import nn

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.bootstrap import ap50_matches, bootstrap_ap50, interval
from earlyexit_ssd.evaluation.coco import Detections, coco_evaluation, summarize
from earlyexit_ssd.evaluation.collect import Batches, Collected, collect
from earlyexit_ssd.evaluation.confidence import summarize_confidence
from earlyexit_ssd.evaluation.cost import (
    PlainPath,
    Timing,
    count_mmacs,
    example_input,
    mmacs_to_exit,
    time_modules,
)
from earlyexit_ssd.evaluation.operating_point import empty_images, operating_point
from earlyexit_ssd.evaluation.routed import choose_exits, exit_share, mean_cost, routed_detections
from earlyexit_ssd.evaluation.verdict import judge
from earlyexit_ssd.modeling.paths import PathToExit


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    score, iou: where precision, recall and the like are counted, in [0, 1].
    timing_runs, timing_threads: single-image runs per exit, and the CPU threads they use.
    resamples, seed: of the bootstrap over photos; 0 resamples leave the intervals out.
    """

    score: float = 0.5
    iou: float = 0.5
    timing_runs: int = 30
    timing_threads: int = 1
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """Figures of one set of detections, ready for JSON, and the bootstrap's AP50 values [resamples]."""

    figures: dict[str, Any]
    ap50_values: np.ndarray


@dataclass(frozen=True)
class Costs:
    """MMACs and timing to each exit, shallow to deep, and of the detector without exits."""

    mmacs: list[float]
    timings: list[Timing]
    plain_mmacs: float
    plain_timing: Timing


def evaluate_exits(
    model: nn.Module,
    loader: Batches,
    ground_truth: COCO,
    router: Any,
    settings: EvaluationSettings,
    *,
    splits: Sequence[str] = (),
    forced: bool = False,
    collected: Collected | None = None,
) -> dict[str, Any]:
    """Evaluate every exit and the routed detector; the network runs once per photo.

    Args:
        model: an `EarlyExitSSDLite` on the device to measure.
        loader: batches of the photos without augmentation; not read when ``collected`` is given.
        ground_truth: the same photos' objects (`earlyexit_ssd.data.to_coco`).
        router: an `ExitRouter`.
        settings: thresholds, timing and bootstrap.
        splits: names of the data sets, for the record.
        forced: the run went on past a failed gate.
        collected: what `collect` returned for these photos, when the caller has it already.

    Returns:
        ``context``, ``exits``, ``without_exits``, ``routed`` and ``verdict``: plain numbers, strings, lists
        and None.
    """
    collected = collected or collect(model, loader, router)
    _check_same_images(collected, ground_truth)
    costs = measure_costs(model, settings, router)
    qualities = [evaluate_detections(ground_truth, found, settings) for found in collected.detections]
    metrics = {
        "context": _context(model, ground_truth, settings, splits, forced),
        "exits": [_exit_entry(model, index, collected, costs, qualities) for index in range(len(qualities))],
        "without_exits": {
            "mmacs": costs.plain_mmacs,
            "ms": costs.plain_timing.ms,
            "ms_interval": [costs.plain_timing.low, costs.plain_timing.high],
        },
        "routed": _routed_entry(model, ground_truth, collected, costs, router, settings),
    }
    metrics["verdict"] = asdict(judge(metrics, forced))
    return metrics


def evaluate_detections(ground_truth: COCO, detections: Detections, settings: EvaluationSettings) -> Quality:
    """The quality figures of one set of detections: AP by COCO, the operating point, AP50's interval."""
    evaluation = coco_evaluation(ground_truth, detections)
    point = asdict(operating_point(ground_truth, detections, settings.score, settings.iou))
    values = bootstrap_ap50(ap50_matches(evaluation), settings.resamples, settings.seed)
    bounds = interval(values)
    figures = asdict(summarize(evaluation)) | {"AP50_interval": list(bounds) if bounds else None} | point
    del figures["images"], figures["empty_images"]  # the same for every exit: in the context
    return Quality(figures, values)


def measure_costs(model: nn.Module, settings: EvaluationSettings, router: Any | None = None) -> Costs:
    """MMACs and milliseconds of one image, all exits and the plain detector timed in turns; scoring by ``router``
    included."""
    example, plain = example_input(model), PlainPath(model)
    paths = [PathToExit(model, index, router) for index in range(len(model.exit_names))]
    *timings, plain_timing = time_modules([*paths, plain], example, settings.timing_runs, settings.timing_threads)
    return Costs(mmacs_to_exit(model), timings, count_mmacs(plain, example), plain_timing)


def _check_same_images(collected: Collected, ground_truth: COCO) -> None:
    missing = sorted(set(ground_truth.imgs) - set(collected.image_ids))
    if missing:
        raise DataError(
            f"image {missing[0]} ({len(missing)} in all) is in the ground truth but was not evaluated;"
            " make both from the same data set"
        )


def _exit_entry(
    model: nn.Module, index: int, collected: Collected, costs: Costs, qualities: list[Quality]
) -> dict[str, Any]:
    timing = costs.timings[index]
    entry = {"name": model.exit_names[index], "layer": model.exit_layers[index], **qualities[index].figures}
    if index < len(qualities) - 1:
        bounds = interval(qualities[-1].ap50_values - qualities[index].ap50_values)
        entry["AP50_below_full_interval"] = list(bounds) if bounds else None
    summary = summarize_confidence(collected.confidences[index])
    entry["confidence"] = asdict(summary) if summary else None
    return entry | {"mmacs": costs.mmacs[index], "ms": timing.ms, "ms_interval": [timing.low, timing.high]}


def _routed_entry(
    model: nn.Module,
    ground_truth: COCO,
    collected: Collected,
    costs: Costs,
    router: Any,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    thresholds = [float(value) for value in router.thresholds]
    chosen = choose_exits(collected.confidences, thresholds)
    quality = evaluate_detections(ground_truth, routed_detections(collected, chosen), settings)
    milliseconds = mean_cost(chosen, [timing.ms for timing in costs.timings])
    return {
        "policy": str(router.policy),
        "thresholds": thresholds,
        **quality.figures,
        "exit_share": exit_share(chosen, model.exit_names),
        "mmacs": mean_cost(chosen, costs.mmacs),
        "ms": milliseconds,
        "speedup": costs.plain_timing.ms / milliseconds if milliseconds else None,
    }


def _context(
    model: nn.Module, ground_truth: COCO, settings: EvaluationSettings, splits: Sequence[str], forced: bool
) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "splits": list(splits),
        "images": len(ground_truth.imgs),
        "empty_images": len(empty_images(ground_truth)),
        "classes": list(model.classes),
        "score": settings.score,
        "iou": settings.iou,
        "runs": settings.timing_runs,
        "threads": settings.timing_threads,
        "resamples": settings.resamples,
        "seed": settings.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "forced": forced,
    }

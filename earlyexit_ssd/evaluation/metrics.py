"""Every figure of a detector with exits, as the dict that metrics.json holds (keys: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.collect import Batches, Collected, collect
from earlyexit_ssd.evaluation.confidence import summarize_confidence
from earlyexit_ssd.evaluation.cost import (
    PlainPath,
    Timing,
    count_mmacs,
    example_input,
    mmacs_to_exit,
)
from earlyexit_ssd.evaluation.operating_point import empty_images
from earlyexit_ssd.evaluation.photo_losses import as_ground_truth, losses_against_full, losses_against_labels
from earlyexit_ssd.evaluation.quality import (
    EvaluationSettings,
    Quality,
    describe_boxes,
    evaluate_agreement,
    evaluate_detections,
    listed_interval,
)
from earlyexit_ssd.evaluation.rivals import Rival, evaluate_rivals
from earlyexit_ssd.evaluation.routed import choose_exits, exit_share, mean_cost, routed_detections
from earlyexit_ssd.evaluation.runtime import time_in_runtime
from earlyexit_ssd.evaluation.verdict import asked_value, judge
from earlyexit_ssd.modeling.paths import AllOutputs, PathToExit
from earlyexit_ssd.routing.certificate import Certificate


@dataclass(frozen=True)
class Costs:
    """MMACs and timing to each exit, shallow to deep, and of the detector without exits; timing of the rivals."""

    mmacs: list[float]
    timings: list[Timing]
    plain_mmacs: float
    plain_timing: Timing
    rival_timings: list[Timing]


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
    rivals: Sequence[Rival] = (),
    certificate: Certificate | None = None,
    taken_over: bool = False,
    labelled: bool = True,
) -> dict[str, Any]:
    """Evaluate every exit and the routed detector; the network runs once per photo.

    Args:
        model: an `EarlyExitSSDLite` on the device to measure.
        loader: batches of the photos without augmentation; read once, unless ``collected`` is given, and once for
            each rival that has to find its detections.
        ground_truth: the same photos' objects (`earlyexit_ssd.data.to_coco`).
        router: an `ExitRouter`.
        settings: thresholds, timing and bootstrap.
        splits: names of the data sets, for the record.
        forced: the run went on past a failed gate.
        collected: what `collect` returned for these photos, when the caller has it already.
        rivals: static detectors to hold the routed one against.
        certificate: that the router comes from; what it was asked for is checked on these photos.
        taken_over: the full path is a checkpoint as it was, so the exits are held against it alone.
        labelled: False where nobody labelled the photos: what the full path finds at the score is what is there, all
            figures are agreement with it, and AP is None.

    Returns:
        ``context``, ``exits``, ``without_exits``, ``routed``, ``rivals``, ``verdict`` and, with a certificate,
        ``certificate``: plain numbers, strings, lists and None.
    """
    collected = collected or collect(model, loader, router)
    _check_same_images(collected, ground_truth)
    costs = measure_costs(model, settings, router, rivals)
    judged = evaluate_detections if labelled else evaluate_agreement
    if not labelled:
        ground_truth = as_ground_truth(ground_truth, collected.detections[-1], settings.score)
    qualities = [judged(ground_truth, found, settings) for found in collected.detections]
    chosen = choose_exits(collected.confidences, router.thresholds.tolist())
    routed = judged(ground_truth, routed_detections(collected, chosen), settings)
    metrics = {
        "context": {
            **_context(model, ground_truth, settings, splits, forced),
            "taken_over": taken_over,
            "labelled": labelled,
        },
        "exits": [_exit_entry(model, index, collected, costs, qualities) for index in range(len(qualities))],
        "without_exits": {
            "mmacs": costs.plain_mmacs,
            "ms": costs.plain_timing.ms,
            "ms_interval": [costs.plain_timing.low, costs.plain_timing.high],
        },
        "routed": _routed_entry(model, router, routed, chosen, costs),
        "rivals": evaluate_rivals(rivals, costs.rival_timings, loader, ground_truth, routed, settings),
    }
    metrics["exits"][-1]["found"] = describe_boxes(ground_truth, collected.detections[-1])
    if certificate is not None:
        metrics["certificate"] = check_promise(
            certificate, ground_truth, collected, chosen, (qualities[-1], routed), costs, settings
        )
    metrics["verdict"] = asdict(judge(metrics, forced))
    return metrics


def check_promise(
    certificate: Certificate,
    ground_truth: COCO,
    collected: Collected,
    chosen: Tensor,
    full_and_routed: tuple[Quality, Quality],
    costs: Costs,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """What a certificate was asked for, against what these photos say.

    Returns:
        ``target`` (the certificate's), ``measured`` (AP50 lost, missed and added per photo, or the speed-up in the
        certificate's unit of cost), its 95 % bootstrap ``interval``, and whether it is ``kept``; None where undefined.
    """
    target, asked = certificate.target, asked_value(certificate.target)
    draws = np.random.default_rng(settings.seed).integers(len(chosen), size=(settings.resamples, len(chosen)))
    if target["kind"] == "ap_drop":
        full, routed = full_and_routed
        before, after = full.figures["AP50"], routed.figures["AP50"]
        measured = None if before is None or after is None else before - after
        interval = full.ap50_minus(routed)
    elif target["kind"] == "risk":
        measure = losses_against_labels if target["reference"] == "labels" else losses_against_full
        exits = [routed_detections(collected, chosen), collected.detections[-1]]
        losses = measure(ground_truth, exits, target["score"], target["iou"])[:, 0]
        measured, interval = float(losses.mean()), listed_interval(losses[draws].mean(axis=1))
    else:
        in_ms = certificate.cost_model["unit"] == "ms"
        of_exits = [timing.ms for timing in costs.timings] if in_ms else costs.mmacs
        plain = costs.plain_timing.ms if in_ms else costs.plain_mmacs
        of_photos = np.array(of_exits)[chosen.numpy()]
        measured, interval = float(plain / of_photos.mean()), listed_interval(plain / of_photos[draws].mean(axis=1))
    tiny = 1e-9  # what was asked for may be met exactly
    kept = None
    if measured is not None:
        kept = measured >= asked - tiny if target["kind"] == "speedup" else measured <= asked + tiny
    return {"target": dict(target), "measured": measured, "interval": interval, "kept": kept}


def measure_costs(
    model: nn.Module, settings: EvaluationSettings, router: Any | None = None, rivals: Sequence[Rival] = ()
) -> Costs:
    """MMACs and milliseconds of one image; exits, scoring by ``router`` included, plain detector and rivals are timed
    in turns, in the runtime of ``settings``."""
    example, plain = example_input(model), PlainPath(model)
    paths = [AllOutputs(PathToExit(model, index, router)) for index in range(len(model.exit_names))]
    networks = [*paths, plain, *(rival.network for rival in rivals)]
    examples = [*[example] * (len(paths) + 1), *(rival.example for rival in rivals)]
    timings = time_in_runtime(networks, examples, settings.runtime, settings.timing_runs, settings.timing_threads)
    count = len(paths)
    return Costs(
        mmacs_to_exit(model, router), timings[:count], count_mmacs(plain, example), timings[count], timings[count + 1 :]
    )


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
        entry["empty"] = model.empty[index]
        entry["AP50_below_full_interval"] = qualities[-1].ap50_minus(qualities[index])
    summary = summarize_confidence(collected.confidences[index])
    entry["confidence"] = asdict(summary) if summary else None
    return entry | {"mmacs": costs.mmacs[index], "ms": timing.ms, "ms_interval": [timing.low, timing.high]}


def _routed_entry(model: nn.Module, router: Any, quality: Quality, chosen: Tensor, costs: Costs) -> dict[str, Any]:
    milliseconds = mean_cost(chosen, [timing.ms for timing in costs.timings])
    return {
        "policy": str(router.policy),
        "thresholds": router.thresholds.tolist(),
        "hybrid": bool(router.hybrid),
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
        "runtime": settings.runtime,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "forced": forced,
    }

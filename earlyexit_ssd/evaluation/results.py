"""How sure an exit is of itself, over all photos."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.calibration.certificate import Certificate, plain_part
from earlyexit_ssd.data import canonical
from earlyexit_ssd.errors import DataError, EarlyExitError, nearest
from earlyexit_ssd.evaluation.cost import (
    EAGER,
    ONNX_RUNTIME,
    OnnxNetwork,
    PlainPath,
    Timing,
    count_mmacs,
    example_input,
    mmacs_to_exit,
    time_in_runtime,
)
from earlyexit_ssd.evaluation.matches import (
    Detections,
    as_ground_truth,
    bootstrap_choices,
    coco_evaluation,
    empty_images,
    interval,
    losses_against_full,
    losses_against_labels,
    matches_of,
    operating_point,
    summarize,
)
from earlyexit_ssd.evaluation.outputs import (
    Batches,
    Collected,
    choose_exits,
    collect,
    collect_detections,
    exit_share,
    mean_cost,
    routed_detections,
)
from earlyexit_ssd.evaluation.verdict import judge
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfidenceSummary:
    """Mean, standard deviation (population) and range of an exit's confidence, all in [0, 1]."""

    mean: float
    std: float
    min: float
    max: float


def summarize_confidence(confidence: Tensor) -> ConfidenceSummary | None:
    """Summary of the confidences [n] of n photos; None where there is none: no photo, or below 0, since the router's
    policy has nothing to look at there (an exit without a branch)."""
    values = confidence[confidence >= 0].double()
    if values.numel() == 0:
        return None
    return ConfidenceSummary(
        mean=values.mean().item(),
        std=values.std(unbiased=False).item(),
        min=values.min().item(),
        max=values.max().item(),
    )


# How well a set of detections does: every figure of quality, and how to measure.


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


# Static detectors that a routed one is held against: what one would ship instead.

PLAIN, CUT_HEAD, SINGLE_EXIT, ONNX = "plain", "cut_head", "single_exit", "onnx"
"""Kinds: the detector without exits at another size, the same with a head of the wanted classes alone, one exit shipped
alone, a foreign detector from a file."""


@dataclass(frozen=True)
class Rival:
    """A detector that has no choice.

    name: in tables.
    kind: `PLAIN`, `CUT_HEAD`, `SINGLE_EXIT` or `ONNX`.
    network: what is timed, on ``example`` [1, 3, height, width].
    mmacs: millions of multiply-accumulates; None where they cannot be counted.
    found: its detections, or a module of torchvision's interface that finds them; labels are the evaluated ones.
    source: the file it comes from; None where it is the evaluated model's.
    """

    name: str
    kind: str
    network: nn.Module
    example: Tensor
    mmacs: float | None
    found: nn.Module | Detections
    source: str | None = None

    def runtime(self, default: str) -> str:
        """What it is timed in, ``default`` for everything that is not a graph from a file."""
        return ONNX_RUNTIME if isinstance(self.network, OnnxNetwork) else default


def exits_alone(model: nn.Module, collected: Collected) -> list[Rival]:
    """Every exit of an `EarlyExitSSDLite` that has a branch, as a detector of its own: a branch has nothing of the
    others in it, so its detections are the same without them."""
    rivals, example = [], example_input(model)
    for index, name in enumerate(model.exit_names[:-1]):
        if not model.empty[index]:
            network = PathToExit(model, index, alone=True)
            mmacs = count_mmacs(network, example)
            rivals.append(Rival(f"{name} alone", SINGLE_EXIT, network, example, mmacs, collected.detections[index]))
    return rivals


def evaluate_rivals(
    rivals: Sequence[Rival],
    timings: Sequence[Timing],
    loader: Batches,
    ground_truth: COCO,
    routed: Quality,
    settings: EvaluationSettings,
) -> list[dict[str, Any]]:
    """The rows of metrics.json, in the order of ``rivals``.

    Args:
        rivals: the detectors.
        timings: of their networks, measured in turns with the exits.
        loader, ground_truth: the photos that the exits were evaluated on.
        routed: of the routed detector.
        settings: the same as for the exits.
    """
    rows = []
    for rival, timing in zip(rivals, timings, strict=True):
        found = collect_detections(rival.found, loader) if isinstance(rival.found, nn.Module) else rival.found
        quality = evaluate_detections(ground_truth, found, settings)
        rows.append(
            {
                "name": rival.name,
                "kind": rival.kind,
                "source": Path(rival.source).name if rival.source else None,
                "input_size": list(rival.example.shape[-2:]),
                **quality.figures,
                "routed_minus_rival_AP50_interval": routed.ap50_minus(quality),
                "mmacs": rival.mmacs,
                "ms": timing.ms,
                "ms_interval": [timing.low, timing.high],
                "runtime": rival.runtime(settings.runtime),
            }
        )
    return rows


# Another detector's classes as those that are evaluated.


class WantedClasses(nn.Module):
    """A detector whose labels are those of ``wanted``; what it finds of other classes is dropped.

    Args:
        detector: list of photos to one dict each, with ``boxes`` [n, 4], ``scores`` [n] and ``labels`` [n] in 1..K.
        source: its K names.
        wanted: names of the labels 1.. that are evaluated; names are compared as data sets' are (VOC's, COCO's).
        name: of the detector, for messages.

    Raises:
        EarlyExitError: the detector knows none of the wanted classes.
    """

    def __init__(self, detector: nn.Module, source: Sequence[str], wanted: Sequence[str], name: str) -> None:
        super().__init__()
        labels = {canonical(one): label for label, one in enumerate(wanted, start=1)}
        lookup = [0, *(labels.get(canonical(one), 0) for one in source)]
        absent = [one for label, one in enumerate(wanted, start=1) if label not in lookup]
        if len(absent) == len(wanted):
            raise EarlyExitError(f"{name}: knows none of {', '.join(wanted)}{nearest(wanted[0], source)}")
        if absent:
            logger.warning("%s knows no %s: its AP there is 0", name, ", ".join(absent))
        self.detector = detector
        self.register_buffer("lookup", torch.tensor(lookup))

    def forward(self, photos: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of the wanted classes, labelled 1.. in their order."""
        return [self._translate(found) for found in self.detector(photos)]

    def _translate(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = self.lookup[found["labels"]]
        keep = labels > 0
        return {"boxes": found["boxes"][keep], "scores": found["scores"][keep], "labels": labels[keep]}


# Every figure of a detector with exits, as the dict that metrics.json holds (keys: docs/metrics.md).


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
    target = certificate.target
    asked = target.epsilon if target.value is None else target.value
    draws = np.random.default_rng(settings.seed).integers(len(chosen), size=(settings.resamples, len(chosen)))
    if target.kind == "ap_drop":
        full, routed = full_and_routed
        before, after = full.figures["AP50"], routed.figures["AP50"]
        measured = None if before is None or after is None else before - after
        interval = full.ap50_minus(routed)
    elif target.kind == "risk":
        measure = losses_against_labels if target.reference == "labels" else losses_against_full
        exits = [routed_detections(collected, chosen), collected.detections[-1]]
        losses = measure(ground_truth, exits, target.score, target.iou)[:, 0]
        measured, interval = float(losses.mean()), listed_interval(losses[draws].mean(axis=1))
    else:
        in_ms = certificate.cost_model.unit == "ms"
        of_exits = [timing.ms for timing in costs.timings] if in_ms else costs.mmacs
        plain = costs.plain_timing.ms if in_ms else costs.plain_mmacs
        of_photos = np.array(of_exits)[chosen.numpy()]
        measured, interval = float(plain / of_photos.mean()), listed_interval(plain / of_photos[draws].mean(axis=1))
    tiny = 1e-9  # what was asked for may be met exactly
    kept = None
    if measured is not None:
        kept = measured >= asked - tiny if target.kind == "speedup" else measured <= asked + tiny
    return {"target": plain_part(target), "measured": measured, "interval": interval, "kept": kept}


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

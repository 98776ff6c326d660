"""Evaluate a detector with exits: every exit, the routed detector, and the rivals that one would ship instead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.calibration.certificate import Certificate, plain_part
from earlyexit_ssd.data import canonical
from earlyexit_ssd.errors import DataError, EarlyExitError, nearest
from earlyexit_ssd.evaluation.cost import (
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
    SIZES,
    Detections,
    ExitMatches,
    PhotoCounts,
    as_ground_truth,
    exit_matches,
    interval,
    losses_against_full,
    photo_counts,
)
from earlyexit_ssd.evaluation.metrics import DetectorEvaluation, EvaluationSettings
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
from earlyexit_ssd.evaluation.results import (
    BoxSummary,
    CertificateResult,
    ConfidenceSummary,
    Context,
    CostResult,
    ExitResult,
    Results,
    RivalResult,
    RoutedResult,
    Target,
)
from earlyexit_ssd.evaluation.verdict import asked_value, judge
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


def evaluate_detections(
    ground_truth: COCO, detections: Detections, settings: EvaluationSettings, labelled: bool = True
) -> DetectorEvaluation:
    """One detector's detections against the objects; its ``figures`` are computed when they are read."""
    matches = exit_matches(ground_truth, [detections], settings.iou, tuple(SIZES))
    return DetectorEvaluation(matches, settings, labelled)


def summarize_confidence(confidence: Tensor) -> ConfidenceSummary | None:
    """Summary of the confidences [n] of n photos; None where there is none: no photo, or below 0, since the router's
    policy has nothing to look at there (an exit without a branch)."""
    values = confidence[confidence >= 0].double()
    if values.numel() == 0:
        return None
    return ConfidenceSummary(
        values.mean().item(), values.std(unbiased=False).item(), values.min().item(), values.max().item()
    )


def describe_boxes(ground_truth: COCO, detections: Detections) -> BoxSummary:
    """What all boxes of a detector have in common, whatever there is to find."""
    scores = np.concatenate([np.zeros(0), *(found["scores"].numpy() for found in detections.values())])
    outside = [np.zeros(0, dtype=bool)]
    for image_id, found in detections.items():
        image, boxes = ground_truth.imgs.get(image_id, {}), found["boxes"].double().numpy()
        size = np.array([image.get("width", np.inf), image.get("height", np.inf)])
        inside = np.prod(np.maximum(np.minimum(boxes[:, 2:], size) - np.maximum(boxes[:, :2], 0), 0), axis=1)
        area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
        outside.append(~((inside > 0) & (inside >= area / 2)))  # NaN is outside
    if not scores.size:
        return BoxSummary(0, None, None, None)
    return BoxSummary(
        int(scores.size), float(scores.mean()), float(scores.std()), float(np.concatenate(outside).mean())
    )


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
    detector: a module with torchvision's interface, or the detections that it has found; labels are the evaluated ones.
    source: the file it comes from; None where it is the evaluated model's.
    """

    name: str
    kind: str
    network: nn.Module
    example: Tensor
    mmacs: float | None
    detector: nn.Module | Detections
    source: str | None = None

    def found(self, loader: Batches) -> Detections:
        """What it finds on the photos of ``loader``, or has found already."""
        return collect_detections(self.detector, loader) if isinstance(self.detector, nn.Module) else self.detector

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
    routed: DetectorEvaluation,
) -> tuple[RivalResult, ...]:
    """Results in the order of ``rivals``.

    Args:
        timings: of their networks, measured in turns with the exits.
        loader, ground_truth: the photos that the exits were evaluated on.
        routed: the routed detector, for differences on the same draws of photos.
    """
    settings, results = routed.settings, []
    for rival, timing in zip(rivals, timings, strict=True):
        evaluation = evaluate_detections(ground_truth, rival.found(loader), settings)
        results.append(
            RivalResult(
                name=rival.name,
                kind=rival.kind,
                source=Path(rival.source).name if rival.source else None,
                input_size=list(rival.example.shape[-2:]),
                figures=evaluation.figures,
                routed_minus_rival_AP50_interval=routed.ap50_minus(evaluation),
                mmacs=rival.mmacs,
                ms=timing.ms,
                ms_interval=[timing.low, timing.high],
                runtime=rival.runtime(settings.runtime),
            )
        )
    return tuple(results)


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


# All figures of a detector with exits.


@dataclass(frozen=True)
class Costs:
    """MMACs and timing to each exit, shallow to deep, and of the detector without exits; timing of the rivals."""

    mmacs: list[float]
    timings: list[Timing]
    plain: CostResult
    rival_timings: list[Timing]

    def routed(self, chosen: Tensor, unit: str) -> np.ndarray:
        """Cost of every photo by the exit that it takes (``chosen`` [n]), in ``ms`` or ``mmacs``."""
        of_exits = [timing.ms for timing in self.timings] if unit == "ms" else self.mmacs
        return np.array(of_exits)[chosen.numpy()]


@dataclass(frozen=True)
class Evaluation:
    """The results, and what photos.csv is made of.

    counts: of the photos at every exit, at the score and IoU of the settings. chosen: the exit of every photo [n], in
    the order of the collected ones.
    """

    results: Results
    counts: PhotoCounts
    chosen: Tensor


def evaluate_exits(
    model: nn.Module,
    loader: Batches,
    ground_truth: COCO,
    router: ExitRouter,
    settings: EvaluationSettings,
    context: Context | None = None,
    collected: Collected | None = None,
    rivals: Sequence[Rival] = (),
    certificate: Certificate | None = None,
) -> Evaluation:
    """Evaluate every exit and the routed detector; the network runs once per photo.

    Args:
        model: an `EarlyExitSSDLite` on the device to measure.
        loader: batches of the photos without augmentation; read once, unless ``collected`` is given, and once for
            each rival that has to find its detections.
        ground_truth: the same photos' objects (`earlyexit_ssd.data.to_coco`).
        settings: thresholds, timing and bootstrap.
        context: what the caller knows: ``splits``, ``forced``, ``taken_over`` and ``weights_sha256``, which the verdict
            and the record need, and ``labelled``. Where nobody labelled the photos, what the full path finds at the
            score is what is there; all figures are agreement with it, and AP is None.
        collected: what `collect` returned for these photos, when the caller has it already.
        rivals: static detectors to hold the routed one against.
        certificate: that the router comes from; what it was asked for is checked on these photos.
    """
    context, collected = context or Context(), collected or collect(model, loader, router)
    _check_same_images(collected, ground_truth)
    costs = measure_costs(model, settings, router, rivals)
    if not context.labelled:
        ground_truth = as_ground_truth(ground_truth, collected.detections[-1], settings.score)
    matches = exit_matches(ground_truth, collected.detections, settings.iou, tuple(SIZES))
    chosen = choose_exits(collected.confidences, router.thresholds.tolist())
    choices = [*(np.full(matches.photos, index) for index in range(matches.exits)), _by_image(collected, chosen)]
    *exits, routed = (DetectorEvaluation(matches.choose(choice), settings, context.labelled) for choice in choices)
    *early, full = (_exit_result(model, index, collected, costs, exits) for index in range(len(exits)))
    results = Results(
        context=_context(context, model, matches, settings),
        exits=(*early, replace(full, found=describe_boxes(ground_truth, collected.detections[-1]))),
        without_exits=costs.plain,
        routed=_routed_result(model, router, routed, chosen, costs),
        rivals=evaluate_rivals(rivals, costs.rival_timings, loader, ground_truth, routed),
    )
    if certificate is not None:
        kept = check_promise(certificate, ground_truth, collected, chosen, matches, (exits[-1], routed), costs)
        results = replace(results, certificate=kept)
    results = replace(results, verdict=judge(results))
    return Evaluation(results, photo_counts(matches, settings.score), chosen)


def _context(context: Context, model: nn.Module, matches: ExitMatches, settings: EvaluationSettings) -> Context:
    device = next(model.parameters()).device
    return replace(
        context,
        images=matches.photos,
        empty_images=int((matches.objects == 0).sum()),
        classes=list(model.classes),
        score=settings.score,
        iou=settings.iou,
        runs=settings.timing_runs,
        threads=settings.timing_threads,
        resamples=settings.resamples,
        seed=settings.seed,
        runtime=settings.runtime,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
    )


def check_promise(
    certificate: Certificate,
    ground_truth: COCO,
    collected: Collected,
    chosen: Tensor,
    matches: ExitMatches,
    full_and_routed: tuple[DetectorEvaluation, DetectorEvaluation],
    costs: Costs,
) -> CertificateResult:
    """What a certificate was asked for, against what these photos say."""
    target, settings = plain_part(certificate.target), full_and_routed[0].settings
    asked = asked_value(target)
    draws = np.random.default_rng(settings.seed).integers(len(chosen), size=(settings.resamples, len(chosen)))
    if target["kind"] == "ap_drop":
        full, routed = full_and_routed
        before, after = full.figures["AP50"], routed.figures["AP50"]
        measured = None if before is None or after is None else before - after
        bounds = full.ap50_minus(routed)
    elif target["kind"] == "risk":
        losses = _losses(target, ground_truth, collected, chosen, matches)
        measured, bounds = float(losses.mean()), interval(losses[draws].mean(axis=1))
    else:
        unit = "ms" if certificate.cost_model.unit == "ms" else "mmacs"
        plain, of_photos = getattr(costs.plain, unit), costs.routed(chosen, unit)
        measured, bounds = float(plain / of_photos.mean()), interval(plain / of_photos[draws].mean(axis=1))
    tiny = 1e-9  # what was asked for may be met exactly
    kept = None
    if measured is not None:
        kept = measured >= asked - tiny if target["kind"] == "speedup" else measured <= asked + tiny
    return CertificateResult(target, measured, bounds, kept)


def _losses(
    target: Target, ground_truth: COCO, collected: Collected, chosen: Tensor, matches: ExitMatches
) -> np.ndarray:
    """Loss of every routed photo [n], by rising image id, as the target of a risk counts it."""
    score, iou = target["score"], target["iou"]
    if target["reference"] != "labels":
        exits = [routed_detections(collected, chosen), collected.detections[-1]]
        return losses_against_full(ground_truth, exits, score, iou)[:, 0]
    if matches.conditions[-1][1] != iou:
        matches = exit_matches(ground_truth, collected.detections, iou, ())
    losses = photo_counts(matches, score).losses_against_labels()
    return losses[np.arange(len(losses)), _by_image(collected, chosen)]


def _by_image(collected: Collected, chosen: Tensor) -> np.ndarray:
    """The exits that the photos take, by rising image id."""
    return chosen.numpy()[np.argsort(collected.image_ids, kind="stable")]


def measure_costs(
    model: nn.Module, settings: EvaluationSettings, router: ExitRouter | None = None, rivals: Sequence[Rival] = ()
) -> Costs:
    """MMACs and milliseconds of one image; exits, scoring by ``router`` included, plain detector and rivals are timed
    in turns, in the runtime of ``settings``."""
    example, plain = example_input(model), PlainPath(model)
    paths = [AllOutputs(PathToExit(model, index, router)) for index in range(len(model.exit_names))]
    networks = [*paths, plain, *(rival.network for rival in rivals)]
    examples = [*[example] * (len(paths) + 1), *(rival.example for rival in rivals)]
    timings = time_in_runtime(networks, examples, settings.runtime, settings.timing_runs, settings.timing_threads)
    own = timings[len(paths)]
    without_exits = CostResult(count_mmacs(plain, example), own.ms, [own.low, own.high])
    return Costs(mmacs_to_exit(model, router), timings[: len(paths)], without_exits, timings[len(paths) + 1 :])


def _check_same_images(collected: Collected, ground_truth: COCO) -> None:
    missing = sorted(set(ground_truth.imgs) - set(collected.image_ids))
    if missing:
        raise DataError(
            f"image {missing[0]} ({len(missing)} in all) is in the ground truth but was not evaluated;"
            " make both from the same data set"
        )


def _exit_result(
    model: nn.Module, index: int, collected: Collected, costs: Costs, exits: Sequence[DetectorEvaluation]
) -> ExitResult:
    early, timing = index < len(exits) - 1, costs.timings[index]
    return ExitResult(
        name=model.exit_names[index],
        layer=model.exit_layers[index],
        figures=exits[index].figures,
        empty=model.empty[index] if early else None,
        AP50_below_full_interval=exits[-1].ap50_minus(exits[index]) if early else None,
        confidence=summarize_confidence(collected.confidences[index]),
        mmacs=costs.mmacs[index],
        ms=timing.ms,
        ms_interval=[timing.low, timing.high],
    )


def _routed_result(
    model: nn.Module, router: ExitRouter, evaluation: DetectorEvaluation, chosen: Tensor, costs: Costs
) -> RoutedResult:
    milliseconds = mean_cost(chosen, [timing.ms for timing in costs.timings])
    return RoutedResult(
        policy=str(router.policy),
        thresholds=router.thresholds.tolist(),
        hybrid=bool(router.hybrid),
        figures=evaluation.figures,
        exit_share=exit_share(chosen, model.exit_names),
        mmacs=mean_cost(chosen, costs.mmacs),
        ms=milliseconds,
        speedup=costs.plain.ms / milliseconds if milliseconds else None,
    )

"""Evaluate a detector with exits: every exit, the routed detector, and rivals that could be shipped instead of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchvision.ops import box_area, clip_boxes_to_image

from earlyexit_ssd.calibration.certificate import Certificate, plain_part
from earlyexit_ssd.data import canonical
from earlyexit_ssd.errors import DataError, EarlyExitError, suggest
from earlyexit_ssd.evaluation.cost import ONNX_RUNTIME, PlainPath, Timing, count_mmacs, example_input, time_in_runtime
from earlyexit_ssd.evaluation.matches import (
    SIZES,
    DetectionsById,
    ExitMatches,
    PhotoCounts,
    as_ground_truth,
    exit_matches,
    interval,
    losses_against_full,
    photo_counts,
)
from earlyexit_ssd.evaluation.metrics import DetectorEvaluation, EvaluationSettings
from earlyexit_ssd.evaluation.outputs import Batches, Collected, choose_exits, collect_detections, exit_share
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
)
from earlyexit_ssd.evaluation.verdict import judge, target_value
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


def evaluate_detections(
    ground_truth: COCO, detections: DetectionsById, settings: EvaluationSettings, blocks: np.ndarray | None = None
) -> DetectorEvaluation:
    """Match detections with the objects of ``ground_truth``."""
    matches = exit_matches(ground_truth, [detections], settings.iou, tuple(SIZES))
    return DetectorEvaluation(matches, settings, blocks=blocks)


def summarize_confidence(confidence: Tensor) -> ConfidenceSummary | None:
    """Summarize the confidences [n] of one exit. Negative values are ignored: `ExitRouter` gives -1 at an empty exit if
    the policy reads logits only. None if all are negative."""
    values = confidence[confidence >= 0].double().numpy()
    if not values.size:
        return None
    return ConfidenceSummary(*map(float, (values.mean(), values.std(), values.min(), values.max())))


def describe_boxes(ground_truth: COCO, detections: DetectionsById) -> BoxSummary:
    """Describe all detected boxes. ``ground_truth`` gives the images' sizes; its objects are not used."""
    scores = np.concatenate([np.zeros(0), *(of_image["scores"].numpy() for of_image in detections.values())])
    if not scores.size:
        return BoxSummary(0, None, None, None)
    outside = []
    for image_id, of_image in detections.items():
        image, boxes = ground_truth.imgs[image_id], of_image["boxes"].double()
        inside, area = box_area(clip_boxes_to_image(boxes, (image["height"], image["width"]))), box_area(boxes)
        outside.append(~((inside > 0) & (inside >= area / 2)))  # written so that NaN counts as outside
    share = float(torch.cat(outside).double().mean())
    return BoxSummary(int(scores.size), float(scores.mean()), float(scores.std()), share)


Kind = Literal["plain", "cut_head", "single_exit", "onnx"]
"""Kinds of rivals, see docs/metrics.md."""


@dataclass(frozen=True)
class Rival:
    """A detector that could be shipped instead of the routed one."""

    name: str
    kind: Kind
    network: nn.Module  # the module that is timed
    example: Tensor  # its input [1, 3, height, width]
    mmacs: float | None  # millions of multiply-accumulates; None if they cannot be counted
    detector: nn.Module | DetectionsById  # a detector with torchvision's interface, or its detections on the photos
    source: str | None = None  # path of its file; None if it is part of the evaluated model

    def detections(self, loader: Batches) -> DetectionsById:
        """Run the detector on the photos of ``loader``, unless ``detector`` holds its detections already."""
        return collect_detections(self.detector, loader) if isinstance(self.detector, nn.Module) else self.detector


def exits_alone(model: nn.Module, collected: Collected) -> list[Rival]:
    """Return each early exit of an `EarlyExitSSDLite` as a rival, except exits without a branch.

    An exit alone has the same detections as in the whole model, so they are taken from ``collected``.
    """
    rivals, example = [], example_input(model)
    for index, name in enumerate(model.exit_names[:-1]):
        if not model.empty[index]:
            network = PathToExit(model, index, alone=True)
            mmacs = count_mmacs(network, example)
            rivals.append(Rival(f"{name} alone", "single_exit", network, example, mmacs, collected.detections[index]))
    return rivals


def evaluate_rivals(
    rivals: Sequence[Rival], timings: Sequence[Timing], ground_truth: COCO, routed: DetectorEvaluation
) -> tuple[RivalResult, ...]:
    """Evaluate the rivals, whose ``detector`` must hold detections, and compare them with ``routed``."""
    settings, results = routed.settings, []
    for rival, timing in zip(rivals, timings, strict=True):
        evaluation = evaluate_detections(ground_truth, rival.detector, settings, routed.blocks)
        results.append(
            RivalResult(
                name=rival.name,
                kind=rival.kind,
                source=Path(rival.source).name if rival.source else None,
                input_size=list(rival.example.shape[-2:]),
                figures=evaluation.figures,
                routed_minus_rival_AP50_interval=routed.ap50_minus(evaluation),
                mmacs=rival.mmacs,
                **vars(timing),
                runtime=ONNX_RUNTIME if rival.kind == "onnx" else settings.runtime,
            )
        )
    return tuple(results)


class WantedClasses(nn.Module):
    """Wrap a detector with torchvision's interface so that it returns only the classes ``wanted``, labelled 1, 2, ...

    ``source`` are the names of the detector's labels 1..K. VOC's and COCO's names of the same class match. Without any
    wanted class, an EarlyExitError with the ``name`` of the detector is raised.
    """

    def __init__(self, detector: nn.Module, source: Sequence[str], wanted: Sequence[str], name: str) -> None:
        super().__init__()
        label_of = {canonical(class_name): label for label, class_name in enumerate(wanted, start=1)}
        lookup = [0, *(label_of.get(canonical(class_name), 0) for class_name in source)]
        missing = [class_name for label, class_name in enumerate(wanted, start=1) if label not in lookup]
        if len(missing) == len(wanted):
            raise EarlyExitError(f"{name}: has none of the classes {', '.join(wanted)}{suggest(wanted[0], source)}")
        if missing:
            logger.warning("%s has no class %s: its AP for this class is 0", name, ", ".join(missing))
        self.detector = detector
        self.register_buffer("lookup", torch.tensor(lookup))

    def forward(self, photos: list[Tensor]) -> list[dict[str, Tensor]]:
        results = []
        for detections in self.detector(photos):
            renumbered = {**detections, "labels": self.lookup[detections["labels"]]}
            keep = renumbered["labels"] > 0
            results.append({key: renumbered[key][keep] for key in ("boxes", "scores", "labels")})
        return results


@dataclass(frozen=True)
class Costs:
    """Cost of one image up to each exit (shallow to deep), without exits (``plain``), and in each rival."""

    exits: list[CostResult]
    plain: CostResult
    rivals: list[Timing]

    def of_photos(self, choice: np.ndarray, unit: str) -> np.ndarray:
        """Return the cost of each photo, float64 [n], in ``ms`` or ``mmacs``. Photo i leaves at exit ``choice[i]``."""
        return np.array([getattr(cost, unit) for cost in self.exits], np.float64)[choice]


@dataclass(frozen=True)
class Evaluation:
    """The results, and the parts from which the report page is made."""

    results: Results
    ground_truth: COCO  # if the photos have no labels, its objects are the full path's detections
    matches: ExitMatches  # of every exit with ``ground_truth``
    counts: PhotoCounts  # per photo and exit, at the settings' score and IoU
    chosen: Tensor  # the exit that each photo takes, int [n], in the order of the collected photos


def evaluate_exits(
    model: nn.Module,
    collected: Collected,
    ground_truth: COCO,
    router: ExitRouter,
    settings: EvaluationSettings,
    context: Context,
    rivals: Sequence[Rival] = (),
    certificate: Certificate | None = None,
    blocks: np.ndarray | None = None,
) -> Evaluation:
    """Evaluate every exit and the routed detector.

    Args:
        model: an `EarlyExitSSDLite` on the device to measure.
        ground_truth: the objects of the photos in ``collected`` (`earlyexit_ssd.data.to_coco`).
        context: ``splits``, ``forced``, ``taken_over``, ``untrained``, ``weights_sha256`` and ``labelled``. The others
            are filled in. If ``labelled`` is False, the full path's detections at the settings' score replace the
            objects, so all figures measure the agreement with the full path, and AP is None.
        rivals: each ``detector`` must hold detections.
        certificate: the router's certificate. Its target is checked on these photos.
        blocks: number of the block of each photo by image id, int [n]. The bootstrap draws blocks. None: photos. With
            a single block all bootstrap intervals are None.

    Raises:
        DataError: ``collected`` lacks a photo of ``ground_truth``.
    """
    missing = sorted(set(ground_truth.imgs) - set(collected.image_ids))
    if missing:
        problem = f"image {missing[0]} ({len(missing)} in all) is in the ground truth but was not evaluated"
        raise DataError(f"{problem}; make both from the same data set")
    costs = measure_costs(model, settings, router, rivals)
    if blocks is not None and not blocks.any():  # every draw would be the same photos
        logger.warning("all photos are in one block, so there are no intervals; evaluate on photos of more blocks")
        settings = replace(settings, resamples=0)
    if not context.labelled:
        ground_truth = as_ground_truth(ground_truth, collected.detections[-1], settings.score)
    matches = exit_matches(ground_truth, collected.detections, settings.iou, tuple(SIZES))
    chosen = choose_exits(collected.confidences, router.thresholds.tolist())
    by_image = chosen.numpy()[np.argsort(collected.image_ids, kind="stable")]
    choices = [*(np.full(matches.photos, index) for index in range(matches.exits)), by_image]
    *exits, routed = (
        DetectorEvaluation(matches.choose(choice), settings, context.labelled, blocks) for choice in choices
    )
    *early, full = (
        ExitResult(
            name=model.exit_names[index],
            layer=model.exit_layers[index],
            figures=evaluation.figures,
            empty=empty,
            AP50_below_full_interval=None if empty is None else exits[-1].ap50_minus(evaluation),
            confidence=summarize_confidence(collected.confidences[index]),
            **vars(costs.exits[index]),
        )
        for index, (evaluation, empty) in enumerate(zip(exits, (*model.empty, None), strict=True))
    )
    device = next(model.parameters()).device
    context = replace(
        context,
        **vars(settings),
        images=matches.photos,
        empty_images=int((matches.objects == 0).sum()),
        classes=list(model.classes),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
    )
    results = Results(
        context=context,
        exits=(*early, replace(full, found=describe_boxes(ground_truth, collected.detections[-1]))),
        without_exits=costs.plain,
        routed=_routed_result(model, router, routed, choices[-1], costs),
        rivals=evaluate_rivals(rivals, costs.rivals, ground_truth, routed),
    )
    counts = photo_counts(matches, settings.score)
    if certificate is not None:
        comparison = compare_certificate(
            certificate, ground_truth, collected, choices[-1], counts, exits[-1], routed, costs
        )
        results = replace(results, certificate=comparison)
    results = replace(results, verdict=judge(results))
    return Evaluation(results, ground_truth, matches, counts, chosen)


def compare_certificate(
    certificate: Certificate,
    ground_truth: COCO,
    collected: Collected,
    choice: np.ndarray,
    counts: PhotoCounts,
    full: DetectorEvaluation,
    routed: DetectorEvaluation,
    costs: Costs,
) -> CertificateResult:
    """Compare a certificate's target with the value measured on these photos.

    ``choice`` is the exit of each photo by image id, int [n]. For a target that limits a risk against the labels,
    ``counts`` must have the score and IoU of the target.
    """
    target, unit = plain_part(certificate.target), None
    limit = target_value(target)
    if target["kind"] == "ap_drop":
        before, after = full.figures["AP50"], routed.figures["AP50"]
        measured = None if before is None or after is None else before - after
        bounds = full.ap50_minus(routed)
    elif target["kind"] == "risk":
        if target["reference"] == "labels":
            losses = counts.losses_against_labels()
        else:
            losses = losses_against_full(ground_truth, collected.detections, target["score"], target["iou"])
        losses = losses[np.arange(len(losses)), choice]
        measured, bounds = float(losses.mean()), interval(routed.mean_draws(losses))
    else:
        unit = "ms" if certificate.cost_model.unit == "ms" else "mmacs"
        plain, of_photos = getattr(costs.plain, unit), costs.of_photos(choice, unit)
        measured, bounds = float(plain / of_photos.mean()), interval(plain / routed.mean_draws(of_photos))
    kept = None
    if measured is not None:
        excess = limit - measured if target["kind"] == "speedup" else measured - limit
        kept = excess <= 1e-9  # a target that is met exactly may have a rounding error
    return CertificateResult(target, measured, bounds, kept, unit)


def measure_costs(model: nn.Module, settings: EvaluationSettings, router: ExitRouter, rivals: Sequence[Rival]) -> Costs:
    """Measure the cost of one image up to each exit (with the router's confidences), in the detector without exits, and
    in the rivals. All are timed in turns. The MMACs of the rivals are in `Rival`."""
    example, exits = example_input(model), range(len(model.exit_names))
    paths = [*(AllOutputs(model, index, router) for index in exits), PlainPath(model)]
    mmacs = [count_mmacs(path, example) for path in paths]
    networks = [*paths, *(rival.network for rival in rivals)]
    examples = [*[example] * len(paths), *(rival.example for rival in rivals)]
    timings = time_in_runtime(networks, examples, settings.runtime, settings.runs, settings.threads)
    *exits, without = (CostResult(count, **vars(timing)) for count, timing in zip(mmacs, timings, strict=False))
    return Costs(exits, without, timings[len(mmacs) :])


def _routed_result(
    model: nn.Module, router: ExitRouter, evaluation: DetectorEvaluation, choice: np.ndarray, costs: Costs
) -> RoutedResult:
    ms = mmacs = bounds = None
    if len(choice):
        of_photos, mmacs = costs.of_photos(choice, "ms"), float(costs.of_photos(choice, "mmacs").mean())
        ms, bounds = float(of_photos.mean()), interval(costs.plain.ms / evaluation.mean_draws(of_photos))
    return RoutedResult(
        policy=str(router.policy),
        thresholds=router.thresholds.tolist(),
        hybrid=bool(router.hybrid),
        figures=evaluation.figures,
        exit_share=exit_share(choice, model.exit_names),
        mmacs=mmacs,
        ms=ms,
        speedup=costs.plain.ms / ms if ms else None,
        speedup_interval=bounds,
    )

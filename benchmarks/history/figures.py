"""Figures of an attempt: those of the history, and AP50, scores, boxes and findings of the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.history.attempts import EXITS, Attempt
from benchmarks.history.features import BATCH, Features
from benchmarks.history.training import CurvePoint, HeadLosses, Predictions, predict
from earlyexit_ssd.doctor.findings import diagnose
from earlyexit_ssd.doctor.model import MODEL_CHECKS, ExitOutput, ModelEvidence, area_under_curve
from earlyexit_ssd.evaluation.matches import ExitMatches, ap_of_choice, bootstrap_choices, exit_matches, interval
from earlyexit_ssd.evaluation.outputs import choose_exits, exit_share
from earlyexit_ssd.modeling.outputs import ExitOutputs
from earlyexit_ssd.modeling.trunk import evaluating

RULE = 0.6
"""The history's threshold for its confidence, the mean foreground probability."""
COINS = 20
"""Number of random choices of the photos that leave."""


@dataclass(frozen=True)
class ExitFigures:
    """Figures of one exit on the test photos."""

    AP50: float
    AP50_interval: list[float]  # 95 %, bootstrap over the photos
    scores: list[float]  # 5th, 50th and 95th percentile of the foreground probability over all default boxes
    score_auc: float  # probability that a box that overlaps an object has a larger score than a box that does not
    large_deltas: float  # share of the box deltas outside [-5, 5]
    overlap: float  # IoU of the box with the largest score and its nearest object, mean over the photos with objects


@dataclass(frozen=True)
class ForegroundRule:
    """The mean foreground at temperature 1, without a gate, as the confidence of an early exit.

    ``highest``, ``lowest`` and ``coin`` are AP50 if half of the photos leave here and the others take the full path.
    """

    share: float  # of the photos with a mean foreground of at least `RULE`
    largest: float  # mean foreground of any photo
    highest: float  # the photos with the highest mean foreground leave
    lowest: float  # the photos with the lowest mean foreground leave
    coin: float  # random photos leave, mean of `COINS` choices


@dataclass(frozen=True)
class AttemptFigures:
    """Figures of the routing of one attempt on the test photos. Lists have a value per exit."""

    attempt: str
    shares: list[float]  # of the photos
    confidences: list[float]  # mean over the photos
    ungated: list[float]  # the same without the gate
    temperatures: list[float]
    thresholds: list[float]  # of the early exits
    routed_AP50: float
    curve: list[CurvePoint]  # a point per epoch of the training
    findings: list[str]  # of the doctor, in the order of its checks


@dataclass(frozen=True)
class Trial:
    """The result of one training."""

    detector: str
    matching: str
    seed: int
    photos: int  # of the test split
    exits: list[ExitFigures]  # exit 8, exit 12 and the full path
    rule: list[ForegroundRule]  # of the early exits
    attempts: list[AttemptFigures]  # those with routing learned in this training


def measure(losses: HeadLosses, features: Features, curves: Sequence[list[CurvePoint]], name: str, seed: int) -> Trial:
    """Return all figures of trained heads on the test photos. ``name`` is the name of the detector."""
    predictions = predict(losses, features)
    matches = exit_matches(features.truth, detect(losses, predictions))
    alone = [np.full(matches.photos, index) for index in range(len(EXITS))]
    draws = bootstrap_choices(matches, alone)
    foregrounds = [1 - head["cls_logits"].softmax(-1)[..., 0] for head in predictions.heads]
    exits = []
    for index, foreground in enumerate(foregrounds):
        deltas = predictions.heads[index]["bbox_regression"]
        exits.append(
            ExitFigures(
                AP50=ap50(matches, alone[index]),
                AP50_interval=interval(draws[index].AP50) or [0.0, 0.0],
                scores=np.quantile(foreground.numpy(), [0.05, 0.5, 0.95]).tolist(),
                score_auc=area_under_curve(foreground.flatten(), predictions.matched.foreground.flatten()),
                large_deltas=(deltas.abs() > 5).float().mean().item(),
                overlap=likeliest_overlap(losses, foreground, deltas, predictions.targets),
            )
        )
    rows = {int(target["image_id"]): row for row, target in enumerate(predictions.targets)}
    order = [rows[image_id] for image_id in matches.image_ids]  # the photos in the order of the matches
    rule = [foreground_rule(matches, foregrounds[index].mean(-1).numpy()[order], index) for index in range(2)]
    attempts = []
    for routing, curve in zip(losses.routings, curves, strict=True):
        ungated = routing.confidences(predictions.heads, 0)
        gated = routing.confidences(predictions.heads, routing.attempt.minimum)
        thresholds, temperatures = routing.thresholds.tolist(), routing.router.temperatures.tolist()
        chosen = choose_exits(gated, thresholds)
        shares = list(exit_share(chosen, EXITS).values())
        attempts.append(
            AttemptFigures(
                routing.attempt.name,
                shares,
                [confidence.mean().item() for confidence in gated],
                [confidence.mean().item() for confidence in ungated],
                temperatures,
                thresholds,
                ap50(matches, chosen.numpy()[order]),
                curve,
                findings(losses, predictions, routing.attempt, curve, shares, exits),
            )
        )
    return Trial(name, losses.matching, seed, matches.photos, exits, rule, attempts)


def detect(losses: HeadLosses, predictions: Predictions) -> list[dict[int, dict[str, Tensor]]]:
    """Return for each exit: image id -> detections, boxes in the photo's pixels."""
    model = losses.model
    ids = [int(target["image_id"]) for target in predictions.targets]
    sizes = [tuple(target["photo_size"].tolist()) for target in predictions.targets]
    width, height = model.transform.fixed_size
    of_exits: list[dict[int, dict[str, Tensor]]] = [{} for _ in predictions.heads]
    for start in range(0, len(ids), BATCH):
        part = slice(start, start + BATCH)
        heads = tuple({key: value[part] for key, value in head.items()} for head in predictions.heads)
        photos = len(ids[part])
        network = [(height, width)] * photos
        outputs = ExitOutputs(heads, (), [losses.anchors] * photos, network, sizes[part], model.empty)
        with evaluating(model):  # in training mode the boxes would stay in network pixels
            for index, detections in enumerate(of_exits):
                detections |= dict(zip(ids[part], model.detections(outputs, index), strict=True))
    return of_exits


def ap50(matches: ExitMatches, choice: np.ndarray) -> float:
    """Return AP50 if photo i takes exit ``choice[i]``; 0 without objects."""
    return ap_of_choice(matches, choice, ap50_only=True).AP50 or 0.0


def foreground_rule(matches: ExitMatches, confidence: np.ndarray, exit_index: int) -> ForegroundRule:
    """Return the figures of an early exit. ``confidence`` [n] is its mean foreground, in the order of the matches."""
    full = matches.exits - 1
    rank = confidence.argsort(kind="stable").argsort(kind="stable")
    generator, half = np.random.default_rng(0), matches.photos // 2

    def leaving(leave: np.ndarray) -> float:
        return ap50(matches, np.where(leave, exit_index, full))

    coins = [leaving(generator.permutation(matches.photos) < half) for _ in range(COINS)]
    return ForegroundRule(
        share=float((confidence >= RULE).mean()),
        largest=float(confidence.max()),
        highest=leaving(rank >= matches.photos - half),
        lowest=leaving(rank < half),
        coin=float(np.mean(coins)),
    )


def likeliest_overlap(
    losses: HeadLosses, foreground: Tensor, deltas: Tensor, targets: Sequence[dict[str, Tensor]]
) -> float:
    """Return `ExitFigures.overlap`. ``foreground`` is [n, A], and ``deltas`` are [n, A, 4]."""
    best = foreground.argmax(1)
    rows = torch.arange(len(best))
    boxes = losses.model.box_coder.decode_single(deltas[rows, best], losses.anchors[best])
    pairs = zip(boxes, targets, strict=True)
    values = [box_iou(box[None], target["boxes"]).max().item() for box, target in pairs if len(target["boxes"])]
    return float(np.mean(values))


def findings(
    losses: HeadLosses,
    predictions: Predictions,
    attempt: Attempt,
    curve: Sequence[CurvePoint],
    shares: Sequence[float],
    exits: Sequence[ExitFigures],
) -> list[str]:
    """Return the findings of the doctor, a line each."""
    gated, tempered = (curve if used else () for used in (attempt.minimum, attempt.temperatures != "fixed"))
    evidence = ModelEvidence(
        exits=[
            ExitOutput.of(name, head["cls_logits"], head["bbox_regression"])
            for name, head in zip(EXITS, predictions.heads, strict=True)
        ],
        default_boxes=losses.anchors,
        objects=[target["boxes"] for target in predictions.targets],
        shares=dict(zip(EXITS, shares, strict=True)),
        temperatures={name: [point.temperatures[index] for point in tempered] for index, name in enumerate(EXITS)},
        confidences={name: [point.confidences[index] for point in gated] for index, name in enumerate(EXITS)},
        ap50={name: figures.AP50 for name, figures in zip(EXITS, exits, strict=True)},
    )
    bad = diagnose(MODEL_CHECKS, evidence).bad
    return [f"{finding.check} ({finding.subject}): {finding.figure:.3g}" for finding in bad]

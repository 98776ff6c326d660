"""What the history measured of an attempt, and what it never looked at: AP50, scores, boxes, and the doctor."""

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
"""Random choices of the photos that leave."""


@dataclass(frozen=True)
class ExitFigures:
    """Figures of one exit on the test photos.

    Attributes:
        AP50, AP50_interval: with a 95 % bootstrap interval over the photos.
        scores: 5th, 50th and 95th percentile of the foreground probability over all default boxes.
        score_auc: probability that a default box that overlaps an object has a larger score than one that does not.
        large_deltas: share of the box deltas outside [-5, 5].
        overlap: mean IoU of the box with the largest score and its nearest object, over the photos with objects.
    """

    AP50: float
    AP50_interval: list[float]
    scores: list[float]
    score_auc: float
    large_deltas: float
    overlap: float


@dataclass(frozen=True)
class ForegroundRule:
    """What the mean foreground, at temperature 1 and without a gate, decides at an early exit.

    Attributes:
        share: of the photos with a mean foreground of at least `RULE`.
        largest: mean foreground of any photo.
        highest, lowest, coin: AP50 if half of the photos leave here and the others take the full path: those with the
            highest mean foreground, with the lowest, and chosen at random (mean of `COINS`).
    """

    share: float
    largest: float
    highest: float
    lowest: float
    coin: float


@dataclass(frozen=True)
class AttemptFigures:
    """Figures of the routing of one attempt on the test photos.

    Attributes:
        shares: of the photos, per exit.
        confidences, ungated: per exit the mean over the photos, with and without the gate.
        temperatures: per exit.
        thresholds: per early exit.
        routed_AP50: of the detector with this routing.
        curve: of the training.
        findings: what the doctor says, the checks in their order.
    """

    attempt: str
    shares: list[float]
    confidences: list[float]
    ungated: list[float]
    temperatures: list[float]
    thresholds: list[float]
    routed_AP50: float
    curve: list[CurvePoint]
    findings: list[str]


@dataclass(frozen=True)
class Trial:
    """The result of one training.

    Attributes:
        detector, matching, seed: what was trained.
        photos: of the test split.
        exits: figures of exit 8, exit 12 and the full path.
        rule: per early exit.
        attempts: whose routing was learned in this training.
    """

    detector: str
    matching: str
    seed: int
    photos: int
    exits: list[ExitFigures]
    rule: list[ForegroundRule]
    attempts: list[AttemptFigures]


def measure(losses: HeadLosses, features: Features, curves: Sequence[list[CurvePoint]], name: str, seed: int) -> Trial:
    """All figures of trained heads on the test photos; ``name`` is the detector's."""
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
    place = {int(target["image_id"]): row for row, target in enumerate(predictions.targets)}
    order = [place[image_id] for image_id in matches.image_ids]  # photos as the matches have them
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
                [one.mean().item() for one in gated],
                [one.mean().item() for one in ungated],
                temperatures,
                thresholds,
                ap50(matches, chosen.numpy()[order]),
                curve,
                findings(losses, predictions, routing.attempt, curve, shares, exits),
            )
        )
    return Trial(name, losses.matching, seed, matches.photos, exits, rule, attempts)


def detect(losses: HeadLosses, predictions: Predictions) -> list[dict[int, dict[str, Tensor]]]:
    """Per exit: image id -> detections, boxes in the photo's pixels."""
    model = losses.model
    ids = [int(target["image_id"]) for target in predictions.targets]
    sizes = [tuple(target["photo_size"].tolist()) for target in predictions.targets]
    width, height = model.transform.fixed_size
    found: list[dict[int, dict[str, Tensor]]] = [{} for _ in predictions.heads]
    for start in range(0, len(ids), BATCH):
        part = slice(start, start + BATCH)
        heads = tuple({key: value[part] for key, value in head.items()} for head in predictions.heads)
        photos = len(ids[part])
        network = [(height, width)] * photos
        outputs = ExitOutputs(heads, (), [losses.anchors] * photos, network, sizes[part], model.empty)
        for index in range(len(found)):
            with evaluating(model):  # a model in training would leave boxes in network pixels
                found[index] |= dict(zip(ids[part], model.detections(outputs, index), strict=True))
    return found


def ap50(matches: ExitMatches, choice: np.ndarray) -> float:
    """AP50 where photo i takes exit ``choice[i]``; 0 without objects."""
    return ap_of_choice(matches, choice, ap50_only=True).AP50 or 0.0


def foreground_rule(matches: ExitMatches, confidence: np.ndarray, exit_index: int) -> ForegroundRule:
    """``confidence`` [n] is the mean foreground at the early exit ``exit_index``, in the order of the matches."""
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
    """See `ExitFigures.overlap`; foreground [n, A], deltas [n, A, 4]."""
    best = foreground.argmax(1)
    rows = torch.arange(len(best))
    boxes = losses.model.box_coder.decode_single(deltas[rows, best], losses.anchors[best])
    pairs = zip(boxes, targets, strict=True)
    values = [box_iou(box[None], one["boxes"]).max().item() for box, one in pairs if len(one["boxes"])]
    return float(np.mean(values))


def findings(
    losses: HeadLosses,
    predictions: Predictions,
    attempt: Attempt,
    curve: Sequence[CurvePoint],
    shares: Sequence[float],
    exits: Sequence[ExitFigures],
) -> list[str]:
    """What the doctor finds, one line each."""
    gated, tempered = (curve if used else () for used in (attempt.minimum, attempt.temperatures != "fixed"))
    evidence = ModelEvidence(
        exits=[
            ExitOutput.of(name, head["cls_logits"], head["bbox_regression"])
            for name, head in zip(EXITS, predictions.heads, strict=True)
        ],
        default_boxes=losses.anchors,
        objects=[target["boxes"] for target in predictions.targets],
        shares=dict(zip(EXITS, shares, strict=True)),
        temperatures={name: [one.temperatures[index] for one in tempered] for index, name in enumerate(EXITS)},
        confidences={name: [one.confidences[index] for one in gated] for index, name in enumerate(EXITS)},
        ap50=dict(zip(EXITS, [one.AP50 for one in exits], strict=True)),
    )
    return [f"{one.check} ({one.subject}): {one.figure:.3g}" for one in diagnose(MODEL_CHECKS, evidence).bad]

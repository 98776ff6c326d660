"""What the history measured of an attempt, and what it never looked at: AP50, scores, boxes, and the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.history.attempts import EXITS
from benchmarks.history.features import BATCH, Features
from benchmarks.history.training import AttemptLosses, CurvePoint, Predictions, predict
from earlyexit_ssd.doctor.findings import diagnose
from earlyexit_ssd.doctor.model import MODEL_CHECKS, ExitOutput, ModelEvidence, area_under_curve
from earlyexit_ssd.evaluation.matches import ExitMatches, ap_of_choice, bootstrap_choices, exit_matches, interval
from earlyexit_ssd.evaluation.outputs import choose_exits, exit_share
from earlyexit_ssd.modeling.outputs import ExitOutputs

RULE = 0.6
"""The history's threshold for its confidence, the mean foreground probability."""
COINS = 20
"""Random choices of the photos that leave."""


@dataclass(frozen=True)
class ExitFigures:
    """Figures of one exit on the test photos.

    Attributes:
        AP50, AP50_interval: with a 95 % bootstrap interval over the photos.
        share: of the photos that leave here.
        confidence, ungated: mean over the photos, with and without the gate.
        temperature: of the exit.
        scores: 5th, 50th and 95th percentile of the foreground probability over all default boxes.
        score_auc: probability that a default box that overlaps an object has a larger score than one that does not.
        large_deltas: share of the box deltas outside [-5, 5].
        overlap: mean IoU of the box with the largest score and its nearest object, over the photos with objects.
    """

    AP50: float
    AP50_interval: list[float]
    share: float
    confidence: float
    ungated: float
    temperature: float
    scores: list[float]
    score_auc: float
    large_deltas: float
    overlap: float


@dataclass(frozen=True)
class ForegroundRule:
    """What the mean foreground decides at an early exit.

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
class Trial:
    """The result of one training.

    Attributes:
        photos: of the test split.
        exits: figures of exit 8, exit 12 and the full path.
        routed_AP50: of the detector with its thresholds.
        thresholds: of the two early exits.
        rule: per early exit; without the gate and at the exit's temperature.
        curve: of the training.
        findings: what the doctor says of it, the worst first.
    """

    data: str
    attempt: str
    matching: str
    seed: int
    photos: int
    exits: tuple[ExitFigures, ...]
    routed_AP50: float
    thresholds: list[float]
    rule: tuple[ForegroundRule, ...]
    curve: tuple[CurvePoint, ...]
    findings: list[str]


def measure(losses: AttemptLosses, features: Features, curve: Sequence[CurvePoint], data: str, seed: int) -> Trial:
    """All figures of a trained attempt on the test photos."""
    predictions, attempt = predict(losses, features), losses.attempt
    matches = exit_matches(features.truth, detect(losses, predictions))
    logits = [head["cls_logits"] for head in predictions.heads]
    ungated, gated = losses.confidences(logits, 0), losses.confidences(logits, attempt.minimum)
    thresholds = losses.thresholds.tolist()
    chosen = choose_exits(gated, thresholds)
    shares = list(exit_share(chosen, EXITS).values())
    alone = [np.full(matches.photos, index) for index in range(len(EXITS))]
    draws = bootstrap_choices(matches, alone)
    exits = []
    for index in range(len(EXITS)):
        foreground, deltas = 1 - logits[index].softmax(-1)[..., 0], predictions.heads[index]["bbox_regression"]
        exits.append(
            ExitFigures(
                AP50=ap50(matches, alone[index]),
                AP50_interval=interval(draws[index].AP50) or [0.0, 0.0],
                share=shares[index],
                confidence=gated[index].mean().item(),
                ungated=ungated[index].mean().item(),
                temperature=losses.router.temperatures[index].item(),
                scores=np.quantile(foreground.numpy(), [0.05, 0.5, 0.95]).tolist(),
                score_auc=area_under_curve(foreground.flatten(), predictions.matched.foreground.flatten()),
                large_deltas=(deltas.abs() > 5).float().mean().item(),
                overlap=likeliest_overlap(losses, foreground, deltas, predictions.targets),
            )
        )
    place = {int(target["image_id"]): row for row, target in enumerate(predictions.targets)}
    order = [place[image_id] for image_id in matches.image_ids]  # photos as the matches have them
    return Trial(
        data,
        attempt.name,
        losses.matching,
        seed,
        matches.photos,
        tuple(exits),
        ap50(matches, chosen.numpy()[order]),
        thresholds,
        tuple(foreground_rule(matches, ungated[index].numpy()[order], index) for index in range(len(EXITS) - 1)),
        tuple(curve),
        findings(losses, predictions, curve, exits),
    )


def detect(losses: AttemptLosses, predictions: Predictions) -> list[dict[int, dict[str, Tensor]]]:
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
    losses: AttemptLosses, foreground: Tensor, deltas: Tensor, targets: Sequence[dict[str, Tensor]]
) -> float:
    """See `ExitFigures.overlap`; foreground [n, A], deltas [n, A, 4]."""
    best = foreground.argmax(1)
    rows = torch.arange(len(best))
    boxes = losses.model.box_coder.decode_single(deltas[rows, best], losses.anchors[best])
    pairs = zip(boxes, targets, strict=True)
    values = [box_iou(box[None], one["boxes"]).max().item() for box, one in pairs if len(one["boxes"])]
    return float(np.mean(values))


def findings(
    losses: AttemptLosses, predictions: Predictions, curve: Sequence[CurvePoint], exits: Sequence[ExitFigures]
) -> list[str]:
    """What the doctor finds, one line each."""
    attempt = losses.attempt
    gated, tempered = (curve if used else () for used in (attempt.minimum, attempt.temperatures != "fixed"))
    evidence = ModelEvidence(
        exits=[
            ExitOutput.of(name, head["cls_logits"], head["bbox_regression"])
            for name, head in zip(EXITS, predictions.heads, strict=True)
        ],
        default_boxes=losses.anchors,
        objects=[target["boxes"] for target in predictions.targets],
        shares=dict(zip(EXITS, [one.share for one in exits], strict=True)),
        temperatures={name: [one.temperatures[index] for one in tempered] for index, name in enumerate(EXITS)},
        confidences={name: [one.confidences[index] for one in gated] for index, name in enumerate(EXITS)},
        ap50=dict(zip(EXITS, [one.AP50 for one in exits], strict=True)),
    )
    return [f"{one.check} ({one.subject}): {one.figure:.3g}" for one in diagnose(MODEL_CHECKS, evidence).bad]

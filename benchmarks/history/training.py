"""Train the heads of one attempt on stored features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.history.attempts import EXITS, Attempt, distribution_loss, gated_confidence, round_robin
from benchmarks.history.features import FeatureBatch, FeatureLoader, Features
from earlyexit_ssd.engine import AfterStep, Trainer, build_optimizer
from earlyexit_ssd.engine.loop import Hook
from earlyexit_ssd.evaluation.outputs import choose_exits, exit_share
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, LossSettings, describe_exits
from earlyexit_ssd.modeling.detector import default_boxes_of_image, early_exit_losses, full_path_losses
from earlyexit_ssd.modeling.losses import Assignment
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.routing import ExitRouter

BOUNDS = {"fixed": (0.5, 3.0), "bounded": (0.5, 3.0), "free": (1e-3, 1e6)}
"""Bounds of the temperatures."""
LR_FACTORS = {"router.": 30.0, "thresholds": 10.0}
"""Temperatures and thresholds move far in few steps."""
EPOCHS, LR = 10, 0.003
"""Of the heads."""


def build_heads(
    trunk: EarlyExitSSDLite, attempt: Attempt, size: int, classes: Sequence[str], seed: int
) -> EarlyExitSSDLite:
    """A detector with the trunk of ``trunk``, frozen, and untrained heads: two branches and the full path's.

    Args:
        size: side of the input, pixels.
        seed: of the new weights.
    """
    torch.manual_seed(seed)
    exits = describe_exits((8, 12), branch="light", channels=64, context=attempt.cascade)
    model = Architecture(tuple(classes), image_size=size, exits=exits).build()
    model.backbone.load_state_dict(trunk.backbone.state_dict())
    model.backbone.requires_grad_(False)
    if not attempt.attention:
        for branch in model.branches.values():
            branch.attention = nn.Identity()
    return model


class AttemptLosses(nn.Module):
    """The losses of an attempt, and the routing that it ends with.

    Args:
        model: of `build_heads`.
        attempt: its switches.
        matching: ``iou`` (the package's) or ``random`` (the history's): as many positives in every photo, but other
            default boxes.
    """

    def __init__(self, model: EarlyExitSSDLite, attempt: Attempt, matching: str) -> None:
        super().__init__()
        self.branches, self.head = model.branches, model.head
        learn = attempt.temperatures != "fixed"
        self.router = ExitRouter(3, temperature_bounds=BOUNDS[attempt.temperatures], learn_temperatures=learn)
        start = torch.full((model.num_early_exits,), attempt.threshold)
        self.thresholds = nn.Parameter(start, requires_grad=attempt.learned_thresholds)
        self.attempt, self.matching = attempt, matching
        self.anchors = default_boxes_of_image(model, torch.device("cpu"))
        self._settings = LossSettings(neg_to_pos_ratio=attempt.negatives)
        self._model = [model]  # in a list: its trunk is not trained

    @property
    def model(self) -> EarlyExitSSDLite:
        """The detector."""
        return self._model[0]

    def forward(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """The losses of every exit, of the temperatures and of the thresholds."""
        heads, assignment = batch.heads(self.model), self.assign(batch)
        losses = full_path_losses(heads[-1], assignment, self._settings)
        losses |= early_exit_losses(dict(enumerate(EXITS[:-1])), heads, assignment, self._settings)
        for index, head in enumerate(heads):
            value = self.router.temperature_loss(head["cls_logits"].detach(), assignment, index)
            if value is not None:
                losses[f"temperature{index}"] = value
        if self.attempt.learned_thresholds:
            confidences = self.confidences([head["cls_logits"] for head in heads], self.attempt.minimum)
            losses["distribution"] = distribution_loss(confidences[:-1], self.thresholds)
        return losses

    def assign(self, batch: FeatureBatch) -> Assignment:
        """Default boxes of the batch with their objects, by the matching of this training."""
        matched = self.matched(batch)
        if self.matching == "iou":
            return matched
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(batch.seed).generate_state(1)[0]))
        counts = matched.foreground.sum(1).tolist()
        orders = [torch.randperm(len(self.anchors), generator=generator)[:count] for count in counts]
        return round_robin(batch.targets, self.anchors, orders, self.model.box_coder)

    def matched(self, batch: FeatureBatch) -> Assignment:
        """Default boxes of the batch with the objects that they overlap."""
        return self.model.assign(batch.targets, [self.anchors] * len(batch.targets))

    def confidences(self, logits: Sequence[Tensor], minimum: int) -> list[Tensor]:
        """Per exit the confidence [N] of each photo, from raw logits [N, A, C]; ``minimum`` objects are wanted."""
        tempered = (self.router.tempered(one, index) for index, one in enumerate(logits))
        return [gated_confidence(one, minimum) for one in tempered]


@dataclass(frozen=True)
class Predictions:
    """Outputs of every exit for n photos: ``heads`` hold [n, A, C] and [n, A, 4]; ``matched`` are the default boxes
    that overlap an object."""

    heads: list[Head]
    matched: Assignment
    targets: list[dict[str, Tensor]]


def predict(losses: AttemptLosses, features: Features, photos: int | None = None) -> Predictions:
    """Outputs for the first ``photos`` photos, all by default."""
    heads, labels, regression = [], [], []
    with evaluating(losses):
        for batch in features.batches(photos):
            heads.append(batch.heads(losses.model))
            matched = losses.matched(batch)
            labels.append(matched.labels)
            regression.append(matched.regression)
    joined = [{key: torch.cat([one[key] for one in exit]) for key in exit[0]} for exit in zip(*heads, strict=True)]
    matched = Assignment(torch.cat(labels), torch.cat(regression))
    return Predictions(joined, matched, features.targets[: len(matched.labels)])


@dataclass(frozen=True)
class CurvePoint:
    """After an epoch, per exit on the calib split: mean confidence, share of the photos, temperature."""

    epoch: int
    confidences: list[float]
    shares: list[float]
    temperatures: list[float]


class Curve(Hook):
    """Measures a `CurvePoint` after every epoch."""

    def __init__(self, losses: AttemptLosses, features: Features) -> None:
        self.losses, self.features, self.points = losses, features, list[CurvePoint]()

    def after_step(self, trainer: Trainer) -> None:
        """See `Hook`."""
        epoch, rest = divmod(trainer.step, len(trainer.loader))
        if rest:
            return
        logits = [head["cls_logits"] for head in predict(self.losses, self.features, 100).heads]
        confidences = self.losses.confidences(logits, self.losses.attempt.minimum_in(epoch))
        chosen = choose_exits([one.detach() for one in confidences], self.losses.thresholds.tolist())
        means = [one.mean().item() for one in confidences]
        shares = list(exit_share(chosen, EXITS).values())
        self.points.append(CurvePoint(epoch, means, shares, self.losses.router.temperatures.tolist()))


def train_heads(losses: AttemptLosses, features: Features, calib: Features, seed: int) -> list[CurvePoint]:
    """Train all heads; a point of the curve per epoch."""
    curve = Curve(losses, calib)
    trainer = Trainer(
        model=losses,
        compute_losses=losses,
        loader=FeatureLoader(features, seed),
        optimizer=build_optimizer(losses, "adamw", LR, 1e-4, LR_FACTORS),
        epochs=EPOCHS,
        peak_lr=LR,
        warmup=0.05,
        clip_gradient=10.0,
        hooks=[curve, AfterStep(lambda _: losses.router.clamp_temperatures())],
    )
    trainer.run()
    return curve.points

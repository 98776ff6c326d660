"""Train the heads of a detector on stored features, and with them the routing of every attempt that has this detector.

The routing learns from the outputs of the heads and does not reach them, so that the attempts can share a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.history.attempts import EXITS, Attempt, Detector, distribution_loss, gated_confidence, round_robin
from benchmarks.history.features import FeatureBatch, FeatureLoader, Features
from earlyexit_ssd.engine import Trainer
from earlyexit_ssd.engine.hooks import AfterStep
from earlyexit_ssd.engine.loop import Hook, build_optimizer
from earlyexit_ssd.evaluation.outputs import choose_exits, exit_share
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, LossSettings, describe_exits
from earlyexit_ssd.modeling.detector import default_boxes_of_image, early_exit_losses, full_path_losses
from earlyexit_ssd.modeling.losses import Assignment
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.routing import ExitRouter

BOUNDS = {"fixed": (0.5, 3.0), "bounded": (0.5, 3.0), "free": (1e-3, 1e6)}
"""Bounds of the temperatures."""
LR_FACTORS = {"routings.": 30.0}
"""Temperatures and thresholds move far in few steps."""
CURVE_PHOTOS = 100


def build_heads(
    trunk: EarlyExitSSDLite, detector: Detector, size: int, classes: Sequence[str], seed: int
) -> EarlyExitSSDLite:
    """A detector with the trunk of ``trunk``, frozen, and untrained heads: two branches and the full path's.

    Args:
        size: side of the input, pixels.
        seed: of the new weights.
    """
    torch.manual_seed(seed)
    exits = describe_exits((8, 12), branch="light", channels=64, context=detector.cascade)
    model = Architecture(tuple(classes), image_size=size, exits=exits).build()
    model.backbone.load_state_dict(trunk.backbone.state_dict())
    model.backbone.requires_grad_(False)
    if not detector.attention:
        for branch in model.branches.values():
            branch.attention = nn.Identity()
    return model


class Routing(nn.Module):
    """The confidences, temperatures and thresholds of an attempt."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.attempt, learn = attempt, attempt.temperatures != "fixed"
        # the history has a temperature for the full path too
        self.router = ExitRouter(len(EXITS), temperature_bounds=BOUNDS[attempt.temperatures], learn_temperatures=learn)
        start = torch.full((len(EXITS) - 1,), attempt.threshold)
        self.thresholds = nn.Parameter(start, requires_grad=attempt.learned_thresholds)

    def confidences(self, heads: Sequence[Head], minimum: int) -> list[Tensor]:
        """Per exit the confidence [N] of each photo, without gradient; ``minimum`` objects are wanted."""
        tempered = (self.router.tempered(head["cls_logits"].detach(), index) for index, head in enumerate(heads))
        return [gated_confidence(one, minimum) for one in tempered]

    def losses(self, heads: Sequence[Head], assignment: Assignment) -> dict[str, Tensor]:
        """Of what the attempt learns: temperatures by likelihood, thresholds by the shares of the photos."""
        losses = {}
        for index, (name, head) in enumerate(zip(EXITS, heads, strict=True)):
            value = self.router.temperature_loss(head["cls_logits"].detach(), assignment, index)
            if value is not None:
                losses[f"{self.attempt.name} temperature {name}"] = value
        if self.attempt.learned_thresholds:
            confidences = self.confidences(heads, self.attempt.minimum)[:-1]
            losses[f"{self.attempt.name} distribution"] = distribution_loss(confidences, self.thresholds)
        return losses


class HeadLosses(nn.Module):
    """The losses of the heads, and of the routings.

    Args:
        model: of `build_heads`.
        detector: its switches.
        matching: ``iou`` (the package's) or ``random`` (the history's): as many positives in every photo, but other
            default boxes.
        attempts: whose routing is learned.
    """

    def __init__(self, model: EarlyExitSSDLite, detector: Detector, matching: str, attempts: Sequence[Attempt]) -> None:
        super().__init__()
        self.branches, self.head = model.branches, model.head
        self.routings = nn.ModuleList(Routing(one) for one in attempts)
        self.matching, self.anchors = matching, default_boxes_of_image(model, torch.device("cpu"))
        self._settings = LossSettings(neg_to_pos_ratio=detector.negatives)
        self._model = [model]  # in a list: its trunk is not trained

    @property
    def model(self) -> EarlyExitSSDLite:
        """The detector."""
        return self._model[0]

    def forward(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """The losses of every exit and routing."""
        heads, assignment = batch.heads(self.model), self.assign(batch)
        losses = full_path_losses(heads[-1], assignment, self._settings)
        losses |= early_exit_losses(dict(enumerate(EXITS[:-1])), heads, assignment, self._settings)
        for routing in self.routings:
            losses |= routing.losses(heads, assignment)
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


@dataclass(frozen=True)
class Predictions:
    """Outputs of every exit for n photos: ``heads`` hold [n, A, C] and [n, A, 4]; ``matched`` are the default boxes
    that overlap an object."""

    heads: list[Head]
    matched: Assignment
    targets: list[dict[str, Tensor]]


def predict(losses: HeadLosses, features: Features, photos: int | None = None) -> Predictions:
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
    """An attempt after an epoch, on calibration photos: per exit mean confidence, share of the photos, temperature."""

    epoch: int
    confidences: list[float]
    shares: list[float]
    temperatures: list[float]


class Curves(Hook):
    """Measures a `CurvePoint` of every routing after every epoch; ``points`` are by routing."""

    def __init__(self, losses: HeadLosses, features: Features) -> None:
        self.losses, self.features = losses, features
        self.points: list[list[CurvePoint]] = [[] for _ in losses.routings]

    def after_step(self, trainer: Trainer) -> None:
        """See `Hook`."""
        epoch, rest = divmod(trainer.step, len(trainer.loader))
        if rest:
            return
        heads = predict(self.losses, self.features, CURVE_PHOTOS).heads
        for points, routing in zip(self.points, self.losses.routings, strict=True):
            confidences = routing.confidences(heads, routing.attempt.minimum_in(epoch))
            shares = exit_share(choose_exits(confidences, routing.thresholds.tolist()), EXITS)
            means = [one.mean().item() for one in confidences]
            points.append(CurvePoint(epoch, means, list(shares.values()), routing.router.temperatures.tolist()))


def train_heads(
    losses: HeadLosses, features: Features, calib: Features, seed: int, epochs: int, lr: float
) -> list[list[CurvePoint]]:
    """Train all heads and routings; returns the points of each routing's curve."""
    curves = Curves(losses, calib)

    def clamp(_: Trainer) -> None:
        for routing in losses.routings:
            routing.router.clamp_temperatures()

    trainer = Trainer(
        model=losses,
        compute_losses=losses,
        loader=FeatureLoader(features, seed),
        optimizer=build_optimizer(losses, "adamw", lr, 1e-4, LR_FACTORS),
        epochs=epochs,
        peak_lr=lr,
        warmup=0.05,
        hooks=[curves, AfterStep(clamp)],
    )
    losses.to(memory_format=torch.channels_last)  # faster on a CPU
    trainer.run()
    losses.to(memory_format=torch.contiguous_format)
    return curves.points

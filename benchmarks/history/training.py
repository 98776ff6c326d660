"""Train the heads of a detector on stored features, and the routing of all attempts with this detector.

No gradient of the routing reaches the heads, so the attempts can share a training.
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
from earlyexit_ssd.engine.loop import AfterStep, Hook, build_optimizer
from earlyexit_ssd.evaluation.outputs import choose_exits, exit_share
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, LossSettings, describe_exits
from earlyexit_ssd.modeling.detector import default_boxes_of_image, early_exit_losses, full_path_losses
from earlyexit_ssd.modeling.losses import Assignment
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.routing import ExitRouter

BOUNDS = {"fixed": (0.5, 3.0), "bounded": (0.5, 3.0), "free": (1e-3, 1e6)}
"""Bounds of the temperatures."""
LR_FACTORS = {"routings.": 30.0}  # temperatures and thresholds must change much in few steps
CURVE_PHOTOS = 100


def build_heads(
    trunk: EarlyExitSSDLite, detector: Detector, size: int, classes: Sequence[str], seed: int
) -> EarlyExitSSDLite:
    """Return a detector with the frozen trunk of ``trunk`` and untrained heads: two branches and the full path's.
    ``size`` is the side of the input in pixels."""
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
        # in the history the full path has a temperature, too
        self.router = ExitRouter(len(EXITS), temperature_bounds=BOUNDS[attempt.temperatures], learn_temperatures=learn)
        start = torch.full((len(EXITS) - 1,), attempt.threshold)
        self.thresholds = nn.Parameter(start, requires_grad=attempt.learned_thresholds)

    def confidences(self, heads: Sequence[Head], minimum: int) -> list[Tensor]:
        """Return the confidence [N] at each exit, without gradient, see `gated_confidence`."""
        tempered = (self.router.tempered(head["cls_logits"].detach(), index) for index, head in enumerate(heads))
        return [gated_confidence(logits, minimum) for logits in tempered]

    def losses(self, heads: Sequence[Head], assignment: Assignment) -> dict[str, Tensor]:
        """Return the losses of learned temperatures (likelihood) and thresholds (shares of the photos)."""
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
    """The losses of the heads of ``model`` (from `build_heads`) and of the routing of ``attempts``.

    ``matching`` assigns default boxes to objects: ``iou`` is the package's. ``random`` is the history's, with as many
    positives in every photo, but other default boxes.
    """

    def __init__(self, model: EarlyExitSSDLite, detector: Detector, matching: str, attempts: Sequence[Attempt]) -> None:
        super().__init__()
        self.branches, self.head = model.branches, model.head
        self.routings = nn.ModuleList(map(Routing, attempts))
        self.matching, self.anchors = matching, default_boxes_of_image(model, torch.device("cpu"))
        self._settings = LossSettings(neg_to_pos_ratio=detector.negatives)
        self._model = [model]  # in a list, so that the trunk is not registered and trained

    @property
    def model(self) -> EarlyExitSSDLite:
        return self._model[0]

    def forward(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Return the losses of every exit and routing."""
        heads, assignment = batch.heads(self.model), self.assign(batch)
        losses = full_path_losses(heads[-1], assignment, self._settings)
        losses |= early_exit_losses(dict(enumerate(EXITS[:-1])), heads, assignment, self._settings)
        for routing in self.routings:
            losses |= routing.losses(heads, assignment)
        return losses

    def assign(self, batch: FeatureBatch) -> Assignment:
        """Assign default boxes to objects by the matching of this training."""
        matched = self.matched(batch)
        if self.matching == "iou":
            return matched
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(batch.seed).generate_state(1)[0]))
        counts = matched.foreground.sum(1).tolist()
        orders = [torch.randperm(len(self.anchors), generator=generator)[:count] for count in counts]
        return round_robin(batch.targets, self.anchors, orders, self.model.box_coder)

    def matched(self, batch: FeatureBatch) -> Assignment:
        """Assign default boxes to the objects that they overlap."""
        return self.model.assign(batch.targets, [self.anchors] * len(batch.targets))


@dataclass(frozen=True)
class Predictions:
    """Outputs of every exit for n photos: ``heads`` with [n, A, C] and [n, A, 4], and the `HeadLosses.matched`."""

    heads: list[Head]
    matched: Assignment
    targets: list[dict[str, Tensor]]


def predict(losses: HeadLosses, features: Features, photos: int | None = None) -> Predictions:
    """Return the outputs for the first ``photos`` photos, all by default."""
    heads, labels, regression = [], [], []
    with evaluating(losses):
        for batch in features.batches(photos):
            heads.append(batch.heads(losses.model))
            matched = losses.matched(batch)
            labels.append(matched.labels)
            regression.append(matched.regression)
    joined = [{key: torch.cat([head[key] for head in exit]) for key in exit[0]} for exit in zip(*heads, strict=True)]
    matched = Assignment(torch.cat(labels), torch.cat(regression))
    return Predictions(joined, matched, features.targets[: len(matched.labels)])


@dataclass(frozen=True)
class CurvePoint:
    """An attempt after an epoch, on calibration photos. Lists have a value per exit."""

    epoch: int
    confidences: list[float]  # mean over the photos
    shares: list[float]  # of the photos
    temperatures: list[float]


class Curves(Hook):
    """Hook that measures a `CurvePoint` of every routing after every epoch. ``points`` are by routing."""

    def __init__(self, losses: HeadLosses, features: Features) -> None:
        self.losses, self.features = losses, features
        self.points: list[list[CurvePoint]] = [[] for _ in losses.routings]

    def after_step(self, trainer: Trainer) -> None:
        epoch, rest = divmod(trainer.step, len(trainer.loader))
        if rest:
            return
        heads = predict(self.losses, self.features, CURVE_PHOTOS).heads
        for points, routing in zip(self.points, self.losses.routings, strict=True):
            confidences = routing.confidences(heads, routing.attempt.minimum_in(epoch))
            shares = exit_share(choose_exits(confidences, routing.thresholds.tolist()), EXITS)
            means = [confidence.mean().item() for confidence in confidences]
            points.append(CurvePoint(epoch, means, list(shares.values()), routing.router.temperatures.tolist()))


def train_heads(
    losses: HeadLosses, features: Features, calib: Features, seed: int, epochs: int, lr: float
) -> list[list[CurvePoint]]:
    """Train all heads and routings. Return the curve of each routing."""
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

"""A hook that runs the doctor's quick checks while a detector trains, and warns once of each failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torch import nn

from earlyexit_ssd.data import DetectionDataset
from earlyexit_ssd.doctor.findings import diagnose
from earlyexit_ssd.doctor.model import MODEL_CHECKS, ModelEvidence
from earlyexit_ssd.engine.loop import Hook, Trainer
from earlyexit_ssd.engine.processes import is_main
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline.doctor import exit_outputs, network_objects

logger = logging.getLogger(__name__)

PHOTOS = 12
"""Photos with objects that are looked at, the same ones each time."""
LARGEST_SHARE = 0.01
"""Of the time of the training, for all checks but the first."""


class Watch(Hook):
    """At the end of epochs, in the last third of the training, check the outputs on a few calib photos.

    A check is left out if all of them together would take more than 1 % of the training's time so far.

    Args:
        photos: the calib split; the first photos with objects are read once.
        measured: function that gives the model to look at, such as the averaged one.
        full_only: the branches are not trained yet, so that only the full path is looked at.
    """

    def __init__(
        self, photos: DetectionDataset, measured: Callable[[], EarlyExitSSDLite], full_only: bool = False
    ) -> None:
        records = [record for record in photos.records if record.has_targets][:PHOTOS]
        self.photos, self.measured, self.full_only = photos.subset(records), measured, full_only
        self.samples: list | None = None
        self.temperatures: dict[str, list[float]] = {}
        self.warned: set[tuple[str, str]] = set()
        self.spent = self.longest = 0.0

    def before_training(self, trainer: Trainer) -> None:
        self.start = time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        due = trainer.step % len(trainer.loader) == 0 and 3 * trainer.step >= 2 * trainer.total_steps
        now = time.perf_counter()
        if due and is_main() and self.spent + self.longest <= LARGEST_SHARE * (now - self.start):
            self.look(trainer.step // len(trainer.loader))
            taken = time.perf_counter() - now
            self.spent, self.longest = self.spent + taken * (self.longest > 0), max(self.longest, taken)

    def look(self, epoch: int) -> None:
        """Run the quick checks and log what is bad for the first time."""
        model = self.measured()
        for finding in diagnose([check for check in MODEL_CHECKS if check.quick], self.evidence(model)).bad:
            if (finding.check, finding.subject) not in self.warned:
                self.warned.add((finding.check, finding.subject))
                logger.warning("epoch %d: %s", epoch, finding)

    def evidence(self, model: EarlyExitSSDLite) -> ModelEvidence:
        """The outputs now, and the temperatures so far."""
        if self.samples is None:
            self.samples = [self.photos[index] for index in range(len(self.photos))]
        device = next(model.parameters()).device
        images, targets = [image.to(device) for image, _ in self.samples], [target for _, target in self.samples]
        if not images:
            return ModelEvidence()
        with evaluating(model):
            outputs = model.exit_outputs(images)
        if isinstance(model.router, nn.Module) and isinstance(model.router.temperatures, nn.Parameter):
            for name, value in zip(model.exit_names, model.router.temperatures.tolist(), strict=False):
                self.temperatures.setdefault(name, []).append(value)
        exits = exit_outputs(model, outputs)
        return ModelEvidence(
            exits=exits[-1:] if self.full_only else exits,
            default_boxes=outputs.anchors[0].cpu(),
            objects=network_objects(outputs, targets),
            temperatures=self.temperatures,
        )

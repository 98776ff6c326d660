"""The training loop: read it top to bottom. Everything that is not a step is a hook."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from earlyexit_ssd.engine.distributed import mean_of
from earlyexit_ssd.engine.optimizer import learning_rate
from earlyexit_ssd.errors import EarlyExitError


class TrainingDiverged(EarlyExitError):
    """A loss or a gradient became NaN or infinite."""


class Loader(Protocol):
    """What the loop asks of a loader of batches."""

    def __len__(self) -> int:
        """Steps in an epoch."""

    def epoch(self, epoch: int, start: int) -> Iterable[Any]:
        """The batches of ``epoch`` from number ``start`` on; the same ones for the same numbers."""


class Hook:
    """Something that happens around the steps; override what is needed.

    Hooks nest like blocks: each enters in the order of the list, and what comes after a step or the training is
    called in the reverse order.
    """

    def before_training(self, trainer: Trainer) -> None:
        """Once, before the first step of this process; a checkpoint may move the trainer's position here."""

    def after_step(self, trainer: Trainer) -> None:
        """After every step; ``trainer.losses`` holds the means over all processes."""

    def after_training(self, trainer: Trainer) -> None:
        """Once, when the training ends, is stopped or fails: give back what was taken."""


class Trainer:
    """Minimise the sum of a dict of losses over a number of epochs.

    All randomness comes from the loader, a function of (epoch, batch), so the position (``step``) and the weights
    are the whole state.

    Args:
        model: what is trained and saved.
        compute_losses: a batch to a dict of scalar losses; it may be a DistributedDataParallel around ``model``.
        loader: the batches.
        optimizer: over the model's parameters.
        epochs, peak_lr, warmup: the schedule.
        clip_gradient: largest norm of the gradient; 0 does not clip.
        amp: ``off``, ``bf16`` or ``fp16``.
        device: where it runs.
        hooks: nested in this order.
        describe: a batch to the names of its photos, for messages.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        compute_losses: Callable[[Any], dict[str, Tensor]],
        loader: Loader,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        peak_lr: float,
        warmup: float = 0.0,
        clip_gradient: float = 0.0,
        amp: str = "off",
        device: torch.device | None = None,
        hooks: Sequence[Hook] = (),
        describe: Callable[[Any], list[str]] = lambda batch: [],
    ) -> None:
        self.model, self.compute_losses, self.loader, self.optimizer = (
            model,
            compute_losses,
            loader,
            optimizer,
        )
        self.epochs, self.peak_lr, self.warmup, self.clip_gradient = epochs, peak_lr, warmup, clip_gradient
        self.device = device or torch.device("cpu")
        self.hooks, self.describe = list(hooks), describe
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self._amp_type = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.step = 0
        self.losses: dict[str, float] = {}
        self.stop = False

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * len(self.loader)

    @property
    def lr(self) -> float:
        """Learning rate of the current step."""
        return learning_rate(self.step, self.total_steps, self.peak_lr, self.warmup)

    def run(self) -> bool:
        """Train to the end; False if a hook set ``stop`` before.

        Raises:
            TrainingDiverged: a loss or a gradient is NaN or infinite; the weights are those of the step before.
        """
        for hook in self.hooks:
            hook.before_training(self)
        try:
            while self.step < self.total_steps and not self.stop:
                self.model.train()
                self._train_epoch(*divmod(self.step, len(self.loader)))
        finally:
            for hook in reversed(self.hooks):
                hook.after_training(self)
        return not self.stop

    def _train_epoch(self, epoch: int, start: int) -> None:
        for batch in self.loader.epoch(epoch, start):
            self.train_step(batch)
            self.step += 1
            for hook in reversed(self.hooks):
                hook.after_step(self)
            if self.stop:
                return

    def train_step(self, batch: Any) -> None:
        """Forward, backward, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_factor", 1.0)
        with self._autocast():
            losses = self.compute_losses(batch)
        self.losses = mean_of(losses)
        self._require_finite(self.losses, batch)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_gradient or float("inf"))
        if not self.scaler.is_enabled():  # with fp16 such steps happen, and the scaler skips them
            self._require_finite({"norm of the gradient": norm.item()}, batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._amp_type is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._amp_type)

    def _require_finite(self, values: dict[str, float], batch: Any) -> None:
        bad = {key: value for key, value in values.items() if not abs(value) < float("inf")}
        if bad:
            figures = ", ".join(f"{key} = {value}" for key, value in bad.items())
            raise TrainingDiverged(
                f"step {self.step}: {figures} for the photos {', '.join(self.describe(batch))}; "
                "look at these photos and boxes, lower LR or set CLIP_GRADIENT; the last checkpoint is kept"
            )

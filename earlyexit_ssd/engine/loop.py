"""The training loop with its optimizer, schedule, batches and averaged weights, and its hooks."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from earlyexit_ssd.console import progress
from earlyexit_ssd.engine.processes import any_process, barrier, is_main, mean_of
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import append_text, make_folder, write_text, write_torch, writing
from earlyexit_ssd.modeling.retrofit import read_weights


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Build ``sgd`` (momentum 0.9) or ``adamw`` for the parameters that require a gradient. Norms and biases have no
    weight decay.

    ``lr_factors`` maps prefixes of parameter names to factors of the learning rate. The default is 1. A parameter group
    stores its factor as ``lr_factor``.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((value for start, value in (lr_factors or {}).items() if key.startswith(start)), 1.0)
            members[factor, weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
    groups = [
        {"params": members[factor, decay], "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
        for factor, decay in sorted(members, reverse=True)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr, fused=True)  # takes a third of the time on a CPU


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Return the learning rate: linear warm-up over the share ``warmup`` of all steps, then a cosine decay to zero
    (Loshchilov and Hutter 2017)."""
    warmup_steps = int(total * warmup)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))


class PhotoLoader:
    """Batches on ``device``, the same in every run. ``loader`` is built by :func:`earlyexit_ssd.data.build_loader` with
    ``train=True``."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self._steps = len(loader)  # of a whole epoch: ``len(loader)`` is less if an epoch resumes

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[list[Tensor], list[dict]]]:
        """Yield the batches of ``epoch`` from number ``start`` on."""
        self.loader.sampler.set_epoch(epoch, start)
        for images, targets in self.loader:
            yield [image.to(self.device, non_blocking=True) for image in images], to_device(targets, self.device)


def to_device(targets: list[dict], device: torch.device) -> list[dict]:
    """Move the tensors in the targets to ``device``."""
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in targets
    ]


class ExponentialMovingAverage:
    """Moving average of the parameters and floating-point buffers. The decay at update ``t`` is ``min(decay,
    (1 + t) / (10 + t))``, so that noisy early weights count little. Other buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model``."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, value in zip(self.average.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.average.load_state_dict(state["average"])


class TrainingDiverged(EarlyExitError):
    """A loss or a gradient became NaN or infinite."""


class Loader(Protocol):
    """Interface of loaders of batches. The length is the number of batches in an epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int) -> Iterable[Any]:
        """Yield the batches of ``epoch`` from number ``start`` on. A batch must depend on (epoch, number) only."""


class Hook:
    """Base class of hooks. ``before_training`` runs in the order of the list, the other methods in reverse order."""

    def before_training(self, trainer: Trainer) -> None:
        """Called once, before the first step of this process. It may set ``trainer.step``."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after every step. ``trainer.losses`` are means over all processes."""

    def after_training(self, trainer: Trainer) -> None:
        """Called once, when the training ends, is stopped or fails, to release resources."""


@dataclass(kw_only=True, eq=False, repr=False)
class Trainer:
    """Minimise the sum of a dict of losses over a number of epochs.

    Only the loader is random, so ``step``, weights, optimizer and (with fp16) scaler are the complete state.
    """

    model: nn.Module  # the model that is trained and saved
    compute_losses: Callable[[Any], dict[str, Tensor]]  # returns the losses of a batch by name
    loader: Loader
    optimizer: torch.optim.Optimizer
    epochs: int
    peak_lr: float
    warmup: float = 0.0  # share of all steps, in [0, 1], see :func:`learning_rate`
    clip_gradient: float = 0.0  # largest norm of the gradient; 0: no clipping
    amp: str = "off"  # off, bf16 or fp16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hooks: Sequence[Hook] = ()  # see `Hook` for the order of the calls
    describe: Callable[[Any], list[str]] = lambda batch: []  # returns the names of a batch's photos, for messages

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")
        self._amp_type = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        self.step, self.losses, self.stop = 0, dict[str, float](), False

    @property
    def total_steps(self) -> int:
        return self.epochs * len(self.loader)

    def run(self) -> bool:
        """Train, and return False if a hook set ``stop``. If a loss or a gradient is not finite, raise TrainingDiverged
        and keep the weights of the previous step. With fp16 a step with such a gradient is left out instead."""
        with contextlib.ExitStack() as started:
            for hook in self.hooks:
                hook.before_training(self)
                started.callback(hook.after_training, self)
            while self.step < self.total_steps and not self.stop:
                self.model.train()
                for batch in self.loader.epoch(*divmod(self.step, len(self.loader))):
                    self.train_step(batch)
                    self.step += 1
                    for hook in reversed(self.hooks):
                        hook.after_step(self)
                    if self.stop:
                        break
        return not self.stop

    def train_step(self, batch: Any) -> None:
        rate = learning_rate(self.step, self.total_steps, self.peak_lr, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        with torch.autocast(self.device.type, self._amp_type, enabled=self._amp_type is not None):
            losses = self.compute_losses(batch)
        self.losses = mean_of(losses)
        self._require_finite(self.losses, batch)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_gradient or float("inf"))
        if not self.scaler.is_enabled():  # with fp16 an infinite gradient is normal, and the scaler skips the step
            self._require_finite({"norm of the gradient": norm.item()}, batch)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _require_finite(self, values: dict[str, float], batch: Any) -> None:
        bad = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
        if bad:
            fix = "check these photos and boxes, lower LR or set CLIP_GRADIENT; the last checkpoint is kept"
            photos = ", ".join(self.describe(batch))
            raise TrainingDiverged(f"step {self.step}: {', '.join(bad)} for the photos {photos}; {fix}")


# Hooks: checkpoints, a log with curves, a progress bar.

LogLine = dict[str, float | None]
"""``step``, ``epoch``, ``lr``, ``loss``, its parts ``loss/<name>``, ``seconds`` and the figures of ``Log.measure``."""


@dataclass
class Checkpoint(Hook):
    """Save the state to ``path`` every ``period`` steps and at the end of each epoch. Resume from it if it exists.

    After SIGINT or SIGTERM the loop saves and stops at the end of the step. The file is replaced by renaming, so a kill
    at any moment leaves a valid file.
    """

    path: Path
    period: int
    ema: ExponentialMovingAverage | None = None
    signal_name: str = ""  # of the signal that stopped the loop

    def before_training(self, trainer: Trainer) -> None:
        """Load the file, and handle signals."""
        if self.path.is_file():
            self._load(trainer)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, trainer: Trainer) -> None:
        trainer.stop = any_process(trainer.stop or bool(self.signal_name), trainer.device)
        end_of_epoch = trainer.step % len(trainer.loader) == 0
        if trainer.stop or end_of_epoch or trainer.step % self.period == 0:
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _parts(self, trainer: Trainer) -> dict[str, object]:
        parts = {"model": trainer.model, "optimizer": trainer.optimizer, "scaler": trainer.scaler, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}

    def _save(self, trainer: Trainer) -> None:
        if is_main():
            states = {name: part.state_dict() for name, part in self._parts(trainer).items()}
            write_torch(self.path, {"step": trainer.step, **states})
        barrier()

    def _load(self, trainer: Trainer) -> None:
        fix = "move it away to start the phase again"
        try:
            state = read_weights(self.path)
        except EarlyExitError as error:
            raise EarlyExitError(f"{error}; or {fix}") from None
        try:
            trainer.step = int(state["step"])
            for name, part in self._parts(trainer).items():
                part.load_state_dict(state[name])
        except Exception as error:  # load_state_dict raises many types
            reason = f"{type(error).__name__}: {error}"
            raise EarlyExitError(f"{self.path}: not the state of this training ({reason}); {fix}") from None


@dataclass
class AfterStep(Hook):
    """Call ``function(model)`` after every step, for example to update averaged weights or to clip values."""

    function: Callable[[nn.Module], None]

    def after_step(self, trainer: Trainer) -> None:
        self.function(trainer.model)


@dataclass
class ProgressBar(Hook):
    """Progress bar over all steps, with the current total loss."""

    description: str

    def before_training(self, trainer: Trainer) -> None:
        self.bar = progress(desc=self.description, total=trainer.total_steps)
        self.bar.update(trainer.step)

    def after_step(self, trainer: Trainer) -> None:
        epoch = min(trainer.epochs, trainer.step // len(trainer.loader) + 1)
        loss = sum(trainer.losses.values())
        self.bar.set_postfix_str(f"epoch {epoch}/{trainer.epochs}, loss {loss:.3f}", refresh=False)
        self.bar.update()

    def after_training(self, trainer: Trainer) -> None:
        self.bar.close()


@dataclass
class Log(Hook):
    """Write a log as JSON lines and for TensorBoard. A resumed run removes the lines that it will write again."""

    folder: Path  # of log.jsonl and tensorboard/
    period: int  # steps between lines
    # returns more figures by name, None if undefined; called at the end of an epoch in every process
    measure: Callable[[], Mapping[str, float | None]] | None = None
    measure_period: int = 1  # epochs between these calls, with a call after the last epoch; 0: no calls

    def before_training(self, trainer: Trainer) -> None:
        if not is_main():
            return
        make_folder(self.folder)
        self.path = self.folder / "log.jsonl"
        if self.path.is_file():
            kept = [line for line in read_log(self.folder) if float(line["step"]) <= trainer.step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = _Board(self.folder / "tensorboard", trainer.step + 1)
        self.started = time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.step == trainer.total_steps
        epoch, inside = divmod(trainer.step, len(trainer.loader))
        measured = self.measure and self.measure_period and not inside and (last or epoch % self.measure_period == 0)
        figures = self.measure() if measured else {}
        if not is_main() or not (last or measured or trainer.step % self.period == 0):
            return
        entry = {
            "step": trainer.step,
            "epoch": trainer.step / len(trainer.loader),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "loss": sum(trainer.losses.values()),
            **{f"loss/{name}": value for name, value in trainer.losses.items()},
            **figures,
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        append_text(self.path, json.dumps(entry) + "\n")
        self.board.write(trainer.step, entry)

    def after_training(self, trainer: Trainer) -> None:
        if is_main():
            self.board.file.close()


def read_log(folder: Path) -> list[LogLine]:
    """Return the complete lines of the log.jsonl in ``folder``. Without a file there are none."""
    path, lines = folder / "log.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError):
            line = json.loads(text)
            if float(line["step"]) < float("inf"):
                lines.append(line)
    return lines


class _Board:
    """Write scalars for TensorBoard in this thread. `SummaryWriter` writes in another thread, where a full disk is not
    reported. TensorBoard hides the points of older files in ``folder`` from ``first_step`` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        make_folder(folder)
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        with writing(self.path):
            self.file = RecordWriter(open(self.path, "ab", buffering=0))  # noqa: SIM115
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        defined = {key: value for key, value in values.items() if value is not None}
        scalars = [summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in defined.items()]
        self._add(step=step, summary=summary_pb2.Summary(value=scalars))

    def _add(self, **fields: Any) -> None:
        with writing(self.path):
            self.file.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

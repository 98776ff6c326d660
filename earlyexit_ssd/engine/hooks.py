"""Hooks of the training loop: checkpoints, a log with curves, a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

from earlyexit_ssd.engine.loop import ExponentialMovingAverage, Hook, Trainer
from earlyexit_ssd.engine.processes import any_process, barrier, is_main
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import append_text, make_folder, write_text, write_torch, writing
from earlyexit_ssd.modeling.retrofit import read_weights
from earlyexit_ssd.progress import progress

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
        trainer.stop = any_process(bool(self.signal_name), trainer.device)
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

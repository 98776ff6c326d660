"""Save the state of a training so that a killed run goes on as if it had not been killed."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from earlyexit_ssd.engine.distributed import any_process, barrier, is_main
from earlyexit_ssd.engine.ema import ExponentialMovingAverage
from earlyexit_ssd.engine.trainer import Hook, Trainer
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_torch
from earlyexit_ssd.modeling.retrofit import read_weights


class Checkpoint(Hook):
    """Write ``path`` every ``period`` steps and at the end of each epoch; read it before training if it is there.

    SIGINT and SIGTERM save and stop the loop after the step that is running. The file is replaced whole, so a kill at
    any moment leaves a good one.
    """

    def __init__(self, path: Path, period: int, ema: ExponentialMovingAverage | None = None) -> None:
        self.path, self.period, self.ema = path, period, ema
        self.signal_name = ""

    def before_training(self, trainer: Trainer) -> None:
        """Go on from the file, and watch for signals."""
        if self.path.is_file():
            self._load(trainer)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, trainer: Trainer) -> None:
        """Save where it is time to."""
        trainer.stop = any_process(bool(self.signal_name), trainer.device)
        end_of_epoch = trainer.step % len(trainer.loader) == 0
        if trainer.stop or end_of_epoch or trainer.step % self.period == 0:
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _save(self, trainer: Trainer) -> None:
        if is_main():
            state = {
                "step": trainer.step,
                "model": trainer.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
            }
            write_torch(self.path, state)
        barrier()

    def _load(self, trainer: Trainer) -> None:
        try:
            state = read_weights(self.path)
        except EarlyExitError as error:
            raise EarlyExitError(f"{error}; or move it away: the phase then starts afresh") from None
        try:
            trainer.step = int(state["step"])
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
        except Exception as error:  # optimizers and modules raise whatever their parts do
            raise EarlyExitError(
                f"{self.path}: not the state of this training ({type(error).__name__}: {error}); move it away: the "
                "phase then starts afresh"
            ) from None

"""What happens after the steps, one small hook each."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from earlyexit_ssd.engine.distributed import is_main
from earlyexit_ssd.engine.ema import ExponentialMovingAverage
from earlyexit_ssd.engine.trainer import Hook, Trainer
from earlyexit_ssd.files import write_text
from earlyexit_ssd.progress import progress


class ClampTemperatures(Hook):
    """Hold a router's temperatures in their bounds after every step."""

    def __init__(self, router: nn.Module) -> None:
        self.router = router

    def after_step(self, trainer: Trainer) -> None:
        self.router.clamp_temperatures()


class UpdateAverage(Hook):
    """Move the averaged weights after every step."""

    def __init__(self, average: ExponentialMovingAverage) -> None:
        self.average = average

    def after_step(self, trainer: Trainer) -> None:
        self.average.update(trainer.model)


class ProgressBar(Hook):
    """A bar over all steps with the current total loss."""

    def __init__(self, description: str) -> None:
        self.description = description

    def before_training(self, trainer: Trainer) -> None:
        self.bar = progress(desc=self.description, total=trainer.total_steps)
        self.bar.update(trainer.step)

    def after_step(self, trainer: Trainer) -> None:
        epoch = min(trainer.epochs, trainer.step // len(trainer.loader) + 1)
        self.bar.set_postfix_str(
            f"epoch {epoch}/{trainer.epochs}, loss {sum(trainer.losses.values()):.3f}", refresh=False
        )
        self.bar.update()

    def after_training(self, trainer: Trainer) -> None:
        self.bar.close()


class Log(Hook):
    """Losses and learning rate as JSON lines and for TensorBoard; a resumed run drops the lines it will write again."""

    def __init__(self, folder: Path, period: int) -> None:
        self.folder, self.period = folder, period
        self.path = folder / "log.jsonl"

    def before_training(self, trainer: Trainer) -> None:
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= trainer.step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.step + 1)
        self.started = time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        if not is_main() or (trainer.step % self.period and trainer.step != trainer.total_steps):
            return
        entry = {
            "step": trainer.step,
            "epoch": trainer.step / len(trainer.loader),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "loss": sum(trainer.losses.values()),
            **trainer.losses,
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for key, value in entry.items():
            self.board.add_scalar(key, value, trainer.step)

    def after_training(self, trainer: Trainer) -> None:
        if is_main():
            self.board.close()


def _step(line: str) -> float:
    """Step of a line of the log; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return float("inf")

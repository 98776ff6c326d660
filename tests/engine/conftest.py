"""A toy problem: fit a line. Batches depend on (epoch, batch) only."""

import torch
from torch import nn

from earlyexit_ssd.engine import Trainer
from earlyexit_ssd.engine.loop import build_optimizer


class LineLoader:
    """A loader of points on y = 2 x + 1."""

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int):
        for batch in range(start, self.steps):
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(1000 * epoch + batch))
            yield x, 2 * x + 1


def line_trainer(hooks=(), epochs=3, loader=None, **changes) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    settings = {
        "model": model,
        "compute_losses": lambda batch: {"square": ((model(batch[0]) - batch[1]) ** 2).mean()},
        "loader": loader or LineLoader(),
        "optimizer": build_optimizer(model, "adamw", 0.05, 0.01),
        "epochs": epochs,
        "peak_lr": 0.05,
        "warmup": 0.1,
        "hooks": hooks,
    }
    return Trainer(**{**settings, **changes})

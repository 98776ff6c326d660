"""An exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """Averages parameters and floating-point buffers; the decay warms up, so that early noise is forgotten.

    Args:
        model: what is averaged.
        decay: largest decay; after ``t`` updates it is ``min(decay, (1 + t) / (10 + t))``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards ``model``."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mine, theirs in zip(self.average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"updates": self.updates, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of :meth:`state_dict`."""
        self.updates = state["updates"]
        self.average.load_state_dict(state["average"])

"""Do batches of photos that leave at different exits keep the speed that their photos would have?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from earlyexit_ssd.evaluation.cost import PlainPath, time_modules
from earlyexit_ssd.modeling.conditional import route
from earlyexit_ssd.modeling.fused import fuse_for_inference
from earlyexit_ssd.modeling.outputs import ExitSignals


@dataclass(frozen=True)
class Throughput:
    """Photos per second of the network, fused for inference, on batches (resizing and post-processing not counted).

    Attributes:
        batch: photos in a batch.
        mixed: with exits mixed as asked.
        ideal: if every photo took as long as in a batch that leaves together at its exit.
        plain: of the detector without exits.
        share_of_ideal: mixed / ideal.
    """

    batch: int
    mixed: float
    ideal: float
    plain: float
    share_of_ideal: float


class _Plan(nn.Module):
    """A router that scores as ``router`` does in the exits ``used`` and then sends image i to ``plan[i]``."""

    hybrid = False

    def __init__(self, router: nn.Module, plan: Sequence[int], used: frozenset[int]) -> None:
        super().__init__()
        self._router, self._plan, self._used = router, torch.tensor(plan), used
        self._left = self._plan

    def needs(self, exit_index: int) -> bool:
        if exit_index == 0:
            self._left = self._plan
        return exit_index in self._used

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        return self._router.confidence(signals, exit_index)

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        leave = self._left == exit_index
        self._left = self._left[~leave]
        return leave


class _Routed(nn.Module):
    """The network with a plan, on normalised images."""

    def __init__(self, model: nn.Module, router: nn.Module, plan: Sequence[int], used: frozenset[int]) -> None:
        super().__init__()
        self._model, self._plan = [model], _Plan(router, plan, used)

    def forward(self, x: Tensor) -> Tensor:
        model = self._model[0]
        before, model.router = model.router, self._plan
        try:
            return route(model, x)[1]
        finally:
            model.router = before


def mixed_throughput(
    model: nn.Module, router: nn.Module, shares: Sequence[float], batch: int = 16, runs: int = 10, threads: int = 1
) -> Throughput:
    """Time batches whose photos leave in these shares [exits], mixed, against batches that leave together.

    An exit where no photo of the batch leaves is closed, so its branch is not computed, as when routing for real.

    Args:
        model: an `EarlyExitSSDLite`; router: scores on the way.
    """
    model = fuse_for_inference(model)
    width, height = model.transform.fixed_size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()).device)
    ends = np.cumsum(shares)[:-1]
    plan = np.searchsorted(ends, (np.arange(batch) + 0.5) / batch, side="right").tolist()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    used = frozenset(plan)
    mixed = _Routed(model, router, [plan[index] for index in order], used)
    together = [_Routed(model, router, [index] * batch, used) for index in sorted(used)]
    timings = time_modules([mixed, PlainPath(model), *together], images, runs, threads)
    mixed_ms, plain_ms, *together_ms = (timing.ms for timing in timings)
    of_exit = dict(zip(sorted(used), together_ms, strict=True))
    ideal = statistics.fmean(of_exit[index] for index in plan)
    return Throughput(
        batch=batch,
        mixed=1000 * batch / mixed_ms,
        ideal=1000 * batch / ideal,
        plain=1000 * batch / plain_ms,
        share_of_ideal=ideal / mixed_ms,
    )

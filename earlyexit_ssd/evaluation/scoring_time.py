"""How long policies take to score a photo."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from earlyexit_ssd.evaluation.cost import Timing, time_modules
from earlyexit_ssd.modeling.outputs import ExitSignals, Router


class _Scoring(nn.Module):
    def __init__(self, router: Router, signals: ExitSignals, exit_index: int) -> None:
        super().__init__()
        self._score = lambda: router.confidence(signals, exit_index)

    def forward(self, _: Tensor) -> Tensor:
        return self._score()


def time_scoring(
    routers: Sequence[Router], signals: ExitSignals, exit_index: int, threads: int = 1, runs: int = 300
) -> list[Timing]:
    """Median milliseconds for which each router looks at the first image of ``signals``, temperature included; in
    turns."""
    first = [None if values is None else values[:1] for values in (signals.logits, signals.previous, signals.tap)]
    shown = ExitSignals(*first, signals.empty)
    return time_modules([_Scoring(router, shown, exit_index) for router in routers], signals.logits, runs, threads)

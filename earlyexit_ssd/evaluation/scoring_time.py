"""How long a policy takes to score a photo."""

from __future__ import annotations

from torch import Tensor, nn

from earlyexit_ssd.evaluation.cost import Timing, time_modules
from earlyexit_ssd.modeling.outputs import ExitSignals, Router


class _Scoring(nn.Module):
    def __init__(self, router: Router, signals: ExitSignals, exit_index: int) -> None:
        super().__init__()
        self._score = lambda: router.confidence(signals, exit_index)

    def forward(self, _: Tensor) -> Tensor:
        return self._score()


def time_scoring(router: Router, signals: ExitSignals, exit_index: int, threads: int = 1, runs: int = 100) -> Timing:
    """Median milliseconds for which ``router`` looks at the first image of ``signals``, temperature included."""
    first = [None if values is None else values[:1] for values in (signals.logits, signals.previous, signals.tap)]
    scoring = _Scoring(router, ExitSignals(*first, signals.empty), exit_index)
    return time_modules([scoring], signals.logits, runs, threads)[0]

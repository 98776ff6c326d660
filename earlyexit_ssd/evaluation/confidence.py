"""How sure an exit is of itself, over all photos."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ConfidenceSummary:
    """Mean, standard deviation (population) and range of an exit's confidence, all in [0, 1]."""

    mean: float
    std: float
    min: float
    max: float


def summarize_confidence(confidence: Tensor) -> ConfidenceSummary | None:
    """Summary of the confidences [n] of n photos; None where there is none: no photo, or below 0, since the router's
    policy has nothing to look at there (an exit without a branch)."""
    values = confidence[confidence >= 0].double()
    if values.numel() == 0:
        return None
    return ConfidenceSummary(
        mean=values.mean().item(),
        std=values.std(unbiased=False).item(),
        min=values.min().item(),
        max=values.max().item(),
    )

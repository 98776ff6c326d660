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
    """Summary of the confidences [n] of n photos; None when there is none."""
    if confidence.numel() == 0:
        return None
    values = confidence.double()
    return ConfidenceSummary(
        mean=values.mean().item(),
        std=values.std(unbiased=False).item(),
        min=values.min().item(),
        max=values.max().item(),
    )

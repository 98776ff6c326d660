"""Temperatures by held-out likelihood, and how reliable an exit's probabilities are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BINS = 10
AT_BOUND = 0.01
"""A fitted temperature this near to a bound (as a share of it) has been stopped by it."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Makes an iterator over raw logits [N, A, C] with labels [N, A], 0 for background; called several times."""


@dataclass(frozen=True)
class Reliability:
    """How often an exit is right where it says it is so sure.

    Attributes:
        confidence, accuracy, count: per bin of the probability of the most probable object class, `BINS` of equal
            width; boxes with less than 0.05 are left out, since nearly all are background and right about it.
        expected_error: sum over the bins of count / total * |accuracy - confidence| (Guo et al. 2017, equation 3).
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    expected_error: float


@torch.no_grad()
def fit_temperature(batches: Batches, bounds: tuple[float, float]) -> float:
    """The temperature T in ``bounds`` at which softmax(logits / T) gives the labels the largest likelihood, over all
    default boxes (Guo et al. 2017, section 4.2)."""
    found = minimize_scalar(
        lambda temperature: negative_log_likelihood(batches(), temperature),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(found.x)


def stopped_by(temperature: float, bounds: tuple[float, float]) -> float | None:
    """The bound that a fitted temperature lies at, if any."""
    return next((bound for bound in bounds if abs(temperature - bound) <= AT_BOUND * bound), None)


@torch.no_grad()
def negative_log_likelihood(batches: Iterable[tuple[Tensor, Tensor]], temperature: float) -> float:
    """Mean over the default boxes of -log p(label) at this temperature."""
    total, count = 0.0, 0
    for logits, labels in batches:
        loss = F.cross_entropy(logits.flatten(0, 1) / temperature, labels.flatten().long(), reduction="sum")
        total, count = total + loss.item(), count + labels.numel()
    return total / max(count, 1)


@torch.no_grad()
def reliability(batches: Iterable[tuple[Tensor, Tensor]], temperature: float) -> Reliability:
    """Of softmax(logits / temperature) against the labels."""
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    for logits, labels in batches:
        probability, label = (logits / temperature).softmax(-1)[..., 1:].max(-1)
        keep = probability >= 0.05
        probability, right = probability[keep], (label[keep] + 1 == labels[keep]).double()
        place = (probability * BINS).long().clamp(max=BINS - 1)
        for row, values in enumerate((torch.ones_like(right), probability.double(), right)):
            sums[row] += torch.bincount(place, weights=values, minlength=BINS)
    count = sums[0]
    confidence, accuracy = (sums[row] / count.clamp(min=1) for row in (1, 2))
    error = (count * (accuracy - confidence).abs()).sum() / count.sum().clamp(min=1)
    return Reliability(tuple(confidence.tolist()), tuple(accuracy.tolist()), tuple(count.long().tolist()), error.item())

"""Temperatures by held-out likelihood, and how reliable an exit's probabilities are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from earlyexit_ssd.routing.policies import FastSoftmax

BINS = 10
LEAST_PROBABILITY = 0.05
AT_BOUND = 0.01
"""A fitted temperature this near to a bound (as a share of it) has been stopped by it."""


@dataclass(frozen=True)
class Reliability:
    """Confidence, accuracy and number of default boxes, in `BINS` bins of equal width of the probability of the most
    probable object class. ``expected_error`` is the sum over them of count / total * |accuracy - confidence| (Guo et
    al. 2017, equation 3)."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    expected_error: float


@dataclass(frozen=True)
class FittedTemperature:
    """One exit's temperature, and its reliability on the photos it was fitted on: at 1 and at that temperature."""

    exit_name: str
    temperature: float
    before: Reliability
    after: Reliability


@torch.no_grad()
def contested_boxes(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [M, C] and labels [M] of the default boxes on an object, or with an object probability of
    `LEAST_PROBABILITY` at least, of batches of raw logits [N, A, C] with labels [N, A], 0 for background.

    The others, 98 % of them, are sure background; counted in, they would decide the temperature alone.
    """
    logits, labels = [], []
    for batch, truth in batches:
        keep = (truth > 0) | (FastSoftmax(batch).largest >= LEAST_PROBABILITY)
        logits.append(batch[keep])
        labels.append(truth[keep].long())
    return torch.cat(logits), torch.cat(labels)


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float]) -> float:
    """The temperature T in ``bounds`` at which softmax(logits / T), [M, C], gives the labels [M] the largest likelihood
    (Guo et al. 2017, section 4.2)."""
    if not len(logits):
        return 1.0
    found = minimize_scalar(
        lambda temperature: F.cross_entropy(logits / temperature, labels).item(), bounds=bounds, method="bounded",
        options={"xatol": 1e-3},
    )  # fmt: skip
    return float(found.x)


def stopped_by(temperature: float, bounds: tuple[float, float]) -> float | None:
    """The bound that a fitted temperature lies at, if any."""
    return next((bound for bound in bounds if abs(temperature - bound) <= AT_BOUND * bound), None)


@torch.no_grad()
def reliability(logits: Tensor, labels: Tensor, temperature: float) -> Reliability:
    """Of softmax(logits / temperature), [M, C], against the labels [M]."""
    probability, label = (logits / temperature).softmax(-1)[..., 1:].max(-1)
    right = (label + 1 == labels).double()
    place = (probability * BINS).long().clamp(max=BINS - 1)
    count, confidence, accuracy = (
        torch.bincount(place, weights=values, minlength=BINS)
        for values in (torch.ones_like(right), probability.double(), right)
    )
    confidence, accuracy = confidence / count.clamp(min=1), accuracy / count.clamp(min=1)
    error = (count * (accuracy - confidence).abs()).sum() / count.sum().clamp(min=1)
    return Reliability(tuple(confidence.tolist()), tuple(accuracy.tolist()), tuple(count.long().tolist()), error.item())

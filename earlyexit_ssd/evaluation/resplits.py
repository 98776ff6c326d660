"""Does a certificate hold? Calibrate on random halves of the photos and look at the other ones, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from earlyexit_ssd.progress import progress
from earlyexit_ssd.routing.certify import certify
from earlyexit_ssd.routing.search import choose


@dataclass(frozen=True)
class Resplits:
    """What happened over many random splits into calibration and test photos.

    Attributes:
        epsilon, delta: of the certificates.
        splits: how many.
        exceeded: share of the splits in which the test photos' mean loss was above epsilon.
        tolerance: what a share of delta may reach by chance: the 97.5 % quantile of binomial(splits, delta) / splits.
        opened: share of the splits in which any exit was opened.
        speedup: mean over the splits, on the test photos, against the detector without exits.
        best_speedup: the same with the cheapest step of the path whose loss on the test photos is at most epsilon:
            thresholds chosen with the test answers.
    """

    epsilon: float
    delta: float
    splits: int
    exceeded: float
    tolerance: float
    opened: float
    speedup: float
    best_speedup: float


def check_certificates(
    path: np.ndarray,
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: np.ndarray,
    plain: float,
    *,
    calibration: int,
    epsilon: float,
    delta: float,
    bound: str,
    splits: int = 1000,
    seed: int = 0,
) -> Resplits:
    """Certify on ``calibration`` photos of a random split, measure on the rest; ``splits`` times.

    Args:
        path: thresholds from safe to bold [steps, early exits], from other photos than these.
        confidences: per early exit [n]; losses: [n, exits].
        costs: of the exits at each step of the path [steps, exits]; plain: of the detector without exits.
    """
    generator, rows = np.random.default_rng(seed), np.arange(len(losses))
    choices = np.stack([choose(confidences, thresholds) for thresholds in path])
    risks = losses[rows, choices]  # [steps, n]
    spent = np.take_along_axis(costs, choices.astype(np.int64), axis=1)
    exceeded, opened, speedups, best = 0, 0, [], []
    for _ in progress(range(splits), desc=f"re-splits at {epsilon:g}"):
        order = generator.permutation(len(losses))
        ours, test = order[:calibration], order[calibration:]
        drawn = [values[ours] for values in confidences]
        found = certify(path, drawn, losses[ours], costs, epsilon, delta, bound, seed=None)  # in random order already
        test_risks = risks[:, test].mean(1)
        exceeded += bool(test_risks[found.step] > epsilon)
        opened += found.step > 0
        speedups.append(plain / spent[found.step, test].mean())
        best.append(plain / spent[:, test].mean(1)[test_risks <= epsilon].min())
    return Resplits(
        epsilon=epsilon,
        delta=delta,
        splits=splits,
        exceeded=exceeded / splits,
        tolerance=float(stats.binom.ppf(0.975, splits, delta)) / splits,
        opened=opened / splits,
        speedup=float(np.mean(speedups)),
        best_speedup=float(np.mean(best)),
    )

"""Tests of whether two samples come from one distribution, the second known by its size and a few quantiles."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln

QUANTILES = 21
"""Stored of the confidences at an exit: those at levels 0, 1/20, ..., 1."""


def fisher_p_value(count: int, photos: int, reference_count: int, reference_photos: int) -> float:
    """Two-sided p-value, in [0, 1], that two samples have the same share (Fisher 1935, exact for any sizes).

    Args:
        count, photos: photos that took an exit, out of how many, at least 1.
        reference_count, reference_photos: the same in calibration.
    """
    took = count + reference_count
    support = np.arange(max(0, took - reference_photos), min(photos, took) + 1)  # tables with the same margins
    chosen = gammaln(support + 1) + gammaln(photos - support + 1)
    left = gammaln(took - support + 1) + gammaln(reference_photos - took + support + 1)
    weights = np.exp((chosen + left).min() - chosen - left)  # hypergeometric; scipy's own takes 20 times as long
    rounding = 1 + 1e-7  # between tables that are equally likely
    return float(weights[weights <= weights[count - support[0]] * rounding].sum() / weights.sum())


def quantile_distance(values: np.ndarray, quantiles: np.ndarray) -> float:
    """Smallest Kolmogorov-Smirnov distance, in [0, 1], from ``values`` [n] to any sample with these sorted quantiles.

    Where k of the 21 quantiles are <= x, the sample's share that is <= x lies in [(k - 1) / 20, k / 20], and is 0 for
    k = 0 and 1 for k = 21. What the share of ``values`` leaves this band by, at most, is the distance: never above the
    one to the sample itself and at most 1/20 below, so that its p-value is conservative, with ties too.
    """
    points = np.concatenate([values, quantiles])  # where either side steps; both are 0 below
    share = np.searchsorted(np.sort(values), points, side="right") / len(values)
    below = np.searchsorted(quantiles, points, side="right")
    steps = len(quantiles) - 1
    low, high = np.maximum(below - 1, 0) / steps, np.minimum(below, steps) / steps
    return float(max(0.0, (share - high).max(), (low - share).max()))


def distance_p_value(distance: float, count: int, reference_count: int) -> float:
    """Bound e * exp(-2 m n / (m + n) * distance^2) on the p-value of a two-sample Kolmogorov-Smirnov distance.

    The inequality of Dvoretzky, Kiefer and Wolfowitz for two samples. Wei & Dudley (2012) show that the constant 2 of
    large samples fails for equal sizes below 458 and the very smallest ones, and found it to hold for the others that
    they computed. e holds for those too, and widens the critical distance by 2 % only at the levels used here.

    Args:
        distance: in [0, 1].
        count, reference_count: sizes m and n of the samples, at least 1.
    """
    effective = count * reference_count / (count + reference_count)
    return min(1.0, math.exp(1 - 2 * effective * distance**2))


def sample_quantiles(values: np.ndarray) -> tuple[float, ...]:
    """Of [n], per level j / 20 the smallest of the values that a share of at least this does not exceed."""
    if not len(values):
        return ()
    steps = QUANTILES - 1
    ranks = (np.arange(QUANTILES) * len(values) + steps - 1) // steps  # rounded up, in whole numbers to be exact
    return tuple(np.sort(values)[np.maximum(ranks, 1) - 1].tolist())

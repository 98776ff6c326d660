"""How far AP and AP50 would move with other photos of the same kind: a bootstrap over photos.

Matching never crosses photos, so it is done once (by pycocotools); a resample only weighs each photo by how
often it was drawn and accumulates again. Weighing gives what pycocotools gives for a data set with the
repeated photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from earlyexit_ssd.evaluation.choices import ExitMatches, ap_of_choice


class Draws(NamedTuple):
    """AP and AP50 in every draw of photos, float [resamples]; NaN where undefined, or not asked for."""

    AP: np.ndarray
    AP50: np.ndarray


def bootstrap_choices(
    matches: ExitMatches,
    choices: Sequence[ArrayLike],
    resamples: int = 200,
    seed: int = 0,
    *,
    ap50_only: bool = True,
    groups: np.ndarray | None = None,
) -> list[Draws]:
    """Per choice of exits [n], its figures in ``resamples`` draws of as many photos with replacement.

    The same seed draws the same photos, so all values on one data set are paired. ``ap50_only`` is ten times as fast.
    Photos that go together, numbered from 0 in ``groups`` [n], are drawn together.
    """
    count = matches.photos if groups is None or not len(groups) else int(groups.max()) + 1
    generator = np.random.default_rng(seed)
    values = [Draws(np.full(resamples, np.nan), np.full(resamples, np.nan)) for _ in choices]
    for index in range(resamples):
        weights = np.bincount(generator.integers(count, size=count) if count else [], minlength=count)
        weights = weights if groups is None else weights[groups]
        for draws, choice in zip(values, choices, strict=True):
            found = ap_of_choice(matches, choice, weights, ap50_only=ap50_only)
            draws.AP[index], draws.AP50[index] = found.AP, found.AP50  # numpy stores None as NaN
    return values


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The central ``level`` of ``values`` (percentiles), NaN left out; None when nothing is left."""
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

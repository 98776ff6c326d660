"""Risk control: the cheapest thresholds whose expected loss is bounded with high probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.bounds import BOUNDS, fixed_sequence_test, photos_needed, upper_bound
from earlyexit_ssd.calibration.thresholds import Grid, choose, pareto_path, threshold_grid
from earlyexit_ssd.config import CLOSED

LONGEST_PATH = 80
"""Largest number of steps on a path: more steps take time, fewer leave larger gaps between thresholds."""


@dataclass(frozen=True)
class Certified:
    """The cheapest thresholds that passed the test.

    Attributes:
        step: index on the path; 0 is the step with all exits closed.
        thresholds: one threshold per early exit.
        choice: exit of every calibration photo, [n].
        loss: mean loss over the calibration photos or their groups.
        bound: upper confidence bound of the expected loss at level delta, as if this were the only step tested.
        passed: number of steps that passed, without step 0.
        photos_needed: number of calibration photos (or groups) that would certify the first open step if further ones
            had the same losses; None if a step passed, or if no number is enough.
    """

    step: int
    thresholds: tuple[float, ...]
    choice: np.ndarray
    loss: float
    bound: float
    passed: int
    photos_needed: int | None = None


def safe_to_bold(
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: Callable[[np.ndarray], np.ndarray],
    grid: Grid | None = None,
) -> np.ndarray:
    """A path of thresholds [steps, early exits], from all exits closed to ever cheaper combinations.

    The steps are the combinations that no other beats in both mean loss and mean cost on m training photos. So the path
    is fixed before a calibration photo is used, and each step may be tested at the whole level delta.

    Args:
        confidences: one array [m] per early exit.
        losses: [m, exits].
        costs: function from thresholds [M, early exits] to the costs of the exits [M, exits].
        grid: the combinations to choose from; by default `threshold_grid`.
    """
    grid = grid or threshold_grid(confidences)
    path = pareto_path(grid.mean(losses), grid.mean_cost(costs(grid.thresholds)))
    thresholds = grid.thresholds[path]
    if len(thresholds) > LONGEST_PATH:
        thresholds = thresholds[np.unique(np.linspace(0, len(thresholds) - 1, LONGEST_PATH).round().astype(int))]
    closed = np.full((1, len(confidences)), CLOSED, dtype=np.float32)
    return np.concatenate([closed, thresholds[(thresholds < CLOSED).any(1)]])


def certify(
    path: np.ndarray,
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: np.ndarray,
    epsilon: float,
    delta: float,
    bound: str = "betting",
    seed: int | None = 0,
    groups: np.ndarray | None = None,
) -> Certified:
    """Test the steps of ``path`` in order until one fails, and take the cheapest step that passed.

    A step passes if its expected loss is shown to be at most ``epsilon``. With probability 1 - ``delta`` this holds for
    all steps that passed together, so the same photos may choose among them (Angelopoulos et al. 2021).

    Args:
        path: from :func:`safe_to_bold`; its first step is closed.
        confidences: one array [n] per early exit, for the calibration photos.
        losses: [n, exits] in [0, 1], for the calibration photos.
        costs: costs of the exits at each step, [steps, exits].
        bound: a key of `BOUNDS`, chosen beforehand.
        seed: seed of the order of the photos; None keeps the given order, which must then be random. The betting bound
            depends on the order: with data sets one behind the other the first could decide alone.
        groups: number (from 0) of the group of each photo, [n]. The mean over a group is one loss, and the guarantee is
            for the draw of groups. None: every photo is a group.
    """
    p_value, rows = BOUNDS[bound], np.arange(len(losses))
    sizes = np.ones(len(losses)) if groups is None else np.bincount(groups)
    order = np.arange(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes))
    choices = [choose(confidences, thresholds) for thresholds in path]
    groups = rows if groups is None else groups
    risks = [(np.bincount(groups, losses[rows, choice]) / sizes)[order] for choice in choices]
    passed = fixed_sequence_test((p_value(risk, epsilon) for risk in risks[1:]), delta)  # step 0 is the full path
    needed = photos_needed(risks[1], epsilon, delta, p_value) if passed == 0 and len(path) > 1 else None
    chosen = min(range(passed + 1), key=lambda step: costs[step][choices[step]].mean())
    certain = 0.0 if chosen == 0 else upper_bound(risks[chosen], delta, p_value)
    thresholds, loss = tuple(float(value) for value in path[chosen]), float(risks[chosen].mean())
    return Certified(chosen, thresholds, choices[chosen], loss, certain, passed, needed)

"""Risk control: the cheapest thresholds whose mean loss is small with high probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.bounds import BOUNDS, fixed_sequence_test, photos_needed, upper_bound
from earlyexit_ssd.calibration.thresholds import Grid, choose, pareto_path, threshold_grid
from earlyexit_ssd.config import CLOSED

LONGEST_PATH = 80
"""Steps of the path; more of them cost time, fewer leave larger gaps between thresholds."""


@dataclass(frozen=True)
class Certified:
    """The cheapest thresholds that passed: of step ``step`` of the path, 0 is the closed one.

    Attributes:
        thresholds: per early exit; choice: exit of every calibration photo, [n]; loss: mean over them or their groups.
        bound: upper confidence bound of the expected loss at level delta, were this the only step.
        passed: steps of the path that passed, the closed one not counted.
        photos_needed: where none passed, how many calibration photos (or groups) would certify the first open step if
            they lost what these did; None where no number would.
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
    """Thresholds of all exits from everything closed to ever cheaper ones, [steps, early exits].

    The path is what no other combination beats in mean loss and mean cost, on photos that are not those of the
    calibration; so it is fixed before these are looked at, and each step may be tested at the whole level.

    Args:
        confidences: per early exit [m]; losses: [m, exits].
        costs: thresholds [M, early exits] to the exits' costs with them [M, exits].
        grid: the combinations to choose from; by default all of `threshold_grid`.
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
    """Walk along ``path`` as long as every step's risk is at most ``epsilon`` with probability 1 - ``delta``, and take
    the step that costs the calibration photos least.

    The promise is one for all steps that passed at once, so any of them may be chosen, by the same photos too.

    Args:
        path: from :func:`safe_to_bold`; its first step is closed.
        confidences: per early exit, of the calibration photos [n]; losses: of these, [n, exits] in [0, 1].
        costs: of the exits at each step of the path, [steps, exits].
        bound: a key of `BOUNDS`, chosen beforehand.
        seed: of the order in which the photos are tested; None: as they come, if that is a random order already. The
            betting bound stops at its best moment: of data sets one behind the other the first alone would decide.
        groups: of photos that go together, numbered from 0, [n]: the mean over the photos of a group is one loss, and
            the promise is for the draw of groups. None: every photo is a group.
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

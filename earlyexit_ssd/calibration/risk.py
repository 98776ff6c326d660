"""Risk control: find the cheapest thresholds whose expected loss is within a limit, with high probability.

The *risk* of thresholds is the expected loss of a photo. ``confidences`` are one array [n] per early exit. ``losses``
[n, exits] have the full path last.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.bounds import BOUNDS, photos_needed, upper_bound
from earlyexit_ssd.calibration.thresholds import CurvePoint, Grid, choose, pareto_path, threshold_grid
from earlyexit_ssd.config import CLOSED

LONGEST_PATH = 80  # largest number of steps of a path: more steps take time, fewer leave larger gaps between thresholds
CURVE_STEPS = 12  # number of steps in a report; the bound of each takes a tenth of a second


@dataclass(frozen=True)
class Certified:
    """The cheapest thresholds that passed the test of :func:`certify`."""

    step: int  # index of the thresholds on the path; step 0, with all exits closed, is not tested and always passes
    point: CurvePoint  # its ``bound`` has level delta as if only this step were tested
    choice: np.ndarray  # exit of every calibration photo, [n]
    passed: int  # number of steps that passed, without step 0
    # estimate of the number of blocks with which step 1 passes; None if a step passed, or if no number suffices
    photos_needed: int | None
    curve: tuple[CurvePoint, ...]  # up to `CURVE_STEPS` steps of the path; empty without ``with_curve``


def threshold_path(
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: Callable[[np.ndarray], np.ndarray],
    grid: Grid | None = None,
) -> np.ndarray:
    """Return the combinations of thresholds that `certify` tests, in this order: [steps, early exits].

    Step 0 has all exits closed. The other steps are up to `LONGEST_PATH` combinations of ``grid`` that are
    Pareto-optimal in mean loss and mean cost on the training photos, by rising loss. No calibration photo influences
    the order, so every step is tested at level delta.

    ``confidences`` and ``losses`` are of the training photos. ``costs`` is a function from thresholds [M, early exits]
    to the costs of the exits [M, exits]. ``grid`` is by default the `threshold_grid` of the training photos.
    """
    grid = grid or threshold_grid(confidences)
    path = pareto_path(grid.mean(losses), grid.mean_cost(costs(grid.thresholds)))
    thresholds = grid.thresholds[path[_spread(len(path), LONGEST_PATH)]]
    closed = np.full((1, len(confidences)), CLOSED, dtype=np.float32)
    return np.concatenate([closed, thresholds[(thresholds < CLOSED).any(1)]])


def certify(
    path: np.ndarray,
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: np.ndarray,
    epsilon: float,
    delta: float,
    method: str = "betting",
    seed: int | None = 0,
    blocks: np.ndarray | None = None,
    with_curve: bool = False,
) -> Certified:
    """Test the steps of ``path`` in order until one fails, and return the cheapest step that passed.

    A step passes if the p-value of the null hypothesis "risk > ``epsilon``" is at most ``delta``. With probability at
    least 1 - ``delta`` the risk of every step that passed is at most ``epsilon`` (Angelopoulos et al. 2021, "Learn then
    test", fixed-sequence testing). So one of these steps may be chosen by its cost on the same photos.

    Args:
        path: thresholds [steps, early exits] from :func:`threshold_path`.
        confidences, losses: of the n calibration photos; losses are in [0, 1].
        costs: costs of the exits at each step, [steps, exits].
        epsilon, delta: limit of the risk, and the largest probability that the guarantee fails, in (0, 1).
        method: name of the test, a key of `BOUNDS`. It must be chosen before the photos are used.
        seed: seed of the random order of the blocks, on which the betting test depends. None keeps the order of the
            blocks, which must then be random.
        blocks: index of the block of each photo, from 0, [n]. The mean loss of a block is one draw, so the guarantee
            holds if blocks are independent draws. None: every photo is a block.
        with_curve: compute ``curve``.
    """
    p_value, photos = BOUNDS[method], np.arange(len(losses))
    blocks = photos if blocks is None else blocks
    sizes = np.bincount(blocks)
    order = np.arange(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes))
    choices = [choose(confidences, thresholds) for thresholds in path]
    block_losses = [(np.bincount(blocks, losses[photos, choice]) / sizes)[order] for choice in choices]
    mean_costs = [float(cost[choice].mean()) for cost, choice in zip(costs, choices, strict=True)]

    def point(step: int) -> CurvePoint:
        draws = block_losses[step]
        bound = upper_bound(draws, delta, p_value) if step else 0.0  # the full path loses nothing
        return CurvePoint(tuple(map(float, path[step])), mean_costs[step], float(draws.mean()), bound)

    # later steps are not tested
    passed = len(list(itertools.takewhile(lambda draws: p_value(draws, epsilon) <= delta, block_losses[1:])))
    needed = photos_needed(block_losses[1], epsilon, delta, p_value) if passed == 0 and len(path) > 1 else None
    chosen = min(range(passed + 1), key=mean_costs.__getitem__)
    shown = _spread(len(path), CURVE_STEPS).tolist() if with_curve else []
    return Certified(chosen, point(chosen), choices[chosen], passed, needed, tuple(map(point, shown)))


def _spread(count: int, limit: int) -> np.ndarray:
    """Return at most ``limit`` indices below ``count``, evenly spaced, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, limit).round().astype(int))

"""Thresholds of all exits at once: every combination of candidates, and which of them are worth a look."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError

LARGEST_GRID = 20_000
"""Combinations that are looked at, at most; the candidates of each exit become fewer with more exits."""


MOST_EXITS = 5
"""Early exits whose thresholds are searched jointly; with more of them the grid is too coarse to mean anything."""


@dataclass(frozen=True)
class Grid:
    """Combinations of thresholds [M, early exits] and, for each, the exit that every photo takes, int8 [M, n]."""

    thresholds: np.ndarray
    choices: np.ndarray

    def mean(self, per_exit: np.ndarray) -> np.ndarray:
        """[M]: the mean over the photos of what their exit has in ``per_exit`` [n, exits]."""
        rows = np.arange(self.choices.shape[1])
        return np.stack([per_exit[rows, choice].mean() for choice in self.choices])

    def mean_cost(self, costs: np.ndarray) -> np.ndarray:
        """[M]: the mean cost of the photos; ``costs`` [M, exits], since a closed exit makes the deeper ones cheaper."""
        return np.stack([row[choice].mean() for row, choice in zip(costs, self.choices, strict=True)])


def choose(confidences: Sequence[np.ndarray], thresholds: Sequence[float]) -> np.ndarray:
    """The exit of every photo, int8 [n]: the first whose confidence reaches its threshold, else the full path.

    Args:
        confidences: per early exit [n].
        thresholds: one per early exit.
    """
    choice = np.full(len(confidences[0]), len(confidences), dtype=np.int8)
    for index in reversed(range(len(confidences))):
        # as the router compares: both in fp32
        choice[confidences[index].astype(np.float32) >= np.float32(thresholds[index])] = index
    return choice


def open_sets(exits: int) -> Iterator[tuple[list[float], np.ndarray]]:
    """Every set of open early exits: thresholds (0, or `CLOSED`), and the exits that photos can then take, the full
    path the last of them. A closed exit makes the deeper ones cheaper, so costs differ from set to set."""
    for flags in itertools.product((True, False), repeat=exits):
        yield [0.0 if flag else CLOSED for flag in flags], np.flatnonzero([*flags, True])


def candidates(confidence: np.ndarray, count: int) -> np.ndarray:
    """Thresholds at ``count`` even quantiles of an exit's confidences [n], halfway between neighbouring values so that
    rounding moves nobody, the highest first; before them `CLOSED`, last 0: everybody leaves."""
    values = np.unique(confidence)
    halfway = (values[1:] + values[:-1]) / 2
    inner = np.unique(np.quantile(halfway, np.linspace(0, 1, count), method="nearest")) if len(halfway) else halfway
    return np.array([CLOSED, *inner[::-1], 0.0], dtype=np.float32)


def threshold_grid(confidences: Sequence[np.ndarray], count: int | None = None) -> Grid:
    """Every combination of the exits' `candidates`, ``count`` of each; by default as many as `LARGEST_GRID` allows."""
    exits = len(confidences)
    require_few(exits)
    count = count or min(60, int(LARGEST_GRID ** (1 / exits)) - 2)
    axes = [candidates(confidence, count) for confidence in confidences]
    thresholds = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    choices = np.stack([choose(confidences, row) for row in thresholds])
    _, first = np.unique(choices, axis=0, return_index=True)
    return Grid(thresholds[np.sort(first)], choices[np.sort(first)])


def require_few(exits: int) -> None:
    """Raise where thresholds of so many early exits are not searched."""
    if exits > MOST_EXITS:
        raise EarlyExitError(
            f"{exits} early exits: thresholds are searched jointly over {MOST_EXITS} at most; take a model with fewer "
            "(EXITS.LAYERS)"
        )


def pareto_path(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the combinations that none beats in both ``loss`` [M] and ``cost`` [M], by rising loss."""
    order = np.lexsort((cost, loss))
    best = np.minimum.accumulate(np.concatenate([[np.inf], cost[order][:-1]]))
    return order[cost[order] < best]


def cheapest_within(loss: np.ndarray, cost: np.ndarray, limit: float) -> int | None:
    """The combination of least cost whose loss is at most ``limit``; of equal ones the one of least loss."""
    allowed = np.flatnonzero(loss <= limit)
    return int(allowed[np.lexsort((loss[allowed], cost[allowed]))[0]]) if len(allowed) else None

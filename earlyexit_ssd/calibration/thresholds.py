"""Thresholds of all exits at once: every combination of candidates, and which of them are worth a look."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.progress import progress

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
    """The exit of every photo, int8 [n]: the first whose confidence (per early exit [n]) reaches its threshold, else
    the full path."""
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
        limit = f"thresholds are searched jointly over {MOST_EXITS} at most"
        raise EarlyExitError(f"{exits} early exits: {limit}; take a model with fewer (EXITS.LAYERS)")


def pareto_path(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the combinations that none beats in both ``loss`` [M] and ``cost`` [M], by rising loss."""
    order = np.lexsort((cost, loss))
    best = np.minimum.accumulate(np.concatenate([[np.inf], cost[order][:-1]]))
    return order[cost[order] < best]


def cheapest_within(loss: np.ndarray, cost: np.ndarray, limit: float) -> int | None:
    """The combination of least cost whose loss is at most ``limit``; of equal ones the one of least loss."""
    allowed = np.flatnonzero(loss <= limit)
    return int(allowed[np.lexsort((loss[allowed], cost[allowed]))[0]]) if len(allowed) else None


STEPS, HALVINGS = 150, 10
"""Of the descent, and of the interval that holds the price of cost."""
WIDTHS = (0.1, 0.01)
"""First and last width of the soft exit, in ranks (see `learn_thresholds`); it shrinks geometrically."""
BUDGETS = 20
"""Mean costs, from that of the cheapest exit to that of the full path alone, that `learned_grid` learns for."""


def learn_open_exits(
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs_with: Callable[[Sequence[float]], np.ndarray],
    budget: float,
) -> np.ndarray:
    """Thresholds [early exits] as `learn_thresholds` finds them, for the set of open exits with the least mean loss: a
    closed exit makes the deeper ones cheaper, which no gradient sees.

    Args:
        confidences: per early exit [n]; losses: [n, exits]; budget: mean cost, at least that of one of the exits.
        costs_with: thresholds (0, or `CLOSED`) of the early exits to the costs [exits].
    """
    best, least = None, np.inf
    for closed, kept in open_sets(len(confidences)):
        thresholds, costs = np.array(closed, dtype=np.float32), costs_with(closed)
        opened = kept[:-1]
        if len(opened):
            seen = [confidences[index] for index in opened]
            thresholds[opened] = learn_thresholds(seen, losses[:, kept], costs[kept], budget)
        choice = choose(confidences, thresholds)
        loss = losses[np.arange(len(choice)), choice].mean()
        if costs[choice].mean() <= budget * (1 + 1e-9) and loss < least:
            best, least = thresholds, loss
    if best is None:
        raise EarlyExitError(f"no exit has a mean cost of {budget:g} or less; give a larger budget")
    return best


def learned_grid(
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs_with: Callable[[Sequence[float]], np.ndarray],
    more_budgets: Sequence[float] = (),
) -> Grid:
    """Thresholds as `learn_open_exits` finds them at even mean costs, all exits closed first, as a grid to choose from.

    ``more_budgets`` are mean costs to learn for beside the even ones; those that no exit has are left out.
    """
    closed = [CLOSED] * len(confidences)
    dearest = float(costs_with(closed)[-1])
    least = min(float(costs_with(flags)[kept[0]]) for flags, kept in open_sets(len(confidences)))
    budgets = {*np.linspace(least, dearest, BUDGETS).tolist(), *(one for one in more_budgets if one >= least)}
    found = [closed]
    for budget in progress(sorted(budgets, reverse=True), desc="learn thresholds"):
        found.append(learn_open_exits(confidences, losses, costs_with, budget).tolist())
    thresholds = np.unique(np.array(found, dtype=np.float32), axis=0)
    return Grid(thresholds, np.stack([choose(confidences, row) for row in thresholds]))


def learn_thresholds(
    confidences: Sequence[np.ndarray], losses: np.ndarray, costs: np.ndarray, budget: float
) -> np.ndarray:
    """Thresholds [early exits] whose mean cost is at most ``budget``, at the lowest price of cost that gives it.

    Confidences (per early exit [n]) are replaced by their ranks in [0, 1] over all photos of an exit, so that one width
    fits every policy. ``losses`` are [n, exits], ``costs`` those of the exits with all of them open.
    """
    ranks = torch.stack([_ranks(values) for values in confidences], dim=1)
    dearest, losses = float(np.max(costs)), torch.from_numpy(losses.astype(np.float32))
    shares = torch.from_numpy(np.asarray(costs, dtype=np.float32)) / dearest
    low, high, best = 0.0, 10.0, torch.zeros(len(confidences))
    for _ in range(HALVINGS):
        price = (low + high) / 2
        thresholds = torch.full((len(confidences),), 0.5, requires_grad=True)
        optimizer = torch.optim.Adam([thresholds], lr=0.03)
        for step in range(STEPS):
            width = WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** (step / STEPS)
            optimizer.zero_grad()
            (soft_shares(ranks, thresholds, width) * (losses + price * shares)).sum(1).mean().backward()
            optimizer.step()
        thresholds = thresholds.detach()
        leaves = torch.cat([ranks >= thresholds, torch.ones(len(ranks), 1, dtype=torch.bool)], dim=1)
        if float(shares[leaves.float().argmax(1)].mean()) * dearest <= budget:
            high, best = price, thresholds
        else:
            low = price
    pairs = zip(confidences, best.tolist(), strict=True)
    return np.array([_unrank(values, rank) for values, rank in pairs], dtype=np.float32)


def soft_shares(ranks: Tensor, thresholds: Tensor, width: float) -> Tensor:
    """Probabilities of the exits, the full path last: [n, early exits] to [n, early exits + 1]."""
    leaves = torch.sigmoid((ranks - thresholds) / width)
    stays = torch.cat([torch.ones(len(ranks), 1), (1 - leaves).cumprod(1)], dim=1)
    return torch.cat([leaves * stays[:, :-1], stays[:, -1:]], dim=1)


def _ranks(values: np.ndarray) -> Tensor:
    """Share of the photos with a smaller value, plus half of those with the same, [n]."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return torch.from_numpy(((below + upto) / (2 * len(values))).astype(np.float32))


def _unrank(values: np.ndarray, rank: float) -> float:
    """The least confidence of a photo that leaves where those of this rank or a higher one do; `CLOSED` where none may
    (a confidence below 0 is that of an exit at which nobody leaves)."""
    leaving = values[(_ranks(values).numpy() >= np.float32(rank)) & (values >= 0)]
    return float(leaving.min()) if len(leaving) else CLOSED

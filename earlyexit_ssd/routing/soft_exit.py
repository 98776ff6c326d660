"""Thresholds learnt by gradient: a soft exit and a term for the cost, instead of a search over combinations.

A photo leaves exit k with probability s_k = sigmoid((c_k - t_k) / width), c_k its confidence, so it takes exit k with
q_k = s_k (1 - s_1) ... (1 - s_{k-1}); the thresholds t minimise the mean of sum_k q_k (loss_k + price * cost_k). The
soft exit follows Bolukbasi et al. 2017, "Adaptive neural networks for efficient inference", section 3; how it compares
with the search: benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.progress import progress
from earlyexit_ssd.routing.search import Grid, choose, open_sets

STEPS = 150
WIDTHS = (0.1, 0.01)
"""First and last width of the soft exit, in ranks (see `learn_thresholds`); it shrinks geometrically."""
BUDGETS = 20
"""Mean costs, from that of the cheapest exit to that of the full path alone, that `learned_grid` learns for."""
HALVINGS = 10
"""Of the interval that holds the price."""


def learn_open_exits(
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs_with: Callable[[Sequence[float]], np.ndarray],
    budget: float,
) -> np.ndarray:
    """Thresholds [early exits] as `learn_thresholds` finds them, for the set of open exits with the least mean loss: a
    closed exit makes the deeper ones cheaper, which no gradient sees.

    Args:
        confidences: per early exit [n].
        losses: per photo and exit, [n, exits].
        costs_with: thresholds (0, or `CLOSED`) of the early exits to the costs [exits].
        budget: mean cost; at least that of one of the exits.
    """
    best, least = None, np.inf
    for closed, kept in open_sets(len(confidences)):
        thresholds, costs = np.array(closed, dtype=np.float32), costs_with(closed)
        opened = kept[:-1]
        if len(opened):
            thresholds[opened] = learn_thresholds(
                [confidences[index] for index in opened], losses[:, kept], costs[kept], budget
            )
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

    Args:
        confidences, losses, costs_with: as there.
        more_budgets: mean costs to learn for beside the even ones; those that no exit has are left out.
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

    Confidences are replaced by their ranks in [0, 1] over all photos of an exit, so that one width fits every policy.

    Args:
        confidences: per early exit [n].
        losses: per photo and exit, [n, exits].
        costs: of the exits, [exits], with all of them open.
        budget: mean cost, in the unit of ``costs``.
    """
    ranks = torch.stack([_ranks(values) for values in confidences], dim=1)
    shares = torch.from_numpy(np.asarray(costs, dtype=np.float32)) / float(np.max(costs))
    low, high, found = 0.0, 10.0, None
    for _ in range(HALVINGS):
        price = (low + high) / 2
        thresholds = _descend(ranks, torch.from_numpy(losses.astype(np.float32)), shares, price)
        if float(shares[_hard(ranks, thresholds)].mean()) * float(np.max(costs)) <= budget:
            high, found = price, thresholds
        else:
            low = price
    if found is None:
        found = torch.zeros(len(confidences))
    return np.array(
        [_unrank(values, float(rank)) for values, rank in zip(confidences, found, strict=True)], dtype=np.float32
    )


def soft_shares(ranks: Tensor, thresholds: Tensor, width: float) -> Tensor:
    """Probabilities of the exits, the full path last: [n, early exits] to [n, early exits + 1]."""
    leaves = torch.sigmoid((ranks - thresholds) / width)
    stays = torch.cat([torch.ones(len(ranks), 1), (1 - leaves).cumprod(1)], dim=1)
    return torch.cat([leaves * stays[:, :-1], stays[:, -1:]], dim=1)


def _descend(ranks: Tensor, losses: Tensor, costs: Tensor, price: float) -> Tensor:
    thresholds = torch.full((ranks.shape[1],), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([thresholds], lr=0.03)
    for step in range(STEPS):
        width = WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** (step / STEPS)
        optimizer.zero_grad()
        (soft_shares(ranks, thresholds, width) * (losses + price * costs)).sum(1).mean().backward()
        optimizer.step()
    return thresholds.detach()


def _hard(ranks: Tensor, thresholds: Tensor) -> Tensor:
    """The exit that each photo takes without softness, [n]."""
    leaves = torch.cat([ranks >= thresholds, torch.ones(len(ranks), 1, dtype=torch.bool)], dim=1)
    return leaves.float().argmax(1)


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

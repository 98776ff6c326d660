"""The lines that a router is held against at equal mean cost: a coin and an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices
from earlyexit_ssd.evaluation.choices import ExitMatches, ap_of_choice
from earlyexit_ssd.routing.search import open_sets

COIN_TOSSES = 20
BOOTSTRAP_TOSSES = 5
"""Of the coin in every resample; photos, not tosses, are what an interval is about."""
ORACLE_BUDGETS = 8


@dataclass(frozen=True)
class Line:
    """AP and AP50 in [0, 1], and the mean cost at which they were reached."""

    cost: float
    AP: float | None
    AP50: float | None


def line_of(matches: ExitMatches, choice: np.ndarray, costs: np.ndarray) -> Line:
    """Where the photos take these exits, [n]; ``costs`` [exits]."""
    found = ap_of_choice(matches, choice)
    return Line(float(costs[choice].mean()), found.AP, found.AP50)


def coin(matches: ExitMatches, choice: np.ndarray, costs: np.ndarray, seed: int = 0) -> Line:
    """Exits in the same shares as ``choice`` [n], but given to the photos by chance: the mean of `COIN_TOSSES`."""
    found = [ap_of_choice(matches, toss) for toss in tosses(choice, COIN_TOSSES, seed)]
    values = [
        None if any(value is None for value in figures) else float(np.mean(figures))
        for figures in ([toss.AP for toss in found], [toss.AP50 for toss in found])
    ]
    return Line(float(costs[choice].mean()), *values)


def tosses(choice: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """``choice`` [n] given to the photos by chance, ``count`` times."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(choice) for _ in range(count)]


def oracle_choice(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Exits [n] with the least mean error at a mean cost of at most ``budget``, chosen photo by photo with the labels.

    Each photo takes the exit of least error + price * cost, the cheaper of equal ones; the price is the smallest, by
    bisection, at which the budget holds (the Lagrangian of the problem). Where photos that stand on the edge of the
    last price fit into the rest of the budget, they take the dearer exit.

    Args:
        errors: [n, exits], such as those of `errors_against_labels`.
        costs: [exits], the first the cheapest.
        budget: at least the cheapest cost.
    """
    if len(costs) == 1:
        return np.zeros(len(errors), dtype=np.int64)
    scale = costs / costs.max()

    def choose(price: float) -> np.ndarray:
        return (errors + price * scale).argmin(1)  # argmin takes the first of equal ones

    low, high = 0.0, 1.0 + float(np.ptp(errors)) / max(float(np.diff(np.sort(scale)).min()), 1e-9)
    if costs[choose(low)].mean() <= budget:
        return choose(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs[choose(middle)].mean() > budget else (low, middle)
    choice, dearer = choose(high), choose(low)
    for photo in np.flatnonzero(choice != dearer):
        change = (costs[dearer[photo]] - costs[choice[photo]]) / len(choice)
        if costs[choice].mean() + change <= budget:
            choice[photo] = dearer[photo]
    return choice


def oracle_over_exits(
    errors: np.ndarray,
    costs_with: Callable[[Sequence[float]], np.ndarray],
    budget: float,
    value: Callable[[np.ndarray], float | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Exits [n] and their costs [exits]: of the choices of least error, at `ORACLE_BUDGETS` mean costs up to
    ``budget`` and for every set of open exits (a closed one makes the deeper ones cheaper), the one of most ``value``.

    The least mean error of the photos is not always the most AP, and an oracle need not spend all that it may; so it
    is at least as good as any exit alone that costs no more.

    Args:
        errors: [n, exits].
        costs_with: thresholds (0, or `CLOSED`) of the early exits to the costs [exits].
        budget: of the mean cost.
        value: exits [n] to what counts, such as AP50.
    """
    best, most = None, (-np.inf, -np.inf)
    budget *= 1 + 1e-9  # a mean over photos that all cost the budget rounds
    for thresholds, usable in open_sets(errors.shape[1] - 1):
        costs = costs_with(thresholds)
        if costs[usable[0]] > budget:
            continue
        for level in np.linspace(costs[usable[0]], budget, ORACLE_BUDGETS):
            choice = usable[oracle_choice(errors[:, usable], costs[usable], level)]
            worth = (value(choice) or 0.0, -costs[choice].mean())
            if worth > most:
                best, most = (choice, costs), worth
    return best


def gap_closed(router: Line, chance: Line, oracle: Line) -> float | None:
    """(router - coin) / (oracle - coin) in AP50: 0 as good as chance, 1 as the oracle; None where the oracle gains
    nothing."""
    if None in (router.AP50, chance.AP50, oracle.AP50) or oracle.AP50 - chance.AP50 < 1e-6:
        return None
    return (router.AP50 - chance.AP50) / (oracle.AP50 - chance.AP50)


def pooled_gap(leads: Sequence[np.ndarray | Sequence[float]]) -> np.ndarray:
    """The gap closed over several budgets at once: the sum of the router's leads over the sum of the oracle's.

    A budget at which the oracle has little to gain counts little, while a mean of the budgets' own gaps divides by it.

    Args:
        leads: per budget (router - coin, oracle - coin) in AP50, [2] or, for draws of the photos, [2, resamples].

    Returns:
        a scalar or [resamples]; NaN where the oracle gains nothing.
    """
    router, oracle = np.sum(np.asarray(leads, dtype=float), axis=0)
    return router / np.where(oracle < 1e-6, np.nan, oracle)


def resampled_leads(
    matches: ExitMatches, choice: np.ndarray, oracles: Sequence[np.ndarray], resamples: int = 200, seed: int = 0
) -> list[np.ndarray]:
    """Per oracle, what router and oracle have more AP50 than a coin in bootstrap draws of the photos, [2, resamples].

    Args:
        choice: the router's exits, [n].
        oracles: each one's exits, [n].
    """
    compared = [choice, *tosses(choice, BOOTSTRAP_TOSSES, seed), *oracles]
    router, *others = (draws.AP50 for draws in bootstrap_choices(matches, compared, resamples, seed))
    chance = np.mean(others[:BOOTSTRAP_TOSSES], axis=0)
    return [np.stack([router - chance, best - chance]) for best in others[BOOTSTRAP_TOSSES:]]


def overthinking(errors: np.ndarray) -> list[float]:
    """Per early exit the share of the photos that it gets wholly right and the full path does not (Kaya et al. 2019,
    "Shallow-deep networks"); ``errors`` [n, exits]."""
    right = errors == 0
    return [float((right[:, index] & ~right[:, -1]).mean()) for index in range(errors.shape[1] - 1)]

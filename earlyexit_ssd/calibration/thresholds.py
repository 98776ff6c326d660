"""Find the thresholds of all exits jointly, on a grid or by gradient descent. Fit temperatures by maximum likelihood.

An exit is *closed* if its threshold is `CLOSED`, which no confidence reaches. The branch of a closed exit is not
computed, so all deeper exits cost less. In all functions ``confidences`` are one array [n] per early exit. ``losses``
[n, exits] and ``costs`` [exits] have the full path last.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.console import progress
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.routing.policies import object_probability

logger = logging.getLogger(__name__)

LARGEST_GRID = 20_000  # limit for the number of combinations; with more exits, each exit gets fewer candidates
MOST_EXITS = 5  # largest number of early exits; with more exits the grid would be too coarse


@dataclass(frozen=True)
class Grid:
    """M combinations of thresholds, and the exit that each photo takes with each combination."""

    thresholds: np.ndarray  # [M, early exits]
    choices: np.ndarray  # int8 [M, n]

    def mean(self, per_exit: np.ndarray) -> np.ndarray:
        """Return the means of ``per_exit`` [n, exits] at the exits that the photos take, [M]."""
        photos = np.arange(self.choices.shape[1])
        return np.stack([per_exit[photos, choice].mean() for choice in self.choices])

    def mean_cost(self, costs: np.ndarray) -> np.ndarray:
        """Return the mean costs of a photo, [M]. ``costs`` [M, exits] has a row per combination, since costs depend on
        which exits are closed."""
        return np.stack([row[choice].mean() for row, choice in zip(costs, self.choices, strict=True)])


@dataclass(frozen=True)
class CurvePoint:
    """One combination of thresholds on the calibration photos."""

    thresholds: tuple[float, ...]
    cost: float  # mean over the photos
    loss: float  # loss of AP50 or mean loss of a photo, depending on the target
    bound: float | None = None  # upper bound of ``loss``; None if it was not computed


def choose(confidences: Sequence[np.ndarray], thresholds: Sequence[float]) -> np.ndarray:
    """Return the exit of every photo, int8 [n]: the first exit whose confidence reaches its threshold, otherwise the
    full path. ``confidences`` may include those of the full path; they are ignored."""
    choice = np.full(len(confidences[0]), len(thresholds), dtype=np.int8)
    for index in reversed(range(len(thresholds))):
        # both in fp32, as in the router
        choice[confidences[index].astype(np.float32) >= np.float32(thresholds[index])] = index
    return choice


def open_sets(exits: int) -> Iterator[tuple[list[float], np.ndarray]]:
    """Yield every set of open early exits, as thresholds (0 for an open exit, `CLOSED` for a closed exit) and as the
    indices of the open exits and the full path."""
    for is_open in itertools.product((True, False), repeat=exits):
        yield [0.0 if value else CLOSED for value in is_open], np.flatnonzero([*is_open, True])


def candidate_thresholds(confidence: np.ndarray, count: int) -> np.ndarray:
    """Return candidates for an exit's threshold from its confidences [n], in falling order.

    The first candidate is `CLOSED`, and the last is 0. The others lie halfway between neighbouring confidences, so that
    rounding changes no decision. At most ``count`` of them are kept, evenly by rank.
    """
    values = np.unique(confidence)
    halfway = (values[1:] + values[:-1]) / 2
    inner = np.unique(np.quantile(halfway, np.linspace(0, 1, count), method="nearest")) if len(halfway) else halfway
    return np.array([CLOSED, *inner[::-1], 0.0], dtype=np.float32)


def threshold_grid(confidences: Sequence[np.ndarray], count: int | None = None) -> Grid:
    """Return all combinations of the `candidate_thresholds` of the exits. Of combinations with which every photo takes
    the same exit, only one is kept. By default ``count`` is as large as `LARGEST_GRID` allows, and at most 60."""
    exits = len(confidences)
    require_few_exits(exits)
    count = count or min(60, int(LARGEST_GRID ** (1 / exits)) - 2)
    axes = [candidate_thresholds(confidence, count) for confidence in confidences]
    thresholds = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    choices = np.stack([choose(confidences, row) for row in thresholds])
    _, first = np.unique(choices, axis=0, return_index=True)
    return Grid(thresholds[np.sort(first)], choices[np.sort(first)])


def require_few_exits(exits: int) -> None:
    """Raise an EarlyExitError if there are more than `MOST_EXITS` early exits."""
    if exits > MOST_EXITS:
        count = f"the model has {exits} early exits, expected at most {MOST_EXITS}"
        raise EarlyExitError(f"{count} for a search of thresholds; use a model with fewer exits (EXITS.LAYERS)")


def pareto_path(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the indices of the Pareto-optimal combinations of ``loss`` [M] and ``cost`` [M], by rising loss."""
    order = np.lexsort((cost, loss))
    best = np.minimum.accumulate(np.concatenate([[np.inf], cost[order][:-1]]))
    return order[cost[order] < best]


def best_within(bounded: np.ndarray, minimised: np.ndarray, limit: float) -> int | None:
    """Return the index of the smallest ``minimised`` [M] among those with ``bounded`` [M] at most ``limit``. A tie goes
    to the smallest ``bounded``. None if all values of ``bounded`` are above the limit."""
    allowed = np.flatnonzero(bounded <= limit)
    return int(allowed[np.lexsort((bounded[allowed], minimised[allowed]))[0]]) if len(allowed) else None


STEPS = 150  # steps of Adam per fit
HALVINGS = 10  # bisection steps for the weight of the cost (a Lagrange multiplier)
WIDTHS = (0.1, 0.01)
"""First and last width, in ranks, of the sigmoid that replaces a threshold during a fit. It shrinks geometrically."""
BUDGETS = 20  # number of budgets of `learned_grid`, from the smallest possible mean cost to that of the full path


CostsWith = Callable[[Sequence[float]], np.ndarray]
"""A function from thresholds of the early exits (0 or `CLOSED`) to the costs of the exits."""


def learn_open_exits(
    confidences: Sequence[np.ndarray], losses: np.ndarray, costs_with: CostsWith, budget: float
) -> np.ndarray:
    """Learn thresholds [early exits] with the smallest mean loss at a mean cost of at most ``budget``.

    The cost that a closed exit saves has no gradient, so each set of open exits is tried. Raises an EarlyExitError if
    no exit is within the budget.
    """
    candidates = []
    for start, usable in open_sets(len(confidences)):
        thresholds, costs = np.array(start, dtype=np.float32), costs_with(start)
        opened = usable[:-1]
        if len(opened):
            open_confidences = [confidences[index] for index in opened]
            thresholds[opened] = learn_thresholds(open_confidences, losses[:, usable], costs[usable], budget)
        choice = choose(confidences, thresholds)
        if costs[choice].mean() <= budget * (1 + 1e-9):
            candidates.append((losses[np.arange(len(choice)), choice].mean(), thresholds))
    if not candidates:
        raise EarlyExitError(f"no exit has a mean cost of {budget:g} or less; allow a larger budget")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def learned_grid(
    confidences: Sequence[np.ndarray], losses: np.ndarray, costs_with: CostsWith, more_budgets: Sequence[float] = ()
) -> Grid:
    """Learn thresholds for `BUDGETS` budgets with `learn_open_exits`. The grid also has all exits closed.

    ``more_budgets`` are additional budgets (mean costs). Budgets below the smallest possible mean cost are left out.
    """
    all_closed = [CLOSED] * len(confidences)
    full_cost = float(costs_with(all_closed)[-1])
    lowest = min(costs_with(start)[choose(confidences, start)].mean() for start, _ in open_sets(len(confidences)))
    budgets = {*np.linspace(lowest, full_cost, BUDGETS).tolist(), *(cost for cost in more_budgets if cost >= lowest)}
    bar = progress(sorted(budgets), desc="learn thresholds")
    learned = [learn_open_exits(confidences, losses, costs_with, budget).tolist() for budget in bar]
    thresholds = np.unique(np.array([all_closed, *learned], dtype=np.float32), axis=0)
    return Grid(thresholds, np.stack([choose(confidences, row) for row in thresholds]))


def learn_thresholds(
    confidences: Sequence[np.ndarray], losses: np.ndarray, costs: np.ndarray, budget: float
) -> np.ndarray:
    """Learn thresholds [early exits] of mean cost at most ``budget`` by gradient descent (Bolukbasi et al. 2017).

    Adam minimises the mean over the photos of sum_e p_e (loss_e + weight * cost_e / max cost), where p_e is the
    probability of exit e (`exit_probabilities`). Bisection finds the smallest weight at which the mean cost is within
    the budget. If there is no such weight, all photos leave at the first exit. Confidences are replaced by their ranks
    in [0, 1], so that one width of the sigmoid fits every policy. All exits are open.
    """
    ranks = torch.stack([_ranks(values) for values in confidences], dim=1)
    highest_cost, losses = float(np.max(costs)), torch.from_numpy(losses.astype(np.float32))
    relative = torch.from_numpy(np.asarray(costs, dtype=np.float32)) / highest_cost
    low, high, best = 0.0, 10.0, torch.zeros(len(confidences))
    for _ in range(HALVINGS):
        weight = (low + high) / 2
        thresholds = torch.full((len(confidences),), 0.5, requires_grad=True)
        optimizer = torch.optim.Adam([thresholds], lr=0.03)
        for step in range(STEPS):
            width = WIDTHS[0] * (WIDTHS[1] / WIDTHS[0]) ** (step / STEPS)
            optimizer.zero_grad()
            (exit_probabilities(ranks, thresholds, width) * (losses + weight * relative)).sum(1).mean().backward()
            optimizer.step()
        thresholds = thresholds.detach()
        leaves = torch.cat([ranks >= thresholds, torch.ones(len(ranks), 1, dtype=torch.bool)], dim=1)
        if float(relative[leaves.float().argmax(1)].mean()) * highest_cost <= budget:
            high, best = weight, thresholds
        else:
            low = weight
    pairs = zip(confidences, best.tolist(), strict=True)
    return np.array([_unrank(values, rank) for values, rank in pairs], dtype=np.float32)


def exit_probabilities(ranks: Tensor, thresholds: Tensor, width: float) -> Tensor:
    """Return the probabilities [n, early exits + 1] that a photo takes each exit, the full path last.

    A sigmoid replaces each threshold t: p_e = s_e prod_{i < e} (1 - s_i), where s = sigmoid((rank - t) / width).
    ``ranks`` are [n, early exits].
    """
    leaves = torch.sigmoid((ranks - thresholds) / width)
    stays = torch.cat([torch.ones(len(ranks), 1), (1 - leaves).cumprod(1)], dim=1)
    return torch.cat([leaves * stays[:, :-1], stays[:, -1:]], dim=1)


def _ranks(values: np.ndarray) -> Tensor:
    """Return the rank of each value in [0, 1], [n]: the share of smaller values plus half the share of equal values."""
    return torch.from_numpy(((rankdata(values) - 0.5) / len(values)).astype(np.float32))


def _unrank(values: np.ndarray, rank: float) -> float:
    """Return the smallest confidence whose rank is at least ``rank``; `CLOSED` if there is none. Negative confidences
    are ignored: the router gives -1 at an empty exit if the policy reads logits only."""
    leaving = values[(_ranks(values).numpy() >= np.float32(rank)) & (values >= 0)]
    return float(leaving.min()) if len(leaving) else CLOSED


BINS = 10  # number of bins of `Reliability`
CONTESTED_PROBABILITY = 0.05  # lowest object probability of a box that `contested_boxes` keeps
AT_BOUND = 0.01  # a temperature is at a bound if it is within this share of the bound


@dataclass(frozen=True)
class Reliability:
    """Mean confidence, accuracy and number of default boxes in each bin.

    A box's confidence is the probability of its most probable object class. The bins divide [0, 1] into `BINS` equal
    parts. ``expected_error`` is the expected calibration error, the sum over the bins of count / total * |accuracy -
    confidence| (Guo et al. 2017, equation 3).
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    expected_error: float


@dataclass(frozen=True)
class FittedTemperature:
    """One exit's temperature, and the exit's reliability on the photos of the fit, at temperature 1 (``before``) and at
    the fitted temperature (``after``)."""

    exit_name: str
    temperature: float
    before: Reliability
    after: Reliability


@torch.no_grad()
def contested_boxes(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return logits [M, C] and labels [M] of the default boxes that may show an object.

    These boxes are matched with an object, or have an object probability of at least `CONTESTED_PROBABILITY`. The other
    98 % are almost surely background. If they were kept, they would determine the temperature.

    ``batches`` are logits [N, A, C], not divided by a temperature, and labels [N, A], 0 for background.
    """
    kept_logits, kept_labels = [], []
    for logits, labels in batches:
        keep = (labels > 0) | (object_probability(logits) >= CONTESTED_PROBABILITY)
        kept_logits.append(logits[keep])
        kept_labels.append(labels[keep].long())
    return torch.cat(kept_logits), torch.cat(kept_labels)


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float]) -> float:
    """Return the temperature T in ``bounds`` that maximises the likelihood of the labels [M] under softmax(logits / T),
    [M, C] (temperature scaling, Guo et al. 2017, section 4.2). 1 if there is no box."""
    if not len(logits):
        return 1.0

    def negative_likelihood(temperature: float) -> float:
        return F.cross_entropy(logits / temperature, labels).item()

    return float(minimize_scalar(negative_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x)


def fit_exit(exit_name: str, logits: Tensor, labels: Tensor, bounds: tuple[float, float]) -> FittedTemperature:
    """Return the temperature of `fit_temperature` and the reliabilities. Warn if the temperature is at a bound."""
    temperature = fit_temperature(logits, labels, bounds)
    for bound in (bound for bound in bounds if abs(temperature - bound) <= AT_BOUND * bound):
        text = "temperature of %s is at its bound %g, so its probabilities are not calibrated"
        logger.warning(text, exit_name, bound)
    before, after = (reliability(logits, labels, divisor) for divisor in (1.0, temperature))
    return FittedTemperature(exit_name, temperature, before, after)


@torch.no_grad()
def reliability(logits: Tensor, labels: Tensor, temperature: float) -> Reliability:
    """Compute the reliability of softmax(logits / temperature), [M, C], on the labels [M]."""
    probability, label = (logits / temperature).softmax(-1)[..., 1:].max(-1)
    correct = (label + 1 == labels).double()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    count, confidence, accuracy = (
        torch.bincount(bins, weights=values, minlength=BINS)
        for values in (torch.ones_like(correct), probability.double(), correct)
    )
    confidence, accuracy = confidence / count.clamp(min=1), accuracy / count.clamp(min=1)
    error = (count * (accuracy - confidence).abs()).sum() / count.sum().clamp(min=1)
    return Reliability(tuple(confidence.tolist()), tuple(accuracy.tolist()), tuple(count.long().tolist()), error.item())

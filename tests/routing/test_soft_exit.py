import numpy as np
import pytest
import torch

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.routing.search import cheapest_within, choose
from earlyexit_ssd.routing.soft_exit import _unrank, learn_open_exits, learn_thresholds, learned_grid, soft_shares


def test_shares_by_hand():
    shares = soft_shares(torch.tensor([[0.5, 0.7]]), torch.tensor([0.5, 0.7 - np.log(3)]), width=1.0)
    assert shares[0].tolist() == pytest.approx([0.5, 0.5 * 0.75, 0.5 * 0.25])


def test_shares_harden():
    shares = soft_shares(torch.tensor([[0.2, 0.9], [0.8, 0.9], [0.2, 0.1]]), torch.tensor([0.5, 0.5]), width=1e-3)
    assert shares.round().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.fixture
def photos():
    """Half of the photos lose nothing at the exit, and its confidence says which."""
    generator = np.random.default_rng(0)
    easy = np.arange(200) < 100
    losses = np.stack([np.where(easy, 0.0, 1.0), np.zeros(200)], axis=1)
    return [np.where(easy, 0.9, 0.1) + 0.05 * generator.random(200)], losses, easy


def test_finds_the_photos_that_lose_nothing(photos):
    confidences, losses, easy = photos
    thresholds = learn_thresholds(confidences, losses, np.array([1.0, 3.0]), budget=2.0)
    choice = choose(confidences, thresholds)
    assert np.where(choice == 0, 1.0, 3.0).mean() <= 2.0
    assert (choice[easy] == 0).mean() > 0.95


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.5])
def test_keeps_the_budget(photos, budget):
    confidences, losses, _ = photos
    choice = choose(confidences, learn_thresholds(confidences, losses, np.array([1.0, 3.0]), budget))
    assert np.where(choice == 0, 1.0, 3.0).mean() <= budget + 0.02


def test_equal_confidences_leave_together_or_not_at_all():
    """Six photos of ten are equally sure; their rank is 0.7, so at 0.8 none of them leaves."""
    values = np.array([0.1, 0.2, 0.3, 0.4, *[1.0] * 6])
    assert _unrank(values, 0.8) == CLOSED
    assert _unrank(values, 0.7) == 1.0
    assert _unrank(values, 0.35) == pytest.approx(0.4)
    assert _unrank(values, -0.5) == pytest.approx(0.1)


def test_nobody_leaves_where_nobody_can():
    """A policy that looks at logits has -1 at an empty exit."""
    assert _unrank(np.full(5, -1.0), 0.0) == CLOSED


def test_a_closed_exit_makes_the_deeper_ones_affordable():
    """Exit 1 is always wrong and exit 2 always right; with exit 1 open exit 2 costs 3, closed 2."""
    confidences = [np.linspace(0, 1, 20), np.linspace(0, 1, 20)]
    losses = np.tile([1.0, 0.0, 0.0], (20, 1))

    def costs_with(thresholds):
        first, second = (threshold < CLOSED for threshold in thresholds)
        return np.array([1.0, 2.0 + first, 4.0 + first + second])

    thresholds = learn_open_exits(confidences, losses, costs_with, budget=2.0)
    assert thresholds[0] == CLOSED
    assert choose(confidences, thresholds).tolist() == [1] * 20
    with pytest.raises(EarlyExitError, match="no exit has a mean cost of 0.5 or less"):
        learn_open_exits(confidences, losses, costs_with, budget=0.5)


def test_a_grid_of_learnt_thresholds_goes_from_closed_to_cheapest(photos):
    confidences, losses, easy = photos
    grid = learned_grid(confidences, losses, lambda thresholds: np.array([1.0, 3.0]), [2.0])
    costs = grid.mean_cost(np.tile([1.0, 3.0], (len(grid.thresholds), 1)))
    assert (grid.thresholds >= CLOSED).any() and costs.max() == 3.0 and costs.min() == 1.0
    best = cheapest_within(costs, grid.mean(losses), 2.0)  # the one asked for: the easy half leaves
    assert (grid.choices[best] == ~easy).mean() > 0.98

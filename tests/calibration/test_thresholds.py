"""Thresholds from a grid and by gradient descent; temperatures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.calibration import thresholds
from earlyexit_ssd.calibration.thresholds import (
    BINS,
    _unrank,
    best_within,
    candidate_thresholds,
    choose,
    contested_boxes,
    exit_probabilities,
    fit_exit,
    fit_temperature,
    learn_open_exits,
    learn_thresholds,
    learned_grid,
    pareto_path,
    reliability,
    threshold_grid,
)
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError

CONFIDENCES = [np.array([0.9, 0.2, 0.5, 0.1]), np.array([0.1, 0.8, 0.9, 0.3])]


@pytest.mark.parametrize(
    ("thresholds", "choice"),
    [([0.5, 0.8], [0, 1, 0, 2]), ([CLOSED, 0.0], [1, 1, 1, 1]), ([CLOSED, CLOSED], [2, 2, 2, 2])],
)
def test_choose_the_first_confident_exit(thresholds, choice):
    assert choose(CONFIDENCES, thresholds).tolist() == choice


def test_choose_compares_in_fp32():
    """0.1 in fp32 is above 0.1 in fp64, but a confidence of 0.1 reaches the threshold 0.1."""
    assert choose([np.array([0.1], np.float64)], [float(np.float32(0.1))]).tolist() == [0]


def test_candidates_lie_between_the_values():
    values = np.array([0.1, 0.3, 0.3, 0.7])
    assert candidate_thresholds(values, 2).tolist() == pytest.approx([CLOSED, 0.5, 0.2, 0.0])
    assert candidate_thresholds(np.array([0.4, 0.4]), 5).tolist() == [CLOSED, 0.0]


def test_grid_has_every_combination_once():
    grid = threshold_grid(CONFIDENCES, 8)
    assert len({tuple(row) for row in grid.choices.tolist()}) == len(grid.choices)
    assert np.array_equal([choose(CONFIDENCES, row) for row in grid.thresholds], grid.choices)
    assert [2, 2, 2, 2] in grid.choices.tolist() and [0, 0, 0, 0] in grid.choices.tolist()
    costs = np.tile([1.0, 2.0, 4.0], (len(grid.choices), 1))
    row = grid.choices.tolist().index([0, 1, 0, 2])
    costs[row, 1] = 3.0
    assert grid.mean_cost(costs)[row] == pytest.approx((1 + 3 + 1 + 4) / 4)
    losses = np.arange(12.0).reshape(4, 3)
    assert grid.mean(losses)[row] == pytest.approx((0 + 4 + 6 + 11) / 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_pareto_path_is_optimal(points):
    loss, cost = np.array(points, dtype=float).T
    path = pareto_path(loss, cost)
    assert (np.diff(loss[path]) > 0).all() and (np.diff(cost[path]) < 0).all()
    for index in path:
        assert not ((loss <= loss[index]) & (cost < cost[index])).any()
        assert not ((loss < loss[index]) & (cost <= cost[index])).any()
    assert loss[path[0]] == loss.min() and cost[path[-1]] == cost.min()


def test_too_many_exits():
    with pytest.raises(EarlyExitError, match="has 6 early exits, .* at most 5 .*; use a model with fewer"):
        threshold_grid([np.zeros(3)] * 6)


def test_best_within_a_limit():
    loss, cost = np.array([0.0, 0.02, 0.01, 0.05]), np.array([9.0, 4.0, 4.0, 1.0])
    assert best_within(loss, cost, 0.02) == 2
    assert best_within(loss, cost, 0.05) == 3
    assert best_within(loss + 1, cost, 0.5) is None


def test_exit_probabilities_by_hand():
    shares = exit_probabilities(torch.tensor([[0.5, 0.7]]), torch.tensor([0.5, 0.7 - np.log(3)]), width=1.0)
    assert shares[0].tolist() == pytest.approx([0.5, 0.5 * 0.75, 0.5 * 0.25])


COSTS = np.array([1.0, 3.0])


@pytest.fixture
def photos():
    """Confidences, losses and easy photos. The easy half loses nothing at the exit, and has high confidences."""
    generator = np.random.default_rng(0)
    easy = np.arange(200) < 100
    losses = np.stack([np.where(easy, 0.0, 1.0), np.zeros(200)], axis=1)
    return [np.where(easy, 0.9, 0.1) + 0.05 * generator.random(200)], losses, easy


@pytest.mark.parametrize(("budget", "tolerance"), [(1.0, 0.02), (1.5, 0.02), (2.0, 0), (2.5, 0.02)])
def test_learnt_thresholds_keep_the_budget(photos, budget, tolerance):
    confidences, losses, easy = photos
    choice = choose(confidences, learn_thresholds(confidences, losses, COSTS, budget))
    assert COSTS[choice].mean() <= budget + tolerance
    if budget == 2.0:  # just enough to keep the other half
        assert (choice[easy] == 0).mean() > 0.95


# six of ten photos have the same confidence, whose rank is 0.7
TIES = np.array([0.1, 0.2, 0.3, 0.4, *[1.0] * 6])


@pytest.mark.parametrize(
    ("values", "rank", "threshold"),
    [
        (TIES, 0.8, CLOSED),
        (TIES, 0.7, 1.0),
        (TIES, 0.35, 0.4),
        (TIES, -0.5, 0.1),
        (np.full(5, -1.0), 0.0, CLOSED),  # no photo leaves at a negative confidence
    ],
)
def test_threshold_of_a_rank(values, rank, threshold):
    assert _unrank(values, rank) == pytest.approx(threshold)


@pytest.fixture
def few_steps(monkeypatch):
    for name, value in (("BUDGETS", 5), ("HALVINGS", 4), ("STEPS", 50)):
        monkeypatch.setattr(thresholds, name, value)


@pytest.mark.usefixtures("few_steps")
def test_a_closed_exit_makes_the_deeper_ones_affordable():
    """Exit 1 is always wrong and exit 2 always right. Exit 2 costs 3 if exit 1 is open, and 2 if it is closed."""
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


@pytest.mark.usefixtures("few_steps")
def test_a_grid_of_learnt_thresholds_goes_from_closed_to_cheapest(photos):
    confidences, losses, easy = photos
    grid = learned_grid(confidences, losses, lambda thresholds: COSTS, [2.0])
    costs = grid.mean_cost(np.tile(COSTS, (len(grid.thresholds), 1)))
    assert (grid.thresholds >= CLOSED).any() and costs.max() == 3.0 and costs.min() == 1.0
    best = best_within(costs, grid.mean(losses), 2.0)  # the easy half leaves
    assert (grid.choices[best] == ~easy).mean() > 0.98


@pytest.mark.usefixtures("few_steps")
def test_learnt_thresholds_beside_an_exit_where_no_photo_leaves(photos):
    """At an empty exit the router gives -1 if the policy reads logits only, so its low cost is out of reach."""
    (confidence,), losses, _ = photos
    no_photo = np.full_like(confidence, -1.0)
    grid = learned_grid([no_photo, confidence], np.insert(losses, 0, 1.0, axis=1), lambda _: np.array([0.1, 1.0, 3.0]))
    assert (grid.thresholds[:, 0] == CLOSED).all()
    assert {0.0, 1.0} <= set((grid.choices == 1).mean(1))


BOUNDS = (0.5, 3.0)


def sampled(scale):
    """Logits times ``scale``, and labels drawn from the softmax of the unscaled logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return scale * logits, labels


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (2.0, 2.0), (0.7, 0.7), (9.0, 3.0), (0.1, 0.5)])
def test_finds_the_temperature_within_the_bounds(scale, expected, caplog):
    fitted = fit_exit("exit8", *sampled(scale), BOUNDS)
    found = fitted.temperature
    assert found == pytest.approx(expected, rel=0.06)
    assert 0.5 <= found <= 3.0
    assert fitted.before == reliability(*sampled(scale), 1.0) and fitted.after == reliability(*sampled(scale), found)
    assert ("temperature of exit8 is at its bound" in caplog.text) is (expected in BOUNDS)
    assert f"its bound {expected:g}, so" in caplog.text or expected not in BOUNDS
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), BOUNDS) == 1.0  # without boxes


def test_certain_background_is_left_out():
    probabilities = [[0.25, 0.75, 0.0], [0.97, 0.02, 0.01], [0.99, 0.005, 0.005], [0.9, 0.04, 0.06]]
    logits = torch.tensor([probabilities]).clamp(min=1e-9).log()
    kept, labels = contested_boxes([(logits, torch.tensor([[1, 0, 2, 0]])), (logits, torch.zeros(1, 4).long())])
    assert labels.tolist() == [1, 2, 0, 0, 0]  # the third box is kept for its label
    assert torch.equal(kept[:3], logits[0, [0, 2, 3]])


def test_reliability_by_hand():
    # objects of probability 0.75 (right, wrong), 0.35 (wrong: another class)
    probabilities = [[0.25, 0.75, 0.0], [0.25, 0.75, 0.0], [0.35, 0.3, 0.35]]
    found = reliability(torch.tensor(probabilities).clamp(min=1e-9).log(), torch.tensor([1, 0, 1]), 1.0)
    assert found.count[7] == 2 and found.count[3] == 1 and sum(found.count) == 3
    assert found.confidence[7] == pytest.approx(0.75) and found.accuracy[7] == pytest.approx(0.5)
    assert found.accuracy[3] == 0.0
    assert found.expected_error == pytest.approx((2 * 0.25 + 1 * 0.35) / 3)
    assert len(found.count) == BINS

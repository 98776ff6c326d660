import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.routing.search import candidates, cheapest_within, choose, pareto_path, threshold_grid

CONFIDENCES = [np.array([0.9, 0.2, 0.5, 0.1]), np.array([0.1, 0.8, 0.9, 0.3])]


def test_the_first_exit_that_is_sure_enough():
    assert choose(CONFIDENCES, [0.5, 0.8]).tolist() == [0, 1, 0, 2]
    assert choose(CONFIDENCES, [CLOSED, 0.0]).tolist() == [1, 1, 1, 1]
    assert choose(CONFIDENCES, [CLOSED, CLOSED]).tolist() == [2, 2, 2, 2]


def test_compares_in_the_precision_of_the_router():
    """0.1 in fp32 is above 0.1 in fp64: a threshold of 0.1 must let a confidence of 0.1 leave."""
    assert choose([np.array([0.1], np.float64)], [float(np.float32(0.1))]).tolist() == [0]


def test_candidates_lie_between_the_values():
    values = np.array([0.1, 0.3, 0.3, 0.7])
    assert candidates(values, 2).tolist() == pytest.approx([CLOSED, 0.5, 0.2, 0.0])
    assert candidates(np.array([0.4, 0.4]), 5).tolist() == [CLOSED, 0.0]


def test_grid_holds_every_combination_once():
    grid = threshold_grid(CONFIDENCES, 8)
    assert len({tuple(row) for row in grid.choices.tolist()}) == len(grid.choices)
    assert all(choose(CONFIDENCES, row).tolist() == list(choice) for row, choice in zip(*grid_parts(grid), strict=True))
    assert [2, 2, 2, 2] in grid.choices.tolist() and [0, 0, 0, 0] in grid.choices.tolist()
    costs = np.tile([1.0, 2.0, 4.0], (len(grid.choices), 1))
    row = grid.choices.tolist().index([0, 1, 0, 2])
    costs[row, 1] = 3.0
    assert grid.mean_cost(costs)[row] == pytest.approx((1 + 3 + 1 + 4) / 4)
    losses = np.arange(12.0).reshape(4, 3)
    assert grid.mean(losses)[row] == pytest.approx((0 + 4 + 6 + 11) / 4)


def grid_parts(grid):
    return grid.thresholds, grid.choices


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_pareto_path_is_what_nothing_beats(points):
    loss, cost = np.array(points, dtype=float).T
    path = pareto_path(loss, cost)
    assert (np.diff(loss[path]) > 0).all() and (np.diff(cost[path]) < 0).all()
    for one in path:
        assert not ((loss <= loss[one]) & (cost < cost[one])).any()
        assert not ((loss < loss[one]) & (cost <= cost[one])).any()
    assert loss[path[0]] == loss.min() and cost[path[-1]] == cost.min()


def test_more_exits_than_are_searched():
    with pytest.raises(EarlyExitError, match="6 early exits: .* over 5 at most; take a model with fewer"):
        threshold_grid([np.zeros(3)] * 6)


def test_cheapest_within_a_limit():
    loss, cost = np.array([0.0, 0.02, 0.01, 0.05]), np.array([9.0, 4.0, 4.0, 1.0])
    assert cheapest_within(loss, cost, 0.02) == 2
    assert cheapest_within(loss, cost, 0.05) == 3
    assert cheapest_within(loss + 1, cost, 0.5) is None

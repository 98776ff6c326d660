import itertools

import numpy as np
import pytest

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.choices import exit_matches
from earlyexit_ssd.evaluation.reference_lines import (
    Line,
    coin,
    gap_closed,
    line_of,
    oracle_choice,
    oracle_over_exits,
    overthinking,
    pooled_gap,
    resampled_leads,
)

COSTS = np.array([1.0, 2.0, 4.0])


def test_oracle_spends_where_it_helps():
    errors = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 1.0, 1.0]])
    assert oracle_choice(errors, COSTS, 2.0).tolist() == [0, 1, 2, 0]  # mean cost (1 + 2 + 4 + 1) / 4
    assert oracle_choice(errors, COSTS, 1.3).tolist() == [0, 1, 0, 0]
    assert oracle_choice(errors, COSTS, 1.0).tolist() == [0, 0, 0, 0]


def test_oracle_with_one_exit():
    assert oracle_choice(np.ones((3, 1)), COSTS[:1], 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_oracle_is_the_best_of_all_choices_but_for_a_photo(seed):
    generator = np.random.default_rng(seed)
    errors = generator.random((6, 3)).round(1)
    choices = np.array(list(itertools.product(range(3), repeat=6)))
    mean_errors = errors[np.arange(6), choices].mean(1)
    for budget in (1.2, 1.7, 2.5, 3.5):
        found = oracle_choice(errors, COSTS, budget)
        assert COSTS[found].mean() <= budget + 1e-12
        best = mean_errors[COSTS[choices].mean(1) <= budget].min()
        assert errors[np.arange(6), found].mean() <= best + 1 / 6


def test_lines_at_equal_cost(random_case):
    truth, shallow = random_case(1, images=60)
    _, other = random_case(2, images=60)
    matches = exit_matches(truth, [other, shallow])  # the first exit sees other photos: it finds nothing
    choice = np.array([0, 1] * 30)
    router, chance = line_of(matches, choice, COSTS[:2]), coin(matches, choice, COSTS[:2])
    assert router.cost == chance.cost == 1.5
    assert 0 < chance.AP50 < line_of(matches, np.ones(60, int), COSTS[:2]).AP50
    assert coin(matches, choice, COSTS[:2], seed=0) == chance != coin(matches, choice, COSTS[:2], seed=1)
    constant = np.ones(60, int)
    assert pytest.approx(line_of(matches, constant, COSTS[:2]).AP50) == coin(matches, constant, COSTS[:2]).AP50


def test_gap_closed_by_hand():
    lines = [Line(1.0, None, value) for value in (0.69, 0.65, 0.72)]
    assert gap_closed(*lines) == pytest.approx(4 / 7)
    assert gap_closed(lines[0], lines[1], lines[1]) is None
    assert gap_closed(Line(1.0, None, None), lines[1], lines[2]) is None


def test_oracle_closes_exits_that_cost_more_than_they_give():
    errors = np.array([[0.9, 0.5, 0.0], [0.9, 0.0, 0.0]])

    def costs_with(thresholds):
        return np.array([1.0, 2.0, 4.0]) + (thresholds[0] < CLOSED) * np.array([0.0, 1.0, 1.0])

    def rightness(choice):
        return 1 - errors[[0, 1], choice].mean()

    choice, costs = oracle_over_exits(errors, costs_with, 3.0, rightness)
    assert choice.tolist() == [2, 1] and costs.tolist() == [1.0, 2.0, 4.0]
    choice, costs = oracle_over_exits(errors, costs_with, 1.0, rightness)
    assert choice.tolist() == [0, 0] and costs.tolist() == [1.0, 3.0, 5.0]


def test_oracle_need_not_spend_what_it_may():
    """Least error would send photo 0 deep; what counts here is that nobody goes deep."""
    errors = np.array([[0.1, 0.0], [0.0, 0.5]])
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: float((exits == 0).sum()))
    assert choice.tolist() == [0, 0]
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: None)  # nothing to find
    assert choice.tolist() == [0, 0]  # the cheapest


def test_gap_in_draws_of_the_photos(random_case):
    """The oracle itself closes all of it in every resample, a coin nothing on average, and photos decide how far."""
    truth, shallow = random_case(1, images=60)
    matches = exit_matches(truth, [random_case(2, images=60)[1], shallow])
    objects = sum(one.objects for one in matches.classes)
    oracle = np.zeros(60, int)
    oracle[np.argsort(-objects)[:30]] = 1
    own = pooled_gap([resampled_leads(matches, oracle, [oracle])[0]])
    assert len(own) == 200 and own[~np.isnan(own)] == pytest.approx(1.0)
    assert np.isnan(own).mean() < 0.2  # a draw in which a coin does as well
    toss = np.random.default_rng(5).permutation(oracle)
    low, high = np.nanquantile(pooled_gap([resampled_leads(matches, toss, [oracle])[0]]), [0.025, 0.975])
    assert low < 0 < high < 1
    everywhere = np.ones(60, int)
    assert np.isnan(pooled_gap([resampled_leads(matches, everywhere, [everywhere])[0]])).all()  # no coin can do worse


def test_pooled_gap_by_hand():
    """0.01 of 0.04 and 0.02 of 0.02 are 0.03 of 0.06, not the mean of 0.25 and 1."""
    assert pooled_gap([(0.01, 0.04), (0.02, 0.02)]) == pytest.approx(0.5)
    draws = pooled_gap([np.array([[0.01, 0.02], [0.04, 0.0]]), np.array([[0.02, 0.0], [0.02, -0.01]])])
    assert draws[0] == pytest.approx(0.5) and np.isnan(draws[1])


def test_overthinking_by_hand():
    errors = np.array([[0.0, 0.2, 0.5], [0.0, 0.0, 0.0], [0.1, 0.0, 0.1], [0.3, 0.3, 0.0]])
    assert overthinking(errors) == [0.25, 0.25]

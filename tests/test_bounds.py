"""P-values and upper bounds for the mean of a loss."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from earlyexit_ssd.bounds import (
    BOUNDS,
    betting_p_value,
    hoeffding_bentkus_p_value,
    photos_needed,
    upper_bound,
)

both_p_values = pytest.mark.parametrize("p_value", BOUNDS.values(), ids=BOUNDS)
shares = st.floats(0.001, 0.999)
loss_lists = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), max_size=40)


def bernoulli_losses(ones: int, count: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [ones, count - ones])


def test_hoeffding_bentkus_by_hand():
    assert hoeffding_bentkus_p_value(np.zeros(148), 0.02) == pytest.approx(0.98**148)
    # (epsilon / mean)^sum ((1 - epsilon) / (1 - mean))^(n - sum); the Bentkus part is 11 e / 2^10 = 0.0292
    assert hoeffding_bentkus_p_value(bernoulli_losses(1, 10), 0.5) == pytest.approx(5 * (5 / 9) ** 9)
    # 1 if the mean reaches epsilon
    assert hoeffding_bentkus_p_value(bernoulli_losses(5, 10), 0.5) == 1.0
    assert hoeffding_bentkus_p_value(bernoulli_losses(9, 10), 0.5) == 1.0
    # h is below 0 by rounding
    assert hoeffding_bentkus_p_value(np.full(20, 0.6501974178352687), 0.6501974188352687) == 1.0


@pytest.mark.parametrize(
    ("losses", "whole"),
    [
        ([1.0] * 4 + [0.0] * 16, 4),
        ([0.5, 0.4] + [1.0] * 3 + [0.0] * 15, 4),  # 3.9 counts as 4
        ([0.2] * 20, 4),  # np.sum is a little above 4
        ([0.1 + 0.2] * 10 + [0.0] * 10, 3),  # each of these losses is a little above 0.3
    ],
)
def test_bentkus_rounds_the_sum_up_except_for_rounding_errors(losses, whole):
    # the share of 2^20 sequences of coin throws with so many heads; for 4 the Hoeffding part is 0.0212, larger
    at_most = sum(math.comb(20, heads) for heads in range(whole + 1))
    assert hoeffding_bentkus_p_value(np.array(losses), 0.5) == pytest.approx(math.e * at_most / 2**20)


def test_betting_by_hand():
    delta = math.exp(-1 / 8)
    first = 1 + math.sqrt(0.25 / (2 * 0.25)) * 0.5  # the variance is 1/4 before the first photo
    second = 1 + math.sqrt(0.25 / (2 * 0.15625)) * 0.5  # (1/4 + (0 - 1/4)^2) / 2 after it
    assert betting_p_value(np.zeros(2), 0.5, delta=delta) == pytest.approx(1 / (first * second))
    # The p-value uses the largest capital so far, at least the initial capital.
    assert betting_p_value(np.array([0.0, 1.0]), 0.5, delta=delta) == pytest.approx(1 / first)
    assert betting_p_value(np.array([1.0, 0.0]), 0.5, delta=delta) == 1.0


def test_bets_are_capped():
    assert betting_p_value(np.zeros(2), 0.5, delta=1e-6) == pytest.approx(1 / 1.75**2)
    # A loss of 1 leaves a quarter of the capital, so the gambler goes on.
    losses = np.concatenate([np.ones(1), np.zeros(9)])
    assert betting_p_value(losses, 0.5, delta=1e-9) == pytest.approx(1 / (0.25 * 1.75**9))


DRAWS = {  # distributions with the mean 0.1
    "bernoulli": lambda generator, shape: (generator.random(shape) < 0.1).astype(float),
    "beta": lambda generator, shape: generator.beta(0.5, 4.5, shape),
    "two_points": lambda generator, shape: np.where(generator.random(shape) < 0.2, 0.4, 0.025),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("p_value", [*BOUNDS.values(), partial(betting_p_value, delta=1e-6)])
def test_rejects_at_most_delta_if_the_mean_is_epsilon(p_value, draw):
    assert p_value(np.zeros(0), 0.3) == upper_bound(np.zeros(0), 0.1, p_value) == 1.0  # without photos
    runs = 2000
    p_values = np.array([p_value(row, 0.1) for row in draw(np.random.default_rng(0), (runs, 120))])
    for delta in (0.05, 0.3):
        assert (p_values <= delta).sum() <= stats.binom.ppf(0.999, runs, delta)
    losses = draw(np.random.default_rng(1), 1000)
    assert p_value(losses, 0.16) < 0.01
    assert p_value(losses, 0.09) > 0.1


def test_betting_is_tighter_at_low_variance():
    losses = np.random.default_rng(0).uniform(0.04, 0.06, 500)
    assert betting_p_value(losses, 0.07) < 1e-3 < 0.1 < hoeffding_bentkus_p_value(losses, 0.07)
    assert upper_bound(losses, 0.1, betting_p_value) < upper_bound(losses, 0.1) - 0.01


@settings(max_examples=150, deadline=None)
@given(losses=loss_lists, one=shares, other=shares)
@example(losses=[0.3] * 10, one=0.3, other=0.30000000001)
def test_p_values_fall_with_epsilon(losses, one, other):
    for p_value in BOUNDS.values():
        above, below = (p_value(np.array(losses), epsilon) for epsilon in (min(one, other), max(one, other)))
        assert 0 <= below <= above * (1 + 1e-9)
        assert above <= 1


@settings(max_examples=40, deadline=None)
@given(losses=loss_lists, delta=st.floats(0.001, 0.9))
def test_upper_bound_is_where_the_p_value_reaches_delta(losses, delta):
    losses = np.array(losses)
    for p_value in BOUNDS.values():
        bound = upper_bound(losses, delta, p_value)
        assert bound == 1.0 or p_value(losses, bound) <= delta
        assert bound < 2e-6 or p_value(losses, bound - 1e-6) > delta


def test_upper_bound_by_hand():
    # (1 - epsilon)^100 = 0.1
    assert upper_bound(np.zeros(100), 0.1) == pytest.approx(1 - 0.1**0.01, abs=1e-6)
    assert upper_bound(np.ones(100), 0.1) == 1.0
    assert upper_bound(np.zeros(100), 0.01, partial(betting_p_value, delta=0.01)) < 0.1


def test_photos_needed_by_hand():
    assert photos_needed(np.zeros(5), 0.02, 0.05) == 149  # log 0.05 / log 0.98 = 148.28
    assert photos_needed(np.zeros(1), 0.5, 0.9) == 1
    # a fifth of the photos lost, 4 of 20 throws: 6196 e / 2^20 = 0.0161; 19 throws give 5036 e / 2^19 = 0.0261
    assert photos_needed(np.array([0, 0, 1.0, 0, 0]), 0.5, 0.0161) == 20
    # the bet reaches its cap soon; with the cap from the start, log 20 / log(1 + 0.75 / 0.98 * 0.02) = 197.2
    assert photos_needed(np.zeros(3), 0.02, 0.05, betting_p_value) == 200


@both_p_values
def test_photos_needed_is_none_if_the_mean_is_not_clearly_below_epsilon(p_value):
    for losses in ([0.2], [0.0, 0.6], [1.0], [], [0.2 - 1e-12]):
        assert photos_needed(np.array(losses), 0.2, 0.1, p_value) is None
    assert 5000 < photos_needed(np.array([0.0, 0.39]), 0.2, 0.1, p_value) < 10**6


@both_p_values
@given(losses=st.lists(st.floats(0, 0.4), min_size=1, max_size=12), epsilon=st.floats(0.41, 0.9))
@settings(max_examples=25, deadline=None)
def test_photos_needed_is_the_smallest_number(p_value, losses, epsilon):
    needed = photos_needed(np.array(losses), epsilon, 0.1, p_value)
    assert p_value(np.resize(np.array(losses), needed), epsilon) <= 0.1
    assert needed == 1 or p_value(np.resize(np.array(losses), needed - 1), epsilon) > 0.1

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from earlyexit_ssd.routing.two_sample import (
    QUANTILES,
    distance_p_value,
    fisher_p_value,
    quantile_distance,
    sample_quantiles,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_fisher_is_scipys(photos, reference_photos, share, reference_share):
    count, before = round(share * photos), round(reference_share * reference_photos)
    expected = fisher_exact([[count, photos - count], [before, reference_photos - before]]).pvalue
    assert fisher_p_value(count, photos, before, reference_photos) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=70), st.lists(st.integers(0, 9), min_size=1, max_size=70))
def test_distance_to_quantiles_is_within_one_step_of_that_to_the_sample(values, sample):
    stored = sample_quantiles(np.array(sample))
    points = np.arange(10)
    share = [(np.array(numbers)[:, None] <= points).mean(0) for numbers in (values, sample)]
    true = abs(share[0] - share[1]).max()
    distance = quantile_distance(np.array(values), np.array(stored))
    assert true - 1 / (QUANTILES - 1) - 1e-9 <= distance <= true + 1e-9


@pytest.mark.parametrize(("count", "reference_count"), [(1, 1), (2, 3), (5, 5), (9, 9), (7, 12), (16, 16), (6, 24)])
def test_distance_p_value_bounds_the_exact_one(count, reference_count):
    # Count the orders in which the two samples can come whose shares never differ by ``gap`` / (m n) or more.
    for gap in range(1, count * reference_count + 1):
        paths = np.zeros((count + 1, reference_count + 1))
        for first in range(count + 1):
            for second in range(reference_count + 1):
                if abs(first * reference_count - second * count) < gap:
                    ways = (paths[first - 1, second] if first else 0) + (paths[first, second - 1] if second else 0)
                    paths[first, second] = ways if first or second else 1
        total = np.prod([(reference_count + k) / k for k in range(1, count + 1)])
        exact = 1 - paths[-1, -1] / total
        assert exact <= distance_p_value(gap / (count * reference_count), count, reference_count) + 1e-12

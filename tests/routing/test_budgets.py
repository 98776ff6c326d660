import numpy as np
import pytest

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.routing.budgets import even_budgets, msdnet_shares, thresholds_for_shares
from earlyexit_ssd.routing.search import choose


def test_budgets_lie_between_first_exit_and_full_path():
    assert even_budgets(4.0, 10.0, 5) == pytest.approx([5, 6, 7, 8, 9])


def test_shares_by_hand():
    assert msdnet_shares(3, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert msdnet_shares(3, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_the_most_confident_leave_first_and_the_next_exit_sees_the_rest():
    confidences = [np.array([0.9, 0.1, 0.5, 0.3]), np.array([1.0, 0.2, 0.8, 0.6])]
    thresholds = thresholds_for_shares(confidences, [0.25, 0.5, 0.25])
    assert thresholds.tolist() == pytest.approx([0.7, 0.4])
    assert choose(confidences, thresholds).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_shares_come_true(shares):
    confidences = list(np.random.default_rng(0).random((2, 1000)))
    choice = choose(confidences, thresholds_for_shares(confidences, shares))
    assert (np.bincount(choice, minlength=3) / 1000).tolist() == pytest.approx(shares, abs=0.002)


def test_equal_confidences_leave_together_and_take_no_place_at_the_next_exit():
    confidences = [np.array([1.0, 1.0, 1.0, 0.2, 0.1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])]
    thresholds = thresholds_for_shares(confidences, [0.2, 0.2, 0.6])
    assert choose(confidences, thresholds).tolist() == [0, 0, 0, 1, 2]


def test_nobody_leaves_at_a_share_of_nothing():
    assert thresholds_for_shares([np.array([0.5, 1.0])], [0.0, 1.0]).tolist() == [CLOSED]


def test_nobody_leaves_who_cannot():
    nowhere, partly = np.full(4, -1.0), np.array([0.5, -1.0, 0.7, -1.0])
    assert thresholds_for_shares([nowhere, nowhere], [0.5, 0.25, 0.25]).tolist() == [CLOSED, CLOSED]
    thresholds = thresholds_for_shares([partly], [1.0, 0.0])
    assert choose([partly], thresholds).tolist() == [0, 1, 0, 1]

"""Putting the routed detector together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.collect import Collected
from earlyexit_ssd.evaluation.routed import choose_exits, exit_share, mean_cost, routed_detections

CONFIDENCES = [torch.tensor([0.9, 0.2, 0.6, 0.1]), torch.tensor([0.1, 0.8, 0.9, 0.2]), torch.zeros(4)]


def test_first_exit_that_is_sure_enough():
    assert choose_exits(CONFIDENCES, [0.6, 0.7]).tolist() == [0, 1, 0, 2]  # 0.6 reaches 0.6


def test_only_the_full_path():
    assert choose_exits([torch.tensor([0.0, 1.0])], []).tolist() == [0, 0]


def test_one_threshold_per_early_exit():
    with pytest.raises(EarlyExitError, match="1 thresholds for 2 early exits"):
        choose_exits(CONFIDENCES, [0.5])


@given(
    st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), max_size=6),
    st.tuples(*[st.floats(0, 1, width=32)] * 2),
)
def test_is_the_first_that_reaches_its_threshold(rows, thresholds):
    confidences = list(torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).T)
    expected = [next((i for i in range(2) if row[i] >= thresholds[i]), 2) for row in rows]
    assert choose_exits(confidences, thresholds).tolist() == expected


def test_detections_of_the_chosen_exit():
    collected = Collected([7, 3], [{7: {"a": 0}, 3: {"a": 1}}, {7: {"a": 2}, 3: {"a": 3}}], [])
    assert routed_detections(collected, torch.tensor([1, 0])) == {7: {"a": 2}, 3: {"a": 1}}


def test_shares_and_costs():
    chosen = torch.tensor([0, 2, 2, 2])
    assert exit_share(chosen, ("exit8", "exit12", "full")) == {"exit8": 0.25, "exit12": 0.0, "full": 0.75}
    assert mean_cost(chosen, [10.0, 20.0, 40.0]) == 32.5


def test_no_photos():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert exit_share(nothing, ("exit8", "full")) == {"exit8": 0.0, "full": 0.0}
    assert mean_cost(nothing, [1.0, 2.0]) is None

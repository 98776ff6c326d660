"""Summary of confidences."""

import pytest
import torch

from earlyexit_ssd.evaluation.confidence import summarize_confidence


def test_by_hand():
    summary = summarize_confidence(torch.tensor([0.25, 0.75]))
    assert (summary.mean, summary.std, summary.min, summary.max) == (0.5, 0.25, 0.25, 0.75)


def test_one_photo_has_no_spread():
    assert summarize_confidence(torch.tensor([0.5])).std == 0.0


def test_none_without_photos():
    assert summarize_confidence(torch.zeros(0)) is None


def test_none_where_the_policy_has_nothing_to_look_at():
    assert summarize_confidence(torch.full((3,), -1.0)) is None


def test_mean_of_many_equal_values_is_exact():
    assert summarize_confidence(torch.full((100_000,), 0.1)).mean == pytest.approx(0.1, abs=1e-7)

"""None"""

from __future__ import annotations

import pytest
import torch

from earlyexit_ssd.calibration.temperature import BINS, contested_boxes, fit_temperature, reliability, stopped_by

BOUNDS = (0.5, 3.0)


def sampled(scale, seed=0, boxes=8000):
    """Labels drawn from the softmax of logits, which are then made ``scale`` times as sure."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(boxes, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return scale * logits, labels


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (2.0, 2.0), (0.7, 0.7), (9.0, 3.0), (0.1, 0.5)])
def test_finds_the_temperature_within_the_bounds(scale, expected):
    found = fit_temperature(*sampled(scale), BOUNDS)
    assert found == pytest.approx(expected, rel=0.06)
    assert 0.5 <= found <= 3.0
    assert stopped_by(found, BOUNDS) == {3.0: 3.0, 0.5: 0.5}.get(expected)


def test_nothing_to_fit():
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), BOUNDS) == 1.0


def test_sure_background_is_left_out():
    probabilities = [[0.25, 0.75, 0.0], [0.97, 0.02, 0.01], [0.99, 0.005, 0.005], [0.9, 0.04, 0.06]]
    logits = torch.tensor([probabilities]).clamp(min=1e-9).log()
    kept, labels = contested_boxes([(logits, torch.tensor([[1, 0, 2, 0]])), (logits, torch.zeros(1, 4).long())])
    assert labels.tolist() == [1, 2, 0, 0, 0]  # the third one is an object that nobody sees
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


def test_the_right_temperature_is_the_more_reliable_one():
    case = sampled(2.5)
    assert reliability(*case, 2.5).expected_error < 0.03 < reliability(*case, 1.0).expected_error

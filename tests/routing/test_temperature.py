import math

import pytest
import torch

from earlyexit_ssd.routing.temperature import (
    BINS,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    stopped_by,
)

BOUNDS = (0.5, 3.0)


def sampled(scale, seed=0, photos=20, boxes=400):
    """Labels drawn from the softmax of logits, which are then made ``scale`` times as sure."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(photos, boxes, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(photos, boxes)
    return scale * logits, labels


def in_batches(logits, labels):
    return lambda: zip(logits.split(7), labels.split(7), strict=True)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (2.0, 2.0), (0.7, 0.7), (9.0, 3.0), (0.1, 0.5)])
def test_finds_the_temperature_within_the_bounds(scale, expected):
    found = fit_temperature(in_batches(*sampled(scale)), BOUNDS)
    assert found == pytest.approx(expected, rel=0.06)
    assert 0.5 <= found <= 3.0
    assert stopped_by(found, BOUNDS) == {3.0: 3.0, 0.5: 0.5}.get(expected)


def test_likelihood_by_hand():
    logits, labels = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.tensor([[0, 0]])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert negative_log_likelihood([(logits, labels)], 2.0) == pytest.approx(expected)


def test_reliability_by_hand():
    # objects of probability 0.75 (right, wrong), 0.35 (wrong: another class), 0.01 (left out)
    probabilities = [[0.25, 0.75, 0.0], [0.25, 0.75, 0.0], [0.35, 0.3, 0.35], [0.99, 0.005, 0.005]]
    logits = torch.tensor([probabilities]).clamp(min=1e-9).log()
    found = reliability([(logits, torch.tensor([[1, 0, 1, 0]]))], 1.0)
    assert found.count[7] == 2 and found.count[3] == 1 and sum(found.count) == 3
    assert found.confidence[7] == pytest.approx(0.75) and found.accuracy[7] == pytest.approx(0.5)
    assert found.accuracy[3] == 0.0
    assert found.expected_error == pytest.approx((2 * 0.25 + 1 * 0.35) / 3)
    assert len(found.count) == BINS


def test_the_right_temperature_is_the_more_reliable_one():
    batches = in_batches(*sampled(2.5))
    assert reliability(batches(), 2.5).expected_error < 0.02 < reliability(batches(), 1.0).expected_error

"""Counts and losses of single photos, by hand."""

import numpy as np
import pytest
import torch

from earlyexit_ssd.evaluation.collect import Collected
from earlyexit_ssd.evaluation.operating_point import operating_point
from earlyexit_ssd.evaluation.photo_losses import (
    Agreement,
    agreement,
    losses_against_full,
    losses_against_labels,
    photo_counts,
    photo_list,
)

HERE, THERE, FAR = (10.0, 10.0, 110.0, 110.0), (200.0, 200.0, 300.0, 320.0), (400.0, 400.0, 500.0, 500.0)


@pytest.fixture
def case(ground_truth, found):
    """Photo 3 has no object, photo 1 two; ids are not in the order of the list of photos."""
    truth = ground_truth(3, [(1, 1, HERE), (1, 2, THERE), (2, 1, FAR)])
    truth.imgs = {image_id: truth.imgs[image_id] for image_id in (2, 3, 1)}
    early = {1: found((1, 0.9, HERE), (1, 0.8, FAR), (2, 0.3, THERE)), 2: found((1, 0.2, FAR)), 3: found()}
    full = {1: found((1, 0.9, HERE), (2, 0.9, THERE)), 2: found((1, 0.7, FAR)), 3: found((1, 0.6, HERE))}
    return truth, early, full


def test_counts_by_rising_image_id(case):
    truth, early, _ = case
    counts = photo_counts(truth, early, 0.5, 0.5)
    assert counts.hits.tolist() == [1, 0, 0]
    assert counts.misses.tolist() == [1, 1, 0]
    assert counts.false_positives.tolist() == [1, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_counts_sum_to_the_operating_point(random_case, seed):
    truth, detections = random_case(seed)
    counts, point = photo_counts(truth, detections, 0.4, 0.5), operating_point(truth, detections, 0.4, 0.5)
    sums = counts.hits.sum(), counts.false_positives.sum(), counts.misses.sum()
    assert sums == (point.true_positives, point.false_positives, point.false_negatives)


def test_against_the_full_path(case):
    truth, early, full = case
    losses = losses_against_full(truth, [early, full], 0.5, 0.5)
    # photo 1: one of two missed and one added; photo 2: its only one missed; photo 3: the full path's false one
    assert losses.tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert losses_against_full(truth, [early, full], 0.25, 0.5)[0, 0] == 0.5  # now THERE is found, FAR still added
    assert losses_against_full(truth, [early, full], 0.95, 0.5).tolist() == [[0.0, 0.0]] * 3  # nobody says anything


def test_against_the_labels(case):
    truth, early, full = case
    losses = losses_against_labels(truth, [early, full], 0.5, 0.5)
    # photo 3: the early exit is right not to see what the full path sees
    assert losses.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_losses_are_shares(random_case):
    truth, detections = random_case(5, images=40)
    _, others = random_case(6, images=40)
    for measure in (losses_against_full, losses_against_labels):
        losses = measure(truth, [others, detections], 0.3, 0.5)
        assert losses.shape == (40, 2) and (losses >= 0).all() and (losses <= 1).all()
        assert np.ptp(losses[:, 0]) > 0


def test_a_row_for_every_photo_in_the_order_of_the_data_set(case):
    """Photo 1 leaves early: of two objects one is found, one that the full path finds is lost, one is added. Photo 3,
    without an object, leaves early too and spares the full path's false alarm. Photo 2 goes on to the end."""
    truth, early, full = case
    confidences = [torch.tensor([0.5, 0.9, 0.75]), torch.tensor([0.25, -1.0, 0.1])]
    collected = Collected([2, 3, 1], [early, full], confidences)
    rows = photo_list(truth, collected, torch.tensor([1, 0, 0]), ("exit8", "full"), "photos/{}.jpg".format, 0.5, 0.5)
    names = ("file", "exit", "confidence", "objects", "found", "lost", "added")
    assert rows == [
        dict(zip(names, ("photos/2.jpg", "full", 0.25, 1, 1, 0, 0), strict=True)),
        dict(zip(names, ("photos/3.jpg", "exit8", pytest.approx(0.9), 0, 0, 0, 0), strict=True)),
        dict(zip(names, ("photos/1.jpg", "exit8", 0.75, 2, 1, 1, 1), strict=True)),
    ]


def test_agreement_by_hand(case):
    """The full path says HERE and THERE, FAR, HERE; the early exit finds the first and adds FAR to photo 1."""
    truth, early, full = case
    assert agreement(truth, full, early, 0.5, 0.5) == Agreement(objects=4, kept=1, added=1, same_photos=0.0)
    assert agreement(truth, full, full, 0.5, 0.5) == Agreement(objects=4, kept=4, added=0, same_photos=1.0)
    assert agreement(truth, full, early, 0.95, 0.5) == Agreement(objects=0, kept=0, added=0, same_photos=1.0)

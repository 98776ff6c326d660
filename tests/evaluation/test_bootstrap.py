"""The bootstrap's AP50 is pycocotools', resampled or not."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.evaluation.bootstrap import ap50_matches, bootstrap_ap50, interval, weighted_ap50
from earlyexit_ssd.evaluation.coco import coco_evaluation, coco_metrics


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_all_ones_equal_pycocotools(random_case, seed):
    coco, detections = random_case(seed)
    evaluation = coco_evaluation(coco, detections)
    value = weighted_ap50(ap50_matches(evaluation), np.ones(12, dtype=int))
    assert (-1 if value is None else value) == evaluation.stats[1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_weights_equal_a_data_set_with_repeated_photos(random_case, ground_truth, seed):
    coco, detections = random_case(seed)
    drawn = np.random.default_rng(seed).integers(12, size=12)
    objects, repeated = [], {}
    for new_id, index in enumerate(drawn.tolist(), start=1):
        repeated[new_id] = copy.deepcopy(detections[index + 1])
        for annotation in coco.imgToAnns[index + 1]:
            x, y, width, height = annotation["bbox"]
            box = (x, y, x + width, y + height)
            objects.append((new_id, annotation["category_id"], box, annotation["iscrowd"]))
    expected = coco_metrics(ground_truth(12, objects, ("a", "b", "c")), repeated).AP50
    value = weighted_ap50(ap50_matches(coco_evaluation(coco, detections)), np.bincount(drawn, minlength=12))
    assert value == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_seeded_and_around_the_value(random_case):
    coco, detections = random_case(3, images=40)
    evaluation = coco_evaluation(coco, detections)
    matches = ap50_matches(evaluation)
    values = bootstrap_ap50(matches, resamples=100, seed=5)
    assert np.array_equal(values, bootstrap_ap50(matches, resamples=100, seed=5))
    assert not np.array_equal(values, bootstrap_ap50(matches, resamples=100, seed=6))
    low, high = interval(values)
    assert low < evaluation.stats[1] < high
    assert 0.02 < high - low < 0.5


def test_interval_is_central():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.array([np.nan, 1.0])) == (1.0, 1.0)
    assert interval(np.full(3, np.nan)) is None


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_to_find(images, ground_truth):
    matches = ap50_matches(coco_evaluation(ground_truth(images, []), {}))
    assert weighted_ap50(matches, np.ones(images, dtype=int)) is None
    assert np.isnan(bootstrap_ap50(matches, resamples=3)).all()

"""Hits, misses and false alarms, counted by hand and against pycocotools' matches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.evaluation.coco import coco_evaluation
from earlyexit_ssd.evaluation.operating_point import empty_images, match, operating_point

BOX, FAR = (10.0, 10.0, 110.0, 110.0), (300.0, 300.0, 400.0, 400.0)
NARROW = (10.0, 10.0, 110.0, 90.0)  # IoU 0.8 with BOX


def test_hand_counted(ground_truth, found):
    coco = ground_truth(3, [(1, 1, BOX), (1, 2, FAR), (2, 1, BOX)])
    point = operating_point(
        coco,
        {
            1: found((1, 0.9, NARROW), (1, 0.8, BOX), (1, 0.4, FAR)),  # hit, double, under the score
            3: found((2, 0.7, BOX)),  # on the empty photo
        },
    )
    assert (point.true_positives, point.false_positives, point.false_negatives) == (1, 2, 2)
    assert point.precision == pytest.approx(1 / 3)
    assert point.recall == pytest.approx(1 / 3)
    assert point.f1 == pytest.approx(1 / 3)
    assert point.false_positives_per_image == pytest.approx(2 / 3)
    assert point.false_positives_per_empty_image == 1.0
    assert point.localization_error == pytest.approx(0.2)
    assert (point.images, point.empty_images) == (3, 1)


def test_the_surest_detection_takes_the_object(ground_truth, found):
    point = operating_point(ground_truth(1, [(1, 1, BOX)]), {1: found((1, 0.8, NARROW), (1, 0.9, BOX))})
    assert (point.true_positives, point.false_positives) == (1, 1)
    assert point.localization_error == pytest.approx(0.0)


def test_score_and_iou_are_inclusive(ground_truth, found):
    coco = ground_truth(1, [(1, 1, (0.0, 0.0, 100.0, 100.0))])
    half = {1: found((1, 0.5, (0.0, 0.0, 100.0, 50.0)))}
    assert operating_point(coco, half, score=0.5, iou=0.5).true_positives == 1
    assert operating_point(coco, half, score=0.51, iou=0.5).false_negatives == 1
    assert operating_point(coco, half, score=0.5, iou=0.51).false_positives == 1


def test_ignored_objects_are_neither_hit_nor_missed(ground_truth, found):
    coco = ground_truth(1, [(1, 1, BOX), (1, 1, FAR, 1)])
    inside = (310.0, 310.0, 330.0, 330.0)  # IoU 0.04, but all of it on the crowd
    point = operating_point(coco, {1: found((1, 0.9, FAR), (1, 0.8, inside), (1, 0.7, BOX))})
    assert (point.true_positives, point.false_positives, point.false_negatives) == (1, 0, 0)
    assert operating_point(coco, {1: found((2, 0.9, FAR))}).false_positives == 1  # another class's crowd


def test_photo_with_only_ignored_objects_is_empty(ground_truth, found):
    coco = ground_truth(2, [(1, 1, BOX, 1), (2, 1, BOX)])
    assert empty_images(coco) == [1]
    point = operating_point(coco, {1: found((1, 0.9, FAR)), 2: found((1, 0.9, FAR))})
    assert point.false_positives_per_empty_image == 1.0


def test_each_class_for_itself(ground_truth, found):
    point = operating_point(ground_truth(1, [(1, 1, BOX)]), {1: found((2, 0.9, BOX), (3, 0.9, BOX))})
    # label 3 is no category and is left out
    assert (point.true_positives, point.false_positives, point.false_negatives) == (0, 1, 1)


def test_undefined_figures(ground_truth, found):
    nothing_found = operating_point(ground_truth(1, [(1, 1, BOX)]), {})
    assert (nothing_found.precision, nothing_found.recall, nothing_found.f1) == (None, 0.0, 0.0)
    assert nothing_found.localization_error is None
    assert nothing_found.false_positives_per_empty_image is None
    nothing_there = operating_point(ground_truth(1, []), {1: found((1, 0.9, BOX))})
    assert (nothing_there.precision, nothing_there.recall, nothing_there.f1) == (0.0, None, 0.0)
    no_photos = operating_point(ground_truth(0, []), {})
    assert (no_photos.f1, no_photos.false_positives_per_image) == (None, None)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), score=st.sampled_from([0.0, 0.3, 0.6]))
def test_counts_are_those_of_pycocotools(random_case, seed, score):
    coco, detections = random_case(seed, images=6)
    point = operating_point(coco, detections, score=score)
    evaluation = coco_evaluation(coco, detections)
    sizes, photos = 4, 6
    hits = false = missed = 0
    for index in range(3):
        for entry in evaluation.evalImgs[index * sizes * photos : (index * sizes + 1) * photos]:
            if entry is None:
                continue
            sure = np.array(entry["dtScores"]) >= score
            matched = (entry["dtMatches"][0] != 0) & sure
            counted = ~entry["dtIgnore"][0] & sure
            hits += (matched & counted).sum()
            false += (~matched & counted).sum()
            missed += (entry["gtIgnore"] == 0).sum() - (matched & counted).sum()
    assert (point.true_positives, point.false_positives, point.false_negatives) == (hits, false, missed)


def test_match_takes_the_best_free_object():
    objects = np.array([[0.0, 0, 100, 100], [10.0, 0, 100, 100]])
    boxes = np.array([[10.0, 0, 100, 100], [10.0, 0, 100, 100], [10.0, 0, 100, 100]])
    result = match(boxes, objects, np.array([False, False]), 0.5)
    assert result.ious == pytest.approx([1.0, 90 / 110])
    assert (result.false_positives, result.false_negatives) == (1, 0)

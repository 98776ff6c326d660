"""Figures of one set of detections."""

import numpy as np
import pytest

from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices, interval
from earlyexit_ssd.evaluation.choices import exit_matches
from earlyexit_ssd.evaluation.coco import coco_metrics
from earlyexit_ssd.evaluation.operating_point import operating_point
from earlyexit_ssd.evaluation.quality import EvaluationSettings, Quality, evaluate_detections

SETTINGS = EvaluationSettings(score=0.3, resamples=20)


def test_figures_are_those_of_the_parts(random_case):
    coco, detections = random_case(1)
    quality = evaluate_detections(coco, detections, SETTINGS)
    assert quality.figures["AP"] == coco_metrics(coco, detections).AP
    assert quality.figures["precision"] == operating_point(coco, detections, 0.3, 0.5).precision
    assert quality.figures["AP50_interval"] == list(interval(quality.ap50_values))
    matches = exit_matches(coco, [detections])
    (draws,) = bootstrap_choices(matches, [np.zeros(matches.photos, int)], resamples=20, ap50_only=False)
    assert quality.figures["AP_interval"] == list(interval(draws.AP))
    low, high = quality.figures["AP_interval"]
    assert 0 <= low < high <= 1


def test_no_resamples_no_interval(random_case):
    quality = evaluate_detections(*random_case(1), EvaluationSettings(resamples=0))
    assert quality.figures["AP50_interval"] is None and quality.figures["AP_interval"] is None


def test_difference_on_the_same_draws():
    first, second = (Quality({}, np.array(values)) for values in ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]))
    assert first.ap50_minus(second) == pytest.approx([0.1, 0.1])
    assert first.ap50_minus(Quality({}, np.full(3, np.nan))) is None

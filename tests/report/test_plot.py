"""The chart."""

import numpy as np
from PIL import ImageColor

from earlyexit_ssd.report.plot import PLAIN, ROUTED, accuracy_against_time


def has(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1).any()


def test_size_and_points(metrics):
    picture = accuracy_against_time(metrics)
    assert picture.size == (960, 640)
    assert has(picture, ROUTED)
    assert has(picture, PLAIN)


def test_undefined_points_are_left_out(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = row["AP50_interval"] = None
    assert not has(accuracy_against_time(metrics), ROUTED)


def test_interval_beside_its_value(metrics):
    metrics["routed"]["AP50_interval"] = [0.7, 0.8]  # a percentile interval may miss the value
    accuracy_against_time(metrics)

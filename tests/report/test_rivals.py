"""The chart of exits and rivals."""

import numpy as np
from PIL import ImageColor

from earlyexit_ssd.report.plot import ROUTED
from earlyexit_ssd.report.rivals import STYLES, accuracy_against_cost


def pixels(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1)


def test_size_and_points(with_rivals):
    picture = accuracy_against_cost(with_rivals)
    assert picture.size == (1664, 1152)
    routed, foreign = pixels(picture, ROUTED), pixels(picture, STYLES["onnx"][0])
    half = picture.width // 2
    assert routed[:, :half].any() and routed[:, half:].any()
    assert foreign[:, :half].any() and not foreign[:, half:].any()  # its MMACs are unknown


def test_older_metrics_and_undefined_points(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = None
    picture = accuracy_against_cost(metrics)
    assert pixels(picture, ROUTED)[: picture.height // 2].any()
    assert not pixels(picture, ROUTED)[picture.height // 2 :].any()

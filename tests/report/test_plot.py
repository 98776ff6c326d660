"""The chart."""

import numpy as np
import pytest
from PIL import ImageColor

from earlyexit_ssd.report.plot import PLAIN, ROUTED, accuracy_against_time, training_curves
from earlyexit_ssd.report.rivals import accuracy_against_cost


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


def test_curves_of_a_training():
    baseline = [{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "AP/full": 0.1, "AP50/full": 0.2}]
    line = {"AP50/exit8": 0.1, "AP50/full": 0.2, "share/exit8": 0.25, "share/full": 0.75, "temperature/exit8": 1.5}
    exits = [{"epoch": 1.0, **line}, {"epoch": 2.0, **line, "AP50/exit8": None}]
    one, all_three = (training_curves(phases) for phases in ({"baseline": baseline}, {"exits": exits}))
    assert one.height < all_three.height  # AP50 alone; AP50, shares and temperatures
    both = training_curves({"baseline": baseline, "exits": exits, "joint": []})
    assert has(both, PLAIN)
    assert training_curves({"baseline": baseline[:1], "exits": []}) is None


@pytest.mark.parametrize("name", ["caf\udce9.onnx", "cost $5, $x_{$.onnx"])
def test_any_name_can_be_drawn(with_rivals, name):
    with_rivals["context"]["splits"] = [name]
    with_rivals["rivals"][0]["name"] = name
    assert has(accuracy_against_time(with_rivals), ROUTED)
    assert accuracy_against_cost(with_rivals).width > 0

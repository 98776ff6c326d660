"""The charts, and names in them that do not cover each other where there is room."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import ImageColor

from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.report.charts import (
    PLAIN,
    ROUTED,
    STYLES,
    _bars,
    accuracy_against_cost,
    place_labels,
    training_curves,
)


def has(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1).any()


def test_interval_beside_its_value(metrics):
    metrics["routed"]["AP50_interval"] = [0.7, 0.8]  # a percentile interval may miss the value
    assert has(accuracy_against_cost(Results.from_json(metrics)), ROUTED)
    assert _bars(0.65, [0.7, 0.8]) == [[0.0], [pytest.approx(0.15)]]


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
    assert has(accuracy_against_cost(Results.from_json(with_rivals)), ROUTED)


# The chart of exits and rivals.


def pixels(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1)


def test_size_and_points_beside_rivals(with_rivals):
    picture = accuracy_against_cost(Results.from_json(with_rivals))
    assert picture.size == (1664, 1152)
    routed, foreign = pixels(picture, ROUTED), pixels(picture, STYLES["onnx"][0])
    half = picture.width // 2
    assert routed[:, :half].any() and routed[:, half:].any()
    assert foreign[:, :half].any() and not foreign[:, half:].any()  # its MMACs are unknown


def test_older_metrics_and_undefined_points(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = None
    picture = accuracy_against_cost(Results.from_json(metrics))
    assert pixels(picture, ROUTED)[: picture.height // 2].any()
    assert not pixels(picture, ROUTED)[picture.height // 2 :].any()


def test_labels_of_a_cluster_stay_apart_and_inside():
    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(0, 0), (0.02, 0.01), (0.03, 0.0), (1, 1), (0.98, 1)]
    axes.plot(*zip(*points, strict=True), "o")
    figure.draw_without_rendering()
    place_labels(axes, points, ["first one", "second", "third", "corner", "beside it"], ["black"] * 5)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["first one", "second", "third", "corner", "beside it"]
    assert not any(Bbox.intersection(*pair) for pair in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)


def test_no_points():
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place_labels(axes, [], [], [])
    assert not axes.texts

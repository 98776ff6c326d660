"""Names do not cover each other where there is room."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from earlyexit_ssd.report.labels import place_labels


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

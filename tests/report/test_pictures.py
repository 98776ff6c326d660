"""The charts, names in them that do not cover each other where there is room, and photos with their boxes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image, ImageColor

from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.images import PALETTE
from earlyexit_ssd.report.pictures import (
    FRAME,
    GAP,
    HEADER,
    IGNORED,
    PLAIN,
    ROUTED,
    STYLES,
    TILE,
    Example,
    _bars,
    accuracy_against_cost,
    choose_examples,
    detection_grid,
    photo_grid,
    place_labels,
    training_curves,
)

NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def one(score: float, box=(40.0, 40.0, 120.0, 120.0), label: int = 1) -> dict:
    return {"boxes": torch.tensor([box]), "scores": torch.tensor([score]), "labels": torch.tensor([label])}


def example(image=None, iscrowd: int = 0, exit_index=None, detections=None) -> Example:
    target = {**one(1.0), "iscrowd": torch.tensor([iscrowd])}
    image = torch.full((3, 160, 160), 0.5) if image is None else image
    return Example(image, target, detections or [NOTHING, one(0.3), one(0.9, label=2)], exit_index)


def pixels(picture, row: int, column: int) -> np.ndarray:
    top, left = HEADER + row * (TILE + GAP), GAP + column * (TILE + GAP)
    return np.asarray(picture)[top : top + TILE, left : left + TILE]


def where(picture: Image.Image | np.ndarray, color: str) -> np.ndarray:
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1)


def has(picture: Image.Image | np.ndarray, color: str) -> bool:
    return bool(where(picture, color).any())


def grid(*examples):
    return detection_grid(examples, ("exit8", "exit12", "full"), ("cat", "dog"), score=0.4)


def test_size():
    assert grid(example(), example()).size == (GAP + 4 * (TILE + GAP), HEADER + 2 * (TILE + GAP))
    assert detection_grid([], ("full",), ("cat",)).size == (GAP + 2 * (TILE + GAP), HEADER)


def test_boxes_where_they_belong():
    picture = grid(example())
    assert not has(pixels(picture, 0, 1), PALETTE[0])  # found nothing
    assert not has(pixels(picture, 0, 2), PALETTE[0])  # under the score
    assert has(pixels(picture, 0, 3), PALETTE[1])  # a dog
    truth = pixels(picture, 0, 0)
    # the photo is shown at twice its size, so the box's corner is at 80
    assert tuple(truth[160, 80]) == ImageColor.getrgb(PALETTE[0])
    assert tuple(truth[160, 240]) == ImageColor.getrgb(PALETTE[0])
    assert tuple(truth[160, 160]) == (128, 128, 128)


def test_without_ground_truth_the_exits_stand_alone():
    known = example(exit_index=1, detections=[NOTHING, one(0.9), one(0.9, label=2)])
    with_truth = grid(known)
    picture = grid(dataclasses.replace(known, target=None))
    assert picture.size == (GAP + 3 * (TILE + GAP), HEADER + TILE + GAP)
    for column in range(3):
        assert np.array_equal(pixels(picture, 0, column), pixels(with_truth, 0, column + 1))
    row = HEADER + TILE // 2
    framed = [picture.getpixel((GAP + column * (TILE + GAP) - 2, row)) == ImageColor.getrgb(FRAME) for column in (0, 1)]
    assert framed == [False, True]
    # Beside others that have one, its own tile shows the photo alone.
    mixed = grid(known, dataclasses.replace(known, target=None))
    assert not has(pixels(mixed, 1, 0), PALETTE[0])
    assert np.array_equal(pixels(mixed, 1, 2), pixels(with_truth, 0, 2))


def test_a_picture_without_frames_does_not_explain_them():
    title = np.asarray(grid(example()))[:HEADER]
    assert not has(title, FRAME)
    assert has(np.asarray(grid(example(exit_index=0)))[: HEADER - GAP], FRAME)


def test_ignored_objects_are_grey():
    truth = pixels(grid(example(iscrowd=1)), 0, 0)
    assert has(truth, IGNORED)
    assert not has(truth, PALETTE[0])


@pytest.mark.parametrize("exit_index", [None, 0, 2])
def test_only_the_routed_exit_is_framed(exit_index):
    picture = np.asarray(grid(example(), example(exit_index=exit_index)))
    row = HEADER + TILE + GAP + TILE // 2
    framed = [tuple(picture[row, GAP + column * (TILE + GAP) - 2]) == ImageColor.getrgb(FRAME) for column in range(4)]
    assert framed == [exit_index is not None and column == exit_index + 1 for column in range(4)]
    assert not has(picture[HEADER + TILE // 2], FRAME)


def test_frame_hides_nothing_of_the_photo():
    plain, framed = grid(example()), grid(example(exit_index=1))
    assert np.array_equal(pixels(plain, 0, 2), pixels(framed, 0, 2))


@pytest.mark.parametrize("shape", [(3, 40, 400), (3, 400, 40), (3, 1, 1), (3, 7, 1000)])
def test_any_shape_of_photo(shape):
    height = max(round(shape[1] * TILE / max(shape[1:])), 1)
    assert grid(example(torch.zeros(shape))).size == (GAP + 4 * (TILE + GAP), HEADER + height + GAP)


def test_box_at_the_edge_keeps_its_text_inside():
    edge = one(0.9, box=(150.0, 0.0, 170.0, 10.0))
    tile = pixels(grid(example(detections=[edge, edge, edge])), 0, 1)
    assert has(tile[:20, -90:], "#ffffff")


def test_unknown_label_does_not_crash():
    grid(example(detections=[one(0.9, label=91)] * 3))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30), st.integers(0, 8))
def test_choice_is_distinct_and_complete(photos, count):
    picked = choose_examples([exit_ for exit_, _ in photos], [empty for _, empty in photos], count)
    assert len(picked) == len(set(picked)) == min(count, len(photos))


def test_choice_shows_every_exit_and_some_empty_photos():
    chosen, empty = [0] * 50 + [1] * 50 + [2] * 2, [index % 2 == 0 for index in range(102)]
    picked = choose_examples(chosen, empty, 8, seed=1)
    assert {chosen[index] for index in picked} == {0, 1, 2}
    assert sum(empty[index] for index in picked) == 2
    assert picked == choose_examples(chosen, empty, 8, seed=1)
    assert picked != choose_examples(chosen, empty, 8, seed=2)


def test_texts_do_not_cover_each_other():
    """The surest keeps its text; the other box is drawn without."""
    crowd = {
        "boxes": torch.tensor([[40.0, 40, 120, 120], [42.0, 40, 122, 120]]),
        "scores": torch.tensor([0.8, 0.9]),
        "labels": torch.tensor([1, 2]),
    }
    tile = pixels(grid(example(detections=[crowd] * 3)), 0, 1)
    text_line = tile[66:78, 80:160]
    assert has(text_line, PALETTE[1])
    assert not has(text_line, PALETTE[0])
    assert has(tile, PALETTE[0])


def test_photo_grid_draws_every_photo_and_its_boxes():
    target = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([1])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    samples = [(torch.zeros(3, 60, 60), target), *[(torch.zeros(3, 60, 60), empty)] * 4]
    picture = photo_grid(samples, ["chair"], columns=4, tile=60)
    assert picture.size == (GAP + 4 * (60 + GAP), GAP + 2 * (60 + GAP))
    assert picture.getpixel((GAP + 50, GAP + 40)) == (229, 62, 62)
    assert picture.getpixel((GAP + 30, GAP + 60 + GAP + 30)) == (0, 0, 0)
    assert picture.getpixel((GAP + 100, GAP + 60 + GAP + 30)) == (255, 255, 255)


# Charts.


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


def test_size_and_points_beside_rivals(with_rivals):
    picture = accuracy_against_cost(Results.from_json(with_rivals))
    assert picture.size == (1664, 1152)
    routed, foreign = where(picture, ROUTED), where(picture, STYLES["onnx"][0])
    half = picture.width // 2
    assert routed[:, :half].any() and routed[:, half:].any()
    assert foreign[:, :half].any() and not foreign[:, half:].any()  # its MMACs are unknown


def test_older_metrics_and_undefined_points(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = None
    picture = accuracy_against_cost(Results.from_json(metrics))
    assert where(picture, ROUTED)[: picture.height // 2].any()
    assert not where(picture, ROUTED)[picture.height // 2 :].any()


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

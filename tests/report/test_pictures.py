"""The charts, their labels, and photos with their boxes."""

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
    GREY,
    HEADER,
    IGNORED,
    ORANGE,
    STYLES,
    TILE,
    Example,
    accuracy_against_cost,
    choose_examples,
    detection_grid,
    photo_grid,
    place_labels,
    training_curves,
)

NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def detection(score: float, box=(40.0, 40.0, 120.0, 120.0), label: int = 1) -> dict:
    return {"boxes": torch.tensor([box]), "scores": torch.tensor([score]), "labels": torch.tensor([label])}


def example(image=None, iscrowd: int = 0, exit_index=None, detections=None) -> Example:
    target = {**detection(1.0), "iscrowd": torch.tensor([iscrowd])}
    image = torch.full((3, 160, 160), 0.5) if image is None else image
    return Example(image, target, detections or [NOTHING, detection(0.3), detection(0.9, label=2)], exit_index)


def grid(*examples) -> Image.Image:
    return detection_grid(examples, ("exit8", "exit12", "full"), ("cat", "dog"), score=0.4)


def pixels(picture, row: int, column: int) -> np.ndarray:
    top, left = HEADER + GAP // 2 + row * (TILE + GAP), GAP // 2 + column * (TILE + GAP)
    return np.asarray(picture)[top : top + TILE, left : left + TILE]


def where(picture: Image.Image | np.ndarray, color: str) -> np.ndarray:
    """Mask [H, W] of the pixels with this colour."""
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1)


def has(picture: Image.Image | np.ndarray, color: str) -> bool:
    return bool(where(picture, color).any())


def framed_columns(picture: Image.Image, row: int) -> list[int]:
    """The tiles of the row that have a frame on their left."""
    left_of_tiles = np.asarray(picture)[HEADER + row * (TILE + GAP) + TILE // 2, 1 :: TILE + GAP]
    return np.flatnonzero(where(left_of_tiles, FRAME)).tolist()


@pytest.mark.parametrize("shape", [(160, 160), (400, 40), (1, 1000)])
def test_size_of_the_grid_for_any_shape_of_photo(shape):
    height = max(round(shape[0] * TILE / max(shape)), 1)
    picture = grid(*[example(torch.zeros(3, *shape))] * 2)
    assert picture.size == (4 * (TILE + GAP), HEADER + 2 * (height + GAP))
    assert detection_grid([], ("full",), ("cat",)).size == (2 * (TILE + GAP), HEADER)


def test_boxes_are_drawn_in_their_tiles():
    picture = grid(example())
    assert not has(pixels(picture, 0, 1), PALETTE[0])  # no detections
    assert not has(pixels(picture, 0, 2), PALETTE[0])  # score too low
    assert has(pixels(picture, 0, 3), PALETTE[1])  # a dog
    truth = pixels(picture, 0, 0)
    # the photo is shown at twice its size, so the box's corner is at 80
    colors = {column: tuple(truth[160, column]) for column in (80, 160, 240)}
    assert colors[80] == colors[240] == ImageColor.getrgb(PALETTE[0]) and colors[160] == (128, 128, 128)


def test_without_ground_truth_only_the_exits_are_shown():
    known = example(exit_index=1, detections=[NOTHING, detection(0.9), detection(0.9, label=2)])
    unknown = dataclasses.replace(known, target=None)
    with_truth, picture, mixed = grid(known), grid(unknown), grid(known, unknown)
    assert picture.size == (3 * (TILE + GAP), HEADER + TILE + GAP)
    for column in range(3):
        assert np.array_equal(pixels(picture, 0, column), pixels(with_truth, 0, column + 1))
    assert framed_columns(picture, 0) == [1]
    # beside an example with ground truth, the photo alone takes the first column
    assert not has(pixels(mixed, 1, 0), PALETTE[0])
    assert np.array_equal(pixels(mixed, 1, 2), pixels(with_truth, 0, 2))


def test_ignored_objects_are_grey():
    truth = pixels(grid(example(iscrowd=1)), 0, 0)
    assert has(truth, IGNORED) and not has(truth, PALETTE[0])


@pytest.mark.parametrize("exit_index", [None, 0, 2])
def test_only_the_routed_exit_has_a_frame(exit_index):
    picture = grid(example(), example(exit_index=exit_index))
    assert framed_columns(picture, 0) == []
    assert framed_columns(picture, 1) == ([] if exit_index is None else [exit_index + 1])
    assert has(np.asarray(picture)[: HEADER - GAP], FRAME) == (exit_index is not None)  # the header explains frames
    for column in range(4):  # a frame hides nothing of the photo
        assert np.array_equal(pixels(picture, 0, column), pixels(picture, 1, column))


def test_box_at_the_edge_keeps_its_text_inside():
    edge = detection(0.9, box=(150.0, 0.0, 170.0, 10.0))
    tile = pixels(grid(example(detections=[edge] * 3)), 0, 1)
    assert has(tile[:20, -90:], "#ffffff")


def test_unknown_label_is_drawn():
    assert has(pixels(grid(example(detections=[detection(0.9, label=91)] * 3)), 0, 1), PALETTE[90 % len(PALETTE)])


def test_of_two_overlapping_texts_the_one_with_the_higher_score_is_drawn():
    crowd = {
        "boxes": torch.tensor([[40.0, 40, 120, 120], [42.0, 40, 122, 120]]),
        "scores": torch.tensor([0.8, 0.9]),
        "labels": torch.tensor([1, 2]),
    }
    tile = pixels(grid(example(detections=[crowd] * 3)), 0, 1)
    text_line = tile[66:78, 80:160]
    assert has(text_line, PALETTE[1]) and not has(text_line, PALETTE[0])
    assert has(tile, PALETTE[0])


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30), st.integers(0, 8))
def test_chosen_examples_are_distinct_and_complete(photos, count):
    picked = choose_examples([exit_ for exit_, _ in photos], [empty for _, empty in photos], count)
    assert len(picked) == len(set(picked)) == min(count, len(photos))


def test_chosen_examples_show_every_exit_and_some_empty_photos():
    chosen, empty = [0] * 50 + [1] * 50 + [2] * 2, [index % 2 == 0 for index in range(102)]
    picked = choose_examples(chosen, empty, 8, seed=1)
    assert {chosen[index] for index in picked} == {0, 1, 2}
    assert sum(empty[index] for index in picked) == 2
    assert picked == choose_examples(chosen, empty, 8, seed=1)
    assert picked != choose_examples(chosen, empty, 8, seed=2)


def test_photo_grid_draws_every_photo_and_its_boxes():
    target = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([1])}
    black, side = torch.zeros(3, 240, 240), 240 + GAP
    picture = photo_grid([(black, target), *[(black, NOTHING)] * 4], ["chair"])
    assert picture.size == (4 * side, 2 * side)
    assert picture.getpixel((GAP // 2 + 50, GAP // 2 + 40)) == ImageColor.getrgb(PALETTE[0])
    assert picture.getpixel((GAP + 30, GAP + side + 30)) == (0, 0, 0)  # the fifth photo
    assert picture.getpixel((GAP + side + 30, GAP + side + 30)) == (255, 255, 255)
    wide, high = torch.zeros(3, 120, 240), torch.zeros(3, 240, 120)
    picture = photo_grid([(wide, NOTHING), *[(high, NOTHING)] * 3, (wide, NOTHING)], ["chair"])
    assert picture.size == (4 * side, side + 120 + GAP)
    assert picture.getpixel((side + 30, 230)) == (0, 0, 0)  # photos of other shapes are whole


# Charts.


def test_training_curves_have_a_row_for_each_figure():
    baseline = [{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "AP/full": 0.1, "AP50/full": 0.2}]
    line = {"AP50/exit8": 0.1, "AP50/full": 0.2, "share/exit8": 0.25, "share/full": 0.75, "temperature/exit8": 1.5}
    exits = [{"epoch": 1.0, **line}, {"epoch": 2.0, **line, "AP50/exit8": None}]
    one_row, three_rows = (training_curves(phases) for phases in ({"baseline": baseline}, {"exits": exits}))
    assert one_row.height < three_rows.height
    assert has(training_curves({"baseline": baseline, "exits": exits, "joint": []}), GREY)
    assert training_curves({"baseline": baseline[:1], "exits": []}) is None


def test_rival_without_mmacs_is_drawn_against_milliseconds_only(with_rivals):
    """Any name can be drawn, and an interval that misses the value."""
    with_rivals["rivals"][0]["name"] = name = "caf\udce9 $x_{$.onnx"
    with_rivals["context"]["splits"] = [name]
    with_rivals["routed"]["AP50_interval"] = [0.7, 0.8]
    picture = accuracy_against_cost(Results.from_json(with_rivals))
    assert picture.size == (1664, 1152)
    routed, foreign = where(picture, ORANGE), where(picture, STYLES["onnx"][0])
    half = picture.width // 2
    assert routed[:, :half].any() and routed[:, half:].any()
    assert foreign[:, :half].any() and not foreign[:, half:].any()


def test_undefined_points_are_left_out(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = None
    picture = accuracy_against_cost(Results.from_json(metrics))
    assert where(picture, ORANGE)[: picture.height // 2].any()
    assert not where(picture, ORANGE)[picture.height // 2 :].any()


def test_labels_of_a_cluster_stay_apart_and_inside():
    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place_labels(axes, [], [], [])
    assert not axes.texts
    points = [(0, 0), (0.02, 0.01), (0.03, 0.0), (1, 1), (0.98, 1)]
    texts = ["first one", "second", "third", "corner", "beside it"]
    axes.plot(*zip(*points, strict=True), "o")
    figure.draw_without_rendering()
    place_labels(axes, points, texts, ["black"] * 5)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == texts
    assert not any(Bbox.intersection(*pair) for pair in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)

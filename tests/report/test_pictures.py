"""Sizes and pixels of the detection pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from earlyexit_ssd.images import PALETTE
from earlyexit_ssd.report.pictures import (
    FRAME,
    GAP,
    HEADER,
    IGNORED,
    TILE,
    Example,
    choose_examples,
    detection_grid,
    photo_grid,
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


def has(tile: np.ndarray, color: str) -> bool:
    return bool((tile == ImageColor.getrgb(color)).all(axis=-1).any())


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
    assert not (picture[HEADER + TILE // 2] == ImageColor.getrgb(FRAME)).all(axis=-1).any()


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

"""The IoU-aware crop does what torchvision's does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from earlyexit_ssd.data.iou_crop import RandomIoUCrop, centres_inside, pairwise_iou
from earlyexit_ssd.data.transforms import Augmentation

CROP = Augmentation([RandomIoUCrop(p=1.0)])


def coordinates_image(width: int, height: int) -> np.ndarray:
    """Pixel (x, y) holds (x, y, 0), so that a crop shows where it was taken."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def crop(boxes: list[list[float]], seed: int, width: int = 200, height: int = 120):
    """The window (x1, y1, x2, y2), the boxes, and the indices of the kept ones."""
    image, kept_boxes, kept = CROP(coordinates_image(width, height), np.array(boxes), np.arange(len(boxes)), seed)
    x1, y1 = image[0, 0, :2].astype(int)
    x2, y2 = image[-1, -1, :2].astype(int) + 1
    assert image.shape == (y2 - y1, x2 - x1, 3)
    return np.array([x1, y1, x2, y2]), kept_boxes, kept


def test_boxes_by_hand():
    """Window 20..120 x 10..60: one box inside, one cut, one whose centre is outside, one on the border."""
    transform = RandomIoUCrop(p=1.0)
    size = np.array([200, 120, 200, 120])
    boxes = np.array([[30, 20, 50, 40], [10, 0, 60, 30], [0, 0, 30, 30], [0, 20, 40, 40]], float)
    rows = np.concatenate([boxes / size, [[0], [1], [2], [3]]], axis=1)
    result = transform.apply_to_bboxes(rows, window=(20, 10, 120, 60), shape=(120, 200, 3))
    np.testing.assert_allclose(result[:, :4] * (100, 50, 100, 50), [[10, 10, 30, 30], [0, 0, 40, 20]])
    assert result[:, 4].tolist() == [0, 1]


# centres never on a whole pixel, where rounding would decide on which side of a window's border they are
boxes_in_photo = st.lists(
    st.tuples(st.integers(0, 180), st.integers(0, 100), st.integers(4, 200), st.integers(4, 120)),
    min_size=1,
    max_size=5,
).map(lambda rows: [[x + 0.3, y + 0.3, min(x + w + 0.3, 200), min(y + h + 0.3, 120)] for x, y, w, h in rows])


@settings(deadline=None, max_examples=150)
@given(boxes_in_photo, st.integers(0, 2**40))
def test_every_crop_keeps_the_promises(boxes, seed):
    window, kept_boxes, kept = crop(boxes, seed)
    original = np.array(boxes, float)
    inside = centres_inside(original, window[None])[0]
    whole = window.tolist() == [0, 0, 200, 120]
    assert kept.tolist() == (list(range(len(boxes))) if whole else np.flatnonzero(inside).tolist())
    assert len(kept) > 0
    expected = original[kept].clip(window[[0, 1, 0, 1]], window[[2, 3, 2, 3]]) - window[[0, 1, 0, 1]]
    np.testing.assert_allclose(kept_boxes, expected, atol=1e-3)
    if not whole:
        width, height = window[2:] - window[:2]
        assert 0.5 <= width / height <= 2
        assert 59 <= width <= 200
        assert 35 <= height <= 120


def test_a_photo_without_objects_stays_whole():
    for seed in range(20):
        image, boxes, kept = CROP(coordinates_image(200, 120), np.zeros((0, 4)), np.zeros(0, int), seed)
        assert image.shape == (120, 200, 3)
        assert boxes.shape == (0, 4)
        assert kept.shape == (0,)


def test_least_iou_is_kept(monkeypatch):
    """With 0.7 the only choice, each crop overlaps the box by as much."""
    monkeypatch.setattr(RandomIoUCrop, "LEAST_IOUS", (0.7,))
    box = [[40, 30, 160, 110]]
    for seed in range(30):
        window, _, _ = crop(box, seed)
        assert pairwise_iou(np.array(box, float), window[None])[0, 0] >= 0.7


def test_iou_agrees_with_torchvision():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 50, (30, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(1, 50, (30, 2))], axis=1)
    expected = box_iou(torch.from_numpy(boxes[:10]), torch.from_numpy(boxes[10:]))
    np.testing.assert_allclose(pairwise_iou(boxes[10:], boxes[:10]), expected)


@pytest.mark.parametrize("boxes", [[[40, 30, 160, 110]], [[10, 10, 40, 40], [100, 50, 130, 110]]])
def test_crops_are_distributed_as_torchvisions(boxes):
    """Share of uncropped photos, mean size of the windows and mean number of kept objects, over 150 draws."""
    count = 150
    reference = v2.Compose([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()])
    photo = tv_tensors.Image(torch.zeros(3, 120, 200, dtype=torch.uint8))
    theirs = []
    for _ in range(count):
        target = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(120, 200))
        image, target = reference(photo, {"boxes": target, "labels": torch.arange(len(boxes))})
        theirs.append((image.shape[2] / 200, image.shape[1] / 120, image.shape[1:] == (120, 200), len(target["boxes"])))
    ours = []
    for seed in range(count):
        (x1, y1, x2, y2), _, kept = crop(boxes, seed)
        ours.append(((x2 - x1) / 200, (y2 - y1) / 120, (x2 - x1, y2 - y1) == (200, 120), len(kept)))
    difference = np.mean(theirs, axis=0) - np.mean(ours, axis=0)
    # four standard errors of a difference of two means, 0.25 and 0.5 being generous spreads
    assert (abs(difference) < 4 * np.array([0.25, 0.25, 0.5, 0.5]) * np.sqrt(2 / count)).all(), difference

"""Seeds and augmentations."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

from earlyexit_ssd.config.check import CHOICES
from earlyexit_ssd.data.transforms import (
    CANVAS,
    Augmentation,
    RandomIoUCrop,
    RandomZoomOut,
    build_transforms,
    centres_inside,
    mixed_seed,
)


def test_mixed_seed_is_pinned():
    """Other seeds would change the views of every resumed run."""
    assert mixed_seed(0, 3, 7) == 6812392217526899882
    assert len({mixed_seed(s, e, i) for s in range(4) for e in range(4) for i in range(20)}) == 320


# The IoU-aware crop.

CROP = Augmentation([RandomIoUCrop(p=1.0)])


def coordinates_image(width: int, height: int) -> np.ndarray:
    """Return an image whose pixel (x, y) is (x, y, 0), so a crop shows its window."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def crop(boxes: list[list[float]], seed: int, width: int = 200, height: int = 120):
    """Return the window (x1, y1, x2, y2), the kept boxes relative to it, and their indices."""
    image, kept_boxes, kept = CROP(coordinates_image(width, height), np.array(boxes), np.arange(len(boxes)), seed)
    x1, y1 = image[0, 0, :2].astype(int)
    x2, y2 = image[-1, -1, :2].astype(int) + 1
    assert image.shape == (y2 - y1, x2 - x1, 3)
    return np.array([x1, y1, x2, y2]), kept_boxes, kept


def test_crop_of_boxes_by_hand():
    """The window is 20..120 x 10..60. A box is inside, one is cut, one has its centre outside, one on the border."""
    transform = RandomIoUCrop(p=1.0)
    size = np.array([200, 120, 200, 120])
    boxes = np.array([[30, 20, 50, 40], [10, 0, 60, 30], [0, 0, 30, 30], [0, 20, 40, 40]], float)
    rows = np.concatenate([boxes / size, [[0], [1], [2], [3]]], axis=1)
    result = transform.apply_to_bboxes(rows, window=(20, 10, 120, 60), shape=(120, 200, 3))
    np.testing.assert_allclose(result[:, :4] * (100, 50, 100, 50), [[10, 10, 30, 30], [0, 0, 40, 20]])
    assert result[:, 4].tolist() == [0, 1]


# No centre is on a whole pixel, because there rounding would decide if it is inside the window.
boxes_in_photo = st.lists(
    st.tuples(st.integers(0, 180), st.integers(0, 100), st.integers(4, 200), st.integers(4, 120)),
    min_size=1,
    max_size=5,
).map(lambda rows: [[x + 0.3, y + 0.3, min(x + w + 0.3, 200), min(y + h + 0.3, 120)] for x, y, w, h in rows])


@settings(deadline=None, max_examples=150)
@given(boxes_in_photo, st.integers(0, 2**40))
def test_crop_keeps_objects_with_centre_inside_and_limits_its_shape(boxes, seed):
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


def test_photo_without_objects_is_not_cropped():
    image, boxes, kept = CROP(coordinates_image(200, 120), np.zeros((0, 4)), np.zeros(0, int), 0)
    assert (image.shape, boxes.shape, kept.shape) == ((120, 200, 3), (0, 4), (0,))


def test_crop_reaches_the_minimum_iou(monkeypatch):
    """With 0.7 as the only choice, each window has an IoU of at least 0.7 with the box."""
    monkeypatch.setattr(RandomIoUCrop, "MIN_IOUS", (0.7,))
    box = [[40, 30, 160, 110]]
    windows = torch.tensor(np.array([crop(box, seed)[0] for seed in range(30)]))
    assert box_iou(torch.tensor(box, dtype=torch.float64), windows).min() >= 0.7


def test_distribution_of_crops_equals_torchvision():
    """The share of uncropped photos, and the means of window size and number of kept objects, over 150 draws."""
    count, boxes = 150, [[10, 10, 40, 40], [100, 50, 130, 110]]
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
    # four standard errors of a difference of two means; 0.25 and 0.5 are upper limits of the standard deviations
    assert (abs(difference) < 4 * np.array([0.25, 0.25, 0.5, 0.5]) * np.sqrt(2 / count)).all(), difference


# Presets.

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
BOXES = np.array([[10, 5, 40, 35], [50, 10, 95, 55]], np.float32)
LABELS = np.array([3, 1])


@pytest.mark.parametrize("preset", [preset for preset in CHOICES["DATA.AUGMENTATION"] if preset != "none"])
def test_view_depends_on_the_seed_only(preset):
    first, second = build_transforms(preset), pickle.loads(pickle.dumps(build_transforms(preset)))
    differ = 0
    for seed in range(12):
        np.random.seed(seed)
        image, boxes, labels = view = first(IMAGE, BOXES, LABELS, seed)
        second(IMAGE, BOXES, LABELS, 99)  # earlier draws do not matter
        for value, again in zip(view, second(IMAGE, BOXES, LABELS, seed), strict=True):
            np.testing.assert_array_equal(value, again)
        differ += not np.array_equal(image, IMAGE)
        assert (image.dtype, boxes.dtype, labels.dtype) == (np.uint8, np.float32, np.int64)
    assert differ > 2 and build_transforms("none") is None


def test_flip_mirrors_half_of_the_photos():
    flip = build_transforms("flip")
    flipped = 0
    for seed in range(60):
        image, boxes, labels = flip(IMAGE, BOXES, LABELS, seed)
        if not np.array_equal(image, IMAGE):
            flipped += 1
            np.testing.assert_array_equal(image, IMAGE[:, ::-1])
            np.testing.assert_allclose(boxes, [[60, 5, 90, 35], [5, 10, 50, 55]], atol=1e-4)
        assert labels.tolist() == [3, 1]
    assert 18 < flipped < 42


def test_ssdlite_does_not_change_colours():
    """Each pixel of a view occurs in the photo."""
    colours = {tuple(pixel) for pixel in IMAGE.reshape(-1, 3).tolist()}
    for seed in range(5):
        image, _, _ = build_transforms("ssdlite")(IMAGE, BOXES, LABELS, seed)
        assert {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()} <= colours


def test_ssd_draws_its_changes_independently():
    """Transforms with the same seed would be applied together. Here every combination of four of them occurs."""
    augmentation = build_transforms("ssd")
    chain = augmentation._compose.transforms
    seen = set()
    for seed in range(150):
        augmentation(IMAGE, BOXES, LABELS, seed)
        seen.add(tuple(bool(transform.params) for transform in chain[:4]))
    assert len(seen) == 16


def test_thin_boxes_are_dropped_by_augmentation():
    boxes = np.array([[10, 5, 10.5, 35], [50, 10, 95, 55]], np.float32)
    _, kept, labels = build_transforms("flip")(IMAGE, boxes, LABELS, 0)
    assert len(kept) == 1
    assert labels.tolist() == [1]


def test_zoom_out_moves_the_boxes_with_the_photo():
    image = np.zeros((60, 100, 3), np.uint8)
    image[10:40, 20:80] = (255, 0, 255)
    zoom = Augmentation([RandomZoomOut(p=1.0)])
    sizes = []
    for seed in range(30):
        view, boxes, _ = zoom(image, np.array([[20, 10, 80, 40]]), np.array([1]), seed)
        rows, columns = np.nonzero((view[..., 0] > 200) & (view[..., 1] < 50))
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(boxes[0], seen, atol=1.5)
        sizes.append((boxes[0, 2] - boxes[0, 0]) / 60)
    assert view.shape == image.shape and (view == np.array(CANVAS)).all(axis=2).any()
    assert 0.24 <= min(sizes) < 0.4 < 0.7 < max(sizes) <= 1


def test_update_check_of_albumentations_is_disabled():
    """Importing the package sets the variable."""
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"

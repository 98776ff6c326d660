"""Augmentation presets with albumentations, reproducible from a seed."""

import random
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

Window = tuple[int, int, int, int]  # of whole pixels; the transforms state its format


def mixed_seed(*numbers: int) -> int:
    """Return a seed in [0, 2**63) from non-negative integers such as (seed, epoch, index), the same in every NumPy."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class RandomIoUCrop(A.DualTransform):
    """torchvision's ``RandomIoUCrop`` (Liu et al. 2016, section 2.2) as an albumentations transform.

    A minimum IoU is drawn; 1.0 means no crop. Then 40 random windows are tried, with 0.3 to 1 of each side of the photo
    and an aspect ratio of 0.5 to 2. A window is accepted if it holds the centre of an object and has at least the
    minimum IoU with it. If none is accepted, another minimum is drawn. Objects whose centre is outside the window are
    dropped, the others are clipped.
    """

    SCALE, ASPECT, TRIALS = (0.3, 1.0), (0.5, 2.0), 40
    MIN_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    _targets = A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Window]:
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"], np.float64)[:, :4] * (width, height, width, height)
        window = None
        while len(boxes) and window is None:
            min_iou = self.MIN_IOUS[self.random_generator.integers(len(self.MIN_IOUS))]
            if min_iou >= 1:
                break
            window = self._find_window(boxes, width, height, min_iou)
        return {"window": (0, 0, width, height) if window is None else window}

    def _find_window(self, boxes: np.ndarray, width: int, height: int, min_iou: float) -> Window | None:
        """Return the first of ``TRIALS`` random windows that is accepted, as x1, y1, x2, y2 in pixels, or None."""
        sizes = (self.random_generator.uniform(*self.SCALE, (self.TRIALS, 2)) * (width, height)).astype(int)
        corners = (self.random_generator.random((self.TRIALS, 2)) * ((width, height) - sizes)).astype(int)
        windows = np.concatenate([corners, corners + sizes], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            aspect = sizes[:, 0] / sizes[:, 1]
        valid = (sizes.min(axis=1) > 0) & (aspect >= self.ASPECT[0]) & (aspect <= self.ASPECT[1])
        ious = box_iou(torch.from_numpy(windows.astype(np.float64)), torch.from_numpy(boxes)).numpy()
        ious = np.where(centres_inside(boxes, windows), ious, -1.0)
        accepted = valid & (ious.max(axis=1) >= min_iou)
        return tuple(windows[accepted.argmax()].tolist()) if accepted.any() else None

    def apply(self, img: np.ndarray, window: Window, **params: Any) -> np.ndarray:
        x1, y1, x2, y2 = window
        return img[y1:y2, x1:x2]

    def apply_to_bboxes(self, bboxes: np.ndarray, window: Window, **params: Any) -> np.ndarray:
        """Return the boxes whose centre is in the window, normalized to it: [M, 4 + columns] of [N, 4 + columns]."""
        height, width = params["shape"][:2]
        if window == (0, 0, width, height):
            return bboxes
        scale = np.array([width, height, width, height], np.float64)
        kept = bboxes[centres_inside(bboxes[:, :4] * scale, np.array([window]))[0]].copy()
        x1, y1, x2, y2 = window
        size = np.array([x2 - x1, y2 - y1] * 2)
        kept[:, :4] = ((kept[:, :4] * scale - (x1, y1, x1, y1)) / size).clip(0, 1)
        return kept


def centres_inside(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Return whether each box [N, 4] has its centre inside, not on the border of, each window [M, 4], bool [M, N]."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(axis=2)


CANVAS = (124, 116, 104)  # ImageNet's mean colour, RGB, 0..255


class RandomZoomOut(A.DualTransform):
    """Shrink the photo by a factor of 1 to 4 and place it at random on a canvas of the photo's original size. After the
    detector's resize the result is that of torchvision's ``RandomZoomOut``, which enlarges the canvas."""

    _targets = A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, Window]:
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1.0, 4.0)
        new_width, new_height = max(1, int(width / ratio)), max(1, int(height / ratio))
        left = int(self.py_random.random() * (width - new_width))
        top = int(self.py_random.random() * (height - new_height))
        return {"place": (left, top, new_width, new_height)}

    def apply(self, img: np.ndarray, place: Window, **params: Any) -> np.ndarray:
        left, top, width, height = place
        canvas = np.full_like(img, CANVAS)
        canvas[top : top + height, left : left + width] = cv2.resize(img, (width, height), interpolation=cv2.INTER_AREA)
        return canvas

    def apply_to_bboxes(self, bboxes: np.ndarray, place: Window, **params: Any) -> np.ndarray:
        """Return the boxes [N, 4 + columns] normalized to the canvas."""
        height, width = params["shape"][:2]
        moved = bboxes.copy()
        moved[:, :4] = (bboxes[:, :4] * (place[2:] * 2) + place[:2] * 2) / (width, height, width, height)
        return moved


class Augmentation:
    """A sequence of albumentations transforms whose result depends on the input and a seed only."""

    def __init__(self, transforms: list[A.BasicTransform]) -> None:
        # as torchvision does, drop boxes thinner than a pixel
        boxes = A.BboxParams("pascal_voc", label_fields=["labels"], min_width=1, min_height=1, clip=True)
        self._compose = A.Compose(transforms, bbox_params=boxes)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Augment a photo (uint8 RGB [H, W, 3]) with its boxes (float [N, 4], xyxy in pixels) and labels (int [N]).

        Return an image uint8 [H', W', 3], its boxes float32 [M, 4] (xyxy, pixels) and labels int64 [M], with M <= N.
        """
        # all transforms share a generator; set_random_seed would give each of them the same random numbers
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self._compose(image=image, bboxes=boxes, labels=labels)
        boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        return result["image"], boxes, np.asarray(result["labels"], np.int64).reshape(-1)


def build_transforms(preset: str) -> Augmentation | None:
    """Return the augmentation of a preset of ``DATA.AUGMENTATION``, None for "none"."""
    # torchvision applies each change of colour with probability 0.5, so each has its own ColorJitter
    same = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
    bounds = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
    colours = [A.ColorJitter(**{**same, name: bound}, p=0.5) for name, bound in bounds.items()]
    flip, crop = A.HorizontalFlip(p=0.5), RandomIoUCrop(p=1.0)
    ssd = [*colours, A.ChannelShuffle(p=0.5), RandomZoomOut(p=0.5), crop, flip]
    transforms = {"none": None, "flip": [flip], "ssdlite": [crop, flip], "ssd": ssd}[preset]
    return transforms and Augmentation(transforms)

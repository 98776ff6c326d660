"""Augmentation by name; the presets do what those of torchvision's detection reference do."""

from __future__ import annotations

import random

import numpy as np

from earlyexit_ssd.data.iou_crop import RandomIoUCrop
from earlyexit_ssd.data.offline import albumentations as A
from earlyexit_ssd.data.zoom_out import RandomZoomOut
from earlyexit_ssd.errors import ConfigError, nearest

PRESETS = ("ssdlite", "ssd", "flip", "none")


class Augmentation:
    """A chain of albumentations whose result depends on nothing but its input and a seed."""

    def __init__(self, transforms: list[A.BasicTransform]) -> None:
        # objects thinner than a pixel after a crop teach nothing; torchvision drops them too
        boxes = A.BboxParams("pascal_voc", label_fields=["labels"], min_width=1, min_height=1, clip=True)
        self._compose = A.Compose(transforms, bbox_params=boxes)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Augment a photo.

        Args:
            image: uint8 RGB [H, W, 3].
            boxes: float [N, 4], xyxy in pixels.
            labels: int [N].
            seed: the same seed gives the same result, in any process.

        Returns:
            image uint8 [H', W', 3], boxes float32 [M, 4] in its pixels, labels int64 [M], M <= N.
        """
        # one generator: set_random_seed gives each transform the same numbers, so they would act together
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self._compose(image=image, bboxes=boxes, labels=labels)
        boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        return result["image"], boxes, np.asarray(result["labels"], np.int64).reshape(-1)


def build_transforms(preset: str) -> Augmentation | None:
    """A preset: "ssdlite" (IoU-aware crop, flip), "ssd" (adds colour and zoom-out), "flip", "none" (None).

    Raises:
        ConfigError: an unknown name.
    """
    if preset not in PRESETS:
        expected = f"expected one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}"
        raise ConfigError(f"DATA.AUGMENTATION is {preset!r}, {expected}")
    if preset == "none":
        return None
    chain: list[A.BasicTransform] = [A.HorizontalFlip(p=0.5)]
    if preset != "flip":
        chain.insert(0, RandomIoUCrop(p=1.0))
    if preset == "ssd":
        chain[:0] = [*_photometric_distortion(), RandomZoomOut(p=0.5)]
    return Augmentation(chain)


def _photometric_distortion() -> list[A.BasicTransform]:
    """Brightness, contrast, saturation, hue and the order of the channels, each for half of the photos."""
    neutral = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
    changes = {
        "brightness": (0.875, 1.125),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-0.05, 0.05),
    }
    steps = [A.ColorJitter(**{**neutral, name: bounds}, p=0.5) for name, bounds in changes.items()]
    return [*steps, A.ChannelShuffle(p=0.5)]

"""The zoom-out of SSD's training: the photo made smaller, somewhere on a plain canvas, for small objects."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from earlyexit_ssd.data.offline import albumentations as A

# ImageNet's mean colour, 0..255.
CANVAS = (124, 116, 104)


class RandomZoomOut(A.DualTransform):
    """Shrink the photo by 1 to ``largest`` and put it at a random place of a canvas of the photo's old size.

    torchvision's ``RandomZoomOut`` enlarges the canvas instead; the detector's resize makes both the same
    picture, and this one does not make 16 times the pixels on the way.
    """

    _targets = A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES

    def __init__(self, largest: float = 4.0, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.largest = largest

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        ratio = self.py_random.uniform(1.0, self.largest)
        new_width, new_height = max(1, int(width / ratio)), max(1, int(height / ratio))
        left = int(self.py_random.random() * (width - new_width))
        top = int(self.py_random.random() * (height - new_height))
        return {"place": (left, top, new_width, new_height)}

    def apply(self, img: np.ndarray, place: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        left, top, width, height = place
        canvas = np.empty_like(img)
        canvas[:] = CANVAS
        small = cv2.resize(img, (width, height), interpolation=cv2.INTER_AREA)
        canvas[top : top + height, left : left + width] = small
        return canvas

    def apply_to_bboxes(self, bboxes: np.ndarray, place: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Normalised boxes [N, 4 + more columns] in the canvas' coordinates."""
        height, width = params["shape"][:2]
        left, top, new_width, new_height = place
        moved = bboxes.copy()
        moved[:, [0, 2]] = (bboxes[:, [0, 2]] * new_width + left) / width
        moved[:, [1, 3]] = (bboxes[:, [1, 3]] * new_height + top) / height
        return moved

"""The crop of SSD's training: a window that overlaps some object by a drawn least IoU."""

from __future__ import annotations

from typing import Any

import numpy as np

from earlyexit_ssd.data.offline import albumentations as A


class RandomIoUCrop(A.DualTransform):
    """torchvision's ``RandomIoUCrop`` (Liu et al. 2016, section 2.2) as an albumentations transform.

    A least IoU is drawn, of which 1.0 means no crop. A window of 0.3 to 1 of each side and an aspect ratio
    of 0.5 to 2 is then sought in which the centre of some object lies, that object and the window
    overlapping by the least IoU; after 40 failures another least IoU is drawn. Objects whose centre is
    outside are dropped, the others are cut at the window. A photo without objects stays whole.
    """

    SCALE = (0.3, 1.0)
    ASPECT = (0.5, 2.0)
    LEAST_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    TRIALS = 40

    _targets = A.core.type_definitions.Targets.IMAGE, A.core.type_definitions.Targets.BBOXES

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        boxes = np.asarray(data["bboxes"], np.float64)[:, :4] * (width, height, width, height)
        window = None
        while len(boxes) and window is None:
            least_iou = self.LEAST_IOUS[self.random_generator.integers(len(self.LEAST_IOUS))]
            if least_iou >= 1:
                break
            window = self._find_window(boxes, width, height, least_iou)
        return {"window": (0, 0, width, height) if window is None else window}

    def _find_window(
        self, boxes: np.ndarray, width: int, height: int, least_iou: float
    ) -> tuple[int, int, int, int] | None:
        """The first of ``TRIALS`` random windows that fits, as x1, y1, x2, y2 in whole pixels."""
        low, high = self.SCALE
        sizes = (self.random_generator.uniform(low, high, (self.TRIALS, 2)) * (width, height)).astype(int)
        corners = (self.random_generator.random((self.TRIALS, 2)) * ((width, height) - sizes)).astype(int)
        windows = np.concatenate([corners, corners + sizes], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            aspect = sizes[:, 0] / sizes[:, 1]
        shaped = (sizes.min(axis=1) > 0) & (aspect >= self.ASPECT[0]) & (aspect <= self.ASPECT[1])
        overlaps = np.where(centres_inside(boxes, windows), pairwise_iou(boxes, windows), -1.0)
        fits = shaped & (overlaps.max(axis=1) >= least_iou)
        return tuple(windows[fits.argmax()].tolist()) if fits.any() else None

    def apply(self, img: np.ndarray, window: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        x1, y1, x2, y2 = window
        return img[y1:y2, x1:x2]

    def apply_to_bboxes(self, bboxes: np.ndarray, window: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Normalised boxes [N, 4 + columns] -> those centred inside, in the window's coordinates."""
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
    """Whether each window [M, 4] holds the centre of each box [N, 4] (xyxy), borders apart: bool [M, N]."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(axis=2)


def pairwise_iou(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """IoU of each window [M, 4] with each box [N, 4] (xyxy): [M, N]."""
    corner1 = np.maximum(windows[:, None, :2], boxes[None, :, :2])
    corner2 = np.minimum(windows[:, None, 2:], boxes[None, :, 2:])
    shared = (corner2 - corner1).clip(0).prod(axis=2)
    areas = (windows[:, 2:] - windows[:, :2]).prod(axis=1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return shared / (areas - shared)

"""An exit without a branch: photos in which there is nothing to find leave there with an empty answer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from earlyexit_ssd.modeling.outputs import Head

NO_OBJECT = -30.0
"""Logit of every class but background, whose own is 0: a probability of 1e-13."""


class EmptyExit(nn.Module):
    """In the place of a :class:`earlyexit_ssd.modeling.branch.Branch`: says background everywhere, and costs nothing.

    Whether a photo may leave here has to be foreseen from the tap, before any branch is computed.

    Args:
        num_boxes: default boxes of an image.
        num_classes: outputs per default box, background included.
    """

    def __init__(self, num_boxes: int, num_classes: int) -> None:
        super().__init__()
        self._num_boxes, self.num_classes = num_boxes, num_classes

    def inherit(self, backbone: nn.Module, head: nn.Module) -> None:
        """There is nothing to take over."""

    def forward(self, tap: Tensor) -> Head:
        """The head's outputs for a tap [N, C, S, S], with no object in them."""
        logits = tap.new_full((len(tap), self._num_boxes, self.num_classes), NO_OBJECT)
        logits[..., 0] = 0.0
        return {"cls_logits": logits, "bbox_regression": tap.new_zeros(len(tap), self._num_boxes, 4)}


def num_default_boxes(grids: Sequence[tuple[int, int]], boxes_per_cell: Sequence[int]) -> int:
    """Default boxes of an image from its grids (height, width) and the boxes in each of a grid's cells."""
    return sum(height * width * count for (height, width), count in zip(grids, boxes_per_cell, strict=True))

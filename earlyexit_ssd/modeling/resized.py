"""A trained detector without exits at another input size, as it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.modeling.architecture import Architecture
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.folding import cut_head


def resize_detector(model: EarlyExitSSDLite, architecture: Architecture, size: int, *, cut: bool = False) -> SSD:
    """The full path's weights at an input side of ``size`` pixels; in eval mode, on the model's device.

    With ``cut`` a folded classification head (``MODEL.FOLD exact``) keeps the rows of the model's classes alone, which
    takes no training: the cheapest detector without exits that these weights make.

    The default boxes keep their places and sides in pixels. torchvision's are shares of the input, but a convolution
    has learnt how an object of so many pixels looks: with boxes that shrink along, everything is found too small.
    """
    detector = dataclasses.replace(architecture, image_size=size).build_detector()
    state = {key: value for key, value in model.state_dict().items() if key.startswith(("backbone.", "head."))}
    detector.load_state_dict(state)
    if cut:
        detector.head.classification_head = cut_head(detector.head.classification_head)
    detector.anchor_generator = PixelBoxes(detector.anchor_generator, model.grids, architecture.image_size, size)
    return detector.to(next(model.parameters()).device).eval()


class PixelBoxes(nn.Module):
    """Default boxes for one input size at the places and of the sides, in pixels, that they have for another.

    Args:
        generator: torchvision's, whose boxes are shares of the input.
        grids: (height, width) of the six maps at that size, cells.
        trained_size: the side of the input that the weights know, pixels.
        size: of the inputs to come.
    """

    def __init__(
        self, generator: DefaultBoxGenerator, grids: Sequence[tuple[int, int]], trained_size: int, size: int
    ) -> None:
        super().__init__()
        self.generator = DefaultBoxGenerator(
            generator.aspect_ratios,
            scales=generator.scales,
            steps=[trained_size / side for side, _ in grids],
            clip=generator.clip,
        )
        self.factor = trained_size / size

    def num_anchors_per_location(self) -> list[int]:
        """Default boxes per cell of each grid."""
        return self.generator.num_anchors_per_location()

    def forward(self, images: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Per image [A, 4] xyxy in network pixels."""
        return [self._scale(boxes) for boxes in self.generator(images, feature_maps)]

    def _scale(self, boxes: Tensor) -> Tensor:
        """The centres are right, since steps are pixels; the sides are still shares of the input."""
        centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * self.factor
        return torch.cat([centres - halves, centres + halves], 1)

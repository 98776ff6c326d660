"""torchvision's SSDLite320 MobileNetV3-Large, for any input size and width, from torchvision's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead, _normal_init

from earlyexit_ssd.errors import EarlyExitError

norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
"""BatchNorm as torchvision's SSDLite uses it."""


def build_ssdlite(
    *,
    num_classes: int,
    image_size: int = 320,
    width: float = 1.0,
    reduced_tail: bool = True,
    weights_backbone: MobileNet_V3_Large_Weights | None = None,
    progress: bool = True,
    score_thresh: float = 0.001,
    nms_thresh: float = 0.55,
    detections_per_img: int = 300,
    topk_candidates: int = 300,
) -> SSD:
    """A torchvision ``SSD`` with torchvision's SSDLite layers; at 320 px and width 1.0 it is torchvision's model.

    Args:
        num_classes: outputs per anchor, background included.
        image_size: side of the square input, pixels.
        width: multiplier of every layer's channels, those behind the trunk included.
        reduced_tail: halve the channels behind C4, as torchvision's COCO weights do (MobileNetV3 paper, table 6).
            ImageNet weights have the full tail.
        weights_backbone: ImageNet weights of the trunk; they fix ``width`` to 1.0 and ``reduced_tail`` to False.
        progress: show the download's progress.
        score_thresh, nms_thresh, detections_per_img, topk_candidates: post-processing, as torchvision's SSD.

    Raises:
        ValueError: ImageNet weights with another width or tail.
    """
    if weights_backbone is not None and (width != 1.0 or reduced_tail):
        raise ValueError(
            "ImageNet weights of the trunk need width=1.0 and reduced_tail=False; weights_backbone=None has neither"
        )
    trunk = mobilenet_v3_large(
        weights=weights_backbone,
        progress=progress,
        norm_layer=norm_layer,
        width_mult=width,
        reduced_tail=reduced_tail,
    )
    if weights_backbone is None:
        _normal_init(trunk)
    backbone = _feature_extractor(trunk.features, width)
    size = (image_size, image_size)
    anchor_generator = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    out_channels = detection_utils.retrieve_out_channels(backbone, size)
    head = SSDLiteHead(out_channels, anchor_generator.num_anchors_per_location(), num_classes, norm_layer)
    detector = SSD(
        backbone,
        anchor_generator,
        size,
        num_classes,
        head=head,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
        topk_candidates=topk_candidates,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    detector.width = width  # no layer tells it exactly
    return detector


def _feature_extractor(layers: nn.Sequential, width: float) -> SSDLiteFeatureExtractorMobileNet:
    """Split the trunk inside its last strided block (C4), as torchvision does, and add the four extra maps."""
    strided = [index for index, layer in enumerate(layers) if getattr(layer, "_is_cn", False)]
    return SSDLiteFeatureExtractorMobileNet(layers, strided[-1], norm_layer, width_mult=width)


# A backbone in segments that end at the exits, without rewriting it.


@dataclass(frozen=True)
class TrunkState:
    """Where a batch stands in the trunk.

    Attributes:
        x: output of the last layer run, [N, C, H, W]; at an exit, this is the tap.
        finest: the expansion of C4, the finest map of the full path's head; None before it is reached.
    """

    x: Tensor
    finest: Tensor | None = None

    def select(self, keep: Tensor) -> TrunkState:
        """The images of the boolean mask ``keep`` [N]; the others are computed no further."""
        return TrunkState(self.x[keep], None if self.finest is None else self.finest[keep])


class Trunk:
    """The layers of a detector's backbone as steps, cut behind the exits.

    Made anew for each use, since layers may have been replaced. Not a module: the parameters stay where torchvision has
    them, under the same names.

    Args:
        steps: the layers up to the last one that an exit may leave behind, in order.
        exit_layers: behind which a segment ends, increasing.
        finest_step: index of the step whose output is the finest map of the head.
    """

    def __init__(self, steps: Sequence[nn.Module], exit_layers: Sequence[int], finest_step: int) -> None:
        self._steps, self._finest_step = steps, finest_step
        ends = [self._end(layer) for layer in exit_layers]
        self._ranges = list(zip([0, *ends], [*ends, len(steps)], strict=True))

    def _end(self, layer: int) -> int:
        """How many steps come before the exit behind ``layer``."""
        return layer

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Images [N, 3, S, S] of any side to the output of ``layer``, [N, C, H, W]."""
        for step in self._steps[: self._end(layer)]:
            x = step(x)
        return x

    def run(self, state: TrunkState, segment: int) -> TrunkState:
        """Run segment ``segment`` (0 ends at the first exit; the last one ends the trunk)."""
        x, finest = state.x, state.finest
        for step in range(*self._ranges[segment]):
            x = self._steps[step](x)
            if step == self._finest_step:
                finest = x
        return TrunkState(x, finest)

    def feature_maps(self, state: TrunkState) -> list[Tensor]:
        """The maps of the full path's head, fine to coarse, from the state behind the last segment."""
        raise NotImplementedError


class SegmentedTrunk(Trunk):
    """Of a torchvision ``SSDLiteFeatureExtractorMobileNet``.

    ``features[0]`` holds the layers up to the one before C4 and C4's expansion, ``features[1]`` the rest of C4 and the
    layers behind it.

    Args:
        backbone: the feature extractor.
        exit_layers: trunk layers (torchvision's numbering, stem 0) behind which a segment ends, increasing.

    Raises:
        EarlyExitError: another kind of backbone.
    """

    def __init__(self, backbone: nn.Module, exit_layers: Sequence[int]) -> None:
        try:
            head_part, tail_part = backbone.features
            steps = [*head_part, *tail_part]
            self._extra = list(backbone.extra)
        except (AttributeError, TypeError, ValueError):
            raise EarlyExitError(
                f"backbone is a {type(backbone).__name__}, expected torchvision's SSDLiteFeatureExtractorMobileNet "
                "(`features` in two parts, and `extra`): its layers are run one by one, to leave between them"
            ) from None
        super().__init__(steps, exit_layers, finest_step=len(head_part) - 1)

    def _end(self, layer: int) -> int:
        """C4 takes two steps: its expansion and the rest."""
        return layer + 1 if layer < self._finest_step else layer + 2

    def feature_maps(self, state: TrunkState) -> list[Tensor]:
        """See :meth:`Trunk.feature_maps`."""
        maps = [state.finest, state.x]
        for block in self._extra:
            maps.append(block(maps[-1]))
        return maps


def small_copy(x: Tensor, pixels: int) -> Tensor:
    """Images [N, 3, S, S] at a side of ``pixels``: bilinear to a multiple of it near S, then means over whole cells.

    Bilinear interpolation alone skips pixels where it shrinks by more than two.
    """
    side = int(x.shape[-1])  # a tracer makes tensors of shapes
    times = max(1, round(side / pixels))
    if side != times * pixels:
        x = F.interpolate(x, (times * pixels, times * pixels), mode="bilinear", align_corners=False)
    return F.avg_pool2d(x, times) if times > 1 else x


@torch.no_grad()
def grids_of(backbone: nn.Module, size: int) -> list[tuple[int, int]]:
    """(height, width) of the head's maps, cells, of an input with sides of ``size`` pixels."""
    was_training = backbone.training
    maps = backbone.eval()(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)).values()
    backbone.train(was_training)
    return [tuple(feature.shape[-2:]) for feature in maps]


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
        self.trained_size, self.factor = trained_size, trained_size / size

    def extra_repr(self) -> str:
        return f"trained_size={self.trained_size}, {self.generator}"

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

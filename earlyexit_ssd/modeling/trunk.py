"""torchvision's SSDLite320 MobileNetV3-Large for any input size and width, built from torchvision's parts.

*C4* is trunk layer 13, the last block with stride 2. torchvision splits the trunk inside C4: the output of C4's first
convolution (the *expansion*) is the finest feature map of the head.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead, _normal_init

from earlyexit_ssd.errors import EarlyExitError

norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # BatchNorm with the settings of torchvision's SSDLite


def build_ssdlite(
    *,
    num_classes: int,
    image_size: int = 320,
    width: float = 1.0,
    reduced_tail: bool = True,
    weights_backbone: MobileNet_V3_Large_Weights | None = None,
    trainable_layers: int = 6,
    progress: bool = True,
    score_thresh: float = 0.001,
    nms_thresh: float = 0.55,
    detections_per_img: int = 300,
    topk_candidates: int = 300,
) -> SSD:
    """Build a torchvision ``SSD`` from torchvision's SSDLite layers. At 320 px and width 1.0 it is torchvision's model.

    The other arguments are those of torchvision's ``ssdlite320_mobilenet_v3_large`` and ``SSD``.

    Args:
        image_size: side of the square input, pixels.
        width: factor on the channels of every layer, the extra layers included.
        reduced_tail: halve the channels of C4's output and of layers 14 to 16, as in torchvision's COCO weights
            (MobileNetV3 paper, table 6). ImageNet weights have the full tail.
        weights_backbone: ImageNet weights of the trunk. They need ``width=1.0`` and ``reduced_tail=False``.
        trainable_layers: number of trunk stages that are trained, counted from the last stage, 0 to 6.

    Raises:
        ValueError: ``weights_backbone`` with another width or with the reduced tail.
    """
    if weights_backbone is not None and (width != 1.0 or reduced_tail):
        fix = "otherwise set weights_backbone=None"
        raise ValueError(f"ImageNet weights of the trunk need width=1.0 and reduced_tail=False; {fix}")
    trunk = mobilenet_v3_large(
        weights=weights_backbone, progress=progress, norm_layer=norm_layer, width_mult=width, reduced_tail=reduced_tail
    )
    if weights_backbone is None:
        _normal_init(trunk)
    # torchvision sets `_is_cn` on blocks with a stride; the last such block is C4
    strided = [index for index, layer in enumerate(trunk.features) if getattr(layer, "_is_cn", False)]
    stages = [0, *strided, len(trunk.features) - 1, len(trunk.features)]
    trunk.features[: stages[6 - trainable_layers]].requires_grad_(False)
    backbone = SSDLiteFeatureExtractorMobileNet(trunk.features, strided[-1], norm_layer, width_mult=width)
    size = (image_size, image_size)
    anchor_generator = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    out_channels = detection_utils.retrieve_out_channels(backbone, size)
    detector = SSD(
        backbone,
        anchor_generator,
        size,
        num_classes,
        head=SSDLiteHead(out_channels, anchor_generator.num_anchors_per_location(), num_classes, norm_layer),
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
        topk_candidates=topk_candidates,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    detector.width = width  # stored, since channel counts are rounded and do not determine it
    return detector


# The unchanged backbone, layer by layer.


@dataclass(frozen=True)
class Trunk:
    """The layers of a detector's backbone as a sequence of steps.

    A new one is created for each use, since layers may have been replaced. It is not a module, so the parameters keep
    torchvision's names.

    Attributes:
        steps: the modules up to the last trunk layer.
        extra: the modules after it. Each computes a coarser map of the head from the map before.
        ends: for each trunk layer, the number of steps up to and including the layer.
        finest_step: index of the step whose output is the finest map of the head.
        scale_finest: normalisation of the finest map; None if it has none.
    """

    steps: Sequence[nn.Module]
    extra: Sequence[nn.Module]
    ends: Sequence[int]
    finest_step: int
    scale_finest: Callable[[Tensor], Tensor] | None = None

    def run(self, x: Tensor, start: int, end: int, finest: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the steps ``start`` to ``end - 1``. Return the output and the finest map. ``finest`` is the finest map
        of an earlier call; None if its step has not run."""
        for index in range(start, end):
            x = self.steps[index](x)
            finest = x if index == self.finest_step else finest
        return x, finest

    def feature_maps(self, x: Tensor, finest: Tensor) -> list[Tensor]:
        """Return the feature maps of the full path's head, fine to coarse, from the two values of the last `run`."""
        maps = [self.scale_finest(finest) if self.scale_finest else finest, x]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return maps


def ssdlite_trunk(backbone: nn.Module) -> Trunk:
    """Return the trunk of torchvision's ``SSDLiteFeatureExtractorMobileNet``. Layer 0 is the stem.

    C4 is two steps, since ``features[0]`` ends with C4's expansion and ``features[1]`` starts with the rest of C4.
    Raises an EarlyExitError for another kind of backbone.
    """
    try:
        head_part, tail_part = backbone.features
        steps, extra = [*head_part, *tail_part], list(backbone.extra)
    except (AttributeError, TypeError, ValueError):
        expected = "torchvision's SSDLiteFeatureExtractorMobileNet (`features` in two parts, and `extra`)"
        actual = f"backbone is a {type(backbone).__name__}"
        raise EarlyExitError(f"{actual}, expected {expected}, since exits are attached between its layers") from None
    c4 = len(head_part) - 1
    return Trunk(steps, extra, [*range(1, c4 + 1), *range(c4 + 2, len(steps) + 1)], finest_step=c4)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode, without gradients. At the end the train/eval flag of every submodule is restored."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def grids_of(backbone: nn.Module, size: int) -> list[tuple[int, int]]:
    """Return (height, width) in cells of each feature map of the head, for an input of ``size`` x ``size`` pixels."""
    with evaluating(backbone):
        maps = backbone(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)).values()
    return [tuple(feature.shape[-2:]) for feature in maps]


class PixelBoxes(DefaultBoxGenerator):
    """Default boxes for an input size that differs from the trained size. Their sides and distances in pixels are those
    at the trained size.

    Args:
        generator: torchvision's generator, whose boxes scale with the input; or `PixelBoxes`, whose trained size is
            then used instead of ``trained_size``.
        grids: (height, width) in cells of the feature maps at ``trained_size``, for a generator without ``steps``.
        trained_size: side of the input in training, pixels.
        size: side of the input now, pixels.
    """

    def __init__(
        self, generator: DefaultBoxGenerator, grids: Sequence[tuple[int, int]], trained_size: int, size: int
    ) -> None:
        steps = generator.steps or [trained_size / side for side, _ in grids]
        super().__init__(generator.aspect_ratios, scales=generator.scales, steps=steps, clip=generator.clip)
        self.trained_size = getattr(generator, "trained_size", trained_size)
        self._factor = self.trained_size / size

    def forward(self, images: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the default boxes of each image, [A, 4] xyxy in network pixels."""
        scaled = []
        for boxes in super().forward(images, feature_maps):  # ``steps`` fixes the centres, but sides scale with input
            centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * self._factor
            scaled.append(torch.cat([centres - halves, centres + halves], 1))
        return scaled

"""torchvision's SSDLite320 MobileNetV3-Large, for any input size and width, from torchvision's own parts."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.detection import _utils as detection_utils
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead, _normal_init

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

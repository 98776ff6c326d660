"""torchvision's SSD300 VGG16 with early exits, which also shows how to add another detector."""

# Annotations stay objects here: torchvision.models.get_model_weights reads the weights' enum from them.
import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models._api import register_model
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.branches import Exit, describe_exits, takes_exits
from earlyexit_ssd.modeling.detector import register_detector
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.pretrained import Pretrained
from earlyexit_ssd.modeling.retrofit import torchvision_name
from earlyexit_ssd.modeling.trunk import Trunk

SIZE = 300
FINEST_LAYER, LAST_LAYER = 10, 15
"""conv4_3, whose output is the finest map, and fc7, the last layer before the extra blocks."""


def vgg_trunk(backbone: nn.Module) -> Trunk:
    """Return the trunk of torchvision's ``SSDFeatureExtractorVGG``. Layers 1 to 15 are VGG16's 13 convolutions, fc6 and
    fc7, each with its ReLU and any pooling before it. Raise an EarlyExitError for another kind of backbone."""
    try:
        conv5, *extra = backbone.extra
        modules = [*backbone.features, *conv5[:-1], *conv5[-1]]
        scale = backbone.scale_weight.view(1, -1, 1, 1)
    except (AttributeError, TypeError, ValueError, IndexError):
        expected = "torchvision's SSDFeatureExtractorVGG, since exits are attached between its layers"
        raise EarlyExitError(f"backbone is a {type(backbone).__name__}, expected {expected}") from None
    ends = [0, *(index + 1 for index, module in enumerate(modules) if isinstance(module, nn.ReLU))]
    return Trunk(modules, extra, ends, ends[FINEST_LAYER] - 1, lambda finest: scale * F.normalize(finest))


@register_detector("ssd300_vgg16")
class EarlyExitSSD300(Pretrained):
    """torchvision's SSD300 with a VGG16 and exits of the kinds ``light`` and ``empty``; see `EarlyExitDetector`."""

    last_layer, any_size = LAST_LAYER, False
    default_exits = describe_exits((7, 10), "light")  # after conv3_3 and conv4_3
    plain_weights, backbone_weights = SSD300_VGG16_Weights, VGG16_Weights
    plain_settings: ClassVar = {
        "image_size": SIZE,
        "score_thresh": 0.01,
        "nms_thresh": 0.45,
        "detections_per_img": 200,
        "topk_candidates": 400,
    }

    @property
    def trunk(self) -> Trunk:
        return vgg_trunk(self.backbone)

    @classmethod
    def build_plain(
        cls,
        *,
        num_classes: int,
        image_size: int = SIZE,
        width: float = 1.0,
        reduced_tail: bool = True,
        weights_backbone: VGG16_Weights | None = None,
        **post_processing: float,
    ) -> SSD:
        """Build torchvision's detector without exits. ``reduced_tail``, an argument of SSDLite, is ignored. Raise an
        EarlyExitError for another input size or width."""
        if image_size != SIZE or width != 1.0:
            given = f"ssd300_vgg16 with image_size {image_size} and width {width:g}"
            raise EarlyExitError(f"{given}: it supports only {SIZE} and 1 (MODEL.IMAGE_SIZE, MODEL.WIDTH)")
        return ssd300_vgg16(weights=None, weights_backbone=weights_backbone, num_classes=num_classes, **post_processing)


@register_model()
@takes_exits
def earlyexit_ssd300_vgg16(
    *,
    weights: SSD300_VGG16_Weights | str | os.PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: VGG16_Weights | str | None = VGG16_Weights.IMAGENET1K_FEATURES,
    trainable_backbone_layers: int | None = None,
    exits: Sequence[Exit] | None = None,
    classes: Sequence[str] | None = None,
    losses: LossSettings | None = None,
    router: Router | None = None,
    score_thresh: float | Mapping[str, float] = 0.01,
    nms_thresh: float = 0.45,
    detections_per_img: int = 200,
    topk_candidates: int = 400,
) -> EarlyExitSSD300:
    """torchvision's ``ssd300_vgg16`` with early exits.

    Arguments and errors are those of :func:`earlyexit_ssdlite320_mobilenet_v3_large`, with two differences: ``branch``
    must be ``"light"``, and the default exits are after layers 7 and 10.
    """
    if weights is not None and torchvision_name(weights, SSD300_VGG16_Weights) is None:
        arguments = {**locals(), "image_size": SIZE, "width": 1.0}
        return EarlyExitSSD300.from_file(weights, earlyexit_ssd300_vgg16, arguments)
    detector = ssd300_vgg16(
        weights=weights and SSD300_VGG16_Weights[torchvision_name(weights, SSD300_VGG16_Weights)],
        progress=progress,
        num_classes=num_classes,
        weights_backbone=VGG16_Weights.verify(weights_backbone),
        trainable_backbone_layers=trainable_backbone_layers,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
        topk_candidates=topk_candidates,
    )
    model = EarlyExitSSD300(detector, exits=exits, classes=classes, losses=losses, router=router)
    model.score_thresh = score_thresh
    return model

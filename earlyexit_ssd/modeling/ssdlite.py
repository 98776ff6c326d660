"""torchvision's SSDLite320 MobileNetV3-Large with early exits; ``torchvision.models.get_model`` finds its builder."""

# Annotations stay objects here: torchvision.models.get_model_weights reads the weights' enum from them.
import os
from collections.abc import Mapping, Sequence

from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights
from torchvision.models._api import register_model
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.models.detection.backbone_utils import _validate_trainable_layers

from earlyexit_ssd.config.check import LAST_LAYER, SSDLITE
from earlyexit_ssd.modeling.branches import Exit, takes_exits
from earlyexit_ssd.modeling.checkpoint import ShippedWeights
from earlyexit_ssd.modeling.detector import COCO_CLASSES, register_detector
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.pretrained import Pretrained
from earlyexit_ssd.modeling.retrofit import torchvision_name
from earlyexit_ssd.modeling.trunk import Trunk, build_ssdlite, ssdlite_trunk
from earlyexit_ssd.modeling.validate import LEAST_SCORE


@register_detector(SSDLITE)
class EarlyExitSSDLite(Pretrained):
    """torchvision's SSDLite with a MobileNetV3 and early exits; see :class:`EarlyExitDetector`."""

    last_layer = LAST_LAYER
    plain_weights, backbone_weights = SSDLite320_MobileNet_V3_Large_Weights, MobileNet_V3_Large_Weights
    build_plain = staticmethod(build_ssdlite)

    @property
    def trunk(self) -> Trunk:
        return ssdlite_trunk(self.backbone)


@register_model()
@takes_exits
def earlyexit_ssdlite320_mobilenet_v3_large(
    *,
    weights: SSDLite320_MobileNet_V3_Large_Weights | ShippedWeights | str | os.PathLike | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: MobileNet_V3_Large_Weights | str | None = MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    image_size: int = 320,
    width: float = 1.0,
    exits: Sequence[Exit] | None = None,
    classes: Sequence[str] | None = None,
    losses: LossSettings | None = None,
    router: Router | None = None,
    score_thresh: float | Mapping[str, float] = LEAST_SCORE,
    nms_thresh: float = 0.55,
    detections_per_img: int = 300,
    topk_candidates: int = 300,
) -> EarlyExitSSDLite:
    """torchvision's ``ssdlite320_mobilenet_v3_large`` with early exits.

    Args:
        weights: torchvision's COCO weights of the full path (downloaded by torchvision), with untrained exits. Or a
            file: a checkpoint of torchvision's detector, without exits or with exits that fit the arguments, or a model
            file of this project. Only ``from_pretrained`` of the model's class loads the routing too.
        num_classes: outputs per default box, background included; 91 by default, or those of ``weights``.
        weights_backbone: ImageNet weights of the trunk, if ``weights`` is None.
        image_size, width: see :func:`earlyexit_ssd.modeling.trunk.build_ssdlite`. Another width than 1.0 needs
            ``weights_backbone=None``.
        exits, classes, losses, router: see :class:`EarlyExitDetector`. The keywords of `describe_exits` may be given
            instead of ``exits``.
        score_thresh: lowest score of a detection, or class name -> lowest score.

    The other arguments are torchvision's.

    Raises:
        EarlyExitError: a file without such a detector, or that does not fit the arguments.
        ValueError: ``num_classes`` or ``width`` does not fit torchvision's weights.
    """
    if weights is not None and torchvision_name(weights) is None:
        return EarlyExitSSDLite.from_file(weights, earlyexit_ssdlite320_mobilenet_v3_large, locals())
    weights = weights and SSDLite320_MobileNet_V3_Large_Weights[torchvision_name(weights)]
    weights_backbone = MobileNet_V3_Large_Weights.verify(weights_backbone)
    weights_backbone = None if weights else weights_backbone
    outputs = len(COCO_CLASSES) + 1
    if weights is not None and num_classes not in (None, outputs):
        raise ValueError(f"weights have {outputs} outputs, num_classes is {num_classes}")
    if weights is not None and width != 1.0:
        raise ValueError(f"weights need width=1.0, width is {width}")
    trained = weights is not None or weights_backbone is not None
    detector = build_ssdlite(
        num_classes=outputs if num_classes is None else num_classes,
        image_size=image_size,
        width=width,
        reduced_tail=weights_backbone is None,
        weights_backbone=weights_backbone,
        trainable_layers=_validate_trainable_layers(trained, trainable_backbone_layers, 6, 6),
        progress=progress,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
        topk_candidates=topk_candidates,
    )
    if weights is not None:  # they fit any input size
        detector.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    elif not trained:
        # He et al. 2015, "Delving deep into rectifiers", equation 10. With torchvision's standard deviation of 0.03,
        # activations vanish in eval mode and all scores are equal.
        for module in detector.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model = EarlyExitSSDLite(detector, exits=exits, classes=classes, losses=losses, router=router)
    model.score_thresh = score_thresh
    return model

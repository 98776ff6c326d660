"""torchvision's SSD300 VGG16 with early exits, which also shows how to add another detector."""

# Annotations stay objects here: torchvision.models.get_model_weights reads the weights' enum from them.
import os
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights
from torchvision.models._api import register_model
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.branches import Exit, describe_exits, takes_exits
from earlyexit_ssd.modeling.detector import register_detector
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.pretrained import Pretrained, names_of
from earlyexit_ssd.modeling.retrofit import find_detector, load_every_key, outputs_of, read_weights, torchvision_name
from earlyexit_ssd.modeling.trunk import Trunk, TrunkState

SIZE = 300
FINEST_LAYER, LAST_LAYER = 10, 15
"""conv4_3, whose output is the finest map, and fc7, the last layer before the extra blocks."""

DEFAULT_EXITS = describe_exits((7, 10), "light")  # exits after conv3_3 and conv4_3


class Layer(list):
    """A layer of the trunk: a convolution with its ReLU and, if present, the pooling before it."""

    def __call__(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class VGGTrunk(Trunk):
    """The trunk of torchvision's ``SSDFeatureExtractorVGG``; layers 1 to 15 are VGG16's 13 convolutions, fc6 and fc7.
    An EarlyExitError for another kind of backbone."""

    def __init__(self, backbone: nn.Module, exit_layers: Sequence[int]) -> None:
        try:
            conv5, *extra = backbone.extra
            modules = [*backbone.features, *conv5[:-1], *conv5[-1]]
            self._scale = backbone.scale_weight
        except (AttributeError, TypeError, ValueError, IndexError):
            raise EarlyExitError(
                f"backbone is a {type(backbone).__name__}, expected torchvision's SSDFeatureExtractorVGG: its layers "
                "are run one by one, to leave between them"
            ) from None
        layers = [Layer()]
        for module in modules:
            layers[-1].append(module)
            if isinstance(module, nn.ReLU):
                layers.append(Layer())
        super().__init__(layers[:-1], extra, exit_layers, FINEST_LAYER - 1)

    def feature_maps(self, state: TrunkState) -> list[Tensor]:
        """See :meth:`Trunk.feature_maps`; the finest is normalised and scaled, as torchvision does."""
        _, *coarser = super().feature_maps(state)
        return [self._scale.view(1, -1, 1, 1) * F.normalize(state.finest), *coarser]


@register_detector("ssd300_vgg16")
class EarlyExitSSD300(Pretrained):
    """torchvision's SSD300 with a VGG16 and early exits; see :class:`EarlyExitDetector`.

    Its exits have a ``light`` branch, or none (``empty``).
    """

    last_layer, any_size = LAST_LAYER, False
    plain_weights, backbone_weights = SSD300_VGG16_Weights, VGG16_Weights

    @property
    def trunk(self) -> VGGTrunk:
        return VGGTrunk(self.backbone, self.segment_layers)

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
        """torchvision's detector without exits; ``reduced_tail`` is for SSDLite and ignored here. An EarlyExitError for
        another input size or width."""
        if image_size != SIZE or width != 1.0:
            raise EarlyExitError(
                f"ssd300_vgg16 with image_size {image_size} and width {width:g}: it supports only {SIZE} and 1 (MODEL."
                "IMAGE_SIZE, MODEL.WIDTH)"
            )
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
    """torchvision's ``ssd300_vgg16`` with early exits, which start untrained.

    Args:
        weights: torchvision's COCO weights (downloaded by torchvision), or a checkpoint file of the detector without
            exits. For a model file of this project use ``EarlyExitSSD300.from_pretrained``.
        num_classes: outputs per default box, background included; 91 by default, or those of ``weights``.
        weights_backbone: ImageNet weights of the trunk, if ``weights`` is None.
        exits, classes, losses, router: see :class:`EarlyExitDetector`. Instead of ``exits``: the keywords of
            `describe_exits`, with ``branch="light"``. Default: `DEFAULT_EXITS`.
        score_thresh: may be a dict of class names to lowest scores.

    Raises:
        EarlyExitError: a file without such a detector.
    """
    settings = {"nms_thresh": nms_thresh, "detections_per_img": detections_per_img, "topk_candidates": topk_candidates}
    if weights is None or torchvision_name(weights, SSD300_VGG16_Weights):
        detector = ssd300_vgg16(
            weights=weights and SSD300_VGG16_Weights[torchvision_name(weights, SSD300_VGG16_Weights)],
            progress=progress,
            num_classes=num_classes,
            weights_backbone=VGG16_Weights.verify(weights_backbone),
            trainable_backbone_layers=trainable_backbone_layers,
            **settings,
        )
    else:
        state = find_detector(read_weights(weights), weights)
        outputs = outputs_of(state)
        if outputs < 2 or num_classes not in (None, outputs):
            raise EarlyExitError(
                f"{weights}: its SSD head has {outputs} outputs, num_classes is {num_classes}; leave it out, or give a "
                "checkpoint of torchvision's ssd300_vgg16"
            )
        detector = EarlyExitSSD300.build_plain(num_classes=outputs, **settings)
        load_every_key(detector, state, weights)
    outputs = detector.head.classification_head.num_columns
    model = EarlyExitSSD300(
        detector,
        exits=DEFAULT_EXITS if exits is None else exits,
        classes=names_of(outputs, classes) if classes is not None or outputs == 91 else None,
        losses=losses,
        router=router,
    )
    model.score_thresh = score_thresh
    return model

"""torchvision's SSDLite320 MobileNetV3-Large with early exits; ``torchvision.models.get_model`` finds its builder."""

# Annotations stay objects here: torchvision.models.get_model_weights reads the weights' enum from them.
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights
from torchvision.models._api import register_model
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

from earlyexit_ssd.config.check import LAST_LAYER
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import validate
from earlyexit_ssd.modeling.branches import Exit, describe_exits, exit_keywords, takes_exits
from earlyexit_ssd.modeling.checkpoint import ShippedWeights, weights_path
from earlyexit_ssd.modeling.detector import register_detector
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.pretrained import Pretrained
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES, torchvision_name
from earlyexit_ssd.modeling.trunk import SegmentedTrunk, build_ssdlite
from earlyexit_ssd.modeling.validate import LEAST_SCORE

POST_PROCESSING = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")


@register_detector("ssdlite320_mobilenet_v3_large")
class EarlyExitSSDLite(Pretrained):
    """torchvision's SSDLite with a MobileNetV3 and early exits; see :class:`EarlyExitDetector`."""

    last_layer = LAST_LAYER
    plain_weights, backbone_weights = SSDLite320_MobileNet_V3_Large_Weights, MobileNet_V3_Large_Weights
    build_plain = staticmethod(build_ssdlite)

    @property
    def trunk(self) -> SegmentedTrunk:
        return SegmentedTrunk(self.backbone, self.segment_layers)


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
            file: a checkpoint of torchvision's SSDLite, without exits or with exits that fit the arguments, or a model
            file of this project. Only ``EarlyExitSSDLite.from_pretrained`` loads the routing too.
        num_classes: outputs per default box, background included; 91 by default.
        weights_backbone: ImageNet weights of the trunk, if ``weights`` is None.
        trainable_backbone_layers: as in torchvision; it needs ``image_size=320`` and ``width=1.0``.
        image_size, width: see :func:`earlyexit_ssd.modeling.trunk.build_ssdlite`; another width than 1.0 needs
            ``weights_backbone=None``.
        exits, classes, losses, router: see :class:`EarlyExitDetector`. Instead of ``exits``: the keywords of
            `describe_exits`.
        score_thresh: may be a dict of class names to lowest scores.
    """
    if weights is not None and (isinstance(weights, ShippedWeights) or torchvision_name(weights) is None):
        return _from_file(weights_path(weights), locals())
    weights = SSDLite320_MobileNet_V3_Large_Weights.verify(weights)
    weights_backbone = MobileNet_V3_Large_Weights.verify(weights_backbone)
    post_processing = {
        "score_thresh": LEAST_SCORE,  # set below: names need the model's classes
        "nms_thresh": nms_thresh,
        "detections_per_img": detections_per_img,
        "topk_candidates": topk_candidates,
    }
    if width != 1.0 or image_size != 320:
        if trainable_backbone_layers is not None or (weights is not None and width != 1.0):
            raise ValueError("trainable_backbone_layers need image_size=320 and width=1.0, weights need width=1.0")
        if weights is not None:
            weights_backbone = None
            if num_classes not in (None, len(COCO_CLASSES) + 1):
                raise ValueError(f"weights have {len(COCO_CLASSES) + 1} outputs, num_classes is {num_classes}")
        detector = build_ssdlite(
            num_classes=num_classes or 91,
            image_size=image_size,
            width=width,
            reduced_tail=weights_backbone is None,
            weights_backbone=weights_backbone,
            progress=progress,
            **post_processing,
        )
        if weights is not None:  # convolutions fit any size
            detector.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    else:
        detector = ssdlite320_mobilenet_v3_large(
            weights=weights,
            progress=progress,
            num_classes=num_classes,
            weights_backbone=weights_backbone,
            trainable_backbone_layers=trainable_backbone_layers,
            **post_processing,
        )
    if weights is None and weights_backbone is None:
        _initialise(detector.backbone)
    if classes is None and detector.head.classification_head.num_columns == len(COCO_CLASSES) + 1:
        classes = COCO_CLASSES
    model = EarlyExitSSDLite(detector, exits=exits, classes=classes, losses=losses, router=router)
    model.score_thresh = score_thresh
    return model


def _initialise(backbone: nn.Module) -> None:
    """He initialisation (He et al. 2015, "Delving deep into rectifiers", equation 10) of an untrained trunk: with
    torchvision's standard deviation of 0.03 activations vanish in eval mode, and all scores are equal."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _from_file(path: Path, given: dict[str, Any]) -> EarlyExitSSDLite:
    """The model in a file; the builder's arguments describe a checkpoint that contains no description of its own. An
    EarlyExitError for a file that does not fit the arguments."""
    exits = describe_exits() if given["exits"] is None else tuple(given["exits"])
    sizes = {name: given[name] for name in ("image_size", "width")}
    post_processing = {name: given[name] for name in POST_PROCESSING}
    described = {**sizes, **post_processing, "score_thresh": LEAST_SCORE, "exits": exits}
    model, _ = EarlyExitSSDLite.open_file(path, given["classes"], described)
    if given["trainable_backbone_layers"] is not None:
        raise EarlyExitError(
            f"{path}: trainable_backbone_layers need torchvision's weights; use model.freeze_full_path()"
        )
    if given["num_classes"] not in (None, model.num_classes):
        raise EarlyExitError(
            f"{path} has {model.num_classes} outputs, num_classes is {given['num_classes']}; leave it out (a training "
            "with MODEL.WEIGHTS and MODEL.FOLD changes classes)"
        )
    defaults = inspect.signature(earlyexit_ssdlite320_mobilenet_v3_large).parameters
    asked = {name: value for name, value in sizes.items() if value != defaults[name].default}
    asked |= {} if given["exits"] is None else exit_keywords(exits)
    built = {"image_size": model.transform.fixed_size[0], "width": model.width, **exit_keywords(model.exits)}
    for name, value in asked.items():
        if value != built.get(name):
            raise EarlyExitError(
                f"{path} was built with {name} {built.get(name)}, given is {value!s:.60}; leave it out"
            )
    for name, value in post_processing.items():
        if value != defaults[name].default:
            setattr(model, name, value)
    if given["losses"] is not None:
        validate.check_losses(given["losses"], model.num_early_exits)
        model.losses = given["losses"]
    validate.check_router(given["router"], model.num_early_exits)
    model.router = given["router"]
    return model.train()

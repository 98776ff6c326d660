"""A torchvision SSD with early exits: the forward pass from exit to exit, detections and losses.

A *context* is a feature map that one exit's branch passes to the next exit's branch. The glossary of docs/design.md
explains the other terms.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import validate
from earlyexit_ssd.modeling.branches import Exit, Place, check_exits, describe_exits, takes_exits
from earlyexit_ssd.modeling.heads import num_outputs
from earlyexit_ssd.modeling.losses import Assignment, LossSettings, assign, detection_losses, distillation_loss
from earlyexit_ssd.modeling.outputs import ExitOutputs, ExitSignals, Head, Router, pool_tap
from earlyexit_ssd.modeling.trunk import PixelBoxes, Trunk, evaluating
from earlyexit_ssd.registry import Registry

Targets = list[dict[str, Tensor]]
"""Per image ``boxes`` [n, 4] xyxy absolute pixels and ``labels`` [n] in 1..K; n may be 0."""
Detections = list[dict[str, Tensor]]
"""Per image ``boxes`` [n, 4] xyxy in the photo's pixels, ``labels`` [n] and ``scores`` [n]."""
Sizes = list[tuple[int, int]]  # per image (height, width) in pixels

COCO_CLASSES = tuple(SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"][1:])
"""torchvision's names of the labels 1..90; "N/A" where COCO skips a number."""

POST_PROCESSING = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")


def full_path_losses(head: Head, assignment: Assignment, settings: LossSettings) -> dict[str, Tensor]:
    """Return the full path's losses times ``full_weight``, under torchvision's names (see `detection_losses`)."""
    losses = detection_losses(head, assignment, settings)
    return {key: settings.full_weight * value for key, value in losses.items()}


def early_exit_losses(
    names: Mapping[int, str],
    heads: Sequence[Head],
    assignment: Assignment,
    settings: LossSettings,
    router: Router | None = None,
) -> dict[str, Tensor]:
    """Return the weighted losses of the early exits as scalars.

    Args:
        names: exit index -> name of the early exits that have a branch.
        heads: outputs of all exits, shallow to deep, the full path last.

    Returns:
        For each name ``<name>_bbox_regression`` and ``<name>_classification`` unless ``supervision`` is ``teacher``,
        ``<name>_distillation`` if there is a teacher, and ``<name>_temperature`` if the router learns temperatures.
        With the supervision ``teacher`` temperatures are fitted to the full path's most probable classes.
    """
    if settings.supervision == "teacher":
        labels = heads[-1]["cls_logits"].detach().argmax(-1)
        assignment = Assignment(labels, torch.zeros_like(heads[-1]["bbox_regression"]))
    losses = {}
    for index, name in names.items():
        weight, head = settings.exit_weight(index), heads[index]
        if settings.supervision == "labels":
            for key, value in detection_losses(head, assignment, settings).items():
                losses[f"{name}_{key}"] = weight * value
        if settings.teacher != "none":
            deeper = [other for other in names if other > index]  # without empty exits, which cannot teach
            teacher = heads[deeper[0] if deeper and settings.teacher == "next" else -1]
            value = distillation_loss(head, teacher, settings)
            losses[f"{name}_distillation"] = weight * settings.distillation_weight * value
        if router is not None:
            value = router.temperature_loss(head["cls_logits"].detach(), assignment, index)
            if value is not None:
                losses[f"{name}_temperature"] = value
    return losses


# The forward pass from exit to exit.


@dataclass
class AtExit:
    """A batch of images at an exit of the forward pass. Taps, maps and heads are computed when the caller reads them.

    Attributes:
        model, trunk: the detector, and the layers of its trunk.
        index: index of the exit; the full path's index is the number of early exits.
        x: output of the trunk at this exit, [N, C, H, W]; at a glance, the images.
        copies: small copies of the images [N, 3, P, P], one for each glance.
        finest: the finest feature map of the full path's head; None before it is computed.
        context: context of this exit's branch.
        glance_tap: tap [N, C, H, W] of a glance; None at other exits, and before :attr:`tap` is first read.
    """

    model: EarlyExitDetector
    trunk: Trunk
    index: int
    x: Tensor
    copies: Sequence[Tensor]
    finest: Tensor | None = None
    context: Tensor | None = None
    glance_tap: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether this is the full path."""
        return self.index == self.model.num_early_exits

    @property
    def tap(self) -> Tensor:
        """Output of the exit's trunk layer, [N, C, H, W]."""
        if self.index >= self.model.num_glances:
            return self.x
        if self.glance_tap is None:
            end = self.trunk.ends[self.model.exits[self.index].layer]
            self.glance_tap, _ = self.trunk.run(self.copies[self.index], 0, end)
        return self.glance_tap

    def maps(self) -> list[Tensor]:
        """Return the feature maps of the full path's head. Call it at the full path only."""
        return self.trunk.feature_maps(self.x, self.finest)

    def head(self) -> Head:
        """Return the head outputs of this exit."""
        if self.full:
            return self.model.head(self.maps())
        branch = self.model.branches[self.model.exit_names[self.index]]
        # An empty exit reads only the number of images from its input, so a glance's tap need not be computed.
        return branch(self.x if self.model.empty[self.index] else self.tap, self.context)

    def signals(self, head: Head) -> ExitSignals:
        """Return the router's inputs at this exit."""
        if self.full:
            return ExitSignals(head["cls_logits"])
        return ExitSignals(head["cls_logits"], pool_tap(self.tap), self.model.empty[self.index])

    def keep(self, images: Tensor) -> None:
        """Keep only these images (boolean mask [N] or indices), here and at all later exits of the walk."""
        for name in ("x", "finest", "context", "glance_tap"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[images])
        self.copies = [copies[images] for copies in self.copies]


def walk(
    model: EarlyExitDetector,
    x: Tensor,
    copies: Sequence[Tensor] | None = None,
    branches: bool = True,
    first: int = 0,
    finest: Tensor | None = None,
    context: Tensor | None = None,
) -> Iterator[AtExit]:
    """Yield each exit in order, the full path last. The trunk runs up to an exit only when that exit is requested.

    Args:
        x: normalised images [N, 3, S, S].
        copies: result of :meth:`EarlyExitDetector.small_copies` for the images. None: crops of ``x`` of the same size,
            for costs and training, where the content of a copy does not matter.
        branches: False if no head of a branch will be computed; contexts are then skipped.
        first: index of the first exit to yield. If it is above 0, ``x``, ``finest`` and ``context`` are the values
            at the exit before it.
    """
    trunk, glances, early = model.trunk, model.num_glances, model.num_early_exits
    ends = [trunk.ends[layer] for layer in model.exit_layers[glances:early]]
    segments = list(pairwise([0, *ends, len(trunk.steps)]))
    if copies is None:
        copies = [x[..., : glance.pixels, : glance.pixels] for glance in model.exits[:glances]]
    for index in range(first, early + 1):
        if index >= glances:
            x, finest = trunk.run(x, *segments[index - glances], finest)
            if branches and index < early:
                context = model.branches[model.exit_names[index]].context(x, context)
        at = AtExit(model, trunk, index, x, copies, finest, context)
        yield at  # the caller may remove images with `AtExit.keep`
        x, copies, finest, context = at.x, at.copies, at.finest, at.context


def route(model: EarlyExitDetector, x: Tensor, copies: Sequence[Tensor] | None = None) -> tuple[Head, Tensor, Tensor]:
    """Run each image up to the exit that the router chooses for it. For ``x`` and ``copies`` see `walk`.

    With a hybrid router each image runs through the whole trunk and takes its boxes from the full path. The full path's
    classification head runs only for images that leave at no early exit.

    Returns:
        the head outputs of each image, the index of its exit (with a hybrid router, of its classes) [N], and the
        confidence there [N].
    """
    router, hybrid_boxes = model.router, {}
    # Indices of the images that have left at no exit yet. The walk's batch has only these, or with a hybrid router all.
    undecided = torch.arange(len(x), device=x.device)
    parts: list[tuple[Tensor, Head, int, Tensor]] = []  # per exit: image indices, head, exit index, confidences
    for at in walk(model, x, copies):
        if at.full and router.hybrid:
            maps = at.maps()
            hybrid_boxes = {"bbox_regression": model.head.regression_head(maps)}
        if not len(undecided) or not (at.full or router.needs(at.index)):
            continue
        selected = at  # the undecided images at this exit
        if not router.hybrid:
            head = at.head()
        elif at.full:
            head = {"cls_logits": model.head.classification_head([feature[undecided] for feature in maps])}
        else:
            selected = copy.copy(at)
            selected.keep(undecided)
            head = {"cls_logits": selected.head()["cls_logits"]}
        confidence = router.confidence(selected.signals(head), at.index)
        leave = torch.ones_like(undecided, dtype=torch.bool) if at.full else router.leaves(confidence, at.index)
        if not leave.any():
            continue
        if not leave.all():  # indexing would copy the logits, which are large
            head = {key: value[leave] for key, value in head.items()}
        parts.append((undecided[leave], head, at.index, confidence[leave]))
        undecided = undecided[~leave]
        if not router.hybrid:
            if not len(undecided):
                break
            at.keep(~leave)
    order = torch.cat([images for images, *_ in parts]).argsort()

    def in_input_order(values: list[Tensor]) -> Tensor:
        return values[0] if len(parts) == 1 else torch.cat(values)[order]

    head = {key: in_input_order([head[key] for _, head, *_ in parts]) for key in parts[0][1]}
    exit_index = in_input_order([torch.full_like(images, index) for images, _, index, _ in parts])
    return {**head, **hybrid_boxes}, exit_index, in_input_order([confidence for *_, confidence in parts])


# The detector, independent of its backbone.


def default_classes(outputs: int) -> tuple[str, ...]:
    """Return the class names for a head with ``outputs`` outputs: COCO's for 91, ``class_1`` and so on for others."""
    if outputs == len(COCO_CLASSES) + 1:
        return COCO_CLASSES
    return tuple(f"class_{label}" for label in range(1, outputs))


DETECTORS: Registry[type[EarlyExitDetector]] = Registry("detector (MODEL.NAME)")
"""torchvision's name of a detector -> the class of this detector with early exits."""

D = TypeVar("D", bound="type[EarlyExitDetector]")


def register_detector(name: str) -> Callable[[D], D]:
    """Class decorator: register an `EarlyExitDetector` under ``name``, for ``MODEL.NAME`` and for model files."""

    def register(detector: D) -> D:
        DETECTORS.register(name, detector)
        detector.detector_name = name
        return detector

    return register


class EarlyExitDetector(SSD):
    """A torchvision SSD with branches after some trunk layers.

    All parameters and buffers of the torchvision detector keep their names. Without a router, the detections equal
    torchvision's. A subclass sets ``last_layer``, implements ``trunk`` and ``build_plain``, and names torchvision's
    weights if there are any.

    Args:
        detector: a torchvision detector; its modules are used, not copied.
        exits: the early exits, shallow to deep. The keywords of `describe_exits` may be given instead.
        classes: names of the labels 1..K, without background; see :func:`default_classes`.
        losses: settings of the training losses.
        router: chooses each image's exit in eval mode; None runs the full path only.

    Attributes:
        exit_names: names of all exits in the order of computation, such as ``("glance128", "exit8", "full")``.
        exit_layers: trunk layer of each exit; `last_layer` for the full path.
        width: factor on the trunk's channels.
        grids: (height, width) in cells of the head's feature maps.
        empty: per early exit, True if it has no branch.
        norm_frozen: True keeps BatchNorm in eval mode in training, from the next call of ``train()`` on.

    Raises:
        EarlyExitError: exits in a wrong order or outside the trunk, or a number of class names that does not fit the
            detector's head.
    """

    detector_name: ClassVar[str]
    last_layer: ClassVar[int]  # of the trunk; early exits attach to layers 1 to ``last_layer - 1``
    # torchvision's weights of the detector without exits, and of the trunk; `WeightsEnum` itself has no members
    plain_weights: ClassVar[type[WeightsEnum]] = WeightsEnum
    backbone_weights: ClassVar[type[WeightsEnum]] = WeightsEnum
    default_exits: ClassVar[tuple[Exit, ...]] = describe_exits()
    any_size: ClassVar[bool] = True  # False: only torchvision's input size works
    fused = False  # True after `fuse_for_inference`

    @takes_exits
    def __init__(
        self,
        detector: SSD,
        *,
        exits: Sequence[Exit] | None = None,
        classes: Sequence[str] | None = None,
        losses: LossSettings | None = None,
        router: Router | None = None,
    ) -> None:
        num_classes = num_outputs(detector.head.classification_head)
        size = detector.transform.fixed_size
        super().__init__(detector.backbone, detector.anchor_generator, size, num_classes, head=detector.head)
        self.classes = tuple(classes or default_classes(num_classes))
        if len(self.classes) != num_classes - 1:
            head = f"a head with {num_classes} outputs (one is background)"
            raise EarlyExitError(f"{len(self.classes)} class names for {head}, expected {num_classes - 1}")
        for name in ("transform", "proposal_matcher", "neg_to_pos_ratio", *POST_PROCESSING):
            setattr(self, name, getattr(detector, name))
        self.exits = tuple(self.default_exits if exits is None else exits)
        check_exits(self.exits, self.last_layer, min(size))
        self.width = getattr(detector, "width", 1.0)
        self.exit_layers = (*(exit.layer for exit in self.exits), self.last_layer)
        self.exit_names = (*(exit.name for exit in self.exits), "full")
        self.empty = tuple(exit.empty for exit in self.exits)
        self.losses = losses if losses is not None else LossSettings()
        validate.check_losses(self.losses, len(self.exits))
        validate.check_router(router, len(self.exits))
        self.router = router
        self.norm_frozen = False
        self._full_path_frozen = False
        with evaluating(self.backbone):
            taps, maps = self.trunk_maps(next(self.backbone.parameters()).new_zeros(1, 3, *size))
        self.train(self.training)  # the parts of `detector` may be in eval mode
        self.grids = [tuple(feature.shape[-2:]) for feature in maps]
        boxes_per_cell = self.anchor_generator.num_anchors_per_location()
        self.branches, context_channels = nn.ModuleDict(), 0
        for exit, tap in zip(self.exits, taps, strict=True):
            shape = tuple(tap.shape[1:])
            place = Place(self.backbone, exit.layer, shape, self.grids, boxes_per_cell, num_classes, context_channels)
            branch = self.branches[exit.name] = exit.build(place)
            context_channels = branch.context_channels
        self.inherit()

    @property
    def trunk(self) -> Trunk:
        """The layers of the backbone, read anew at each access because a user may replace layers."""
        raise NotImplementedError  # abstract: each registered detector implements it

    @classmethod
    def build_plain(cls, **settings: object) -> SSD:
        """Build torchvision's detector without exits, untrained. Keywords are those of :func:`build_ssdlite`."""
        raise NotImplementedError  # abstract: each registered detector implements it

    def inherit(self) -> None:
        """Copy the full path's current weights into the copied layers of the branches."""
        for branch in self.branches.values():
            branch.inherit(self.backbone, self.head)

    @property
    def score_thresh(self) -> float | dict[str, float]:
        """Lowest score of a detection: a number, or class name -> number (0.001 for other classes)."""
        return self._score_thresh

    @score_thresh.setter
    def score_thresh(self, value: float | Mapping[str, float]) -> None:
        self._score_thresh = validate.score_thresh(value, getattr(self, "classes", ()))

    @property
    def num_classes(self) -> int:
        """Outputs per default box, background included."""
        return len(self.classes) + 1

    @property
    def num_glances(self) -> int:
        """Number of glances, which are the first early exits."""
        return sum(exit.pixels is not None for exit in self.exits)

    @property
    def num_early_exits(self) -> int:
        """Number of exits before the full path."""
        return len(self.exit_layers) - 1

    def small_copies(self, images: list[Tensor]) -> list[Tensor]:
        """Return small copies of images [3, H, W], one normalised batch [N, 3, P, P] for each glance. They are resized
        from the images like the network's input."""
        transform, copies = copy.copy(self.transform), []
        for glance in self.exits[: self.num_glances]:
            transform.fixed_size = (glance.pixels, glance.pixels)
            copies.append(transform(images, None)[0].tensors)
        return copies

    def trunk_maps(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the taps (one per early exit) and the full path's feature maps of normalised images [N, 3, S, S]."""
        *early, full = walk(self, x, branches=False)
        return [at.tap for at in early], full.maps()

    def full_maps(self, x: Tensor) -> list[Tensor]:
        """Return the full path's feature maps of normalised images [N, 3, S, S]. No glance is computed."""
        *_, full = walk(self, x, branches=False)
        return full.maps()

    def branch_heads(self, taps: Sequence[Tensor]) -> list[Head]:
        """Return the head outputs of all early exits from their taps."""
        heads, context = [], None
        for branch, tap in zip(self.branches.values(), taps, strict=True):
            context = branch.context(tap, context)
            heads.append(branch(tap, context))
        return heads

    def default_boxes(self, images: ImageList) -> list[Tensor]:
        """Return the default boxes per image, [A, 4] xyxy in network pixels, in fp32 also under autocast."""
        maps = [images.tensors.new_empty((1, 0, *grid), dtype=torch.float32) for grid in self.grids]
        return self.anchor_generator(images, maps)

    def freeze_full_path(self, frozen: bool = True) -> None:
        """Freeze trunk and head: they get no gradient and stay in eval mode, so only the branches are trained."""
        self._full_path_frozen = frozen
        for module in (self.backbone, self.head):
            module.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> EarlyExitDetector:
        """Set the mode as ``nn.Module.train`` does, but keep frozen parts in eval mode."""
        super().train(mode)
        if self._full_path_frozen:
            self.backbone.eval()
            self.head.eval()
        if self.norm_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def compute_losses(self, heads: Sequence[Head], assignment: Assignment) -> dict[str, Tensor]:
        """Return the weighted losses of all exits; a frozen full path has none. ``heads``: shallow to deep, the full
        path last."""
        validate.check_router(self.router, self.num_early_exits, trains=True)
        full = {} if self._full_path_frozen else full_path_losses(heads[-1], assignment, self.losses)
        names = {index: self.exit_names[index] for index, empty in enumerate(self.empty) if not empty}
        return full | early_exit_losses(names, heads, assignment, self.losses, self.router)

    def assign(self, targets: Targets, anchors: list[Tensor]) -> Assignment:
        """Match targets (boxes in network pixels) with default boxes. All exits share the result."""
        return assign(targets, anchors, self.proposal_matcher, self.box_coder)

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Return scalar losses of all exits in train mode, and detections in eval mode. With a router each detection
        dict also has the scalars ``exit_index`` and ``exit_confidence``. ``images``: RGB [3, H, W] in [0, 1]."""
        validate.check_not_traced(None if self.training else self.router)
        validate.check_images(images)
        validate.check_head(self.head, self.num_classes)
        if self.training:
            targets = validate.check_targets(targets, len(images), self.classes)
            validate.check_batch(self, len(images))
            batch, targets = self.transform(images, targets)
            heads = [at.head() for at in walk(self, batch.tensors)]
            return self.compute_losses(heads, self.assign(targets, self.default_boxes(batch)))
        batch, _ = self.transform(images, None)
        anchors, photo_sizes = self.default_boxes(batch), [tuple(image.shape[-2:]) for image in images]
        if self.router is None:
            head = self.head(self.full_maps(batch.tensors))
            return self._postprocess(head, anchors, batch.image_sizes, photo_sizes)
        validate.check_router(self.router, self.num_early_exits)
        head, exit_index, confidence = route(self, batch.tensors, self.small_copies(images))
        detections = self._postprocess(head, anchors, batch.image_sizes, photo_sizes)
        for index, detection in enumerate(detections):
            detection["exit_index"], detection["exit_confidence"] = exit_index[index], confidence[index]
        return detections

    def exit_outputs(self, images: list[Tensor]) -> ExitOutputs:
        """Compute the outputs of all exits in one forward pass, without routing."""
        validate.check_images(images)
        batch, _ = self.transform(images, None)
        exits = list(walk(self, batch.tensors, self.small_copies(images)))
        heads, pooled = tuple(at.head() for at in exits), tuple(pool_tap(at.tap) for at in exits[:-1])
        photo_sizes = [tuple(image.shape[-2:]) for image in images]
        return ExitOutputs(heads, pooled, self.default_boxes(batch), batch.image_sizes, photo_sizes, self.empty)

    def detections(self, outputs: ExitOutputs, exit_index: int) -> Detections:
        """Return the detections of all images at one exit, from the result of :meth:`exit_outputs`."""
        return self._postprocess(outputs.heads[exit_index], outputs.anchors, outputs.network_sizes, outputs.photo_sizes)

    def postprocess_detections(
        self, head_outputs: Head, image_anchors: list[Tensor], image_shapes: Sizes
    ) -> Detections:
        """Filter detections as torchvision does, and also apply score thresholds per class.

        These are applied after NMS and before the limit per image. Before NMS they would give the same detections,
        since a box suppresses only boxes of its own class with a lower score.
        """
        if not isinstance(self.score_thresh, Mapping):
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
        lowest_scores = [self.score_thresh.get(name, validate.LEAST_SCORE) for name in self.classes]
        unlimited_self = types.SimpleNamespace(  # replaces `self`: torchvision's method reads only these attributes
            box_coder=self.box_coder,
            score_thresh=min(lowest_scores),
            nms_thresh=self.nms_thresh,
            topk_candidates=self.topk_candidates,
            detections_per_img=None,
        )
        thresholds = torch.tensor([0.0, *lowest_scores], device=image_anchors[0].device)
        detections = SSD.postprocess_detections(unlimited_self, head_outputs, image_anchors, image_shapes)
        for detection in detections:
            keep = (detection["scores"] > thresholds[detection["labels"]]).nonzero()[: self.detections_per_img, 0]
            detection.update({key: value[keep] for key, value in detection.items()})
        return detections

    def _postprocess(self, head: Head, anchors: list[Tensor], network_sizes: Sizes, photo_sizes: Sizes) -> Detections:
        detections = self.postprocess_detections(head, anchors, network_sizes)
        return self.transform.postprocess(detections, network_sizes, photo_sizes)


# The network up to one exit as a module, for operation counts, timing and export.


class PathToExit(nn.Module):
    """The computation for an image that leaves at ``exit_index``: the trunk and the branches up to this exit.

    Args:
        exit_index: 0 for the first exit, the number of early exits for the full path.
        router: computes the confidences; closed exits are skipped. None: no confidences, and no exit is skipped.
        alone: skip the heads of all earlier exits, as in a detector with this exit only. Used without a router.
    """

    def __init__(
        self, model: EarlyExitDetector, exit_index: int, router: Router | None = None, *, alone: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= exit_index <= model.num_early_exits:
            raise ValueError(f"exit_index {exit_index}: the model has exits 0 to {model.num_early_exits}")
        self.model, self.exit_index, self.router, self.alone = model, exit_index, router, alone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4] of normalised images [N, 3, S, S]."""
        heads, _ = self.run(x)
        return heads[-1]["cls_logits"], heads[-1]["bbox_regression"]

    def run(self, x: Tensor) -> tuple[list[Head], list[Tensor]]:
        """Return the head outputs of all exits on the path, and other tensors.

        The other tensors are the router's confidences [N] at the early exits. If the path ends at an empty exit, the
        pooled tap comes last. A tracer would otherwise drop the trunk, since the head of an empty exit is constant.
        """
        heads: list[Head] = []
        others: list[Tensor] = []
        hybrid = self.router is not None and self.router.hybrid
        for at in walk(self.model, x):
            skip = self.alone if self.router is None else not self.router.needs(at.index)
            if at.index < self.exit_index and skip:
                continue
            if at.index <= self.exit_index:
                heads.append(at.head())
                ends_empty = at.index == self.exit_index and not at.full and self.model.empty[at.index]
                signals = at.signals(heads[-1]) if ends_empty or self.router is not None else None
                if self.router is not None and not at.full:
                    others.append(self.router.confidence(signals, at.index))
                if ends_empty:
                    others.append(signals.tap)
            elif at.full:  # with a hybrid router: the exit's classes, the full path's boxes
                heads[-1] = {**heads[-1], "bbox_regression": self.model.head.regression_head(at.maps())}
            if at.index == self.exit_index and not hybrid:
                break
        return heads, others


class AllOutputs(PathToExit):
    """A path that returns all tensors of :meth:`PathToExit.run`, since a tracer drops operations without an output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        heads, others = self.run(x)
        return [tensor for head in heads for tensor in head.values()] + others


def fuse_for_inference(model: EarlyExitDetector) -> EarlyExitDetector:
    """Return a copy in eval mode with each BatchNorm fused into its convolution; on a CPU in channels-last format.

    Detections equal the model's up to fp32 rounding. The router is copied too. The copy cannot be trained, saved or
    compared with a certificate.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    fused.fused = True
    for sequence in [module for module in fused.modules() if isinstance(module, nn.Sequential)]:
        for (name, first), (next_name, second) in pairwise(list(sequence.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
                setattr(sequence, name, fuse_conv_bn_eval(first, second))
                setattr(sequence, next_name, nn.Identity())
    if next(fused.parameters()).device.type == "cpu":  # on CUDA this makes depthwise convolutions many times slower
        fused.to(memory_format=torch.channels_last)
    return fused


# Modules that compute only the losses of one training phase. The model itself computes all losses.


@dataclass(frozen=True)
class ResizedBatch:
    """The full path's outputs for a batch at one of several input sizes."""

    images: ImageList  # the normalised batch at the model's own size, before the resizing
    side: int  # side of the resized, square input in pixels
    head: Head  # head outputs of the resized batch
    anchors: list[Tensor]  # default boxes [A, 4] xyxy per image, in pixels of the resized input
    targets: Targets  # boxes in pixels of the resized input


class FullPathLosses(nn.Module):
    """Losses of the full path. The branches are not computed and get no gradient.

    ``sides`` are the input sides in pixels of multi-scale training; default: the model's own side. The image ids of a
    batch select its side. Default boxes keep their size in pixels (`PixelBoxes`).
    """

    def __init__(self, model: EarlyExitDetector, sides: Sequence[int] = ()) -> None:
        super().__init__()
        self.backbone, self.head, self._sides = model.backbone, model.head, tuple(sides)
        self._model = [model]  # in a list, so that the branches' parameters are not registered here

    def forward(self, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """Return ``bbox_regression`` and ``classification``, as in torchvision's SSD."""
        model, batch = self._model[0], self.compute(images, targets)
        return full_path_losses(batch.head, model.assign(batch.targets, batch.anchors), model.losses)

    def compute(self, images: list[Tensor], targets: Targets) -> ResizedBatch:
        """Return the head outputs of a batch at the input side that its image ids select."""
        model = self._model[0]
        validate.check_images(images)
        targets = validate.check_targets(targets, len(images), model.classes)
        validate.check_batch(self, len(images))
        batch, targets = model.transform(images, targets)
        side = own_side = batch.tensors.shape[-1]
        if self._sides:
            side = self._sides[sum(int(target["image_id"]) for target in targets) % len(self._sides)]
        if side == own_side:
            maps = model.full_maps(batch.tensors)
            anchors = model.default_boxes(batch)
        else:
            x = F.interpolate(batch.tensors, (side, side), mode="bilinear", antialias=True)
            targets = [{**target, "boxes": target["boxes"] * (side / own_side)} for target in targets]
            maps = model.full_maps(x)
            anchor_generator = PixelBoxes(model.anchor_generator, model.grids, own_side, side)
            fp32_maps = [feature.detach().float() for feature in maps]
            anchors = anchor_generator(ImageList(x, [(side, side)] * len(x)), fp32_maps)
        return ResizedBatch(batch, side, self.head(maps), anchors, targets)


@dataclass(frozen=True)
class TapBatch:
    """Outputs of the frozen full path for a batch, from which `BranchLosses` computes the losses."""

    taps: list[Tensor]  # per early exit [N, C, H, W]
    head: Head  # of the full path, the teacher
    targets: Targets  # boxes in network pixels


class BranchLosses(nn.Module):
    """Losses of the branches from stored taps. They equal the losses of a model whose full path is frozen."""

    def __init__(self, model: EarlyExitDetector) -> None:
        super().__init__()
        self.branches = model.branches
        if isinstance(model.router, nn.Module):  # its temperatures are trained too
            self.router = model.router
        self._model = [model]  # in a list, so that the full path's parameters are not registered here

    def forward(self, batch: TapBatch) -> dict[str, Tensor]:
        """Return the weighted losses of all early exits."""
        validate.check_batch(self, len(batch.targets))
        model = self._model[0]
        heads = [*model.branch_heads(batch.taps), batch.head]
        anchors = [default_boxes_of_image(model, batch.taps[0].device)] * len(batch.targets)
        return model.compute_losses(heads, model.assign(batch.targets, anchors))


def default_boxes_of_image(model: EarlyExitDetector, device: torch.device) -> Tensor:
    """Return the default boxes of an image, [A, 4] xyxy in network pixels. They are the same for every image."""
    width, height = model.transform.fixed_size
    return model.default_boxes(ImageList(torch.empty(1, 3, height, width, device=device), [(height, width)]))[0]


@torch.no_grad()
def compute_taps(model: EarlyExitDetector, images: list[Tensor], targets: Targets) -> TapBatch:
    """Return the full path's outputs for a batch, in the model's current mode. ``targets``: boxes in photo pixels."""
    targets = validate.check_targets(targets, len(images), model.classes)
    batch, targets = model.transform(images, targets)
    taps, maps = model.trunk_maps(batch.tensors)
    return TapBatch(taps, model.head(maps), targets)

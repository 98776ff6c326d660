"""A torchvision SSD with early exits: one walk from exit to exit, its detections and its losses."""

from __future__ import annotations

import copy
import dataclasses
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
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.modeling import arguments, validate
from earlyexit_ssd.modeling.branches import Exit, build_branches, check_exits, describe_exits, takes_exits
from earlyexit_ssd.modeling.heads import num_outputs
from earlyexit_ssd.modeling.losses import Assignment, LossSettings, assign, detection_losses, distillation_loss
from earlyexit_ssd.modeling.outputs import ExitOutputs, ExitSignals, Head, Router, pool_tap
from earlyexit_ssd.modeling.trunk import PixelBoxes, Trunk, TrunkState, small_copy
from earlyexit_ssd.modeling.validate import check_batch, check_images, check_targets


def full_path_losses(head: Head, assignment: Assignment, settings: LossSettings) -> dict[str, Tensor]:
    """``bbox_regression`` and ``classification``, as torchvision's SSD names them, times ``full_weight``."""
    losses = detection_losses(head, assignment, settings)
    return {key: settings.full_weight * value for key, value in losses.items()}


def early_exit_losses(
    names: Mapping[int, str],
    heads: Sequence[Head],
    assignment: Assignment,
    settings: LossSettings,
    router: Router | None = None,
) -> dict[str, Tensor]:
    """Per exit ``<name>_bbox_regression`` and ``_classification``; where asked ``_distillation`` and ``_temperature``.

    With ``supervision="teacher"`` the labels are not looked at: the teacher's most probable classes stand in for
    them where a temperature is fitted.

    Args:
        names: index -> name of the early exits that have a branch.
        heads: of the early exits and, last, of the full path.
        assignment: one matching for all exits.
        settings: weights and teacher.
        router: fits its temperatures if it learns them.
    """
    if settings.supervision == "teacher":
        labels = heads[-1]["cls_logits"].detach().argmax(-1)
        assignment = Assignment(labels, torch.zeros_like(heads[-1]["bbox_regression"]))
    losses = {}
    for index, name in names.items():
        weight = settings.exit_weight(index)
        if settings.supervision == "labels":
            for key, value in detection_losses(heads[index], assignment, settings).items():
                losses[f"{name}_{key}"] = weight * value
        if settings.teacher != "none":
            deeper = [other for other in names if other > index]  # an exit without a branch has nothing to teach
            teacher = heads[deeper[0] if deeper and settings.teacher == "next" else -1]
            value = distillation_loss(heads[index], teacher, settings)
            losses[f"{name}_distillation"] = weight * settings.distillation_weight * value
        if router is not None:
            value = router.temperature_loss(heads[index]["cls_logits"].detach(), assignment, index)
            if value is not None:
                losses[f"{name}_temperature"] = value
    return losses


# One walk: from exit to exit, and at each of them what is asked for.


@dataclass
class Stop:
    """A batch at one exit of its walk.

    Attributes:
        model: the detector; ``trunk``: its layers.
        index: of the exit; the number of early exits at the full path.
        state: of the trunk. ``context``: of the branch there, see :meth:`Branch.context`.
        glance: features of the small copies, where the exit is a glance and was asked for its tap.
    """

    model: EarlyExitDetector
    trunk: Trunk
    index: int
    state: TrunkState
    context: Tensor | None = None
    glance: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether this is the full path, the end of the walk."""
        return self.index == self.model.num_early_exits

    @property
    def tap(self) -> Tensor:
        """[N, C, H, W] behind the exit's layer; a glance is computed here, at the first call."""
        exit = self.model.exits[self.index] if not self.full else None
        if exit is None or exit.pixels is None:
            return self.state.x
        if self.glance is None:
            self.glance = self.trunk.features(small_copy(self.state.x, exit.pixels), exit.layer)
        return self.glance

    def maps(self) -> list[Tensor]:
        """At the full path, the maps of its head."""
        return self.trunk.feature_maps(self.state)

    def head(self) -> Head:
        """The outputs of this exit; computed at each call."""
        if self.full:
            return self.model.head(self.maps())
        branch = self.model.branches[self.model.exit_names[self.index]]
        # An empty exit says the same whatever it sees, so that no glance is computed for its head.
        return branch(self.state.x if self.model.empty[self.index] else self.tap, self.context)

    def signals(self, head: Head) -> ExitSignals:
        """What a router sees here."""
        if self.full:
            return ExitSignals(head["cls_logits"])
        return ExitSignals(head["cls_logits"], pool_tap(self.tap), self.model.empty[self.index])

    def select(self, images: Tensor) -> Stop:
        """The same for some images alone: a boolean mask [N], or indices."""
        context, glance = (None if one is None else one[images] for one in (self.context, self.glance))
        return dataclasses.replace(self, state=self.state.select(images), context=context, glance=glance)

    def keep(self, images: Tensor) -> None:
        """Let these images go on alone, those of the boolean mask [N]."""
        rest = self.select(images)
        self.state, self.context, self.glance = rest.state, rest.context, rest.glance


def walk(model: EarlyExitDetector, x: Tensor, branches: bool = True, behind: Stop | None = None) -> Iterator[Stop]:
    """Go from exit to exit, the full path last; what is behind a stop is computed when the walk goes on.

    Args:
        model: the detector.
        x: normalised images [N, 3, S, S].
        branches: whether branches are asked for; without, no context is computed for them.
        behind: go on from this stop rather than from the images.
    """
    trunk, state, context, glances, first = model.trunk, TrunkState(x), None, model.num_glances, 0
    if behind is not None:
        state, context, first = behind.state, behind.context, behind.index + 1
    for index, name in list(enumerate(model.exit_names))[first:]:
        if index >= glances:
            state = trunk.run(state, index - glances)
            if branches and index < model.num_early_exits:
                context = model.branches[name].context(state.x, context)
        stop = Stop(model, trunk, index, state, context)
        yield stop
        state, context = stop.state, stop.context


def route(model: EarlyExitDetector, x: Tensor) -> tuple[Head, Tensor, Tensor]:
    """Compute every image to the exit that its router takes, and no further.

    With a hybrid router the trunk is run for every image: an image whose exit is sure takes its classes from there, all
    take the boxes of the full path, whose classification head is computed for the others alone.

    Args:
        model: with a router.
        x: normalised images [N, 3, S, S].

    Returns:
        the head outputs of each image's own exit, its exit's index [N] (of the classes) and its confidence there [N]
        (at the full path: the confidence by the same rule).
    """
    router, boxes = model.router, {}
    active = torch.arange(len(x), device=x.device)
    parts: list[tuple[Tensor, Head, int, Tensor]] = []
    for stop in walk(model, x):
        if stop.full and router.hybrid:
            maps = stop.maps()
            boxes = {"bbox_regression": model.head.regression_head(maps)}
        if not len(active) or not (stop.full or router.needs(stop.index)):
            continue
        if boxes:
            head = {"cls_logits": model.head.classification_head([feature[active] for feature in maps])}
            here = stop
        else:
            here = stop.select(active) if router.hybrid else stop
            head = here.head()
        confidence = router.confidence(here.signals(head), stop.index)
        leave = None if stop.full else router.leaves(confidence, stop.index)
        if router.hybrid:
            head = {"cls_logits": head["cls_logits"]}
        if leave is None or leave.all():  # logits are large: do not copy them for nothing
            parts.append((active, head, stop.index, confidence))
            active = active[:0]
            if not router.hybrid:
                break
        elif leave.any():
            parts.append(
                (active[leave], {key: value[leave] for key, value in head.items()}, stop.index, confidence[leave])
            )
            active = active[~leave]
            if not router.hybrid:
                stop.keep(~leave)
    head, exit_index, confidence = _in_order(parts)
    return {**head, **boxes}, exit_index, confidence


def _in_order(parts: list[tuple[Tensor, Head, int, Tensor]]) -> tuple[Head, Tensor, Tensor]:
    """Join the images of all exits in the order in which they came."""
    indices = [torch.full_like(positions, index) for positions, _, index, _ in parts]
    if len(parts) == 1:  # logits are large: do not copy them for nothing
        return parts[0][1], indices[0], parts[0][3]
    positions = [positions for positions, *_ in parts]
    head = {key: _put(positions, [head[key] for _, head, _, _ in parts]) for key in parts[0][1]}
    return head, _put(positions, indices), _put(positions, [confidence for *_, confidence in parts])


def _put(positions: list[Tensor], values: list[Tensor]) -> Tensor:
    """[n_i, ...] of every part to [N, ...], each row at its position."""
    out = values[0].new_empty(sum(map(len, positions)), *values[0].shape[1:])
    for where, value in zip(positions, values, strict=True):
        out.index_copy_(0, where, value)
    return out


# The detector, whatever its backbone is.

DETECTORS: dict[str, type[EarlyExitDetector]] = {}
"""torchvision's name of a detector -> the same with early exits; :func:`register_detector` adds to it."""

D = TypeVar("D", bound="type[EarlyExitDetector]")


def register_detector(name: str) -> Callable[[D], D]:
    """Decorate a class of detectors with early exits, so that configuration and model files may name it."""

    def register(kind: D) -> D:
        kind.detector_name = name
        DETECTORS[name] = kind
        return kind

    return register


def detector_class(name: str) -> type[EarlyExitDetector]:
    """The class of a registered name.

    Raises:
        EarlyExitError: there is none; the message has the nearest name.
    """
    if name not in DETECTORS:
        listed = ", ".join(DETECTORS)
        raise EarlyExitError(
            f"detector (MODEL.NAME) is {name!r:.60}, expected one of {listed}{nearest(str(name), DETECTORS)}"
        )
    return DETECTORS[name]


class EarlyExitDetector(SSD):
    """A torchvision SSD with branches behind some trunk layers.

    Every parameter and buffer of the torchvision detector keeps its name, and without a router the detections are
    torchvision's own. In train mode ``model(images, targets)`` returns a dict of scalar losses (all exits at once),
    in eval mode one dict per image with ``boxes`` [n, 4] xyxy in the photo's pixels, ``labels`` [n] and ``scores``
    [n]; with a router also ``exit_index`` and ``exit_confidence``, scalar tensors.

    A kind of detectors names ``last_layer`` and torchvision's weights, and implements ``trunk`` and ``build_plain``.

    Args:
        detector: a torchvision detector; its parts are used, not copied.
        exits: shallow to deep; instead of it, the keywords of :func:`earlyexit_ssd.modeling.branches.describe_exits`
            (``exit_layers``, ``branch``, ``empty`` and the branches' arguments).
        classes: names of the labels 1..K, background not among them; by default ``class_1`` and so on.
        losses: what is minimised in training.
        router: decides who leaves early in eval mode; None runs the full path alone.

    Attributes:
        score_thresh: least score of a detection, or class name -> least score (classes that are not named keep 0.001).
        exit_names: in the order of the walk, such as ``("glance128", "exit8", "exit12", "full")``.
        exit_layers: their layers, `last_layer` for the full path. ``grids``: (height, width) of the head's maps, cells.
        empty: per early exit, whether it has no branch.

    Raises:
        ValueError: an impossible exit layer, or a number of classes that the detector's head does not have.
    """

    detector_name: ClassVar[str]
    last_layer: ClassVar[int]
    """Behind which the full path begins; exits leave from 1 to the one before."""
    plain_weights: ClassVar[type[WeightsEnum]]
    backbone_weights: ClassVar[type[WeightsEnum]]
    """torchvision's weights of the detector without exits, and of its trunk."""
    any_size: ClassVar[bool] = True
    """Whether its layers fit inputs of other sizes than torchvision's."""

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
        super().__init__(
            detector.backbone,
            detector.anchor_generator,
            detector.transform.fixed_size,
            num_classes,
            image_mean=detector.transform.image_mean,
            image_std=detector.transform.image_std,
            head=detector.head,
            nms_thresh=detector.nms_thresh,
            detections_per_img=detector.detections_per_img,
            iou_thresh=detector.proposal_matcher.high_threshold,
            topk_candidates=detector.topk_candidates,
            positive_fraction=1 / (1 + detector.neg_to_pos_ratio),
        )
        self.exits = tuple(describe_exits() if exits is None else exits)
        layers = tuple(one.layer for one in self.exits)
        check_exits(self.exits, self.last_layer)
        self.classes = tuple(classes or (f"class_{label}" for label in range(1, num_classes)))
        arguments.check_class_names(self.classes, num_classes)
        self.score_thresh = detector.score_thresh
        self.width = getattr(detector, "width", 1.0)
        self.exit_layers = (*layers, self.last_layer)
        self.exit_names = (*(one.name for one in self.exits), "full")
        self.empty = tuple(one.empty for one in self.exits)
        self.losses = losses if losses is not None else LossSettings()
        validate.check_losses(self.losses, len(layers))
        validate.check_router(router, len(layers))
        self.router = router
        self.norm_frozen = False
        self._trunk_frozen = False
        taps, self.grids = self._dry_run()
        boxes_per_cell = self.anchor_generator.num_anchors_per_location()
        self.branches = build_branches(self.exits, self.backbone, taps, self.grids, boxes_per_cell, num_classes)
        self.inherit()

    @property
    def trunk(self) -> Trunk:
        """The layers that the backbone has now, also after one was replaced, cut behind the exits."""
        raise NotImplementedError

    @classmethod
    def build_plain(cls, **settings: object) -> SSD:
        """torchvision's detector without exits, untrained; keywords as :func:`build_ssdlite`'s."""
        raise NotImplementedError

    def inherit(self) -> None:
        """Start the branches' tails and heads from what the full path knows now."""
        for branch in self.branches.values():
            branch.inherit(self.backbone, self.head)

    @property
    def score_thresh(self) -> float | dict[str, float]:
        """Least score of a detection, one number or by class name."""
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
        """Early exits that look at a small copy of the image; they come first."""
        return sum(one.pixels is not None for one in self.exits)

    @property
    def segment_layers(self) -> tuple[int, ...]:
        """Layers behind which the trunk is cut, on the image at its full size."""
        return self.exit_layers[self.num_glances : -1]

    @property
    def num_early_exits(self) -> int:
        """Exits before the full path."""
        return len(self.exit_layers) - 1

    @torch.no_grad()
    def _dry_run(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
        """The taps' shapes and the grids, from a blank image; BatchNorm statistics are left alone."""
        was_training = self.training
        self.backbone.eval()
        parameter = next(self.backbone.parameters())
        blank = torch.zeros(1, 3, *self.transform.fixed_size, device=parameter.device, dtype=parameter.dtype)
        taps, maps = self.trunk_maps(blank)
        self.backbone.train(was_training)
        return [tuple(tap.shape[1:]) for tap in taps], [tuple(feature.shape[-2:]) for feature in maps]

    def trunk_maps(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Normalised images [N, 3, S, S] to the taps (one per early exit) and the maps of the full path."""
        *early, last = walk(self, x, branches=False)
        return [stop.tap for stop in early], last.maps()

    def branch_heads(self, taps: Sequence[Tensor]) -> list[Head]:
        """Heads of all early exits from their taps."""
        heads, context = [], None
        for branch, tap in zip(self.branches.values(), taps, strict=True):
            context = branch.context(tap, context)
            heads.append(branch(tap, context))
        return heads

    def default_boxes(self, images: ImageList) -> list[Tensor]:
        """Per image [A, 4] xyxy in network pixels, in fp32 whatever autocast does to the maps."""
        maps = [images.tensors.new_empty((1, 0, *grid), dtype=torch.float32) for grid in self.grids]
        return self.anchor_generator(images, maps)

    def freeze_trunk(self, frozen: bool = True) -> None:
        """Train the branches only: the full path takes no gradient and its BatchNorm stays in eval mode."""
        self._trunk_frozen = frozen
        for module in (self.backbone, self.head):
            module.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> EarlyExitDetector:
        """As ``nn.Module.train``, but what is frozen stays in eval mode."""
        super().train(mode)
        if self._trunk_frozen:
            self.backbone.eval()
            self.head.eval()
        if self.norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def compute_losses(self, heads: Sequence[Head], assignment: Assignment) -> dict[str, Tensor]:
        """Weighted losses of all exits (heads shallow to deep, the full path last); the frozen full path has none."""
        validate.check_router(self.router, self.num_early_exits, trains=True)
        full = {} if self._trunk_frozen else full_path_losses(heads[-1], assignment, self.losses)
        names = {index: self.exit_names[index] for index, empty in enumerate(self.empty) if not empty}
        return full | early_exit_losses(names, heads, assignment, self.losses, self.router)

    def assign(self, targets: list[dict[str, Tensor]], anchors: list[Tensor]) -> Assignment:
        """Match targets (network pixels) with default boxes; one matching serves every exit."""
        return assign(targets, anchors, self.proposal_matcher, self.box_coder)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in train mode, detections in eval mode; see the class.

        Args:
            images: list of [3, H, W] in [0, 1], any sizes.
            targets: in train mode, per image ``boxes`` [n, 4] xyxy absolute pixels and ``labels`` [n] in 1..K;
                n may be 0.
        """
        validate.check_not_traced(None if self.training else self.router)
        validate.check_images(images)
        validate.check_head(self.head, self.num_classes)
        if self.training:
            return self._training_losses(images, targets)
        return self._detections(images)

    def _training_losses(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> dict[str, Tensor]:
        targets = validate.check_targets(targets, len(images), self.classes)
        validate.check_batch(self, len(images))
        batch, targets = self.transform(images, targets)
        heads = [stop.head() for stop in walk(self, batch.tensors)]
        return self.compute_losses(heads, self.assign(targets, self.default_boxes(batch)))

    def exit_outputs(self, images: list[Tensor]) -> ExitOutputs:
        """One pass over the network for all exits, unrouted."""
        validate.check_images(images)
        photo_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images, None)
        stops = list(walk(self, batch.tensors))
        heads, pooled = tuple(stop.head() for stop in stops), tuple(pool_tap(stop.tap) for stop in stops[:-1])
        return ExitOutputs(heads, pooled, self.default_boxes(batch), batch.image_sizes, photo_sizes, self.empty)

    def detections(self, outputs: ExitOutputs, exit_index: int) -> list[dict[str, Tensor]]:
        """Detections of one exit: per image ``boxes`` xyxy in the photo's pixels, ``labels`` and ``scores``."""
        return self._finish(outputs.heads[exit_index], outputs.anchors, outputs.network_sizes, outputs.photo_sizes)

    def postprocess_detections(
        self, head_outputs: Head, image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """torchvision's own; least scores by class are cut between its suppression and its limit per image.

        Suppression works within a class, from the surest box down, so what is cut later has suppressed nothing.
        """
        if not isinstance(self.score_thresh, Mapping):
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
        least = [self.score_thresh.get(name, validate.LEAST_SCORE) for name in self.classes]
        unlimited = types.SimpleNamespace(
            box_coder=self.box_coder,
            score_thresh=min(least),
            nms_thresh=self.nms_thresh,
            topk_candidates=self.topk_candidates,
            detections_per_img=None,
        )
        cuts = torch.tensor([0.0, *least], device=image_anchors[0].device)
        detections = SSD.postprocess_detections(unlimited, head_outputs, image_anchors, image_shapes)
        kept = [found["scores"] > cuts[found["labels"]] for found in detections]
        return [
            {key: value[keep][: self.detections_per_img] for key, value in found.items()}
            for found, keep in zip(detections, kept, strict=True)
        ]

    def _finish(
        self,
        head: Head,
        anchors: list[Tensor],
        network_sizes: list[tuple[int, int]],
        photo_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        detections = self.postprocess_detections(head, anchors, network_sizes)
        return self.transform.postprocess(detections, network_sizes, photo_sizes)

    def _detections(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Of the full path, or with a router of each image's exit."""
        photo_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images, None)
        sizes = self.default_boxes(batch), batch.image_sizes, photo_sizes
        if self.router is None:
            return self._finish(self.head(self.trunk_maps(batch.tensors)[1]), *sizes)
        validate.check_router(self.router, self.num_early_exits)
        head, exit_index, confidence = route(self, batch.tensors)
        detections = self._finish(head, *sizes)
        for index, detection in enumerate(detections):
            detection["exit_index"], detection["exit_confidence"] = exit_index[index], confidence[index]
        return detections


# The network up to one exit, as a module of its own: for counting operations, timing and export.


class PathToExit(nn.Module):
    """What a routed image pays for leaving at ``exit_index``: the trunk to there and every branch on the way.

    Args:
        model: the model; its parts are used, not copied.
        exit_index: 0 for the first exit, the number of early exits for the full path.
        router: scores every exit on the way, as it does when it decides, and spares those that it has closed; None
            leaves the scoring out and computes every branch.
        alone: without a router, leaves out the branches before the exit's own, which knows nothing of them: the exit
            as a detector of its own.
    """

    def __init__(
        self, model: EarlyExitDetector, exit_index: int, router: Router | None = None, *, alone: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= exit_index <= model.num_early_exits:
            raise ValueError(f"exit_index {exit_index}: the model has exits 0 to {model.num_early_exits}")
        self.model, self.exit_index, self.router, self.alone = model, exit_index, router, alone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [N, 3, S, S] to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4]."""
        head = self.run(x)[0][-1]
        return head["cls_logits"], head["bbox_regression"]

    def run(self, x: Tensor) -> tuple[list[Head], list[Tensor]]:
        """The heads of all exits on the way, this one's last, and the router's confidences [N] in the early ones."""
        heads: list[Head] = []
        confidences: list[Tensor] = []
        hybrid = self.router is not None and self.router.hybrid
        for stop in walk(self.model, x):
            early = stop.index < self.exit_index
            if early and (self.alone if self.router is None else not self.router.needs(stop.index)):
                continue
            if stop.index <= self.exit_index:
                heads.append(stop.head())
                if self.router is not None and not stop.full:
                    confidences.append(self.router.confidence(stop.signals(heads[-1]), stop.index))
            elif stop.full:
                heads[-1] = {**heads[-1], "bbox_regression": self.model.head.regression_head(stop.maps())}
            if stop.index == self.exit_index and not hybrid:
                break
        return heads, confidences


class AllOutputs(nn.Module):
    """A path that returns everything it pays for: what earlier branches and the router say, too.

    Tracers and exporters drop whatever reaches no output.
    """

    def __init__(self, path: PathToExit) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, S, S] to the tensors of :meth:`PathToExit.run`, in its order."""
        heads, confidences = self.path.run(x)
        return [*(tensor for head in heads for tensor in head.values()), *confidences]


# A model for inference alone: the same answers, up to rounding, in about half of the time in eager PyTorch.


def is_fused(model: nn.Module) -> bool:
    """Whether the model comes from `fuse_for_inference`."""
    return getattr(model, "fused", False)


def fuse_for_inference(model: EarlyExitDetector) -> EarlyExitDetector:
    """A copy in eval mode with every BatchNorm folded into its convolution and, on a CPU, the channels last in memory.

    Detections are the model's up to rounding in fp32. Its router goes along. The copy cannot be trained, saved or
    matched with a certificate: keep the model, and give it its router first.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    fused.fused = True
    for sequence in [module for module in fused.modules() if isinstance(module, nn.Sequential)]:
        for (name, first), (next_name, second) in pairwise(list(sequence.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
                setattr(sequence, name, fuse_conv_bn_eval(first, second))
                setattr(sequence, next_name, nn.Identity())
    if next(fused.parameters()).device.type == "cpu":  # on CUDA, depthwise convolutions are many times slower so
        fused.to(memory_format=torch.channels_last)
    return fused


# What a phase trains: the full path alone, the branches alone from stored taps, or (the model itself) everything.

Targets = list[dict[str, Tensor]]


class FullPath(nn.Module):
    """Losses of the full path; the branches are not computed and take no gradient.

    Args:
        model: the detector.
        sides: of the inputs, pixels, in turn; a batch is shrunk to one of them, chosen by its photos, so that a resumed
            training does the same. The default boxes keep their sides in pixels (`PixelBoxes`). Empty: the model's own.
    """

    def __init__(self, model: EarlyExitDetector, sides: Sequence[int] = ()) -> None:
        super().__init__()
        self.backbone, self.head, self._sides = model.backbone, model.head, tuple(sides)
        # Behind a list, so that the branches' parameters are not this module's.
        self._model = [model]

    def forward(self, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """``bbox_regression`` and ``classification``, as torchvision's SSD names them."""
        model = self._model[0]
        check_images(images)
        targets = check_targets(targets, len(images), model.classes)
        check_batch(self, len(images))
        batch, targets = model.transform(images, targets)
        side, own = self._side(targets), batch.tensors.shape[-1]
        if side in (None, own):
            maps, anchors = model.trunk_maps(batch.tensors)[1], model.default_boxes(batch)
        else:
            x = F.interpolate(batch.tensors, (side, side), mode="bilinear", antialias=True)
            targets = [{**target, "boxes": target["boxes"] * (side / own)} for target in targets]
            maps = model.trunk_maps(x)[1]
            boxes = PixelBoxes(model.anchor_generator, model.grids, own, side)
            anchors = boxes(ImageList(x, [(side, side)] * len(x)), [one.detach().float() for one in maps])
        return full_path_losses(self.head(maps), model.assign(targets, anchors), model.losses)

    def _side(self, targets: Targets) -> int | None:
        if not self._sides:
            return None
        return self._sides[sum(int(target["image_id"]) for target in targets) % len(self._sides)]


@dataclass(frozen=True)
class TapBatch:
    """What the frozen full path gave for a batch.

    Attributes:
        taps: per early exit [N, C, H, W].
        head: the full path's outputs, the teacher.
        targets: per image ``boxes`` [n, 4] xyxy in network pixels and ``labels`` [n].
    """

    taps: list[Tensor]
    head: Head
    targets: Targets


class Branches(nn.Module):
    """Losses of the branches alone; the same figures as the whole model with a frozen trunk on the same images."""

    def __init__(self, model: EarlyExitDetector) -> None:
        super().__init__()
        self.branches = model.branches
        if isinstance(model.router, nn.Module):
            self.router = model.router
        self._model = [model]

    def forward(self, batch: TapBatch) -> dict[str, Tensor]:
        """Weighted losses of all early exits."""
        check_batch(self, len(batch.targets))
        model = self._model[0]
        heads = [*model.branch_heads(batch.taps), batch.head]
        anchors = [default_boxes(model, batch.taps[0].device)] * len(batch.targets)
        return model.compute_losses(heads, model.assign(batch.targets, anchors))


def default_boxes(model: EarlyExitDetector, device: torch.device) -> Tensor:
    """[A, 4] xyxy in network pixels: those of any image, since all have the network's size."""
    width, height = model.transform.fixed_size
    return model.default_boxes(ImageList(torch.empty(1, 3, height, width, device=device), [(height, width)]))[0]


@torch.no_grad()
def compute_taps(model: EarlyExitDetector, images: list[Tensor], targets: Targets) -> TapBatch:
    """Run the full path once, in the mode that the model is in; ``targets`` in photo pixels."""
    targets = check_targets(targets, len(images), model.classes)
    batch, targets = model.transform(images, targets)
    taps, maps = model.trunk_maps(batch.tensors)
    return TapBatch(taps, model.head(maps), targets)

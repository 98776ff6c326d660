"""torchvision's SSDLite with early exits."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.keywords import suggest_keywords
from earlyexit_ssd.modeling import arguments, validate
from earlyexit_ssd.modeling.branches import build_branches
from earlyexit_ssd.modeling.conditional import route, route_hybrid
from earlyexit_ssd.modeling.criterion import early_exit_losses, full_path_losses
from earlyexit_ssd.modeling.folding import num_outputs
from earlyexit_ssd.modeling.losses import LossSettings
from earlyexit_ssd.modeling.matching import Assignment, assign
from earlyexit_ssd.modeling.outputs import ExitOutputs, Head, Router, pool_tap
from earlyexit_ssd.modeling.pretrained import Pretrained
from earlyexit_ssd.modeling.trunk import LAST_LAYER, SegmentedTrunk, TrunkState


class EarlyExitSSDLite(Pretrained, SSD):
    """A torchvision SSDLite with branches behind some trunk layers.

    Every parameter and buffer of the torchvision detector keeps its name, and without a router the detections are
    torchvision's own. In train mode ``model(images, targets)`` returns a dict of scalar losses (all exits at once),
    in eval mode one dict per image with ``boxes`` [n, 4] xyxy in the photo's pixels, ``labels`` [n] and ``scores``
    [n]; with a router also ``exit_index`` and ``exit_confidence``, scalar tensors.

    Args:
        detector: a torchvision SSDLite; its parts are used, not copied.
        exit_layers: trunk layers behind which a branch leaves, increasing, 1..15 (the stem is 0).
        channels, head_rank: see :class:`earlyexit_ssd.modeling.branch.Branch`.
        empty: those of ``exit_layers`` that have no branch (:class:`earlyexit_ssd.modeling.empty.EmptyExit`).
        copy: per exit, or one for all, the share of the channels, in (0, 1], that stay in a
            :class:`earlyexit_ssd.modeling.thinned.CopiedShortCut`.
        depth: per exit, or one for all, the residual blocks of a :class:`earlyexit_ssd.modeling.tail.Tail`, 0 to 2.
        classes: names of the labels 1..K, background not among them; by default ``class_1`` and so on.
        losses: what is minimised in training.
        router: decides who leaves early in eval mode; None runs the full path alone.

    Attributes:
        score_thresh: least score of a detection, or class name -> least score (classes that are not named keep 0.001).
        exit_names: shallow to deep, such as ``("exit8", "exit12", "full")``.
        exit_layers: their layers, 16 for the full path. ``grids``: (height, width) of the head's six maps, cells.
        empty: per early exit, whether it has no branch.

    Raises:
        ValueError: an impossible exit layer, or a number of classes that the detector's head does not have.
    """

    @suggest_keywords
    def __init__(
        self,
        detector: SSD,
        *,
        exit_layers: Sequence[int] = (8, 12),
        channels: int = 0,
        depth: Sequence[int] = (2,),
        copy: Sequence[float] = (0.5,),
        head_rank: int = 0,
        empty: Sequence[int] = (),
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
        exit_layers = arguments.numbers("exit_layers", exit_layers, whole=True)
        empty = arguments.numbers("empty", empty, whole=True)
        arguments.check_exit_layers(exit_layers, empty)
        self.classes = tuple(classes or (f"class_{label}" for label in range(1, num_classes)))
        arguments.check_class_names(self.classes, num_classes)
        self.score_thresh = detector.score_thresh
        self.width = getattr(detector, "width", 1.0)
        self.branch_settings = {"channels": channels, "depth": depth, "copy": copy, "head_rank": head_rank}
        self.exit_layers = (*exit_layers, LAST_LAYER)
        self.exit_names = (*(f"exit{layer}" for layer in exit_layers), "full")
        self.empty = tuple(layer in empty for layer in exit_layers)
        self.losses = losses if losses is not None else LossSettings()
        validate.check_losses(self.losses, len(exit_layers))
        validate.check_router(router, len(exit_layers))
        self.router = router
        self.norm_frozen = False
        self._trunk_frozen = False
        self.grids = self._dry_run()
        self.branches = build_branches(self, channels=channels, depth=depth, copy=copy, head_rank=head_rank)
        self.inherit()

    def inherit(self) -> None:
        """Start the branches' tails and heads from what the full path knows now."""
        for branch in self.branches.values():
            branch.inherit(self.backbone, self.head)

    @property
    def trunk(self) -> SegmentedTrunk:
        """The layers that the backbone has now, also after one was replaced."""
        return SegmentedTrunk(self.backbone, self.exit_layers[:-1])

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
    def num_early_exits(self) -> int:
        """Exits before the full path."""
        return len(self.exit_layers) - 1

    @torch.no_grad()
    def _dry_run(self) -> list[tuple[int, int]]:
        """The grids, from a blank image; BatchNorm statistics are left alone."""
        was_training = self.training
        self.backbone.eval()
        parameter = next(self.backbone.parameters())
        blank = torch.zeros(1, 3, *self.transform.fixed_size, device=parameter.device, dtype=parameter.dtype)
        _, maps = self.trunk_maps(blank)
        self.backbone.train(was_training)
        return [tuple(feature.shape[-2:]) for feature in maps]

    def trunk_maps(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Normalised images [N, 3, S, S] to the taps (one per early exit) and the six maps of the full path."""
        state, taps = TrunkState(x), []
        for segment in range(self.num_early_exits):
            state = self.trunk.run(state, segment)
            taps.append(state.x)
        state = self.trunk.run(state, self.num_early_exits)
        return taps, self.trunk.feature_maps(state)

    def branch_heads(self, taps: Sequence[Tensor]) -> list[Head]:
        """Heads of all early exits from their taps."""
        return [branch(tap) for branch, tap in zip(self.branches.values(), taps, strict=True)]

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

    def train(self, mode: bool = True) -> EarlyExitSSDLite:
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
        taps, maps = self.trunk_maps(batch.tensors)
        heads = [*self.branch_heads(taps), self.head(maps)]
        return self.compute_losses(heads, self.assign(targets, self.default_boxes(batch)))

    def exit_outputs(self, images: list[Tensor]) -> ExitOutputs:
        """One pass over the network for all exits, unrouted."""
        validate.check_images(images)
        photo_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images, None)
        taps, maps = self.trunk_maps(batch.tensors)
        heads = (*self.branch_heads(taps), self.head(maps))
        pooled = tuple(pool_tap(tap) for tap in taps)
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
        compute = route_hybrid if self.router.hybrid else route
        head, exit_index, confidence = compute(self, batch.tensors)
        detections = self._finish(head, *sizes)
        for index, detection in enumerate(detections):
            detection["exit_index"], detection["exit_confidence"] = exit_index[index], confidence[index]
        return detections

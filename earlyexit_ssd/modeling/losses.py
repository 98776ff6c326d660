"""Training targets and losses. Default boxes are assigned to objects once per batch, since all exits share them."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from earlyexit_ssd.config.check import LOSS_CHOICES
from earlyexit_ssd.errors import EarlyExitError, suggest
from earlyexit_ssd.plain import check_fields

Weight = Annotated[float, 0, math.inf]


@dataclass(frozen=True)
class Assignment:
    """Training targets of the default boxes."""

    labels: Tensor  # [N, A] int64, 0 for background
    # [N, A, 4] encoded offsets to the matched object (torchvision's ``BoxCoder``); zero for background
    regression: Tensor

    @property
    def foreground(self) -> Tensor:
        """[N, A] bool, the default boxes assigned to an object."""
        return self.labels > 0


def assign(
    targets: list[dict[str, Tensor]], anchors: list[Tensor], matcher: Matcher, box_coder: BoxCoder
) -> Assignment:
    """Assign default boxes to objects (Liu et al. 2016, SSD, section 2.2, matching strategy).

    With torchvision's ``SSDMatcher`` an object gets its best default box, and every one with an IoU of at least 0.5.

    Args:
        targets: per image ``boxes`` [n, 4] xyxy in network pixels and ``labels`` [n] in 1..K; n may be 0.
        anchors: per image [A, 4] xyxy in network pixels.
    """
    regression = torch.stack([torch.zeros_like(boxes) for boxes in anchors])
    labels = torch.zeros(regression.shape[:2], dtype=torch.int64, device=regression.device)
    for index, (target, boxes) in enumerate(zip(targets, anchors, strict=True)):
        if target["boxes"].numel() > 0:
            matches = matcher(box_iou(target["boxes"], boxes))
            foreground = torch.where(matches >= 0)[0]
            objects = matches[foreground]
            labels[index, foreground] = target["labels"][objects]
            regression[index, foreground] = box_coder.encode_single(target["boxes"][objects], boxes[foreground])
    return Assignment(labels, regression)


@dataclass(frozen=True)
class LossSettings:
    """Settings of the training losses: the keys of the configuration's LOSS section, which docs/config.md explains.

    Attributes:
        neg_to_pos_ratio: number of mined negatives (background boxes in the loss) per positive, above 0.
        min_negatives: smallest number of mined negatives per image. With 0, as in torchvision, an image without objects
            has no loss.
        exit_weights: one weight per exit, shallow to deep, or one weight for all exits.
        full_weight: weight of the full path's losses. It has no effect while the trunk is frozen (exits phase).
    """

    classification: str = "mined"
    neg_to_pos_ratio: Weight = 3.0
    min_negatives: Annotated[int, 0, 2**31] = 8
    focal_alpha: Annotated[float, 0, 1] = 0.25
    focal_gamma: Weight = 2.0
    exit_weights: tuple[Weight, ...] = (1.0,)
    full_weight: Weight = 1.0
    supervision: str = "labels"
    teacher: str = "none"
    distillation_weight: Weight = 1.0
    distillation_box_weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, choices in LOSS_CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise EarlyExitError(f"{name} is {value!r}, expected one of {choices}{suggest(str(value), choices)}")
        if self.neg_to_pos_ratio == 0:
            raise EarlyExitError("neg_to_pos_ratio is 0, expected a number above 0: the losses are divided by it")
        if self.supervision == "teacher" and self.teacher == "none":
            raise EarlyExitError("supervision 'teacher' needs a teacher: 'full' or 'next'")

    def exit_weight(self, index: int) -> float:
        return self.exit_weights[index if len(self.exit_weights) > 1 else 0]


def mean_over_processes(count: Tensor) -> Tensor:
    """Return ``count`` (any shape) averaged over the processes of a distributed run."""
    if distributed.is_available() and distributed.is_initialized():
        count = count.detach().clone()
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count


def mined_negatives(background_loss: Tensor, foreground: Tensor, ratio: float, minimum: int) -> Tensor:
    """Return the mask [N, A] of the negatives, by hard negative mining (Liu et al. 2016, SSD, section 2.2).

    The negatives of an image are the background boxes with the largest ``background_loss`` [N, A]. Their number is
    ``ratio`` times that of the positives (``foreground``, [N, A] bool), rounded up, but at least ``minimum``.
    """
    count = (ratio * foreground.sum(1, keepdim=True)).clamp(min=minimum)
    order = background_loss.masked_fill(foreground, -torch.inf).argsort(1, descending=True)
    rank = order.argsort(1)
    return (rank < count) & ~foreground


def detection_losses(head: dict[str, Tensor], assignment: Assignment, settings: LossSettings) -> dict[str, Tensor]:
    """Return the losses ``bbox_regression`` and ``classification`` of one exit, both scalars.

    ``bbox_regression`` is the smooth L1 loss summed over the positives. ``classification`` is summed over positives and
    mined negatives (cross-entropy, ``mined``), or over all boxes (focal loss, ``focal``). Both are divided by

        max(1, positives, mined negatives / neg_to_pos_ratio)    for ``mined``,
        max(1, positives)                                        for ``focal``.

    With ``mined``, ``min_negatives=0``, a whole ratio and enough negatives they equal torchvision's losses.
    """
    logits, labels, foreground = head["cls_logits"].float(), assignment.labels, assignment.foreground
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    if settings.classification == "focal":
        # -alpha_t (1 - p_t)^gamma log(p_t) with softmax probabilities (Lin et al. 2017, equation 5)
        alpha = torch.where(foreground, settings.focal_alpha, 1 - settings.focal_alpha)
        classification = (alpha * (1 - torch.exp(-loss)) ** settings.focal_gamma * loss).sum()
        counts = foreground.sum()[None]
    else:
        ratio = settings.neg_to_pos_ratio
        negatives = mined_negatives(loss.detach(), foreground, ratio, settings.min_negatives)
        classification = loss[foreground | negatives].sum()
        counts = torch.stack([foreground.sum(), negatives.sum() / ratio])
    boxes = F.smooth_l1_loss(
        head["bbox_regression"][foreground].float(), assignment.regression[foreground], reduction="sum"
    )
    count = mean_over_processes(counts.float()).max().clamp(min=1)
    return {"bbox_regression": boxes / count, "classification": classification / count}


def distillation_loss(student: dict[str, Tensor], teacher: dict[str, Tensor], settings: LossSettings) -> Tensor:
    """Return the distillation loss (Hinton et al. 2015), a scalar. The teacher's outputs get no gradient.

    With sums over all default boxes it is

        sum(KL(p || q) + w f d) / max(1, sum(f)),

    where p and q are the class probabilities of teacher and student, f = 1 - p(background), d is the smooth L1 distance
    of their encoded boxes, and w is ``distillation_box_weight``.
    """
    teacher_log = F.log_softmax(teacher["cls_logits"].detach().float(), -1)
    student_log = F.log_softmax(student["cls_logits"].float(), -1)
    classes = F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    foreground = 1 - teacher_log[..., 0].exp()
    distance = F.smooth_l1_loss(
        student["bbox_regression"].float(), teacher["bbox_regression"].detach().float(), reduction="none"
    ).sum(-1)
    boxes = (foreground * distance).sum()
    count = mean_over_processes(foreground.sum()).clamp(min=1)
    return (classes + settings.distillation_box_weight * boxes) / count

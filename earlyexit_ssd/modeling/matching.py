"""Assign default boxes to objects once; the result serves every exit, since all share the default boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Assignment:
    """What each default box should say.

    Attributes:
        labels: [N, A] int64, 0 for background.
        regression: [N, A, 4] encoded offsets to the matched object (torchvision's ``BoxCoder``); zero for background.
    """

    labels: Tensor
    regression: Tensor

    @property
    def foreground(self) -> Tensor:
        """[N, A] bool, the default boxes that belong to an object."""
        return self.labels > 0


def assign(
    targets: list[dict[str, Tensor]], anchors: list[Tensor], matcher: Matcher, box_coder: BoxCoder
) -> Assignment:
    """Match by IoU with torchvision's ``SSDMatcher``: 0.5, plus the best default box of every object.

    Args:
        targets: per image ``boxes`` [n, 4] xyxy in network pixels and ``labels`` [n] in 1..K; n may be 0.
        anchors: per image [A, 4] xyxy in network pixels.
        matcher: torchvision's ``SSDMatcher``.
        box_coder: torchvision's ``BoxCoder``.
    """
    labels, regression = [], []
    for target, boxes in zip(targets, anchors, strict=True):
        image_labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        image_regression = torch.zeros_like(boxes)
        if target["boxes"].numel() > 0:
            matches = matcher(box_iou(target["boxes"], boxes))
            foreground = torch.where(matches >= 0)[0]
            objects = matches[foreground]
            image_labels[foreground] = target["labels"][objects]
            image_regression[foreground] = box_coder.encode_single(target["boxes"][objects], boxes[foreground])
        labels.append(image_labels)
        regression.append(image_regression)
    return Assignment(torch.stack(labels), torch.stack(regression))

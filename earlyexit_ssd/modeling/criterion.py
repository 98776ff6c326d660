"""The losses of the whole detector: a dict of weighted scalars with the same keys on every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from earlyexit_ssd.modeling.losses import LossSettings, detection_losses, distillation_loss
from earlyexit_ssd.modeling.matching import Assignment
from earlyexit_ssd.modeling.outputs import Head, Router


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

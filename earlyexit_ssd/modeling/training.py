"""What a phase trains: the full path alone, the branches alone from stored taps, or (the model itself) everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from earlyexit_ssd.modeling.criterion import full_path_losses
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.validate import check_batch, check_images, check_targets

Targets = list[dict[str, Tensor]]


class FullPath(nn.Module):
    """Losses of the full path; the branches are not computed and take no gradient."""

    def __init__(self, model: EarlyExitSSDLite) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        # Behind a list, so that the branches' parameters are not this module's.
        self._model = [model]

    def forward(self, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """``bbox_regression`` and ``classification``, as torchvision's SSD names them."""
        model = self._model[0]
        check_images(images)
        targets = check_targets(targets, len(images), model.classes)
        check_batch(self, len(images))
        batch, targets = model.transform(images, targets)
        _, maps = model.trunk_maps(batch.tensors)
        assignment = model.assign(targets, model.default_boxes(batch))
        return full_path_losses(self.head(maps), assignment, model.losses)


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

    def __init__(self, model: EarlyExitSSDLite) -> None:
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


def default_boxes(model: EarlyExitSSDLite, device: torch.device) -> Tensor:
    """[A, 4] xyxy in network pixels: those of any image, since all have the network's size."""
    width, height = model.transform.fixed_size
    return model.default_boxes(ImageList(torch.empty(1, 3, height, width, device=device), [(height, width)]))[0]


@torch.no_grad()
def compute_taps(model: EarlyExitSSDLite, images: list[Tensor], targets: Targets) -> TapBatch:
    """Run the full path once, in the mode that the model is in; ``targets`` in photo pixels."""
    targets = check_targets(targets, len(images), model.classes)
    batch, targets = model.transform(images, targets)
    taps, maps = model.trunk_maps(batch.tensors)
    return TapBatch(taps, model.head(maps), targets)

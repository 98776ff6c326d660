"""What follows C4 in the full path, as a branch's own copy: it knows far more than a few photos can teach."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead

from earlyexit_ssd.modeling.factorised import FactorisedPredictor
from earlyexit_ssd.modeling.folding import copy_rows, is_folded


class Tail(nn.Module):
    """Trunk layers 14 to 16 and the four extra maps of a torchvision SSDLite, with the weights that it has now.

    Args:
        backbone: torchvision's ``SSDLiteFeatureExtractorMobileNet``; its layers are copied.
        depth: residual blocks of the two (layers 14 and 15) to keep, the last ones.

    Attributes:
        in_channels: of the map that it starts from, 80 at width 1.0 with the reduced tail.
        out_channels: of the five maps that it gives, fine to coarse.
    """

    def __init__(self, backbone: nn.Module, depth: int) -> None:
        super().__init__()
        projection, *blocks, last = backbone.features[1]
        if not 0 <= depth <= len(blocks):
            raise ValueError(f"depth {depth}: a branch's tail has 0 to {len(blocks)} residual blocks")
        self.blocks = nn.Sequential(*copy.deepcopy(blocks[len(blocks) - depth :]))
        self.last = copy.deepcopy(last)
        self.extra = copy.deepcopy(backbone.extra)
        self.requires_grad_(True)
        self.in_channels = projection[-1].out_channels
        self.out_channels = [last.out_channels, *(block[-1].out_channels for block in backbone.extra)]

    def inherit(self, backbone: nn.Module) -> None:
        """Take the weights that the full path has now."""
        _, *blocks, last = backbone.features[1]
        pairs = [*zip(reversed(self.blocks), reversed(blocks), strict=False), (self.last, last)]
        for mine, theirs in (*pairs, (self.extra, backbone.extra)):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[N, in_channels, S, S] to the same behind the residual blocks, and the five maps of the head."""
        x = self.blocks(x)
        maps = [self.last(x)]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return x, maps


@torch.no_grad()
def inherit_head(mine: SSDLiteHead, full: SSDLiteHead) -> None:
    """Take the full path's predictors of all maps but the first, which has other channels in a branch.

    Of a folded head the wanted classes' rows are taken; its background starts as the checkpoint's own.
    """
    theirs = full.classification_head
    rows = _wanted_rows(theirs)
    for new, old in zip(mine.classification_head.module_list[1:], theirs.module_list[1:], strict=True):
        new[0].load_state_dict(old[0].state_dict())
        _take_rows(new[1], old[1], theirs.num_columns, rows)
    for new, old in zip(mine.regression_head.module_list[1:], full.regression_head.module_list[1:], strict=True):
        new.load_state_dict(old.state_dict())


@torch.no_grad()
def inherit_first_predictors(mine: SSDLiteHead, full: SSDLiteHead, kept: Tensor) -> None:
    """Take the full path's predictors of the first map, for the channels ``kept`` of it that the branch has."""
    theirs = full.classification_head
    rows = _wanted_rows(theirs)
    for new_head, old_head in ((mine.classification_head, theirs), (mine.regression_head, full.regression_head)):
        new, old = new_head.module_list[0], old_head.module_list[0]
        new[0][0].weight.copy_(old[0][0].weight[kept])
        for name, values in old[0][1].state_dict().items():
            if values.ndim:
                getattr(new[0][1], name).copy_(values[kept])
        narrow = nn.Conv2d(len(kept), old[1].out_channels, 1).to(old[1].weight)
        narrow.weight.copy_(old[1].weight[:, kept])
        narrow.bias.copy_(old[1].bias)
        if old_head is theirs:
            _take_rows(new[1], narrow, theirs.num_columns, rows)
        else:
            new[1].load_state_dict(narrow.state_dict())


def _wanted_rows(head: nn.Module) -> list[int]:
    """Background's row and those of the classes that the branch has."""
    return [0, *head.wanted.tolist()] if is_folded(head) else list(range(head.num_columns))


def _take_rows(new: nn.Module, old: nn.Conv2d, columns: int, rows: list[int]) -> None:
    """The rows of ``old``, or the nearest that a factorised predictor can have."""
    if isinstance(new, FactorisedPredictor):
        whole = nn.Conv2d(new.in_channels, new.out_channels, 1).to(old.weight)
        copy_rows(whole, old, columns, rows)
        new.approximate(whole)
    else:
        copy_rows(new, old, columns, rows)

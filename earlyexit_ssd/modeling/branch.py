"""One exit: from a tap of the trunk to the logits and boxes of the same default boxes as the full path."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.misc import Conv2dNormActivation

from earlyexit_ssd.modeling.factorised import factorise
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.ssdlite import norm_layer
from earlyexit_ssd.modeling.tail import Tail, inherit_first_predictors, inherit_head
from earlyexit_ssd.modeling.thinned import CopiedShortCut


class Branch(nn.Module):
    """A short cut from a tap to where the full path's tail begins, that tail again, a first map, and a head.

    The tail works on the second grid, four times cheaper than the first; what it has understood flows, upsampled,
    back to the first map (top-down, Lin et al. 2017, FPN).

    Args:
        copied: the way to the tail through thinned copies of the full path's own layers.
        finest_grid: side of the first map, cells.
        channels: of the first map; 0 takes the expansion of the copied C4 for it, with the full path's own predictors;
            behind C4, which has none to copy, a new map of as many channels.
        tail: a copy of the full path's, this branch's own.
        num_anchors: default boxes per cell of each grid.
        num_classes: outputs per default box, background included.
        head_rank: channels between the two steps of the class predictors; 0 leaves them in one step.
    """

    def __init__(
        self,
        *,
        copied: CopiedShortCut,
        finest_grid: int,
        channels: int,
        tail: Tail,
        num_anchors: list[int],
        num_classes: int,
        head_rank: int = 0,
    ) -> None:
        super().__init__()
        self.copied, self.tail = copied, tail
        if channels or copied.c4 is None:
            channels = channels or copied.first_channels
            self.fine = _pointwise(copied.fine_channels, channels)
            self.smooth = _depthwise(channels)
        else:
            channels = copied.first_channels
            self.fine = self.smooth = None
        self.top_down = _pointwise(tail.in_channels, channels)
        self.head = SSDLiteHead([channels, *tail.out_channels], num_anchors, num_classes, norm_layer)
        if head_rank:
            factorise(self.head.classification_head, head_rank)
        self._finest_grid = finest_grid

    def inherit(self, backbone: nn.Module, head: SSDLiteHead) -> None:
        """Take the weights that the full path has now."""
        self.tail.inherit(backbone)
        inherit_head(self.head, head)
        kept = self.copied.inherit(backbone)
        if self.fine is None:
            inherit_first_predictors(self.head, head, kept)
            nn.init.zeros_(self.top_down[1].weight)  # at first the map is the full path's

    def forward(self, tap: Tensor) -> Head:
        """A tap [N, C, S, S] of the exit's layer to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4]."""
        fine, expanded, coarse = self.copied(tap)
        coarse, maps = self.tail(coarse)
        size = (self._finest_grid, self._finest_grid)
        first = expanded if self.fine is None else F.interpolate(self.fine(fine), size)
        first = first + F.interpolate(self.top_down(coarse), size)
        return self.head([first if self.smooth is None else self.smooth(first), *maps])


def _pointwise(in_channels: int, out_channels: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        in_channels, out_channels, kernel_size=1, norm_layer=norm_layer, activation_layer=nn.Hardswish
    )


def _depthwise(channels: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        channels, channels, kernel_size=5, groups=channels, norm_layer=norm_layer, activation_layer=nn.Hardswish
    )

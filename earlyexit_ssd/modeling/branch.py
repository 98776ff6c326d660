"""One exit: from a tap of the trunk to the logits and boxes of the same default boxes as the full path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from earlyexit_ssd.modeling.ssdlite import norm_layer

EXPANSION = 3


def _block(channels: int, attention: bool) -> InvertedResidual:
    """MobileNetV3's inverted residual with a 5x5 depthwise kernel: a tap sees little, so context pays."""
    setting = InvertedResidualConfig(channels, 5, EXPANSION * channels, channels, attention, "HS", 1, 1, 1.0)
    return InvertedResidual(setting, norm_layer)


def _pointwise(in_channels: int, out_channels: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        in_channels, out_channels, kernel_size=1, norm_layer=norm_layer, activation_layer=nn.Hardswish
    )


def _depthwise(channels: int, stride: int, kernel_size: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        channels,
        channels,
        kernel_size=kernel_size,
        stride=stride,
        groups=channels,
        norm_layer=norm_layer,
        activation_layer=nn.Hardswish,
    )


def _separable(in_channels: int, out_channels: int, stride: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(_depthwise(in_channels, stride, kernel_size), _pointwise(in_channels, out_channels))


class Branch(nn.Module):
    """Attention on the tap, context from the exit before, a narrow pyramid to the six grids, and an SSDLite head.

    The second grid does the thinking: it is four times cheaper than the first and sees further. Its result flows
    down to the coarser grids and, upsampled, back to the first one (top-down, Lin et al. 2017, FPN).

    Args:
        in_channels: channels of the tap.
        in_grid: side of the tap, cells.
        grids: sides of the six maps of the full path, cells, fine to coarse.
        channels: channels of the pyramid.
        depth: residual blocks on the second grid.
        attention: squeeze-excitation on the tap and in the blocks (Hu et al. 2018).
        cascade: add the second map of the exit before.
        num_anchors: default boxes per cell of each grid.
        num_classes: outputs per default box, background included.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        in_grid: int,
        grids: Sequence[int],
        channels: int,
        depth: int,
        attention: bool,
        cascade: bool,
        num_anchors: list[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.attention = (
            SqueezeExcitation(in_channels, max(8, in_channels // 4), scale_activation=nn.Hardsigmoid)
            if attention
            else nn.Identity()
        )
        self.reduce = nn.Sequential()
        while in_grid > grids[0]:
            out_channels = max(in_channels, channels // 2)
            self.reduce.append(_separable(in_channels, out_channels, 2, 5))
            in_channels, in_grid = out_channels, (in_grid + 1) // 2
        self.fine = _pointwise(in_channels, channels)
        self.coarse = _separable(in_channels, channels, 2 if in_grid > grids[1] else 1, 5)
        self.context = _pointwise(channels, channels) if cascade else None
        self.think = nn.Sequential(*(_block(channels, attention) for _ in range(depth)))
        self.top_down = _pointwise(channels, channels)
        self.smooth = _depthwise(channels, 1, 5)
        self.down = nn.ModuleList(
            _separable(channels, channels, 2 if finer > coarser else 1, 3)
            for finer, coarser in itertools.pairwise(grids[1:])
        )
        self.head = SSDLiteHead([channels] * len(grids), num_anchors, num_classes, norm_layer)
        self._finest_grid = grids[0]

    def forward(self, tap: Tensor, context: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return the head's outputs and the context for the next exit.

        Args:
            tap: [N, in_channels, in_grid, in_grid].
            context: the second map of the exit before, [N, channels, grids[1], grids[1]]; not looked at without
                ``cascade``, and None at the first exit.

        Returns:
            ``{"cls_logits": [N, A, C], "bbox_regression": [N, A, 4]}`` and the second map behind its blocks.
        """
        x = self.reduce(self.attention(tap))
        size = (self._finest_grid, self._finest_grid)
        fine, coarse = F.interpolate(self.fine(x), size), self.coarse(x)
        if self.context is not None:
            coarse = coarse + self.context(context)
        coarse = self.think(coarse)
        fine = self.smooth(fine + F.interpolate(self.top_down(coarse), size))
        maps = [fine, coarse]
        for block in self.down:
            maps.append(block(maps[-1]))
        return self.head(maps), coarse

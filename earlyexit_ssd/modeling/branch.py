"""One exit: from a tap of the trunk to the logits and boxes of the same default boxes as the full path."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from earlyexit_ssd.modeling.factorised import factorise
from earlyexit_ssd.modeling.ssdlite import norm_layer
from earlyexit_ssd.modeling.tail import Tail, inherit_first_predictors, inherit_head
from earlyexit_ssd.modeling.thinned import CopiedShortCut

LARGEST_EXPANSION = 3


def _residual(
    in_channels: int, out_channels: int, stride: int, skipped_layers: int, attention: bool
) -> InvertedResidual:
    """MobileNetV3's inverted residual with a 5x5 depthwise kernel: a tap sees little, so context pays.

    The more it skips, the wider it is: behind layer 12 an expansion gains nothing, behind layer 8 it gains 0.05 AP50.
    """
    expanded = min(max(skipped_layers, 1), LARGEST_EXPANSION) * in_channels
    setting = InvertedResidualConfig(in_channels, 5, expanded, out_channels, attention, "HS", stride, 1, 1.0)
    return InvertedResidual(setting, norm_layer)


def _pointwise(in_channels: int, out_channels: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        in_channels, out_channels, kernel_size=1, norm_layer=norm_layer, activation_layer=nn.Hardswish
    )


def _depthwise(channels: int, stride: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        channels,
        channels,
        kernel_size=5,
        stride=stride,
        groups=channels,
        norm_layer=norm_layer,
        activation_layer=nn.Hardswish,
    )


class Branch(nn.Module):
    """A short cut from a tap to where the full path's tail begins, that tail again, a narrow first map, and a head.

    The tail works on the second grid, four times cheaper than the first; what it has understood flows, upsampled,
    back to the first map (top-down, Lin et al. 2017, FPN).

    Args:
        in_channels: channels of the tap.
        in_grid: side of the tap, cells.
        skipped_layers: trunk layers between the tap and the tail.
        grids: sides of the six maps of the full path, cells, fine to coarse.
        channels: channels of the first map; the full path has 672 at width 1.0, and most of its head's cost there. 0
            takes the expansion of a copied C4 for it, with the full path's own predictors.
        attention: squeeze-excitation on the tap and in the short cut (Hu et al. 2018).
        copied: the way to the tail through the full path's own layers; None builds new ones.
        cascade: add the second map of the exit before.
        tail: a copy of the full path's, this branch's own.
        num_anchors: default boxes per cell of each grid.
        num_classes: outputs per default box, background included.
        head_rank: channels between the two steps of the class predictors; 0 leaves them in one step.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        in_grid: int,
        skipped_layers: int,
        grids: Sequence[int],
        channels: int,
        attention: bool,
        copied: CopiedShortCut | None = None,
        cascade: bool,
        tail: Tail,
        num_anchors: list[int],
        num_classes: int,
        head_rank: int = 0,
    ) -> None:
        super().__init__()
        if copied is not None:
            self.copied, in_channels = copied, copied.fine_channels
        else:
            self._build_short_cut(in_channels, in_grid, skipped_layers, grids, attention, tail.in_channels)
            in_channels = self.short_cut.block[0][0].in_channels
        self.context = _pointwise(tail.in_channels, tail.in_channels) if cascade else None
        self.tail = tail
        if channels:
            self.fine = _pointwise(in_channels, channels)
            self.smooth = _depthwise(channels, 1)
        elif copied is None or copied.expanded_channels is None:
            raise ValueError("channels 0: only a copied C4 (a tap at layer 12 or before) has a first map of its own")
        else:
            channels = copied.expanded_channels
            self.fine = self.smooth = None
        self.top_down = _pointwise(tail.in_channels, channels)
        self.head = SSDLiteHead([channels, *tail.out_channels], num_anchors, num_classes, norm_layer)
        if head_rank:
            factorise(self.head.classification_head, head_rank)
        self._finest_grid = grids[0]

    def inherit(self, backbone: nn.Module, head: SSDLiteHead) -> None:
        """Take the weights that the full path has now, for the tail and the predictors on its maps."""
        self.tail.inherit(backbone)
        inherit_head(self.head, head)
        if hasattr(self, "copied"):
            kept = self.copied.inherit(backbone)
            if self.fine is None:
                inherit_first_predictors(self.head, head, kept)
                nn.init.zeros_(self.top_down[1].weight)  # at first the map is the full path's, then context comes in

    def context_map(self, tap: Tensor, context: Tensor | None) -> Tensor:
        """What the next exit's branch takes from this one, the head left out; as the second result of `forward`."""
        return self.tail.blocks(self._coarse(tap, context)[-1])

    def _coarse(self, tap: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The map before the second grid, C4's expansion where it is copied, and the second map before the tail."""
        if hasattr(self, "copied"):
            x, expanded, coarse = self.copied(tap)
        else:
            x, expanded = self.reduce(self.attention(tap)), None
            coarse = self.short_cut(x)
        return x, expanded, coarse if self.context is None else coarse + self.context(context)

    def forward(self, tap: Tensor, context: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return the head's outputs and the context for the next exit.

        Args:
            tap: [N, in_channels, in_grid, in_grid].
            context: the second map of the exit before, [N, tail.in_channels, grids[1], grids[1]]; not looked at
                without ``cascade``, and None at the first exit.

        Returns:
            ``{"cls_logits": [N, A, C], "bbox_regression": [N, A, 4]}`` and the second map behind the tail's blocks.
        """
        x, expanded, coarse = self._coarse(tap, context)
        coarse, maps = self.tail(coarse)
        size = (self._finest_grid, self._finest_grid)
        fine = (expanded if self.fine is None else F.interpolate(self.fine(x), size)) + F.interpolate(
            self.top_down(coarse), size
        )
        return self.head([fine if self.smooth is None else self.smooth(fine), *maps]), coarse

    def _build_short_cut(
        self,
        in_channels: int,
        in_grid: int,
        skipped_layers: int,
        grids: Sequence[int],
        attention: bool,
        out_channels: int,
    ) -> None:
        self.attention = (
            SqueezeExcitation(in_channels, max(8, in_channels // 4), scale_activation=nn.Hardsigmoid)
            if attention
            else nn.Identity()
        )
        self.reduce = nn.Sequential()
        while in_grid > grids[0]:
            self.reduce.append(_residual(in_channels, 2 * in_channels, 2, skipped_layers, attention))
            in_channels, in_grid = 2 * in_channels, (in_grid + 1) // 2
        stride = 2 if in_grid > grids[1] else 1
        self.short_cut = _residual(in_channels, out_channels, stride, skipped_layers, attention)

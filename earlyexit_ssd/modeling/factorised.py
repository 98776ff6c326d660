"""Classification heads of many classes at a low cost: each predictor in two thin steps."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.detection.ssd import SSDScoringHead


class FactorisedPredictor(nn.Sequential):
    """A 1x1 convolution as two: to ``rank`` channels, and from there to the outputs.

    Args:
        in_channels, out_channels: of the convolution that it stands for.
        rank: channels between the two.
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__(nn.Conv2d(in_channels, rank, 1, bias=False), nn.Conv2d(rank, out_channels, 1))
        self.in_channels, self.out_channels = in_channels, out_channels

    @torch.no_grad()
    def approximate(self, convolution: nn.Conv2d) -> None:
        """Take the nearest weights of this rank in least squares, from the largest singular values (Eckart and Young
        1936); with a rank of ``min(in_channels, out_channels)`` both give the same outputs."""
        narrow, wide = self
        left, values, right = torch.linalg.svd(convolution.weight.flatten(1), full_matrices=False)
        rank = min(narrow.out_channels, len(values))
        root = values[:rank].sqrt()
        narrow.weight.zero_()[:rank] = (root[:, None] * right[:rank])[..., None, None]
        wide.weight.zero_()[:, :rank] = (left[:, :rank] * root)[..., None, None]
        wide.bias.copy_(convolution.bias)


def factorise(head: SSDScoringHead, rank: int) -> None:
    """Put a `FactorisedPredictor` in the place of each predictor of ``head`` that it makes cheaper."""
    for block in head.module_list:
        old = block[1]
        if rank * (old.in_channels + old.out_channels) < old.in_channels * old.out_channels:
            block[1] = FactorisedPredictor(old.in_channels, old.out_channels, rank)
            block[1].approximate(old)

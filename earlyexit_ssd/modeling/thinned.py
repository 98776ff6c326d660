"""Thinned copies of the full path's own layers as the short cut of a branch; the residual ones are left out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from earlyexit_ssd.config import C4_LAYER


class ThinnedBlock(nn.Sequential):
    """An inverted residual without its residual: expansion, depthwise convolution, attention if there, projection.

    Args:
        layers: those of the block that it copies.
        keep: share of the expansion's channels that stay, in (0, 1].
    """

    def __init__(self, layers: Sequence[nn.Module], keep: float) -> None:
        channels = layers[-1][0].in_channels
        expands = layers[0][0].groups == 1
        count = _kept(channels, keep) if expands else channels
        super().__init__(*_slice(layers, torch.arange(count)))
        self.requires_grad_(True)

    @property
    def expanded_channels(self) -> int:
        """Channels between expansion and projection."""
        return self[-1][0].in_channels

    def inherit(self, layers: Sequence[nn.Module]) -> Tensor:
        """Take the weights that the copied block has now, of the channels that matter most; returns their indices.

        A channel matters as much as the projection takes from it: the norm of its column there times the root mean
        square of the normalised depthwise output, sqrt(scale^2 + shift^2) of the BatchNorm (Li et al. 2017, "Pruning
        filters for efficient ConvNets", rates filters by their norms).
        """
        norm = next(layer[1] for layer in layers[:-1] if not hasattr(layer, "fc1") and layer[0].groups > 1)
        size = (norm.weight**2 + norm.bias**2).sqrt()
        importance = size * layers[-1][0].weight.flatten(1).norm(dim=0)
        channels = importance.topk(self.expanded_channels).indices.sort().values
        self.load_state_dict(nn.Sequential(*_slice(layers, channels)).state_dict())
        return channels


class CopiedShortCut(nn.Module):
    """From a tap to the first and the second grid through thinned copies of the layers that change the shape.

    A residual layer adds little to what passes through it, and a trained network works without some of them (Veit et
    al. 2016, "Residual networks behave like ensembles of relatively shallow networks"). Of the layers behind a tap,
    2, 4, 7, 11 and C4 (13) have no residual.

    Args:
        backbone: torchvision's ``SSDLiteFeatureExtractorMobileNet``.
        layer: of the tap.
        keep: share of every expansion's channels that stays, in (0, 1].

    Attributes:
        fine_channels: of the map that C4 starts from.
        first_channels: of C4's expansion here, which in the full path is the first map; behind C4, as many as a copy
            would keep of it.
    """

    def __init__(self, backbone: nn.Module, layer: int, keep: float) -> None:
        super().__init__()
        self._layer = layer
        blocks = [ThinnedBlock(block, keep) for block in _blocks_behind(backbone, layer)]
        self.before = nn.Sequential(*blocks[:-1])
        self.c4 = blocks[-1] if blocks else None
        first_map = backbone.features[0][-1].out_channels
        self.first_channels = self.c4.expanded_channels if blocks else _kept(first_map, keep)
        self.fine_channels = self.c4[0][0].in_channels if blocks else backbone.features[1][0][-1].out_channels

    def inherit(self, backbone: nn.Module) -> Tensor | None:
        """Take the weights that the full path has now; returns the channels of C4's expansion that are kept."""
        modules = [*self.before, *([self.c4] if self.c4 is not None else [])]
        blocks = _blocks_behind(backbone, self._layer)
        kept = [module.inherit(block) for module, block in zip(modules, blocks, strict=True)]
        return kept[-1] if kept else None

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The map before C4 [N, fine_channels, S, S], C4's expansion (None behind C4), and what C4 makes of it."""
        fine = self.before(tap)
        if self.c4 is None:
            return fine, None, fine
        expansion, *rest = self.c4
        expanded = coarse = expansion(fine)
        for layer in rest:
            coarse = layer(coarse)
        return fine, expanded, coarse


def _kept(channels: int, keep: float) -> int:
    """A share of the channels, a multiple of 8."""
    return min(channels, max(8, round(keep * channels / 8) * 8))


def _blocks_behind(backbone: nn.Module, layer: int) -> list[list[nn.Module]]:
    """The layers of every block behind ``layer`` that has no residual, C4 last."""
    first, second = backbone.features
    blocks = [list(block.block) for block in first[layer + 1 : -1] if not block.use_res_connect]
    return [*blocks, [first[-1], *second[0]]] if layer < C4_LAYER else []


def _slice(layers: Sequence[nn.Module], channels: Tensor) -> list[nn.Module]:
    """Copies of a block's layers with these channels between expansion and projection only."""
    layers = [copy.deepcopy(layer) for layer in layers]
    *inner, projection = layers
    for layer in inner:
        if hasattr(layer, "fc1"):
            _take(layer.fc1, layer.fc1.weight[:, channels], layer.fc1.bias)
            _take(layer.fc2, layer.fc2.weight[channels], layer.fc2.bias[channels])
        else:
            _take(layer[0], layer[0].weight[channels], None)
            for name, values in layer[1].state_dict().items():
                if values.ndim:
                    _set(layer[1], name, values[channels])
            layer[1].num_features = len(channels)
    _take(projection[0], projection[0].weight[:, channels], None)
    return layers


def _take(convolution: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Give the convolution other channels."""
    depthwise = convolution.groups > 1
    convolution.out_channels = len(weight)
    convolution.in_channels = len(weight) if depthwise else weight.shape[1]
    convolution.groups = len(weight) if depthwise else 1
    _set(convolution, "weight", weight)
    if bias is not None:
        _set(convolution, "bias", bias)


def _set(module: nn.Module, name: str, values: Tensor) -> None:
    values = values.detach().clone()
    setattr(module, name, nn.Parameter(values) if isinstance(getattr(module, name), nn.Parameter) else values)

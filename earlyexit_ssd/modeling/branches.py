"""What follows C4 in the full path, as a branch's own copy: it knows far more than a few photos can teach."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.misc import Conv2dNormActivation

from earlyexit_ssd.config import C4_LAYER, LAST_LAYER, TAIL_BLOCKS
from earlyexit_ssd.modeling import arguments
from earlyexit_ssd.modeling.heads import FactorisedPredictor, copy_rows, factorise, is_folded
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import norm_layer

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.detector import EarlyExitSSDLite


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


# Thinned copies of the full path's own layers as the short cut of a branch; the residual ones are left out.


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


# An exit without a branch: photos in which there is nothing to find leave there with an empty answer.

NO_OBJECT = -30.0
"""Logit of every class but background, whose own is 0: a probability of 1e-13."""


class EmptyExit(nn.Module):
    """In the place of a :class:`earlyexit_ssd.modeling.branches.Branch`: says background everywhere, and costs nothing.

    Whether a photo may leave here has to be foreseen from the tap, before any branch is computed.

    Args:
        num_boxes: default boxes of an image.
        num_classes: outputs per default box, background included.
    """

    def __init__(self, num_boxes: int, num_classes: int) -> None:
        super().__init__()
        self._num_boxes, self.num_classes = num_boxes, num_classes

    def inherit(self, backbone: nn.Module, head: nn.Module) -> None:
        """There is nothing to take over."""

    def forward(self, tap: Tensor) -> Head:
        """The head's outputs for a tap [N, C, S, S], with no object in them."""
        logits = tap.new_full((len(tap), self._num_boxes, self.num_classes), NO_OBJECT)
        logits[..., 0] = 0.0
        return {"cls_logits": logits, "bbox_regression": tap.new_zeros(len(tap), self._num_boxes, 4)}


def num_default_boxes(grids: Sequence[tuple[int, int]], boxes_per_cell: Sequence[int]) -> int:
    """Default boxes of an image from its grids (height, width) and the boxes in each of a grid's cells."""
    return sum(height * width * count for (height, width), count in zip(grids, boxes_per_cell, strict=True))


# One exit: from a tap of the trunk to the logits and boxes of the same default boxes as the full path.


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


# The branches of a detector, one for each of its early exits.


def build_branches(
    model: EarlyExitSSDLite,
    *,
    channels: int,
    depth: Sequence[int],
    copy: Sequence[float],
    head_rank: int,
) -> nn.ModuleDict:
    """Name of the exit -> its branch, not yet with the full path's weights, or an empty exit.

    Args:
        model: with its trunk, head, exits and grids.
        channels, depth, copy, head_rank: see the model.
    """
    boxes_per_cell = model.anchor_generator.num_anchors_per_location()
    copy, depth = arguments.numbers("copy", copy), arguments.numbers("depth", depth, whole=True)
    shares = arguments.one_for_each("copy", copy, model.num_early_exits, highest=1, zero=False)
    depths = arguments.one_for_each("depth", depth, model.num_early_exits, highest=TAIL_BLOCKS)
    arguments.whole_number("channels", channels)
    arguments.whole_number("head_rank", head_rank)
    branches = nn.ModuleDict()
    for index, name in enumerate(model.exit_names[:-1]):
        if model.empty[index]:
            branches[name] = EmptyExit(num_default_boxes(model.grids, boxes_per_cell), model.num_classes)
            continue
        # Behind C4 the trunk itself has run some of the tail's blocks; with channels they stay as in older model files.
        behind = LAST_LAYER - 1 - model.exit_layers[index]
        blocks = depths[index] if channels else min(depths[index], behind)
        branches[name] = Branch(
            copied=CopiedShortCut(model.backbone, model.exit_layers[index], shares[index]),
            finest_grid=model.grids[0][0],
            channels=channels,
            tail=Tail(model.backbone, blocks),
            num_anchors=boxes_per_cell,
            num_classes=model.num_classes,
            head_rank=head_rank,
        )
    return branches

"""Early exits: their description, and the kinds of branches.

A *context* is a feature map that one exit's branch passes to the next exit's branch. *C4* is trunk layer 13, the last
of layers 0 to 16 with stride 2. As in torchvision, the output of its expansion is the head's first map. The glossary of
docs/design.md explains the other terms.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from earlyexit_ssd.config.check import LARGEST_SIDE, MAX_CHANNELS, TAIL_BLOCKS
from earlyexit_ssd.errors import EarlyExitError, check_keywords, shown, suggest
from earlyexit_ssd.modeling.heads import copy_rows, factorise, is_folded
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import norm_layer
from earlyexit_ssd.plain import check_fields, typed
from earlyexit_ssd.registry import Registry

T = TypeVar("T", bound=Callable)


@dataclass(frozen=True)
class Argument:
    """An argument of a kind of branch. Its values have the type of ``default``: bool, int or float."""

    default: bool | float
    highest: float = MAX_CHANNELS  # largest allowed number; the smallest is 0
    zero: bool = True  # False if 0 is not allowed

    def checked(self, name: str, value: object) -> bool | float:
        """Return ``value`` with the type of the default. Raise an EarlyExitError if it is not allowed."""
        kind = type(self.default)
        value = typed(kind if kind is bool else Annotated[kind, 0, self.highest], value, name)
        if value == 0 and not self.zero:
            raise EarlyExitError(f"{name} is 0, expected a number in (0, {self.highest}]")
        return kind(value)


@dataclass(frozen=True)
class Place:
    """Where a branch is attached, and the shapes of its input and outputs.

    Attributes:
        backbone: the detector's backbone, whose layers may be copied.
        layer, tap: trunk layer of the tap, and the tap's (channels, height, width).
        grids, boxes_per_cell: per feature map of the head, (height, width) in cells, and default boxes per cell.
        num_classes: outputs per default box, background included.
        context_channels: channels of the previous exit's context; 0 for none.
    """

    backbone: nn.Module
    layer: int
    tap: tuple[int, int, int]
    grids: Sequence[tuple[int, int]]
    boxes_per_cell: Sequence[int]
    num_classes: int
    context_channels: int = 0

    @property
    def num_boxes(self) -> int:
        """Default boxes per image."""
        return sum(math.prod(grid) * boxes for grid, boxes in zip(self.grids, self.boxes_per_cell, strict=True))


BRANCHES: Registry[tuple[Callable[..., Branch], Mapping[str, Argument]]] = Registry("branch")
"""Kind of branch -> its builder ``build(place, **values)`` and its arguments; filled by :func:`register_branch`."""


def register_branch(name: str, **arguments: Argument) -> Callable[[T], T]:
    """Decorator: register a class or function that builds the branches of kind ``name``."""
    for argument, value in arguments.items():
        if not isinstance(value, Argument):
            expected = "an Argument, such as Argument(0)"
            raise EarlyExitError(f"branch '{name!s:.60}': {argument} is {shown(value)}, expected {expected}")

    def register(build: T) -> T:
        BRANCHES.register(name, (build, arguments))
        return build

    return register


@dataclass(frozen=True)
class Exit:
    """Description of one early exit.

    Attributes:
        layer: trunk layer that the exit is attached to (torchvision's numbering, the stem is 0).
        branch: kind of its branch, a name in :data:`BRANCHES`.
        arguments: name -> value of the branch's arguments; those left out get their defaults.
        pixels: side in pixels of a glance's small copy of the image; None for other exits.

    Raises:
        EarlyExitError: an unknown kind or argument, or a value out of its range.
    """

    layer: int
    branch: str = "copied"
    arguments: dict[str, Any] = field(default_factory=dict)
    pixels: Annotated[int, 32, LARGEST_SIDE] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pixels is not None and self.branch != "empty":
            raise EarlyExitError(f"a glance has the branch '{self.branch!s:.60}', expected 'empty'")
        accepted, values = arguments_of(self.branch), {}
        for name in self.arguments:
            if name not in accepted:
                hint = suggest(str(name), accepted) or f"; it takes {', '.join(accepted) or 'none'}"
                raise EarlyExitError(f"a {self.branch} branch has no argument {name!r:.60}{hint}")
        for name, argument in accepted.items():
            values[name] = argument.checked(name, self.arguments.get(name, argument.default))
        object.__setattr__(self, "arguments", values)

    @property
    def name(self) -> str:
        """Name such as ``exit8``, or ``glance128`` for a glance at 128 pixels."""
        return f"exit{self.layer}" if self.pixels is None else f"glance{self.pixels}"

    @property
    def empty(self) -> bool:
        """True if the exit has no branch."""
        return self.branch == "empty"

    def build(self, place: Place) -> Branch:
        """Build the exit's branch. :meth:`Branch.inherit` then copies the full path's weights."""
        build, _ = BRANCHES[self.branch]
        return build(place, **self.arguments)


def arguments_of(branch: str) -> Mapping[str, Argument]:
    """Return name -> argument of a kind of branch. Raise EarlyExitError if there is no such kind."""
    return BRANCHES.find(branch)[1]


def _all_arguments() -> dict[str, Argument]:
    return {name: argument for _, arguments in BRANCHES.values() for name, argument in arguments.items()}


def exit_keyword_names() -> list[str]:
    """Return the names of the keywords of :func:`describe_exits`."""
    return ["exit_layers", "branch", "empty", "glances", *_all_arguments()]


def describe_exits(
    exit_layers: Sequence[int] = (8, 12),
    branch: str | Sequence[str] = "copied",
    empty: Sequence[int] = (),
    glances: Sequence[Sequence[int]] = (),
    **arguments: object,
) -> tuple[Exit, ...]:
    """Build the description of all exits from keywords.

    Args:
        exit_layers: trunk layers of the exits other than glances, increasing.
        branch: kind of all branches, or a list with one kind per exit.
        empty: layers in ``exit_layers`` whose exits have no branch. It takes precedence over ``branch``.
        glances: (pixels, layer) of each glance, pixels increasing. Glances come before the other exits.
        arguments: arguments of the branches, one value for all exits or a list with one per exit. A branch ignores
            arguments that its kind does not have.
    """
    layers = tuple(map(int, typed(tuple[int, ...], exit_layers, "exit_layers")))
    for layer in typed(tuple[int, ...], empty, "empty"):
        if layer not in layers:
            raise EarlyExitError(f"empty has {layer}, expected some of the exits' layers {layers}")
    check_keywords(describe_exits, arguments, exit_keyword_names())
    kinds = _one_each("branch", branch, len(layers))
    columns = {name: _one_each(name, value, len(layers)) for name, value in arguments.items()}
    exits = []
    for pair in glances:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            expected = "pairs of pixels and a trunk layer, such as (128, 12)"
            raise EarlyExitError(f"glances has {pair!r:.60}, expected {expected}")
        exits.append(Exit(pair[1], "empty", pixels=pair[0]))
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        kind = "empty" if layer in empty else kind
        accepted = arguments_of(kind)
        exits.append(Exit(layer, kind, {name: column[index] for name, column in columns.items() if name in accepted}))
    return tuple(exits)


def _one_each(name: str, value: object, exits: int) -> list:
    """Return one value for each of ``exits`` exits. ``value``: one for all exits, or a list with one per exit."""
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if len(values) not in (1, exits):
        raise EarlyExitError(f"{name} is {value!r:.60}, expected one value, or one for each of {exits} exits")
    return values * exits if len(values) == 1 else values


def exit_keywords(exits: Sequence[Exit]) -> dict[str, object]:
    """Return the keywords with which :func:`describe_exits` builds ``exits``, in plain types for model files."""
    glances = tuple((exit.pixels, exit.layer) for exit in exits if exit.pixels is not None)
    exits = exits[len(glances) :]
    layers, empty = tuple(exit.layer for exit in exits), tuple(exit.layer for exit in exits if exit.empty)
    keywords = {"exit_layers": layers, "empty": empty, "glances": glances}
    columns = {"branch": [None if exit.empty else exit.branch for exit in exits]}
    columns |= {name: [exit.arguments.get(name) for exit in exits] for name in _all_arguments()}
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        if values:
            # an exit whose branch lacks the argument ignores it, so any value will do there
            filled = tuple(values[0] if value is None else value for value in column)
            keywords[name] = values[0] if len(set(values)) == 1 else filled
    return keywords


def check_exits(exits: Sequence[Exit], last_layer: int, side: int) -> None:
    """Raise EarlyExitError unless glances with increasing pixels below the input's ``side`` come first, then exits with
    increasing layers."""
    glances = [exit for exit in exits if exit.pixels is not None]
    pixels = [exit.pixels for exit in exits[: len(glances)]]
    if None in pixels or pixels != sorted(set(pixels)):
        raise EarlyExitError(f"glances at {pixels} pixels: expected increasing sides, and glances before other exits")
    if pixels and pixels[-1] >= side:
        raise EarlyExitError(f"a glance at {pixels[-1]} pixels: expected fewer than the input's {side}")
    for group in (exits[len(glances) :], *([exit] for exit in glances)):  # layers of glances may be in any order
        layers = tuple(exit.layer for exit in group)
        if list(layers) != sorted(set(layers)) or not all(1 <= layer < last_layer for layer in layers):
            raise EarlyExitError(f"exit_layers {layers}: expected increasing trunk layers from 1 to {last_layer - 1}")


def takes_exits(function: T) -> T:
    """Decorator: let a function or class accept the keywords of :func:`describe_exits` instead of ``exits``.

    A misspelt keyword raises TypeError with the nearest name.
    """
    if isinstance(function, type):
        function.__init__ = takes_exits(function.__init__)
        return function
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        names = exit_keyword_names()
        check_keywords(function, kwargs, [*parameters, *names])
        keywords = {name: kwargs.pop(name) for name in names if name in kwargs}
        given = kwargs.get("exits")
        if not isinstance(given, list | tuple | None) or not all(isinstance(each, Exit) for each in given or ()):
            fix = "write exit_layers=(8, 12), or exits=describe_exits((8, 12))"
            raise EarlyExitError(f"exits is {shown(given)}, expected exits; {fix}")
        if keywords:
            if given is not None:
                raise TypeError(f"{function.__qualname__} got exits and {next(iter(keywords))}; give one of them")
            kwargs["exits"] = describe_exits(**keywords)
        return function(*args, **kwargs)

    return wrapper


class Branch(nn.Module):
    """Base class of branches, which compute head outputs for the full path's default boxes from an exit's tap."""

    context_channels = 0
    """Channels of the context for the next exit; 0 for none."""

    def inherit(self, backbone: nn.Module, head: nn.Module) -> None:
        """Copy the full path's current weights into the copied layers, if the branch has any."""

    def context(self, tap: Tensor, previous: Tensor | None) -> Tensor | None:
        """Return this exit's context; None if there is none. ``previous``: context of the exit before."""
        return None

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """Return ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4]. ``tap``: [N, C, H, W]; ``context``: the
        result of :meth:`context`."""
        raise NotImplementedError  # abstract: each kind of branch implements it


# The kind "copied": thinned copies of the layers from the tap to C4, then full copies of the layers after C4.


class Tail(nn.Module):
    """Copy of the trunk after C4: the last ``depth`` (0 to 2) residual blocks, layer 16 and the four extra blocks."""

    def __init__(self, backbone: nn.Module, depth: int) -> None:
        super().__init__()
        self.blocks, self.last, self.extra = deepcopy(self._originals(backbone, depth))
        self.requires_grad_(True)
        self.in_channels = backbone.features[1][0][-1].out_channels
        self.out_channels = [self.last.out_channels, *(block[-1].out_channels for block in self.extra)]

    @staticmethod
    def _originals(backbone: nn.Module, depth: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        _, *blocks, last = backbone.features[1]
        return nn.Sequential(*blocks[len(blocks) - depth :]), last, backbone.extra

    def inherit(self, backbone: nn.Module) -> None:
        originals = self._originals(backbone, len(self.blocks))
        for copied, original in zip((self.blocks, self.last, self.extra), originals, strict=True):
            copied.load_state_dict(original.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output of the residual blocks [N, in_channels, S, S], and the head's five coarser maps."""
        x = self.blocks(x)
        maps = [self.last(x)]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return x, maps


@torch.no_grad()
def inherit_predictors(head: SSDLiteHead, full: SSDLiteHead, channels: Tensor | None = None) -> None:
    """Copy the predictors of the full path's head ``full`` into a branch's ``head``.

    If only ``full`` is folded, background and the wanted classes are copied. ``channels``: indices of the channels that
    the branch's first map has. With None this map is new, and its predictors are not copied.
    """
    classifier = full.classification_head
    unfold = is_folded(classifier) and not is_folded(head.classification_head)
    rows = [0, *classifier.wanted.tolist()] if unfold else list(range(classifier.num_columns))
    for new_head, old_head in ((head.classification_head, classifier), (head.regression_head, full.regression_head)):
        blocks = list(old_head.module_list)
        if channels is not None:
            # [1:] is a Sequential: `_slice_block` expects the convolution at [0] of its last layer
            depthwise, predictor = _slice_block([blocks[0][0], blocks[0][1:]], channels)
            blocks[0] = nn.Sequential(depthwise, *predictor)
        maps = slice(1 if channels is None else 0, None)
        for new, old in zip(list(new_head.module_list)[maps], blocks[maps], strict=True):
            new[0].load_state_dict(old[0].state_dict())
            if old_head is classifier:
                copy_rows(new[1], old[1], classifier.num_columns, rows)
            else:
                new[1].load_state_dict(old[1].state_dict())


class ThinnedBlock(nn.Sequential):
    """Copy of an inverted residual block, with a ``share`` in (0, 1] of its expansion channels.

    ``layers``: [expansion,] depthwise convolution, [squeeze-excitation,] projection.
    """

    def __init__(self, layers: Sequence[nn.Module], share: float) -> None:
        channels = layers[-1][0].in_channels
        if layers[0][0].groups == 1:  # an expansion
            channels = _thinned(channels, share)
        super().__init__(*_slice_block(layers, torch.arange(channels)))  # sets the shapes; `inherit` copies the weights
        self.requires_grad_(True)

    @property
    def expanded_channels(self) -> int:
        """Channels between expansion and projection."""
        return self[-1][0].in_channels

    def inherit(self, layers: Sequence[nn.Module]) -> Tensor:
        """Copy the current weights of the block's most important channels, and return the indices of these channels.

        Importance is the norm of the channel's weights in the projection (as in Li et al. 2017, "Pruning filters for
        efficient ConvNets") times the root mean square of the depthwise convolution's output, sqrt(scale^2 + shift^2)
        of its BatchNorm.
        """
        norm = next(layer[1] for layer in layers if not isinstance(layer, SqueezeExcitation) and layer[0].groups > 1)
        output_rms = (norm.weight**2 + norm.bias**2).sqrt()
        importance = output_rms * layers[-1][0].weight.flatten(1).norm(dim=0)
        channels = importance.topk(self.expanded_channels).indices.sort().values
        self.load_state_dict(nn.Sequential(*_slice_block(layers, channels)).state_dict())
        return channels


class CopiedPathToC4(nn.Module):
    """Thinned copies of the blocks between a tap and C4's output; none for a tap at C4 or after it.

    Blocks with a residual connection are skipped, which a trained network tolerates (Veit et al. 2016, "Residual
    networks behave like ensembles of relatively shallow networks"). Layers 2, 4, 7, 11 and C4 have no such connection.

    Attributes:
        c4: the copy of C4; None if nothing is copied.
        fine_channels: channels of C4's input, or of the tap if nothing is copied.
        first_channels: channels of the branch's first map by default, the rounded ``share`` of the channels of C4's
            expansion.
    """

    def __init__(self, backbone: nn.Module, layer: int, share: float) -> None:
        super().__init__()
        self._layer = layer
        blocks = [ThinnedBlock(block, share) for block in _blocks_to_c4(backbone, layer)]
        self.before = nn.Sequential(*blocks[:-1])
        self.c4 = blocks[-1] if blocks else None
        first_map = backbone.features[0][-1].out_channels
        self.first_channels = self.c4.expanded_channels if blocks else _thinned(first_map, share)
        self.fine_channels = self.c4[0][0].in_channels if blocks else backbone.features[1][0][-1].out_channels

    def inherit(self, backbone: nn.Module) -> Tensor | None:
        """Return the indices of the copied channels of C4's expansion, or None if nothing is copied."""
        channels = None
        # not strict: `c4` is None if there are no blocks
        for copied, block in zip([*self.before, self.c4], _blocks_to_c4(backbone, self._layer), strict=False):
            channels = copied.inherit(block)
        return channels

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return C4's input, its expansion and its output. If nothing is copied, return the tap, None and the tap."""
        fine = self.before(tap)
        if self.c4 is None:
            return fine, None, fine
        expansion, *rest = self.c4
        expanded = coarse = expansion(fine)
        for layer in rest:
            coarse = layer(coarse)
        return fine, expanded, coarse


def _thinned(channels: int, share: float) -> int:
    """Return ``share`` of the channels, rounded to a multiple of 8."""
    return min(channels, max(8, round(share * channels / 8) * 8))


def _blocks_to_c4(backbone: nn.Module, layer: int) -> list[list[nn.Module]]:
    """Return the blocks without residual connection after ``layer`` up to C4, each as a list of its layers."""
    first, second = backbone.features
    blocks = [list(block.block) for block in first[layer + 1 : -1] if not block.use_res_connect]
    return [*blocks, [first[-1], *second[0]]] if layer < len(first) - 1 else []


def _slice_block(layers: Sequence[nn.Module], channels: Tensor) -> list[nn.Module]:
    """Copy a block's layers with only these ``channels`` (indices) between expansion and projection."""
    *inner, projection = deepcopy(list(layers))
    for layer in inner:
        if isinstance(layer, SqueezeExcitation):
            _slice(layer.fc1, channels, dim=1)
            _slice(layer.fc2, channels, dim=0)
        else:
            _slice(layer[0], channels, dim=0)
            _slice(layer[1], channels, dim=0)
    _slice(projection[0], channels, dim=1)
    return [*inner, projection]


def _slice(module: nn.Module, channels: Tensor, dim: int) -> None:
    """Reduce a convolution or BatchNorm to some of its output channels (``dim`` 0) or input channels (1)."""
    for name, values in module.state_dict().items():
        if values.ndim > dim:
            kept = values.index_select(dim, channels.to(values.device))
            setattr(module, name, nn.Parameter(kept) if isinstance(getattr(module, name), nn.Parameter) else kept)
    if not isinstance(module, nn.Conv2d):
        module.num_features = len(channels)
    elif module.groups > 1:
        module.groups = module.in_channels = module.out_channels = len(channels)
    else:
        setattr(module, "in_channels" if dim else "out_channels", len(channels))


@register_branch(
    "copied",
    channels=Argument(0),
    depth=Argument(2, TAIL_BLOCKS),
    copy=Argument(0.5, 1, zero=False),
    head_rank=Argument(0),
)
class CopiedBranch(Branch):
    """A branch of copied layers: tap -> `CopiedPathToC4` -> `Tail` -> head.

    The tail computes all maps but the first. The output of its residual blocks is upsampled and added to the first map
    (top-down connection, Lin et al. 2017, FPN).

    Args:
        channels: channels of a new first map. With 0 the first map is C4's copied expansion, as in the full path, and
            its predictors are copied too. If C4 is not copied, the map is new in any case.
        depth: ``depth`` of the `Tail`.
        copy: ``share`` of the `CopiedPathToC4`.
        head_rank: ``rank`` of `factorise`.
    """

    def __init__(self, place: Place, *, channels: int, depth: int, copy: float, head_rank: int) -> None:
        super().__init__()
        if not hasattr(place.backbone, "features") or len(place.backbone.features) != 2:
            needed = "a copied branch needs the layers of torchvision's SSDLite with a MobileNetV3"
            raise EarlyExitError(f"{needed}, but this detector has others; use branch='light' (EXITS.BRANCH light)")
        # Residual blocks up to the tap are not copied. With `channels` they are, since older model files have them.
        c4, tail = (len(part) - 1 for part in place.backbone.features)  # index of C4, layers after it
        blocks = depth if channels else min(depth, c4 + tail - 1 - place.layer)
        self.copied, self.tail = CopiedPathToC4(place.backbone, place.layer, copy), Tail(place.backbone, blocks)
        new_map = channels > 0 or self.copied.c4 is None
        channels = channels or self.copied.first_channels
        self.fine = _pointwise(self.copied.fine_channels, channels) if new_map else None
        self.smooth = _depthwise(channels) if new_map else None
        self.top_down = _pointwise(self.tail.in_channels, channels)
        self.head = SSDLiteHead(
            [channels, *self.tail.out_channels], list(place.boxes_per_cell), place.num_classes, norm_layer
        )
        factorise(self.head.classification_head, head_rank)
        self._finest_grid = tuple(place.grids[0])

    def inherit(self, backbone: nn.Module, head: SSDLiteHead) -> None:
        self.tail.inherit(backbone)
        channels = self.copied.inherit(backbone)
        inherit_predictors(self.head, head, channels if self.fine is None else None)
        if self.fine is None:
            nn.init.zeros_(self.top_down[1].weight)  # before training, nothing is added to the copied first map

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        fine, expanded, coarse = self.copied(tap)
        coarse, maps = self.tail(coarse)
        first = expanded if self.fine is None else F.interpolate(self.fine(fine), self._finest_grid)
        first = first + F.interpolate(self.top_down(coarse), self._finest_grid)
        return self.head([first if self.smooth is None else self.smooth(first), *maps])


# The kind "light": a few new layers. It fits any detector.


def _halvings(side: int, grid: int) -> int:
    """Return the number of stride-2 convolutions that shrink ``side`` cells towards ``grid``, but not below it."""
    count = 0
    while (side + 1) // 2 >= grid and side > grid:
        side, count = (side + 1) // 2, count + 1
    return count


class PyramidStep(nn.Module):
    """Compute the next map of a feature pyramid with depthwise separable convolutions of stride 2, or one of stride 1.

    ``sizes``: (height, width) in cells of the input and of the next map. If the convolutions do not give the size of
    the next map, their output is resized to it.
    """

    def __init__(self, channels: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        input_size, self._grid = sizes
        halvings = min(map(_halvings, input_size, self._grid))
        self.layers = nn.Sequential()
        for stride in [2] * halvings or [1]:
            self.layers.append(_depthwise(channels, kernel_size=3, stride=stride))
            self.layers.append(_pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x if x.shape[-2:] == self._grid else F.interpolate(x, self._grid)


@register_branch("light", channels=Argument(0), context=Argument(True), head_rank=Argument(0))
class LightBranch(Branch):
    """Squeeze-excitation on the tap (Hu et al. 2018), context from the previous exit, and a narrow feature pyramid.

    Args:
        channels: channels of every map of the pyramid; 0 means 64.
        context: True adds the previous exit's context, resized. It is computed even if that exit is closed.
        head_rank: ``rank`` of `factorise`.
    """

    def __init__(self, place: Place, *, channels: int, context: bool, head_rank: int) -> None:
        super().__init__()
        width = self.context_channels = channels or 64
        tap_channels = place.tap[0]
        self.attention = SqueezeExcitation(tap_channels, max(8, tap_channels // 4))
        self.narrow = _pointwise(tap_channels, width)
        self.cascade = _pointwise(place.context_channels, width) if context and place.context_channels else None
        sizes = [(place.tap[1], place.tap[2]), *(tuple(grid) for grid in place.grids)]
        self.pyramid = nn.ModuleList(PyramidStep(width, pair) for pair in pairwise(sizes))
        boxes = list(place.boxes_per_cell)
        self.head = SSDLiteHead([width] * len(boxes), boxes, place.num_classes, norm_layer)
        factorise(self.head.classification_head, head_rank)

    def context(self, tap: Tensor, previous: Tensor | None) -> Tensor:
        x = self.narrow(self.attention(tap))
        if self.cascade is not None:
            x = x + F.interpolate(self.cascade(previous), tap.shape[-2:])
        return x

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        maps = []
        for step in self.pyramid:
            context = step(context)
            maps.append(context)
        return self.head(maps)


_convolution = functools.partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.Hardswish)


def _pointwise(in_channels: int, out_channels: int) -> Conv2dNormActivation:
    return _convolution(in_channels, out_channels, kernel_size=1)


def _depthwise(channels: int, kernel_size: int = 5, stride: int = 1) -> Conv2dNormActivation:
    return _convolution(channels, channels, kernel_size=kernel_size, stride=stride, groups=channels)


# The kind "empty": no branch. Photos that leave there have no detections.

NO_OBJECT = -30.0  # logit of every class; background's is 0, so each class has a probability of 1e-13


@register_branch("empty")
class EmptyExit(Branch):
    """No branch: predict background for every default box, and pass on the previous exit's context."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._num_boxes, self.num_classes = place.num_boxes, place.num_classes
        self.context_channels = place.context_channels

    def context(self, tap: Tensor, previous: Tensor | None) -> Tensor | None:
        return previous

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        logits = tap.new_full((len(tap), self._num_boxes, self.num_classes), NO_OBJECT)
        logits[..., 0] = 0.0
        return {"cls_logits": logits, "bbox_regression": tap.new_zeros(len(tap), self._num_boxes, 4)}

"""Early exits: their description, and the kinds of branches.

The *context* of a branch is a map that it passes on to the branch of the next exit. *C4* is trunk layer 13, the last
one with stride 2. docs/design.md has a glossary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from earlyexit_ssd.config.check import C4_LAYER, LARGEST_SIDE, LAST_LAYER, MAX_CHANNELS, TAIL_BLOCKS
from earlyexit_ssd.errors import EarlyExitError, check_keywords, nearest
from earlyexit_ssd.modeling.heads import copy_rows, factorise, is_folded
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import norm_layer
from earlyexit_ssd.plain import typed

T = TypeVar("T", bound=Callable)


@dataclass(frozen=True)
class Argument:
    """One argument of a branch kind: a number of the type of ``default``, or a bool if ``default`` is a bool."""

    default: bool | float
    highest: float = MAX_CHANNELS  # largest allowed number; the smallest is 0
    zero: bool = True  # whether 0 is allowed

    def per_exit(self, name: str, value: object, exits: int) -> list:
        """The checked values as a list, one for each of ``exits`` exits, from one value for all or from a list."""
        given = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        if len(given) not in (1, exits) or not all(map(self._allows, given)):
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            interval = f"{'[' if self.zero else '('}0, {self.highest}]"
            expected = "True or False" if isinstance(self.default, bool) else f"{kind} in {interval}"
            raise EarlyExitError(f"{name} is {value!r:.60}, expected {expected}, or one for each of {exits} exits")
        given = [type(self.default)(one) for one in given]
        return given * exits if len(given) == 1 else given

    def _allows(self, value: object) -> bool:
        if isinstance(self.default, bool) or isinstance(value, bool):
            return type(value) is type(self.default)
        kind = Integral if isinstance(self.default, int) else Real
        return isinstance(value, kind) and 0 <= value <= self.highest and (value > 0 or self.zero)


@dataclass(frozen=True)
class Place:
    """What a branch is built from: its place in the detector, and the shapes of its input and outputs.

    Attributes:
        backbone: the detector's backbone, whose layers may be copied.
        layer, tap: trunk layer of the tap, and the tap's (channels, height, width).
        grids, boxes_per_cell: of each feature map of the head, (height, width) in cells and default boxes per cell.
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
        pairs = zip(self.grids, self.boxes_per_cell, strict=True)
        return sum(height * width * count for (height, width), count in pairs)


BRANCHES: dict[str, tuple[Callable[..., Branch], Mapping[str, Argument]]] = {}
"""Kind of branch -> its builder ``build(place, **arguments)`` and its arguments; filled by :func:`register_branch`."""


def register_branch(name: str, **known: Argument) -> Callable[[T], T]:
    """Decorator: register a builder as branch kind ``name``. It takes a :class:`Place` and the arguments ``known``."""

    def register(build: T) -> T:
        BRANCHES[name] = build, known
        return build

    return register


@dataclass(frozen=True)
class Exit:
    """Description of one early exit, shared by configuration, builders, model and model files.

    Attributes:
        layer: trunk layer that the exit is attached to (torchvision's numbering, the stem is 0).
        branch: kind of its branch, a name in :data:`BRANCHES`.
        arguments: arguments of the branch; missing ones get the kind's defaults.
        pixels: of a glance, the side of the small copy of the image, in pixels. The trunk runs on the copy up to
            ``layer`` before the full-size pass. None for other exits.

    Raises:
        EarlyExitError: an unknown kind or argument, or a value out of its range.
    """

    layer: int
    branch: str = "copied"
    arguments: dict[str, bool | float] = field(default_factory=dict)
    pixels: int | None = None

    def __post_init__(self) -> None:
        typed(int, self.layer, "layer")
        typed(Annotated[int, 32, LARGEST_SIDE] | None, self.pixels, "a glance's side")
        if self.pixels is not None and self.branch != "empty":
            raise EarlyExitError(f"a glance has the branch '{self.branch!s:.60}', expected 'empty'")
        known, values = arguments_of(self.branch), {}
        for name in self.arguments:
            if name not in known:
                hint = nearest(str(name), known) or f"; it takes {', '.join(known) or 'none'}"
                raise EarlyExitError(f"a {self.branch} branch has no argument {name!r:.60}{hint}")
        for name, argument in known.items():
            (values[name],) = argument.per_exit(name, self.arguments.get(name, argument.default), exits=1)
        object.__setattr__(self, "arguments", values)

    @property
    def name(self) -> str:
        """Name such as ``exit8``, or ``glance128`` for a glance on a copy of 128 pixels."""
        return f"exit{self.layer}" if self.pixels is None else f"glance{self.pixels}"

    @property
    def empty(self) -> bool:
        """Whether the exit has no branch."""
        return self.branch == "empty"

    def build(self, place: Place) -> Branch:
        """The exit's branch, before :meth:`Branch.inherit` is called."""
        build, _ = BRANCHES[self.branch]
        return build(place, **self.arguments)


def arguments_of(branch: object) -> Mapping[str, Argument]:
    """Name -> argument of a kind of branch. An EarlyExitError if there is no such kind."""
    if not isinstance(branch, str) or branch not in BRANCHES:
        hint = nearest(str(branch), BRANCHES)
        raise EarlyExitError(f"branch is {branch!r:.60}, expected one of {', '.join(BRANCHES)}{hint}")
    return BRANCHES[branch][1]


def _all_arguments() -> dict[str, Argument]:
    """Name -> argument, of all kinds of branches."""
    return {name: argument for _, arguments in BRANCHES.values() for name, argument in arguments.items()}


def exit_keyword_names() -> list[str]:
    """Names of the keywords of :func:`describe_exits`."""
    return ["exit_layers", "branch", "empty", "glances", *_all_arguments()]


def describe_exits(
    exit_layers: Sequence[int] = (8, 12),
    branch: str | Sequence[str] = "copied",
    empty: Sequence[int] = (),
    glances: Sequence[Sequence[int]] = (),
    **given: object,
) -> tuple[Exit, ...]:
    """Build the description of all exits from keywords.

    Args:
        exit_layers: trunk layers of the exits other than glances, increasing.
        branch: kind of all branches, or one for each exit.
        empty: those of ``exit_layers`` whose exit has no branch, whatever ``branch`` says.
        glances: (pixels, layer) of each glance, pixels increasing; they come before the other exits.
        given: arguments of the branches, one value for all exits or one for each; a kind ignores those of other kinds.
    """
    layers = tuple(map(int, typed(tuple[int, ...], exit_layers, "exit_layers")))
    for layer in typed(tuple[int, ...], empty, "empty"):
        if layer not in layers:
            raise EarlyExitError(f"empty has {layer}, expected some of the exits' layers {layers}")
    kinds = [branch] if isinstance(branch, str) else list(branch) if isinstance(branch, (list, tuple)) else []
    if len(kinds) not in (1, len(layers)):
        told = f"branch is {branch!r:.60}, expected one of {', '.join(BRANCHES)}"
        raise EarlyExitError(f"{told}, or one for each of {len(layers)} exits")
    kinds = kinds * len(layers) if len(kinds) == 1 else kinds
    check_keywords(describe_exits, given, exit_keyword_names())
    known, exits = _all_arguments(), []
    values = {name: known[name].per_exit(name, value, len(layers)) for name, value in given.items()}
    for pair in glances:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            told = f"glances has {pair!r:.60}, expected pairs of pixels and a trunk layer"
            raise EarlyExitError(f"{told}, such as (128, 12)")
        exits.append(Exit(pair[1], "empty", pixels=pair[0]))
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        kind = "empty" if layer in empty else kind
        takes = arguments_of(kind)
        exits.append(Exit(layer, kind, {name: value[index] for name, value in values.items() if name in takes}))
    return tuple(exits)


def exit_keywords(exits: Sequence[Exit]) -> dict[str, object]:
    """The inverse of :func:`describe_exits`: its keywords for these exits, in plain types for model files."""
    glances = tuple((one.pixels, one.layer) for one in exits if one.pixels is not None)
    exits = exits[len(glances) :]
    layers, empty = tuple(one.layer for one in exits), tuple(one.layer for one in exits if one.empty)
    keywords = {"exit_layers": layers, "empty": empty, "glances": glances}
    columns = {"branch": [None if one.empty else one.branch for one in exits]}
    columns |= {name: [one.arguments.get(name) for one in exits] for name in _all_arguments()}
    for name, column in columns.items():
        values = [value for value in column if value is not None]
        if values:
            each = tuple(values[0] if value is None else value for value in column)
            keywords[name] = values[0] if len(set(values)) == 1 else each
    return keywords


def check_exits(exits: Sequence[Exit], last_layer: int) -> None:
    """Check the order: glances of increasing pixels, then exits of increasing layers, all before ``last_layer``."""
    glances = [one for one in exits if one.pixels is not None]
    pixels = [one.pixels for one in exits[: len(glances)]]
    if None in pixels or pixels != sorted(set(pixels)):
        raise EarlyExitError(f"glances at {pixels} pixels: expected increasing sides, and glances before other exits")
    for group in (exits[len(glances) :], *([one] for one in glances)):
        layers = tuple(one.layer for one in group)
        if list(layers) != sorted(set(layers)) or not all(1 <= layer < last_layer for layer in layers):
            raise EarlyExitError(f"exit_layers {layers}: expected increasing trunk layers from 1 to {last_layer - 1}")


def takes_exits(function: T) -> T:
    """Decorator: the function or class also accepts the keywords of :func:`describe_exits` instead of ``exits``.

    A misspelt keyword raises ``TypeError`` with the nearest name.
    """
    if isinstance(function, type):
        function.__init__ = takes_exits(function.__init__)
        return function
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def described(*args: object, **given: object) -> object:
        names = exit_keyword_names()
        check_keywords(function, given, [*parameters, *names])
        keywords = {name: given.pop(name) for name in names if name in given}
        if keywords:
            if given.get("exits") is not None:
                raise TypeError(f"{function.__qualname__} got exits and {next(iter(keywords))}; give one of them")
            given["exits"] = describe_exits(**keywords)
        return function(*args, **given)

    return described


class Branch(nn.Module):
    """Base class of branches: from an exit's tap to head outputs for the full path's default boxes.

    Attributes:
        context_channels: channels of the context for the next exit; 0 for none.
    """

    context_channels = 0

    def inherit(self, backbone: nn.Module, head: nn.Module) -> None:
        """Copy the full path's current weights into copied layers."""

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor | None:
        """This exit's context, from its tap and the previous exit's context ``before``; None if there is none."""
        return None

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """A tap [N, C, H, W], and what :meth:`context` gives for it, to ``cls_logits`` [N, A, C] and
        ``bbox_regression`` [N, A, 4]."""
        raise NotImplementedError  # abstract: every registered kind of branch defines it


# The kind "copied": thinned copies of the layers from the tap to C4, then whole copies of the layers after it.


class Tail(nn.Module):
    """Copy of trunk layers 14 to 16 and the four extra blocks of a torchvision SSDLite, with its current weights.

    ``depth`` is the number of residual blocks (layers 14 and 15) to copy, 0 to 2; 1 copies layer 15.
    """

    def __init__(self, backbone: nn.Module, depth: int) -> None:
        super().__init__()
        c4_rest, *blocks, last = backbone.features[1]
        self.blocks = nn.Sequential(*deepcopy(blocks[len(blocks) - depth :]))
        self.last = deepcopy(last)
        self.extra = deepcopy(backbone.extra)
        self.requires_grad_(True)
        self.in_channels = c4_rest[-1].out_channels
        self.out_channels = [last.out_channels, *(block[-1].out_channels for block in backbone.extra)]

    def inherit(self, backbone: nn.Module) -> None:
        _, *blocks, last = backbone.features[1]
        pairs = [*zip(reversed(self.blocks), reversed(blocks), strict=False), (self.last, last)]
        for mine, theirs in (*pairs, (self.extra, backbone.extra)):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[N, in_channels, S, S] to the output of the residual blocks (same shape) and the head's five coarser maps."""
        x = self.blocks(x)
        maps = [self.last(x)]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return x, maps


@torch.no_grad()
def inherit_predictors(mine: SSDLiteHead, full: SSDLiteHead, channels: Tensor | None = None) -> None:
    """Copy the full path's predictors; for the first map, only the input channels ``channels`` (indices).

    ``channels`` None: the first map is new, so its predictors are not copied. If only the full path's head is folded
    (see `FoldedClassificationHead`), only background and wanted classes are copied.
    """
    theirs = full.classification_head
    folds = is_folded(theirs) and not is_folded(mine.classification_head)
    rows = [0, *theirs.wanted.tolist()] if folds else list(range(theirs.num_columns))
    for new_head, old_head in ((mine.classification_head, theirs), (mine.regression_head, full.regression_head)):
        blocks = list(old_head.module_list)
        if channels is not None:
            # [1:] wraps the 1x1 predictor in a Sequential, so that its convolution is at [0] as in a projection
            depthwise, predictor = _slice_block([blocks[0][0], blocks[0][1:]], channels)
            blocks[0] = nn.Sequential(depthwise, *predictor)
        copied = slice(1 if channels is None else 0, None)
        for new, old in zip(list(new_head.module_list)[copied], blocks[copied], strict=True):
            new[0].load_state_dict(old[0].state_dict())
            if old_head is theirs:
                copy_rows(new[1], old[1], theirs.num_columns, rows)
            else:
                new[1].load_state_dict(old[1].state_dict())


class ThinnedBlock(nn.Sequential):
    """Copy of an inverted residual block without residual connection, with a ``share`` in (0, 1] of its expansion
    channels. ``layers``: [expansion,] depthwise convolution, [squeeze-excitation,] projection."""

    def __init__(self, layers: Sequence[nn.Module], share: float) -> None:
        channels = layers[-1][0].in_channels
        expands = layers[0][0].groups == 1
        count = _thinned(channels, share) if expands else channels
        super().__init__(*_slice_block(layers, torch.arange(count)))  # sets shapes only; `inherit` copies the weights
        self.requires_grad_(True)

    @property
    def expanded_channels(self) -> int:
        """Channels between expansion and projection."""
        return self[-1][0].in_channels

    def inherit(self, layers: Sequence[nn.Module]) -> Tensor:
        """Copy the current weights of the block's most important channels; returns the indices of these channels.

        Importance is the norm of the channel's weights in the projection (as in Li et al. 2017, "Pruning filters for
        efficient ConvNets") times the root mean square of the depthwise convolution's output, sqrt(scale^2 + shift^2)
        of its BatchNorm.
        """
        norm = next(layer[1] for layer in layers[:-1] if not hasattr(layer, "fc1") and layer[0].groups > 1)
        output_rms = (norm.weight**2 + norm.bias**2).sqrt()
        importance = output_rms * layers[-1][0].weight.flatten(1).norm(dim=0)
        channels = importance.topk(self.expanded_channels).indices.sort().values
        self.load_state_dict(nn.Sequential(*_slice_block(layers, channels)).state_dict())
        return channels


class CopiedPathToC4(nn.Module):
    """Thinned copies of the blocks between a tap and C4's output; none for a tap at C4 or after it.

    Blocks with a residual connection are skipped; layers 2, 4, 7, 11 and C4 (13) have none. A trained network tolerates
    that (Veit et al. 2016, "Residual networks behave like ensembles of relatively shallow networks").

    Args:
        layer: trunk layer of the tap.
        share: share of every expansion's channels to copy, in (0, 1].

    Attributes:
        c4: the copy of C4; None if nothing is copied.
        fine_channels: channels of C4's input; of the tap if nothing is copied.
        first_channels: ``share`` of the channels of C4's expansion, rounded.
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
        """Copy the full path's current weights; returns the copied channels of C4's expansion (indices), or None."""
        pairs = zip([*self.before, self.c4], _blocks_to_c4(backbone, self._layer), strict=False)
        channels = [module.inherit(block) for module, block in pairs]
        return channels[-1] if channels else None

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tap to C4's input [N, fine_channels, S, S], C4's expansion and C4's output. If nothing is copied, the tap is
        the first and the last, and the expansion is None."""
        fine = self.before(tap)
        if self.c4 is None:
            return fine, None, fine
        expansion, *rest = self.c4
        expanded = coarse = expansion(fine)
        for layer in rest:
            coarse = layer(coarse)
        return fine, expanded, coarse


def _thinned(channels: int, share: float) -> int:
    """``share`` of the channels, rounded to a multiple of 8."""
    return min(channels, max(8, round(share * channels / 8) * 8))


def _blocks_to_c4(backbone: nn.Module, layer: int) -> list[list[nn.Module]]:
    """The blocks without residual connection after ``layer`` up to C4, each as a list of its layers."""
    first, second = backbone.features
    blocks = [list(block.block) for block in first[layer + 1 : -1] if not block.use_res_connect]
    return [*blocks, [first[-1], *second[0]]] if layer < C4_LAYER else []


def _slice_block(layers: Sequence[nn.Module], channels: Tensor) -> list[nn.Module]:
    """Copies of a block's layers with only these ``channels`` (indices) between expansion and projection."""
    *inner, projection = deepcopy(list(layers))
    for layer in inner:
        if hasattr(layer, "fc1"):
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

    The tail computes all maps of the head but the first. The output of its residual blocks is upsampled and added to
    the first map (top-down connection, Lin et al. 2017, FPN).

    Args:
        channels: channels of a new first map. 0: the first map is C4's copied expansion, as in the full path, with
            copied predictors; if no C4 was copied, the map is new.
        depth, copy, head_rank: see `Tail`, the ``share`` of `CopiedPathToC4`, and `factorise`.
    """

    def __init__(self, place: Place, *, channels: int, depth: int, copy: float, head_rank: int) -> None:
        super().__init__()
        if not hasattr(place.backbone, "features") or len(place.backbone.features) != 2:
            raise EarlyExitError(
                "a copied branch copies layers of torchvision's SSDLite with a MobileNetV3, this detector has others: "
                "take branch='light' (EXITS.BRANCH light)"
            )
        # A tap after C4 has passed some blocks already, so they are not copied. With channels they are copied all the
        # same, because existing model files with channels have them.
        blocks = depth if channels else min(depth, LAST_LAYER - 1 - place.layer)
        self.copied, self.tail = CopiedPathToC4(place.backbone, place.layer, copy), Tail(place.backbone, blocks)
        self.fine = self.smooth = None
        if channels or self.copied.c4 is None:
            channels = channels or self.copied.first_channels
            self.fine = _pointwise(self.copied.fine_channels, channels)
            self.smooth = _depthwise(channels)
        else:
            channels = self.copied.first_channels
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
            nn.init.zeros_(self.top_down[1].weight)  # at first nothing is added to the copied first map

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        fine, expanded, coarse = self.copied(tap)
        coarse, maps = self.tail(coarse)
        first = expanded if self.fine is None else F.interpolate(self.fine(fine), self._finest_grid)
        first = first + F.interpolate(self.top_down(coarse), self._finest_grid)
        return self.head([first if self.smooth is None else self.smooth(first), *maps])


# The kind "light": a few new layers, for any detector.


def _halvings(side: int, grid: int) -> int:
    """Number of stride-2 convolutions that shrink ``side`` cells towards ``grid`` without going below it."""
    count = 0
    while (side + 1) // 2 >= grid and side > grid:
        side, count = (side + 1) // 2, count + 1
    return count


class PyramidStep(nn.Module):
    """From a map of one grid to one of the next (``sizes``: both, (height, width) in cells): depthwise separable
    convolutions of stride 2, or one of stride 1, then nearest-neighbour resizing if needed."""

    def __init__(self, channels: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        start, self._grid = sizes
        halvings = min(_halvings(side, goal) for side, goal in zip(start, self._grid, strict=True))
        self.layers = nn.Sequential()
        for stride in [2] * halvings or [1]:
            self.layers.append(_depthwise(channels, kernel_size=3, stride=stride))
            self.layers.append(_pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, *grid]."""
        x = self.layers(x)
        return x if x.shape[-2:] == self._grid else F.interpolate(x, self._grid)


@register_branch("light", channels=Argument(0), context=Argument(True), head_rank=Argument(0))
class LightBranch(Branch):
    """Squeeze-excitation on the tap (Hu et al. 2018), context from the previous exit, and a narrow feature pyramid.

    Args:
        channels: channels of every map of the pyramid; 0 means 64.
        context: whether to add the previous exit's context, resized. It is computed even if that exit is closed.
        head_rank: see `factorise`.
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

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor:
        """The narrow map [N, channels, H, W], input of the pyramid."""
        x = self.narrow(self.attention(tap))
        if self.cascade is not None:
            x = x + F.interpolate(self.cascade(before), tap.shape[-2:])
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
    """No branch: predicts background for every default box, and passes the previous exit's context on."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._num_boxes, self.num_classes = place.num_boxes, place.num_classes
        self.context_channels = place.context_channels

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor | None:
        return before

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        logits = tap.new_full((len(tap), self._num_boxes, self.num_classes), NO_OBJECT)
        logits[..., 0] = 0.0
        return {"cls_logits": logits, "bbox_regression": tap.new_zeros(len(tap), self._num_boxes, 4)}

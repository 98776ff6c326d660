"""Early exits: their description, the kinds of branches, and the function that builds them.

A *tap* is the output of the trunk layer that an exit is attached to. A *branch* computes detections from it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from earlyexit_ssd.config import C4_LAYER, LAST_LAYER, MOST_CHANNELS, TAIL_BLOCKS
from earlyexit_ssd.errors import EarlyExitError, nearest
from earlyexit_ssd.keywords import require_known
from earlyexit_ssd.modeling import arguments
from earlyexit_ssd.modeling.heads import FactorisedPredictor, copy_rows, factorise, is_folded
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import norm_layer

T = TypeVar("T", bound=Callable)


# The kinds of branches, and the description of one exit.


@dataclass(frozen=True)
class Argument:
    """One argument of a branch kind: a number >= 0, or a bool if ``default`` is a bool.

    Attributes:
        default: default value; its type is the expected type.
        highest: largest allowed number.
        zero: whether 0 is allowed.
        by_exit: in :func:`describe_exits` the argument is a sequence, one number for all exits or one for each.
    """

    default: bool | float
    highest: float = MOST_CHANNELS
    zero: bool = True
    by_exit: bool = False

    def of_each(self, name: str, value: object, exits: int) -> list:
        """A list of the values of ``exits`` exits.

        Raises:
            EarlyExitError: wrong type, out of range, or wrong number of values.
        """
        given = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if isinstance(self.default, bool):
            if len(given) not in (1, exits) or not all(isinstance(one, bool) for one in given):
                raise EarlyExitError(f"{name} is {value!r:.60}, expected True or False, or one for each exit")
            return list(given) * (exits // len(given))
        whole = isinstance(self.default, int)
        if self.by_exit or isinstance(value, (list, tuple)):
            given = arguments.numbers(name, value, whole)
        elif whole:
            arguments.whole_number(name, value)
        given = tuple(int(one) if whole else float(one) for one in given)
        return arguments.one_for_each(name, given, exits, self.highest, self.zero)


@dataclass(frozen=True)
class Place:
    """The position of a branch, and the shapes of its input and outputs.

    Attributes:
        backbone: the detector's backbone, whose layers may be copied.
        layer, tap: trunk layer of the tap, and its (channels, height, width).
        grids, boxes_per_cell: (height, width) in cells of the head's feature maps, and default boxes per cell of each.
        num_classes: outputs per default box, background included.
        context: channels of the map that the previous exit passes on; 0 for none.
    """

    backbone: nn.Module
    layer: int
    tap: tuple[int, int, int]
    grids: Sequence[tuple[int, int]]
    boxes_per_cell: Sequence[int]
    num_classes: int
    context: int = 0


@dataclass(frozen=True)
class BranchKind:
    """A kind of branch: its builder ``build(place, **arguments)`` and its arguments."""

    build: Callable[..., Branch]
    arguments: Mapping[str, Argument]


BRANCHES: dict[str, BranchKind] = {}
"""Name -> branch kind; filled by :func:`register_branch`."""


def register_branch(name: str, **known: Argument) -> Callable[[T], T]:
    """Decorator: register a builder that takes a :class:`Place` and the arguments ``known`` as branch kind ``name``."""

    def register(build: T) -> T:
        BRANCHES[name] = BranchKind(build, known)
        return build

    return register


@dataclass(frozen=True)
class Exit:
    """Description of one early exit, shared by configuration, builders, model and model files.

    Attributes:
        layer: trunk layer that the exit is attached to (torchvision's numbering, the stem is 0).
        branch: kind of its branch, a name in :data:`BRANCHES`.
        arguments: arguments of the branch; missing ones get the kind's defaults.
        pixels: side of the small copy of the image, in pixels, if the exit is a glance: the trunk runs on the copy up
            to ``layer`` before the full-size pass. A glance has no branch (``empty``). None for other exits.

    Raises:
        EarlyExitError: an unknown kind or argument, or a value out of its range.
    """

    layer: int
    branch: str = "copied"
    arguments: dict[str, bool | float] = field(default_factory=dict)
    pixels: int | None = None

    def __post_init__(self) -> None:
        arguments.whole_number("layer", self.layer)
        if self.pixels is not None and not (arguments.is_number(self.pixels, whole=True) and self.pixels >= 32):
            raise EarlyExitError(f"a glance at {self.pixels!r:.60} pixels, expected a whole number from 32 on")
        if self.pixels is not None and self.branch != "empty":
            raise EarlyExitError(f"a glance with a branch '{self.branch!s:.60}': it has none, expected 'empty'")
        if not isinstance(self.branch, str) or self.branch not in BRANCHES:
            listed = ", ".join(BRANCHES)
            hint = nearest(str(self.branch), BRANCHES)
            raise EarlyExitError(f"branch is {self.branch!r:.60}, expected one of {listed}{hint}")
        known = BRANCHES[self.branch].arguments
        for name in self.arguments:
            if name not in known:
                hint = nearest(str(name), known) or f"; it takes {', '.join(known) or 'none'}"
                raise EarlyExitError(f"a {self.branch} branch has no argument {name!r:.60}{hint}")
        given = {name: self.arguments.get(name, argument.default) for name, argument in known.items()}
        wrap = {name: [value] if known[name].by_exit else value for name, value in given.items()}
        values = {name: known[name].of_each(name, value, 1)[0] for name, value in wrap.items()}
        object.__setattr__(self, "arguments", values)

    @property
    def name(self) -> str:
        """Name such as ``exit8``, or ``glance128`` for a glance at 128 pixels."""
        return f"exit{self.layer}" if self.pixels is None else f"glance{self.pixels}"

    @property
    def empty(self) -> bool:
        """Whether it has no branch."""
        return self.branch == "empty"


def exit_words() -> list[str]:
    """Keywords of :func:`describe_exits`."""
    return [
        "exit_layers",
        "branch",
        "empty",
        "glances",
        *dict.fromkeys(name for kind in BRANCHES.values() for name in kind.arguments),
    ]


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
        empty: layers in ``exit_layers`` whose exit has no branch.
        glances: (pixels, layer) of each glance, pixels increasing; they come before the other exits.
        given: arguments of the branches, one value for all exits or one for each; a kind uses those that it has.

    Raises:
        EarlyExitError: an invalid value.
    """
    layers = tuple(map(int, arguments.numbers("exit_layers", exit_layers, whole=True)))
    empty = arguments.numbers("empty", empty, whole=True)
    kinds = (branch,) if isinstance(branch, str) else tuple(branch) if isinstance(branch, (list, tuple)) else ()
    if len(kinds) not in (1, len(layers)):
        raise EarlyExitError(
            f"branch is {branch!r:.60}, expected one of {', '.join(BRANCHES)}, or one for each of {len(layers)} exits"
        )
    for layer in empty:
        if layer not in layers:
            raise EarlyExitError(f"empty has {layer}, expected some of the exits' layers {layers}")
    kinds = kinds * (len(layers) // len(kinds))
    exits = [_glance(one) for one in glances]
    declared = {name: argument for kind in BRANCHES.values() for name, argument in kind.arguments.items()}
    require_known(describe_exits, given, exit_words())
    values = {name: declared[name].of_each(name, value, len(layers)) for name, value in given.items()}
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        kind = "empty" if layer in empty else kind
        known = BRANCHES[kind].arguments if isinstance(kind, str) and kind in BRANCHES else {}
        exits.append(Exit(layer, kind, {name: value[index] for name, value in values.items() if name in known}))
    return tuple(exits)


def exit_keywords(exits: Sequence[Exit]) -> dict[str, object]:
    """The inverse of :func:`describe_exits`: its keywords for these exits, in plain types for model files."""
    glances = tuple((one.pixels, one.layer) for one in exits if one.pixels is not None)
    exits = exits[len(glances) :]
    words: dict[str, object] = {"exit_layers": tuple(one.layer for one in exits)}
    kinds = [one.branch for one in exits if not one.empty]
    words["branch"] = tuple(one.branch for one in exits) if len(set(kinds)) > 1 else (*kinds, "copied")[0]
    for name in exit_words()[4:]:
        having = [one.arguments[name] for one in exits if name in one.arguments]
        if having:
            argument = next(BRANCHES[one.branch].arguments[name] for one in exits if name in one.arguments)
            same = len(set(having)) == 1
            each = having[:1] if same else [one.arguments.get(name, having[0]) for one in exits]
            words[name] = each[0] if same and not argument.by_exit else tuple(each)
    words["empty"] = tuple(one.layer for one in exits if one.empty)
    return {**words, "glances": glances} if glances else words


def _glance(pair: object) -> Exit:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise EarlyExitError(f"glances has {pair!r:.60}, expected pairs of pixels and a trunk layer, such as (128, 12)")
    return Exit(pair[1], "empty", pixels=pair[0])


def check_exits(exits: Sequence[Exit], last_layer: int) -> None:
    """Check the order: glances of increasing pixels, then exits of increasing layers, all before ``last_layer``."""
    glances = [one for one in exits if one.pixels is not None]
    layers = tuple(one.layer for one in exits[len(glances) :])
    if layers:
        arguments.check_exit_layers(layers, last_layer)
    pixels = [one.pixels for one in exits[: len(glances)]]
    if None in pixels or pixels != sorted(set(pixels)):
        raise EarlyExitError(f"glances at {pixels} pixels: expected increasing sides, and glances before other exits")
    for one in glances:
        arguments.check_exit_layers((one.layer,), last_layer)


def takes_exits(function: T) -> T:
    """Decorator: the function or class also accepts the keywords of :func:`describe_exits` instead of ``exits``.

    A misspelt keyword raises ``TypeError`` with the nearest name.
    """
    if isinstance(function, type):
        function.__init__ = takes_exits(function.__init__)
        return function
    own = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def described(*args: object, **given: object) -> object:
        words = exit_words()
        require_known(function, given, [*own, *words])
        asked = {name: given.pop(name) for name in words if name in given}
        if asked:
            if given.get("exits") is not None:
                raise TypeError(f"{function.__qualname__} got exits and {next(iter(asked))}; give one of them")
            given["exits"] = describe_exits(**asked)
        return function(*args, **given)

    return described


class Branch(nn.Module):
    """Base class: from an exit's tap to head outputs for the same default boxes as the full path's.

    Attributes:
        context_channels: channels of the map that it passes on to the next exit; 0 for none.
    """

    context_channels = 0

    def inherit(self, backbone: nn.Module, head: nn.Module) -> None:
        """Copy current weights of the full path; a branch without such layers does nothing."""

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor | None:
        """A map for the head and the next exit, from the tap and the previous exit's context ``before``."""
        return None

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """A tap [N, C, H, W] to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4].

        Args:
            tap: output of the exit's trunk layer.
            context: result of :meth:`context` for it.
        """
        raise NotImplementedError  # abstract: each registered kind of branch has its own


def build_branches(
    exits: Sequence[Exit],
    backbone: nn.Module,
    taps: Sequence[tuple[int, int, int]],
    grids: Sequence[tuple[int, int]],
    boxes_per_cell: Sequence[int],
    num_classes: int,
) -> nn.ModuleDict:
    """Exit name -> its branch, before the full path's weights are copied; arguments as in `Place`."""
    branches, context = nn.ModuleDict(), 0
    for one, tap in zip(exits, taps, strict=True):
        place = Place(backbone, one.layer, tap, grids, boxes_per_cell, num_classes, context)
        branches[one.name] = BRANCHES[one.branch].build(place, **one.arguments)
        context = branches[one.name].context_channels
    return branches


# The kind "copied": the layers behind C4 of the full path as the branch's own copy, preceded by thinned copies of the
# layers that lead there. Copied weights need far fewer photos than new layers.


class Tail(nn.Module):
    """Copy of trunk layers 14 to 16 and the four extra blocks of a torchvision SSDLite, with its current weights.

    Args:
        backbone: torchvision's ``SSDLiteFeatureExtractorMobileNet``; its layers are copied.
        depth: how many of the two residual blocks (layers 14 and 15) to keep; the last ones stay.

    Attributes:
        in_channels: channels of the input map, 80 at width 1.0 with the reduced tail.
        out_channels: channels of the five output maps, fine to coarse.
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
        """Copy the full path's current weights."""
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
def inherit_head(mine: SSDLiteHead, full: SSDLiteHead) -> None:
    """Copy the full path's predictors of all maps but the first, whose channels differ in a branch.

    If only the full path's head is folded, background and the wanted classes are copied. Background then lacks the
    folded classes. If both heads are folded, all classes are copied.
    """
    theirs = full.classification_head
    rows = _inherited_rows(mine.classification_head, theirs)
    for new, old in zip(mine.classification_head.module_list[1:], theirs.module_list[1:], strict=True):
        new[0].load_state_dict(old[0].state_dict())
        _take_rows(new[1], old[1], theirs.num_columns, rows)
    for new, old in zip(mine.regression_head.module_list[1:], full.regression_head.module_list[1:], strict=True):
        new.load_state_dict(old.state_dict())


@torch.no_grad()
def inherit_first_predictors(mine: SSDLiteHead, full: SSDLiteHead, kept: Tensor) -> None:
    """Copy the full path's predictors of the first map, restricted to the branch's channels ``kept`` (indices)."""
    theirs = full.classification_head
    rows = _inherited_rows(mine.classification_head, theirs)
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


def _inherited_rows(mine: nn.Module, theirs: nn.Module) -> list[int]:
    """For each class index of the branch's head the class index in the full path's head."""
    if is_folded(theirs) and not is_folded(mine):
        return [0, *theirs.wanted.tolist()]
    return list(range(theirs.num_columns))


def _take_rows(new: nn.Module, old: nn.Conv2d, columns: int, rows: list[int]) -> None:
    """Copy the classes ``rows`` of ``old``; a factorised predictor gets the nearest weights of its rank."""
    if isinstance(new, FactorisedPredictor):
        whole = nn.Conv2d(new.in_channels, new.out_channels, 1).to(old.weight)
        copy_rows(whole, old, columns, rows)
        new.approximate(whole)
    else:
        copy_rows(new, old, columns, rows)


class ThinnedBlock(nn.Sequential):
    """Copy of an inverted residual block with fewer expansion channels and no residual connection.

    Args:
        layers: the block's layers: expansion, depthwise convolution, squeeze-excitation (optional), projection.
        keep: share of the expansion's channels to keep, in (0, 1].
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
        """Copy the block's current weights of the most important channels; returns the channels' indices.

        Importance is the norm of the channel's column in the projection times the root mean square of the depthwise
        output, sqrt(scale^2 + shift^2) of its BatchNorm (after Li et al. 2017, "Pruning filters for efficient
        ConvNets", who rank filters by their norms).
        """
        norm = next(layer[1] for layer in layers[:-1] if not hasattr(layer, "fc1") and layer[0].groups > 1)
        size = (norm.weight**2 + norm.bias**2).sqrt()
        importance = size * layers[-1][0].weight.flatten(1).norm(dim=0)
        channels = importance.topk(self.expanded_channels).indices.sort().values
        self.load_state_dict(nn.Sequential(*_slice(layers, channels)).state_dict())
        return channels


class CopiedShortCut(nn.Module):
    """Thinned copies of the layers without residual connection between a tap and C4's output.

    A trained network tolerates the removal of some residual blocks (Veit et al. 2016, "Residual networks behave like
    ensembles of relatively shallow networks"). Layers 2, 4, 7, 11 and C4 (13) have no residual connection.

    Args:
        backbone: torchvision's ``SSDLiteFeatureExtractorMobileNet``.
        layer: trunk layer of the tap.
        keep: share of every expansion's channels to keep, in (0, 1].

    Attributes:
        fine_channels: channels of C4's input; behind C4, of the tap.
        first_channels: channels of the copied C4's expansion, the head's first map; behind C4, the number that a copy
            would have.
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
        """Copy the full path's current weights; returns the kept channels of C4's expansion, None behind C4."""
        modules = [*self.before, *([self.c4] if self.c4 is not None else [])]
        blocks = _blocks_behind(backbone, self._layer)
        kept = [module.inherit(block) for module, block in zip(modules, blocks, strict=True)]
        return kept[-1] if kept else None

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """C4's input [N, fine_channels, S, S], C4's expansion (None behind C4), and C4's output."""
        fine = self.before(tap)
        if self.c4 is None:
            return fine, None, fine
        expansion, *rest = self.c4
        expanded = coarse = expansion(fine)
        for layer in rest:
            coarse = layer(coarse)
        return fine, expanded, coarse


def _kept(channels: int, keep: float) -> int:
    """``keep`` of the channels, rounded to a multiple of 8."""
    return min(channels, max(8, round(keep * channels / 8) * 8))


def _blocks_behind(backbone: nn.Module, layer: int) -> list[list[nn.Module]]:
    """The layers of each block behind ``layer`` that has no residual connection, up to C4."""
    first, second = backbone.features
    blocks = [list(block.block) for block in first[layer + 1 : -1] if not block.use_res_connect]
    return [*blocks, [first[-1], *second[0]]] if layer < C4_LAYER else []


def _slice(layers: Sequence[nn.Module], channels: Tensor) -> list[nn.Module]:
    """Copies of a block's layers with only these ``channels`` (indices) between expansion and projection."""
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
    """Replace the convolution's weights, and its channel counts accordingly."""
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


class CopiedBranch(Branch):
    """A branch of copied layers: short cut to C4's output, tail, first map, and head.

    The tail works on the second grid, which has a quarter of the first grid's cells. Its output is upsampled and added
    to the first map (top-down connection, Lin et al. 2017, FPN).

    Args:
        copied: thinned copies of the layers up to C4's output.
        finest_grid: side of the first map, cells.
        channels: channels of the first map, a new layer. 0: the first map is the copied C4's expansion, with copied
            predictors; an exit behind C4 gets a new layer of the same number of channels.
        tail: this branch's copy of the full path's tail.
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
        """Copy the full path's current weights."""
        self.tail.inherit(backbone)
        inherit_head(self.head, head)
        kept = self.copied.inherit(backbone)
        if self.fine is None:
            inherit_first_predictors(self.head, head, kept)
            nn.init.zeros_(self.top_down[1].weight)  # the first map starts as the copied one

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """See :meth:`Branch.forward`."""
        fine, expanded, coarse = self.copied(tap)
        coarse, maps = self.tail(coarse)
        size = (self._finest_grid, self._finest_grid)
        first = expanded if self.fine is None else F.interpolate(self.fine(fine), size)
        first = first + F.interpolate(self.top_down(coarse), size)
        return self.head([first if self.smooth is None else self.smooth(first), *maps])


_FIRST_CHANNELS = Argument(0)
_HEAD_RANK = Argument(0)


@register_branch(
    "copied",
    channels=_FIRST_CHANNELS,
    depth=Argument(2, TAIL_BLOCKS, by_exit=True),
    copy=Argument(0.5, 1, zero=False, by_exit=True),
    head_rank=_HEAD_RANK,
)
def build_copied(place: Place, *, channels: int, depth: int, copy: float, head_rank: int) -> CopiedBranch:
    """Arguments as in :class:`CopiedBranch`, `Tail` (``depth``) and `CopiedShortCut` (``copy``: its ``keep``)."""
    if not hasattr(place.backbone, "features") or len(place.backbone.features) != 2:
        raise EarlyExitError(
            "a copied branch copies layers of torchvision's SSDLite with a MobileNetV3, this detector has others: take "
            "branch='light' (EXITS.BRANCH light)"
        )
    # Behind C4 the trunk has already run some of the tail's blocks. With channels, older model files contain them.
    blocks = depth if channels else min(depth, LAST_LAYER - 1 - place.layer)
    return CopiedBranch(
        copied=CopiedShortCut(place.backbone, place.layer, copy),
        finest_grid=place.grids[0][0],
        channels=channels,
        tail=Tail(place.backbone, blocks),
        num_anchors=list(place.boxes_per_cell),
        num_classes=place.num_classes,
        head_rank=head_rank,
    )


# The kind "light": a few new layers, for any detector.


def _halvings(side: int, grid: int) -> int:
    """Number of stride-2 convolutions that shrink ``side`` cells towards ``grid`` without going below it."""
    count = 0
    while (side + 1) // 2 >= grid and side > grid:
        side, count = (side + 1) // 2, count + 1
    return count


class PyramidStep(nn.Module):
    """From a map to one of a given grid: stride-2 depthwise convolutions, then nearest-neighbour resizing if needed."""

    def __init__(self, channels: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        start, self._grid = sizes
        strides = [2] * min(_halvings(side, goal) for side, goal in zip(start, self._grid, strict=True)) or [1]
        self.layers = nn.Sequential()
        for stride in strides:
            self.layers.append(_depthwise(channels, kernel_size=3, stride=stride))
            self.layers.append(_pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, *grid]."""
        x = self.layers(x)
        return x if x.shape[-2:] == self._grid else F.interpolate(x, self._grid)


@register_branch("light", channels=_FIRST_CHANNELS, context=Argument(True), head_rank=_HEAD_RANK)
class LightBranch(Branch):
    """Squeeze-excitation on the tap (Hu et al. 2018), context from the previous exit, and a narrow feature pyramid.

    The context is the previous exit's narrow map, resized and added to this exit's. It is computed even if the previous
    exit is closed.

    Args:
        place: position and shapes.
        channels: channels of every map of the pyramid; 0 means 64.
        context: use the previous exit's context; a ``light`` exit passes one on.
        head_rank: channels between the two steps of the class predictors; 0 leaves them in one step.
    """

    def __init__(self, place: Place, *, channels: int, context: bool, head_rank: int) -> None:
        super().__init__()
        width = self.context_channels = channels or 64
        tap_channels = place.tap[0]
        self.attention = SqueezeExcitation(tap_channels, max(8, tap_channels // 4))
        self.narrow = _pointwise(tap_channels, width)
        self.cascade = _pointwise(place.context, width) if context and place.context else None
        sizes = [(place.tap[1], place.tap[2]), *(tuple(grid) for grid in place.grids)]
        self.pyramid = nn.ModuleList(PyramidStep(width, pair) for pair in pairwise(sizes))
        boxes = list(place.boxes_per_cell)
        self.head = SSDLiteHead([width] * len(boxes), boxes, place.num_classes, norm_layer)
        if head_rank:
            factorise(self.head.classification_head, head_rank)

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor:
        """The narrow map [N, channels, H, W], input of the pyramid."""
        x = self.narrow(self.attention(tap))
        if self.cascade is not None:
            x = x + F.interpolate(self.cascade(before), tap.shape[-2:])
        return x

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """See :meth:`Branch.forward`."""
        maps = []
        for step in self.pyramid:
            context = step(context)
            maps.append(context)
        return self.head(maps)


def _pointwise(in_channels: int, out_channels: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        in_channels, out_channels, kernel_size=1, norm_layer=norm_layer, activation_layer=nn.Hardswish
    )


def _depthwise(channels: int, kernel_size: int = 5, stride: int = 1) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        channels,
        channels,
        kernel_size=kernel_size,
        stride=stride,
        groups=channels,
        norm_layer=norm_layer,
        activation_layer=nn.Hardswish,
    )


# The kind "empty": no branch. Photos that leave there have no detections.

NO_OBJECT = -30.0
"""Logit of every class; background's is 0, so each class has a probability of 1e-13."""


class EmptyExit(Branch):
    """Predicts background for every default box without computation, and passes the previous context on.

    The logits hold no information, so routing needs a policy that predicts from the tap whether the photo is empty.

    Args:
        num_boxes: default boxes per image.
        num_classes: outputs per default box, background included.
        context_channels: channels of the previous exit's context.
    """

    def __init__(self, num_boxes: int, num_classes: int, context_channels: int = 0) -> None:
        super().__init__()
        self._num_boxes, self.num_classes, self.context_channels = num_boxes, num_classes, context_channels

    def context(self, tap: Tensor, before: Tensor | None) -> Tensor | None:
        """The context ``before``."""
        return before

    def forward(self, tap: Tensor, context: Tensor | None = None) -> Head:
        """Head outputs without objects for a tap [N, C, H, W]."""
        logits = tap.new_full((len(tap), self._num_boxes, self.num_classes), NO_OBJECT)
        logits[..., 0] = 0.0
        return {"cls_logits": logits, "bbox_regression": tap.new_zeros(len(tap), self._num_boxes, 4)}


@register_branch("empty")
def build_empty(place: Place) -> EmptyExit:
    """Build an :class:`EmptyExit`; it has no arguments."""
    return EmptyExit(num_default_boxes(place.grids, place.boxes_per_cell), place.num_classes, place.context)


def num_default_boxes(grids: Sequence[tuple[int, int]], boxes_per_cell: Sequence[int]) -> int:
    """Number of default boxes per image, from the grids (height, width) and the boxes per cell of each."""
    return sum(height * width * count for (height, width), count in zip(grids, boxes_per_cell, strict=True))

"""The branches of a detector, one for each of its early exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from earlyexit_ssd.config import LAST_LAYER, TAIL_BLOCKS
from earlyexit_ssd.modeling import arguments
from earlyexit_ssd.modeling.branch import Branch
from earlyexit_ssd.modeling.empty import EmptyExit, num_default_boxes
from earlyexit_ssd.modeling.tail import Tail
from earlyexit_ssd.modeling.thinned import CopiedShortCut

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite


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

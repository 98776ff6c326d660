"""The branches of a detector, one for each of its early exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from earlyexit_ssd.modeling import validate
from earlyexit_ssd.modeling.branch import Branch
from earlyexit_ssd.modeling.empty import EmptyExit, num_default_boxes
from earlyexit_ssd.modeling.tail import FIRST_TAIL_LAYER, Tail
from earlyexit_ssd.modeling.thinned import CopiedShortCut

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite


def build_branches(
    model: EarlyExitSSDLite,
    taps: Sequence[Tensor],
    *,
    channels: int,
    depth: Sequence[int],
    attention: bool,
    copy: Sequence[float],
    cascade: bool,
    head_rank: int,
) -> nn.ModuleDict:
    """Name of the exit -> its branch, not yet with the full path's weights.

    Args:
        model: with its trunk, head, exits and grids.
        taps: one per early exit, [1, C, S, S], for their shapes.
        channels, depth, attention, copy, cascade, head_rank: see the model.
    """
    boxes_per_cell = model.anchor_generator.num_anchors_per_location()
    shares = validate.one_for_each("copy", copy, model.num_early_exits, highest=1)
    depths = validate.one_for_each("depth", depth, model.num_early_exits, highest=2)
    branches = nn.ModuleDict()
    for index, (tap, share) in enumerate(zip(taps, shares, strict=True)):
        layer = model.exit_layers[index]
        if model.empty[index]:
            num_boxes = num_default_boxes(model.grids, boxes_per_cell)
            branches[model.exit_names[index]] = EmptyExit(num_boxes, model.num_classes)
            continue
        branches[model.exit_names[index]] = Branch(
            in_channels=tap.shape[1],
            in_grid=tap.shape[-1],
            skipped_layers=FIRST_TAIL_LAYER - 1 - layer,
            grids=[grid[0] for grid in model.grids],
            channels=channels,
            attention=attention,
            copied=CopiedShortCut(model.backbone, layer, share) if share else None,
            cascade=cascade and index > 0 and not model.empty[index - 1],
            tail=Tail(model.backbone, depths[index]),
            num_anchors=boxes_per_cell,
            num_classes=model.num_classes,
            head_rank=head_rank,
        )
    return branches

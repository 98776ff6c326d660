"""Compute each image to its exit and no further."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from earlyexit_ssd.modeling.outputs import ExitSignals, Head, pool_tap
from earlyexit_ssd.modeling.trunk import TrunkState

if TYPE_CHECKING:
    from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite


def route(model: EarlyExitSSDLite, x: Tensor) -> tuple[Head, Tensor, Tensor]:
    """Compute every image to the exit that its router takes, and no further.

    Args:
        model: with a router.
        x: normalised images [N, 3, S, S].

    Returns:
        the head outputs of each image's own exit, its exit's index [N] and its confidence there [N] (at the full
        path: the confidence by the same rule).
    """
    active = torch.arange(len(x), device=x.device)
    state = TrunkState(x)
    parts: list[tuple[Tensor, Head, int, Tensor]] = []
    for index, branch in enumerate(model.branches.values()):
        state = model.trunk.run(state, index)
        if not model.router.needs(index):
            continue
        head = branch(state.x)
        logits = head["cls_logits"]
        confidence = model.router.confidence(ExitSignals(logits, pool_tap(state.x), model.empty[index]), index)
        leave = model.router.leaves(confidence, index)
        if leave.all():
            parts.append((active, head, index, confidence))
            break
        if leave.any():
            parts.append((active[leave], {key: value[leave] for key, value in head.items()}, index, confidence[leave]))
            active, state = active[~leave], state.select(~leave)
    else:
        last = model.num_early_exits
        head = model.head(model.trunk.feature_maps(model.trunk.run(state, last)))
        confidence = model.router.confidence(ExitSignals(head["cls_logits"]), last)
        parts.append((active, head, last, confidence))
    return _in_order(parts)


def route_hybrid(model: EarlyExitSSDLite, x: Tensor) -> tuple[Head, Tensor, Tensor]:
    """Run the trunk for every image; an image whose exit is sure takes its classes from there, all take the boxes of
    the full path, whose classification head is computed for the others alone.

    Args and returns as :func:`route`; the exit's index is that of the classes.
    """
    open_images = torch.arange(len(x), device=x.device)
    state = TrunkState(x)
    parts: list[tuple[Tensor, Head, int, Tensor]] = []
    for index, branch in enumerate(model.branches.values()):
        state = model.trunk.run(state, index)
        tap = state.x[open_images]
        if not model.router.needs(index):
            continue
        if not len(open_images):
            continue
        head = branch(tap)
        logits = head["cls_logits"]
        confidence = model.router.confidence(ExitSignals(logits, pool_tap(tap), model.empty[index]), index)
        sure = model.router.leaves(confidence, index)
        parts.append((open_images[sure], {"cls_logits": logits[sure]}, index, confidence[sure]))
        open_images = open_images[~sure]
    last = model.num_early_exits
    maps = model.trunk.feature_maps(model.trunk.run(state, last))
    if len(open_images):
        logits = model.head.classification_head([feature[open_images] for feature in maps])
        confidence = model.router.confidence(ExitSignals(logits), last)
        parts.append((open_images, {"cls_logits": logits}, last, confidence))
    head, exit_index, confidence = _in_order(parts)
    return {**head, "bbox_regression": model.head.regression_head(maps)}, exit_index, confidence


def _in_order(parts: list[tuple[Tensor, Head, int, Tensor]]) -> tuple[Head, Tensor, Tensor]:
    """Join the images of all exits in the order in which they came."""
    indices = [torch.full_like(positions, index) for positions, _, index, _ in parts]
    if len(parts) == 1:  # logits are large: do not copy them for nothing
        return parts[0][1], indices[0], parts[0][3]
    positions = [positions for positions, *_ in parts]
    head = {key: _put(positions, [head[key] for _, head, _, _ in parts]) for key in parts[0][1]}
    return head, _put(positions, indices), _put(positions, [confidence for *_, confidence in parts])


def _put(positions: list[Tensor], values: list[Tensor]) -> Tensor:
    """[n_i, ...] of every part to [N, ...], each row at its position."""
    out = values[0].new_empty(sum(map(len, positions)), *values[0].shape[1:])
    for where, value in zip(positions, values, strict=True):
        out.index_copy_(0, where, value)
    return out

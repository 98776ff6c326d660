"""A model file in half precision: half the bytes, for weights that come with the project."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError


def half_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors of a state dict rounded to fp16, the counters as they are.

    All of one type are views into one buffer, since ``torch.save`` spends 200 bytes on each buffer and a model has a
    thousand tensors. BatchNorm's statistics are rounded too: a variance under fp16's smallest number (6e-8) becomes 0,
    and BatchNorm adds 1e-3 to it anyway. ``load_state_dict`` makes fp32 of it again.

    Raises:
        EarlyExitError: a value that is not finite in fp16 (over 65504, or NaN).
    """
    groups: dict[torch.dtype, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(torch.float16 if value.is_floating_point() else value.dtype, []).append(name)
    views: dict[str, Tensor] = {}
    for dtype, names in groups.items():
        buffer = torch.cat([state[name].detach().cpu().flatten().to(dtype) for name in names])
        sizes = [state[name].numel() for name in names]
        for name, part in zip(names, buffer.split(sizes), strict=True):
            if dtype == torch.float16 and not part.isfinite().all():
                raise EarlyExitError(f"{name}: a value that fp16 cannot hold (over 65504 or NaN); train it again")
            views[name] = part.view(state[name].shape)
    return {name: views[name] for name in state}


def half_file(content: dict[str, Any]) -> bytes:
    """The bytes of a model file (what ``save_model`` writes, as ``read_weights`` reads it) in half precision.

    The same content gives the same bytes, so that its sha256 can be compared.
    """
    buffer = io.BytesIO()  # torch.save writes a path's name into the file, but not a buffer's
    torch.save({**content, "model": half_state(content["model"])}, buffer)
    return buffer.getvalue()

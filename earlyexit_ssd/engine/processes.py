"""Several processes, started by torchrun, on one global batch or on shares of the photos."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed, nn

from earlyexit_ssd.errors import EarlyExitError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process, 0-based."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in at least one process; every process must ask."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value)


def gathered(value: T, active: bool = True) -> list[T]:
    """The ``value`` of every process, by rank; every process must ask. Tensors must be on the CPU. Without ``active`` a
    process works for itself, and only its own is returned."""
    values = [value] * (world_size() if active else 1)
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together(active: bool = True) -> Iterator[None]:
    """Raise in every process what one of them raises inside: its own EarlyExitError or OSError, else that of the lowest
    rank. At the end each process waits for the others. Without ``active`` a process works for itself."""
    error = None
    try:
        yield
    except (EarlyExitError, OSError) as caught:
        if not active or getattr(caught, "known_to_all", False):  # the others do not wait, or have raised it too
            raise
        error = caught
    first = next((one for one in (error, *gathered(error, active)) if one is not None), None)
    if first is not None:
        first.known_to_all = True
        raise first


def same_everywhere(module: nn.Module) -> None:
    """Give every process the first one's weights and buffers: BatchNorm's statistics are each process's own."""
    if world_size() > 1:
        for value in module.state_dict().values():
            distributed.broadcast(value, 0)


def mean_of(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars averaged over processes; the keys must be the same everywhere."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        distributed.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun describes in the environment; do nothing without one, or inside one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # The first process may cache taps or calibrate for hours while the others wait.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield
    finally:
        distributed.destroy_process_group()

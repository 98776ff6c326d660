"""Communication between the processes of torchrun, which share a batch or the photos."""

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
    """Return the number of processes, 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the 0-based number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Return True in the process that writes files."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Return True if ``flag`` is true in at least one process. Every process must call it."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return bool(value)


def gathered(value: T, active: bool = True) -> list[T]:
    """Return the values of all processes, by rank. Every process must call it. Tensors must be on the CPU. Without
    ``active``, return only the own value."""
    values = [value] * (world_size() if active else 1)
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together(active: bool = True) -> Iterator[None]:
    """Raise an EarlyExitError or OSError of one process in all processes. A process raises its own error, or the error
    of the lowest rank if it has none. At the end of the context each process waits for the others. If ``active`` is
    False, errors stay in their process."""
    error = None
    try:
        yield
    except (EarlyExitError, OSError) as caught:
        if not active or getattr(caught, "raised_in_all", False):  # the others do not wait here
            raise
        error = caught
    errors = [candidate for candidate in (error, *gathered(error, active)) if candidate is not None]
    if errors:
        errors[0].raised_in_all = True
        raise errors[0]


def broadcast_state(module: nn.Module) -> None:
    """Copy weights and buffers of rank 0 to all processes. BatchNorm's statistics would differ otherwise."""
    if world_size() > 1:
        for value in module.state_dict().values():
            distributed.broadcast(value, 0)


def mean_of(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the means of scalars over all processes. The keys must be the same in all of them."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        distributed.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of torchrun. Do nothing without torchrun, or if the group was joined before."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # 12 h, because the others wait while the first process caches taps or calibrates
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield
    finally:
        distributed.destroy_process_group()

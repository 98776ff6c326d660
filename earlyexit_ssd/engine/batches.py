"""Batches of photos for the loop, the same ones for the same (epoch, batch) in every run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class PhotoLoader:
    """A loader of photos as the loop wants it.

    Args:
        loader: from :func:`earlyexit_ssd.data.build_loader` with ``train=True``.
        device: where the batches go.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self._steps = len(loader)

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[list[Tensor], list[dict]]]:
        """The batches of ``epoch`` from number ``start`` on, on the device."""
        self.loader.sampler.set_epoch(epoch, start)
        for images, targets in self.loader:
            yield (
                [image.to(self.device, non_blocking=True) for image in images],
                to_device(targets, self.device),
            )


def to_device(targets: list[dict], device: torch.device) -> list[dict]:
    """Move the tensors of targets; numbers stay as they are."""
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in targets
    ]

"""Batches in an order that depends on seed and epoch only, the same for any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from earlyexit_ssd.data.dataset import DetectionDataset, Target
from earlyexit_ssd.data.seeding import mixed_seed
from earlyexit_ssd.errors import DataError

logger = logging.getLogger(__name__)


class EpochSampler(Sampler[int]):
    """The photos of one process, in the order of one epoch.

    Training shuffles by (seed, epoch). Batch k of that global order is dealt out over the processes, so
    that the processes' k-th batches together are the k-th batch of a single process. The incomplete batch
    at the end is dropped if there is a full one. Evaluation deals out the photos in their own order, all of
    them.

    Args:
        dataset: its ``set_epoch`` is called along, so that one call chooses order and views.
        batch_size: photos of a batch over all processes.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        train: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = 0
        self.epoch: int | None = None

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order, and how many batches of it are left out because a run is resumed behind them."""
        self.epoch, self.start = epoch, start
        self.dataset.set_epoch(epoch)

    def global_order(self) -> list[int]:
        """Indices of this epoch over all processes, those that ``start`` leaves out included."""
        count = len(self.dataset)
        if not self.train:
            return list(range(count))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch or 0))
        order = torch.randperm(count, generator=generator).tolist()
        return order[: max(count // self.batch_size, 1) * self.batch_size]

    def __iter__(self) -> Iterator[int]:
        # the batch size is a multiple of the process count, so this deals out every batch evenly
        return iter(self.global_order()[self.start * self.batch_size :][self.rank :: self.world_size])

    def __len__(self) -> int:
        count = len(self.dataset)
        if self.train and count >= self.batch_size:
            count -= count % self.batch_size
        count = max(0, count - self.start * self.batch_size)
        return len(range(self.rank, count, self.world_size))


def build_loader(
    dataset: DetectionDataset,
    batch_size: int,
    workers: int,
    train: bool,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of ``(list of images, list of targets)``; ``loader.sampler.set_epoch(epoch)`` goes first.

    Args:
        batch_size: photos of a batch over all processes.
        workers: processes that load; 0 loads in this one.
        rank, world_size: this process among those that train together.

    Raises:
        DataError: an empty data set, or a batch that cannot be dealt out evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        raise DataError(f"batch size {batch_size} cannot be dealt out evenly over {world_size} processes")
    if len(dataset) < (world_size if train else 1):
        raise DataError(f"a data set of {len(dataset)} photos is too small for {world_size} process(es)")
    if workers:
        _one_thread()  # a forked worker would wait for ever for the threads that OpenCV has started in this process
    sampler = EpochSampler(dataset, batch_size, train, seed, rank, world_size)
    return DataLoader(
        dataset,
        batch_size=batch_size // world_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        # its own, for without one an iterator draws from the global generator, which a resumed run must not
        generator=torch.Generator(),
    )


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Photos have different sizes and numbers of objects, so a batch is two lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _one_thread(worker: int = 0) -> None:
    """Workers share the cores; 0 ends OpenCV's own threads."""
    cv2.setNumThreads(0)

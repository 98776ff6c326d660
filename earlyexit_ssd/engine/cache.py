"""Cache of taps (outputs of the exits' trunk layers) on disk.

The trunk is frozen, so the taps are computed once per photo and view. A *view* is one random augmentation of a photo.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from earlyexit_ssd.console import progress
from earlyexit_ssd.engine.loop import to_device
from earlyexit_ssd.engine.processes import barrier, is_main
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import ArrayStore
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.detector import TapBatch, compute_taps
from earlyexit_ssd.modeling.trunk import evaluating

ARRAYS_OF_HEAD = ("cls_logits", "bbox_regression")


class TapCache:
    """Taps and full-path outputs of ``photos`` x ``views`` on disk. Row ``view * photos + index`` belongs to photo
    ``index``. ``model`` determines the shape of a row. ``dtype`` is ``float16`` (relative rounding error up to 2^-11)
    or ``float32`` (no rounding). The attribute ``gibibytes`` is the size on disk."""

    def __init__(self, folder: Path, model: EarlyExitSSDLite, photos: int, views: int, dtype: str = "float16") -> None:
        self.folder, self.photos, self.views, self._dtype = folder, photos, views, np.dtype(dtype)
        self._row = _blank_row(model, self._dtype)
        self.gibibytes = photos * views * sum(values.nbytes for values in self._row.values()) / 2**30

    def require_budget(self, gibibytes: float) -> None:
        """Raise EarlyExitError, with the number of views that fit, if the cache is larger than ``gibibytes``."""
        if self.gibibytes > gibibytes:
            fits = int(gibibytes * self.views / self.gibibytes)
            fix = f"set EXITS_PHASE.CACHE_VIEWS to {fits}" if fits else "set EXITS_PHASE.CACHE to false"
            needs = f"the tap cache of {self.photos} photos x {self.views} views needs {self.gibibytes:.1f} GiB"
            raise EarlyExitError(f"{needs}, EXITS_PHASE.CACHE_GIB allows {gibibytes}; raise CACHE_GIB, or {fix}")

    def build(self, model: EarlyExitSSDLite, loader: DataLoader, contents: str) -> None:
        """Compute the cache, unless it is complete; then open it for reading. Raise EarlyExitError if the disk is full.

        The ``loader`` yields the photos in order. The epoch of its sampler selects the view. ``contents`` identifies
        photos, boxes and views. If it or the weights have changed, the cache is computed again.
        """
        contents = f"{contents} {_weights_hash(model)} {self.views} {self._dtype}"
        store = ArrayStore(self.folder, "cache", contents, self.photos * self.views, self._row)
        if is_main() and not store.is_complete():
            fix = "set EXITS_PHASE.CACHE_VIEWS lower, or EXITS_PHASE.CACHE to false"
            store.create(f"the taps of {self.photos} photos x {self.views} views", fix)
            store.open()
            with evaluating(model):
                targets = list(self._fill(store, model, loader))
            store.flush()
            store.finish(targets)
        barrier()
        store.read()
        self._arrays, self.targets = store.arrays, store.rest

    def _fill(self, store: ArrayStore, model: EarlyExitSSDLite, loader: DataLoader) -> Iterator[dict[str, Tensor]]:
        """Write the arrays of all rows, and yield the target of each row."""
        device = next(model.parameters()).device
        row, largest = 0, float(np.finfo(self._dtype).max)
        bar = progress(desc="cache taps", total=self.photos * self.views)
        for view in range(self.views):
            loader.sampler.set_epoch(view)
            for images, targets in loader:
                batch = compute_taps(model, [image.to(device) for image in images], to_device(targets, device))
                for name, values in _named(batch).items():
                    values = values.clamp(-largest, largest).cpu().numpy()
                    store.arrays[name][row : row + len(images)] = values
                row += len(images)
                bar.update(len(images))
                for target in batch.targets:
                    # cloned, because a tensor from a worker process keeps a file open
                    yield {key: torch.as_tensor(target[key]).cpu().clone() for key in ("boxes", "labels", "image_id")}
        bar.close()

    def rows(self, rows: np.ndarray, device: torch.device) -> TapBatch:
        """Return a batch in fp32 of the rows with the indices ``rows``, in increasing order."""
        order = np.sort(rows)
        arrays = {name: array[order].astype(np.float32) for name, array in self._arrays.items()}
        values = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        head = {name: values.pop(name) for name in ARRAYS_OF_HEAD}
        return TapBatch(list(values.values()), head, to_device([self.targets[row] for row in order], device))


class CachedLoader:
    """Batches of cached taps. Each epoch has every photo once, in its next view, without an incomplete last batch.

    ``batch_size`` is the number of rows per step in all processes together. It is reduced to the number of photos.
    """

    def __init__(
        self, cache: TapCache, batch_size: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self.cache, self.seed, self.device, self.rank, self.world_size = cache, seed, device, rank, world_size
        self.batch_size = min(batch_size, cache.photos)

    def __len__(self) -> int:
        return self.cache.photos // self.batch_size

    def epoch(self, epoch: int, start: int) -> Iterable[TapBatch]:
        """Yield the batches of ``epoch`` from batch number ``start`` on."""
        photos = self.cache.photos
        order = np.random.default_rng([self.seed, epoch]).permutation(photos)
        views = (np.arange(photos) + epoch) % self.cache.views
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            yield self.cache.rows(views[chosen] * photos + chosen, self.device)


def _named(batch: TapBatch) -> dict[str, Tensor]:
    taps = {f"tap{index}": tap for index, tap in enumerate(batch.taps)}
    return {**taps, **{name: batch.head[name] for name in ARRAYS_OF_HEAD}}


def _blank_row(model: EarlyExitSSDLite, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Array name -> zeros [1, ...] in the shape of one photo's row."""
    blank = torch.zeros(3, *model.transform.fixed_size, device=next(model.parameters()).device)
    no_boxes = {"boxes": blank.new_zeros(0, 4), "labels": blank.new_zeros(0, dtype=torch.int64)}
    with evaluating(model):
        batch = compute_taps(model, [blank], [no_boxes])
    return {name: np.zeros(values.shape, dtype) for name, values in _named(batch).items()}


def _weights_hash(model: EarlyExitSSDLite) -> str:
    taps = [(exit.layer, exit.pixels) for exit in model.exits]
    digest = hashlib.sha256(repr((taps, model.transform.fixed_size)).encode())
    for value in (*model.backbone.state_dict().values(), *model.head.state_dict().values()):
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()

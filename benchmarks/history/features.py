"""Taps and maps of a frozen trunk for every photo of a split, computed once and stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.console import progress
from earlyexit_ssd.data import DetectionDataset, build_loader, to_coco
from earlyexit_ssd.data.dataset import fingerprint
from earlyexit_ssd.files import ArrayStore
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating

BATCH = 32


@dataclass(frozen=True)
class FeatureBatch:
    """Outputs of the trunk for N photos.

    Attributes:
        taps: per early exit [N, C, H, W].
        maps: input of the full path's head, fine to coarse.
        targets: per photo ``boxes`` [n, 4] xyxy in network pixels, ``labels`` [n], ``image_id`` and ``photo_size``
            (height, width) in pixels.
        seed: seed of the random numbers of this batch.
    """

    taps: list[Tensor]
    maps: list[Tensor]
    targets: list[dict[str, Tensor]]
    seed: tuple[int, ...] = ()

    def heads(self, model: EarlyExitSSDLite) -> list[Head]:
        """Return the outputs of every exit, the full path last."""
        return [*model.branch_heads(self.taps), model.head(self.maps)]


class Features:
    """The stored outputs of the trunk of ``model`` for the photos of a split, in order and without augmentation.

    The store in ``folder`` is written if it is missing, or if it is for other photos or weights.

    Attributes:
        key: identifies photos and weights.
        truth: the labelled objects.
    """

    def __init__(self, folder: Path, model: EarlyExitSSDLite, dataset: DetectionDataset) -> None:
        self.key, self.truth = f"{fingerprint(dataset)} {weights_hash(model)}", to_coco(dataset)
        self.dataset, self.photos = dataset, len(dataset)
        blank = torch.zeros(1, 3, *model.transform.fixed_size)
        row = {name: values.numpy().astype(np.float16) for name, values in self._compute(model, blank).items()}
        self._store = ArrayStore(folder, "features", self.key, self.photos, row)
        if not self._store.is_complete():
            self._write(model)
        self._store.read()
        self.targets: list[dict[str, Tensor]] = self._store.rest

    @staticmethod
    def _compute(model: EarlyExitSSDLite, images: Tensor) -> dict[str, Tensor]:
        with evaluating(model):
            taps, maps = model.trunk_maps(images)
        named = {f"tap{index}": tap for index, tap in enumerate(taps)}
        return named | {f"map{index}": values for index, values in enumerate(maps)}

    def _write(self, model: EarlyExitSSDLite) -> None:
        self._store.create(f"features of {self.photos} photos", "set DATA.LIMIT lower")
        self._store.open()
        targets: list[dict[str, Tensor]] = []
        for images, labels in progress(build_loader(self.dataset, BATCH, 0, False, 0), desc="features"):
            sizes = [torch.tensor(image.shape[-2:]) for image in images]
            batch, scaled = model.transform(images, labels)
            for name, values in self._compute(model, batch.tensors).items():
                self._store.arrays[name][len(targets) : len(targets) + len(images)] = values.numpy()
            for target, size in zip(scaled, sizes, strict=True):
                kept = {key: torch.as_tensor(target[key]) for key in ("boxes", "labels", "image_id")}
                targets.append({**kept, "photo_size": size})
        self._store.flush()
        self._store.finish(targets)

    def rows(self, rows: np.ndarray, seed: tuple[int, ...] = ()) -> FeatureBatch:
        """Return a batch of the photos with these indices."""
        rows = np.sort(rows)  # the arrays are read from disk
        values = {name: torch.from_numpy(array[rows].astype(np.float32)) for name, array in self._store.arrays.items()}
        taps = [values[name] for name in values if name.startswith("tap")]
        maps = [values[name] for name in values if name.startswith("map")]
        return FeatureBatch(taps, maps, [self.targets[row] for row in rows], seed)

    def batches(self, photos: int | None = None) -> Iterator[FeatureBatch]:
        """Yield the first ``photos`` photos in order, all by default."""
        photos = min(photos or self.photos, self.photos)
        for start in range(0, photos, BATCH):
            yield self.rows(np.arange(start, min(start + BATCH, photos)))


class FeatureLoader:
    """Batches of stored features for a `Trainer`. An incomplete last batch of an epoch is dropped."""

    def __init__(self, features: Features, seed: int) -> None:
        self.features, self.batch_size, self.seed = features, min(BATCH, features.photos), seed

    def __len__(self) -> int:
        return self.features.photos // self.batch_size

    def epoch(self, epoch: int, start: int) -> Iterator[FeatureBatch]:
        """Yield the batches of ``epoch`` from number ``start``."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.features.photos)
        for batch in range(start, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.features.rows(rows, (self.seed, epoch, batch))

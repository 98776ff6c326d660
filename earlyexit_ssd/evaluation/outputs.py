"""Run a detector on photos and keep the outputs of all exits, in memory or on disk."""

from __future__ import annotations

import itertools
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.console import progress
from earlyexit_ssd.engine.processes import failing_together, gathered, is_main
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import ArrayStore
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.outputs import ExitOutputs, ExitSignals
from earlyexit_ssd.modeling.trunk import evaluating

T = TypeVar("T")
Targets = list[dict[str, Tensor | int]]
Batches = Iterable[tuple[list[Tensor], Targets]]
ImageDetections = dict[str, Tensor]
"""Detections of one photo: ``boxes`` [N, 4] xyxy in pixels of the photo, ``scores`` [N] and ``labels`` [N]."""
BatchDetections = tuple[list[int], list[list[ImageDetections]]]
"""Image ids of a batch, and per exit the detections of each photo, on the CPU."""


def shares_photos(loader: Batches) -> bool:
    """Return whether the loader gives each process a part of the photos, see `earlyexit_ssd.data.build_loader`."""
    return getattr(getattr(loader, "sampler", None), "world_size", 1) > 1


def over_batches(
    model: nn.Module, loader: Batches, of_batch: Callable[[list[Tensor], Targets], T], title: str | None
) -> list[T]:
    """Return the results of ``of_batch(images, targets)`` for every batch in order, in eval mode without gradients.

    The images are on the model's device. ``title`` is the title of the progress bar; None: no bar. If the photos are
    split over processes, each process computes its part and gets all results. Then tensors in the results must be on
    the CPU.
    """
    shared = shares_photos(loader)
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    with failing_together(shared), evaluating(model):
        results = [
            of_batch([image.to(device) for image in images], targets)
            for images, targets in progress(loader, desc=title)
        ]
    rounds = itertools.zip_longest(*gathered(results, shared))  # the processes take turns, batch by batch
    return [result for of_round in rounds for result in of_round if result is not None]


@dataclass(frozen=True)
class Collected:
    """Detections and confidences of every exit for every photo, on the CPU."""

    image_ids: list[int]  # in the order of the loader
    detections: list[dict[int, ImageDetections]]  # per exit, shallow to deep: image id -> detections
    confidences: list[Tensor]  # per exit: the router's confidence [n] in the order of image_ids; [] without a router


def collect(
    model: nn.Module, loader: Batches, router: Any | None = None, title: str | None = "evaluate exits"
) -> Collected:
    """Run all exits of an `EarlyExitSSDLite` on every photo of ``loader``, in one forward pass per photo.

    ``loader`` yields batches of (images, targets) without augmentation. ``router`` is the `ExitRouter` that computes
    the confidences. An image id that occurs twice raises DataError.
    """
    exits = range(len(model.exit_names))
    routed = exits if router is not None else ()

    def of_batch(images: list[Tensor], targets: Targets) -> tuple[BatchDetections, list[Tensor]]:
        outputs = model.exit_outputs(images)
        if router is not None and router.hybrid:
            outputs = outputs.on_full_boxes()
        detections = [model.detections(outputs, index) for index in exits]
        confidences = [router.confidence(outputs.signals(index), index).float().cpu() for index in routed]
        return _batch_on_cpu(targets, detections), confidences

    batches = over_batches(model, loader, of_batch, title)
    image_ids, detections = _join_batches([detections for detections, _ in batches], len(exits))
    confidences = [[of_exits[index] for _, of_exits in batches] for index in routed]
    return Collected(image_ids, detections, [torch.cat(values or [torch.zeros(0)]) for values in confidences])


def collect_detections(model: nn.Module, loader: Batches, title: str | None = "evaluate") -> dict[int, ImageDetections]:
    """Run any detector with torchvision's interface. Return image id -> detections, on the CPU."""
    batches = over_batches(model, loader, lambda images, targets: _batch_on_cpu(targets, [model(images)]), title)
    return _join_batches(batches, 1)[1][0]


def _join_batches(batches: Sequence[BatchDetections], exits: int) -> tuple[list[int], list[dict[int, ImageDetections]]]:
    """Return the image ids of all batches, and per exit image id -> detections. A repeated id raises DataError."""
    image_ids = [image_id for ids, _ in batches for image_id in ids]
    if repeated := [image_id for image_id, count in Counter(image_ids).items() if count > 1]:
        raise DataError(f"image id {repeated[0]} occurs twice in the evaluated data set; ids must be unique")
    exit_detections = ([image for _, of_exits in batches for image in of_exits[index]] for index in range(exits))
    return image_ids, [dict(zip(image_ids, of_images, strict=True)) for of_images in exit_detections]


def on_cpu(detections: dict[str, Tensor]) -> ImageDetections:
    """Return the detections of one photo on the CPU, without other outputs of the model."""
    boxes, scores = (detections[key].float().cpu() for key in ("boxes", "scores"))
    return {"boxes": boxes, "scores": scores, "labels": detections["labels"].cpu()}


def _batch_on_cpu(targets: Targets, exits: Sequence[Sequence[dict[str, Tensor]]]) -> BatchDetections:
    return [int(target["image_id"]) for target in targets], [list(map(on_cpu, images)) for images in exits]


def choose_exits(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """Return the exit that each photo takes, int64 [n]: the first whose confidence reaches its threshold, otherwise the
    full path. ``confidences`` are one [n] per exit, the full path last. ``thresholds`` are one per early exit."""
    return torch.from_numpy(choose([values.numpy() for values in confidences], thresholds)).long()


def exit_share(choice: np.ndarray | Tensor, exit_names: Sequence[str]) -> dict[str, float]:
    """Return the share of the photos that leave at each exit, in [0, 1]. The sum is 1, or 0 without photos.
    ``choice`` is the exit of each photo, int [n]."""
    counts = np.bincount(np.asarray(choice), minlength=len(exit_names)).tolist()
    return {name: count / max(len(choice), 1) for name, count in zip(exit_names, counts, strict=True)}


# Outputs of all exits on disk. From them any policy and threshold is evaluated without another forward pass.

REPLAY_BATCH = 64  # photos whose logits are in memory at a time


@dataclass(frozen=True)
class Recording:
    """The recorded outputs of all exits for n photos, by increasing image id. The arrays are memory-mapped files."""

    image_ids: list[int]  # increasing
    detections: list[dict[int, ImageDetections]]  # per exit, the full path last: image id -> detections
    labels: np.ndarray  # labels of the default boxes after matching with the objects, [n, A]
    exit_names: list[str]  # per early exit
    empty: list[bool]  # per early exit: it has no branch
    logits: list[np.ndarray]  # per early exit: raw class logits [n, A, C]; [n, 1, C] for an empty exit
    taps: list[np.ndarray]  # per early exit: the pooled tap [n, 2 * channels]

    def __len__(self) -> int:
        return len(self.image_ids)

    def only(self, names: Sequence[str]) -> typing.Self:
        """Return the recording of a model that has only these early exits and the full path."""
        exits = [self.exit_names.index(name) for name in names]
        fields = ("exit_names", "empty", "logits", "taps")
        parts = {field: [getattr(self, field)[index] for index in exits] for field in fields}
        return replace(self, detections=[self.detections[index] for index in (*exits, -1)], **parts)

    @property
    def early_exits(self) -> int:
        """Number of exits before the full path."""
        return len(self.logits)

    def signals(self, exit_index: int) -> Iterator[ExitSignals]:
        """Yield the router's inputs at an early exit, batch by batch."""
        for start in range(0, len(self), REPLAY_BATCH):
            rows = slice(start, start + REPLAY_BATCH)
            arrays = self.logits[exit_index][rows], self.taps[exit_index][rows]
            logits, tap = (torch.from_numpy(np.array(array)) for array in arrays)
            yield ExitSignals(logits, tap, self.empty[exit_index])

    @torch.no_grad()
    def confidences(self, router: Any) -> list[np.ndarray]:
        """Return the router's confidence in every photo, [n] per early exit."""
        confidences = []
        for index in range(self.early_exits):
            batches = [router.confidence(signals, index).float() for signals in self.signals(index)]
            confidences.append(torch.cat(batches or [torch.zeros(0)]).numpy())
        return confidences


def record(
    model: nn.Module, loader: Batches, image_ids: Sequence[int], folder: Path, key: str, min_score: float | None = None
) -> Recording:
    """Return the recording in ``folder``. Record it first if it is missing, or if photos, weights or exits differ.

    Args:
        loader: batches of (images, targets) without augmentation. If its photos are split over processes, all processes
            must have the same ``folder``.
        image_ids: ids of all photos.
        key: text that identifies the photos.
        min_score: if given, the full path's detections with at least this score replace the targets' objects.

    Raises:
        DataError: an image id occurs twice.
    """
    contents = f"by id {key} {weights_hash(model)}"
    contents += "" if min_score is None else f" taught from {min_score}"
    image_ids = sorted(image_ids)
    store = ArrayStore(folder, "recording", contents, len(image_ids), _example_rows(model))
    if not all(gathered(store.is_complete(), shares_photos(loader))):
        _write(store, model, loader, image_ids, min_score)
        store.read()
    names, arrays = list(model.exit_names[:-1]), store.arrays
    logits, taps = ([arrays[f"{kind}{index}"] for index in range(len(names))] for kind in ("logits", "tap"))
    return Recording(image_ids, store.rest, arrays["labels"], names, list(model.empty), logits, taps)


def _write(store: ArrayStore, model: nn.Module, loader: Batches, image_ids: Sequence[int], score: float | None) -> None:
    shared = shares_photos(loader)
    manages_store = is_main() or not shared
    with failing_together(shared):
        if manages_store:
            fix = "name another folder (--out), or fewer photos (CALIBRATION.TRAIN_PHOTOS, DATA.LIMIT)"
            store.create(f"recording {store.records} photos", fix)
    store.open()
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}

    def of_batch(images: list[Tensor], targets: Targets) -> BatchDetections:
        outputs = model.exit_outputs(images)
        detections = [model.detections(outputs, index) for index in range(len(model.exit_names))]
        labelled = targets
        if score is not None:
            labelled = [{key: image[key][image["scores"] >= score] for key in image} for image in detections[-1]]
        rows = [row_of[int(target["image_id"])] for target in targets]
        for name, values in _rows(model, outputs, labelled).items():
            store.arrays[name][rows] = values
        return _batch_on_cpu(targets, detections)

    batches = over_batches(model, loader, of_batch, "record exits")
    with failing_together(shared):
        store.flush()
    with failing_together(shared):
        if manages_store:
            store.finish(_join_batches(batches, len(model.exit_names))[1])


def _example_rows(model: nn.Module) -> dict[str, np.ndarray]:
    """Return `_rows` of a black photo without objects, for dtypes and shapes."""
    photo = torch.zeros(3, *model.transform.fixed_size, device=next(model.parameters()).device)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with evaluating(model):
        return _rows(model, model.exit_outputs([photo]), [target])


def _rows(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> dict[str, np.ndarray]:
    """Return the arrays of a batch, by their name in the store: ``labels``, ``logits0``, ``tap0``, ``logits1``, ..."""
    rows = {"labels": _labels(model, outputs, targets)}
    for index, tap in enumerate(outputs.taps):
        logits = outputs.heads[index]["cls_logits"]
        # an empty exit has the same logits for all default boxes
        rows |= {f"logits{index}": logits[:, :1] if model.empty[index] else logits, f"tap{index}": tap}
    floats = {name: values.float() for name, values in rows.items() if values.is_floating_point()}
    return {name: values.cpu().numpy() for name, values in (rows | floats).items()}


def _labels(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> Tensor:
    """Return the labels of the default boxes after matching with the objects, int16 [N, A]. Label 0 is background."""
    device = outputs.anchors[0].device
    scaled = []
    for target, (height, width), photo in zip(targets, outputs.network_sizes, outputs.photo_sizes, strict=True):
        scale = torch.tensor([width / photo[1], height / photo[0]] * 2, device=device)
        counted = torch.as_tensor(target.get("iscrowd", torch.zeros(len(target["labels"])))) == 0
        boxes, labels = target["boxes"][counted], target["labels"][counted]
        scaled.append({"boxes": boxes.to(device) * scale, "labels": labels.to(device)})
    return model.assign(scaled, outputs.anchors).labels.to(torch.int16)

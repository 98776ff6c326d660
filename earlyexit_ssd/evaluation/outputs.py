"""Run a detector on photos and keep the outputs of every exit, in memory or on disk."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.engine.processes import failing_together, gathered, is_main
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.files import ArrayStore
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.outputs import ExitOutputs, ExitSignals
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.progress import progress

T = TypeVar("T")
Targets = list[dict[str, Tensor | int]]
Batches = Iterable[tuple[list[Tensor], Targets]]
ImageDetections = dict[str, Tensor]  # boxes [N, 4] xyxy in the photo's pixels, scores [N] and labels [N] of one photo
BatchDetections = tuple[list[int], list[list[ImageDetections]]]
"""The image ids of a batch, and for each exit the detections of its photos, on the CPU."""


def shares_photos(loader: Batches) -> bool:
    """Whether the photos of a loader are split over processes, see `earlyexit_ssd.data.build_loader`."""
    return getattr(getattr(loader, "sampler", None), "world_size", 1) > 1


def over_batches(
    model: nn.Module, loader: Batches, of_batch: Callable[[list[Tensor], Targets], T], title: str | None
) -> list[T]:
    """Results of ``of_batch(images, targets)`` for every batch, in order, in eval mode without gradients.

    The images are on the model's device. If the photos of ``loader`` are split over processes, each process computes
    its part and gets all results: tensors in them must be on the CPU.
    """
    shared = shares_photos(loader)
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    with failing_together(shared), evaluating(model):
        own = [
            of_batch([image.to(device) for image in images], targets)
            for images, targets in progress(loader, desc=title)
        ]
    turns = itertools.zip_longest(*gathered(own, shared))  # the first batch is rank 0's, the second rank 1's, ...
    return [result for turn in turns for result in turn if result is not None]


@dataclass(frozen=True)
class Collected:
    """Detections and confidences of every exit for every photo, on the CPU; without a router no confidences."""

    image_ids: list[int]  # in the order of the loader
    detections: list[dict[int, ImageDetections]]  # per exit, shallow to deep, image id -> detections
    confidences: list[Tensor]  # per exit the router's confidence [n], in the order of image_ids


def collect(
    model: nn.Module, loader: Batches, router: Any | None = None, title: str | None = "evaluate exits"
) -> Collected:
    """Run all exits of an `EarlyExitSSDLite` on every photo of ``loader``, in one forward pass per photo.

    The photos come without augmentation. An `ExitRouter` computes the confidences. ``title`` is that of the progress
    bar; None: no bar. A DataError if an image id occurs twice.
    """
    exits = range(len(model.exit_names))
    scored = exits if router is not None else ()

    def of_batch(images: list[Tensor], targets: Targets) -> tuple[BatchDetections, list[Tensor]]:
        outputs = model.exit_outputs(images)
        if router is not None and router.hybrid:
            outputs = outputs.on_full_boxes()
        found = [model.detections(outputs, index) for index in exits]
        confidences = [router.confidence(outputs.signals(index), index).float().cpu() for index in scored]
        return _batch_on_cpu(targets, found), confidences

    batches = over_batches(model, loader, of_batch, title)
    image_ids, detections = _joined([found for found, _ in batches], len(exits))
    confidences = [[of_exits[index] for _, of_exits in batches] for index in scored]
    return Collected(image_ids, detections, [torch.cat(values or [torch.zeros(0)]) for values in confidences])


def collect_detections(model: nn.Module, loader: Batches, title: str | None = "evaluate") -> dict[int, ImageDetections]:
    """Image id -> detections of any detector with torchvision's interface."""
    batches = over_batches(model, loader, lambda images, targets: _batch_on_cpu(targets, [model(images)]), title)
    return _joined(batches, 1)[1][0]


def _joined(batches: Sequence[BatchDetections], exits: int) -> tuple[list[int], list[dict[int, ImageDetections]]]:
    """The image ids of all batches, and per exit the detections by image id; a repeated id is an error."""
    image_ids = [image_id for ids, _ in batches for image_id in ids]
    if twice := [image_id for image_id, count in Counter(image_ids).items() if count > 1]:
        raise DataError(f"image id {twice[0]} occurs twice in the evaluated data set; ids must be unique")
    found = ([one for _, of_exits in batches for one in of_exits[index]] for index in range(exits))
    return image_ids, [dict(zip(image_ids, of_exit, strict=True)) for of_exit in found]


def on_cpu(found: dict[str, Tensor]) -> ImageDetections:
    """A photo's detections on the CPU, without other outputs of the model."""
    boxes, scores = (found[key].float().cpu() for key in ("boxes", "scores"))
    return {"boxes": boxes, "scores": scores, "labels": found["labels"].cpu()}


def _batch_on_cpu(targets: Targets, exits: Sequence[Sequence[dict[str, Tensor]]]) -> BatchDetections:
    return [int(target["image_id"]) for target in targets], [list(map(on_cpu, found)) for found in exits]


def choose_exits(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """The exit of every photo, int64 [n]: the first whose confidence reaches its threshold, otherwise the last, which
    has none. ``confidences`` are [n] per exit, shallow to deep."""
    if len(thresholds) != len(confidences) - 1:
        raise EarlyExitError(f"{len(thresholds)} thresholds for {len(confidences) - 1} early exits: give one for each")
    return torch.from_numpy(choose([values.numpy() for values in confidences], thresholds)).long()


def exit_share(chosen: Tensor, exit_names: Sequence[str]) -> dict[str, float]:
    """Share of the photos that leave at each exit, in [0, 1], summing to 1 (all 0 without photos)."""
    counts = torch.bincount(chosen, minlength=len(exit_names)).tolist()
    return {name: count / max(len(chosen), 1) for name, count in zip(exit_names, counts, strict=True)}


def mean_cost(chosen: Tensor, costs: Sequence[float]) -> float | None:
    """Mean cost per photo, from the ``costs`` per exit (milliseconds or MMACs); None without photos."""
    return torch.tensor(costs, dtype=torch.float64)[chosen].mean().item() if len(chosen) else None


# Outputs of every exit on disk: one forward pass per photo, then any policy and threshold without the network.

REPLAY_BATCH = 64  # photos whose logits are in memory at a time


@dataclass(frozen=True)
class Recording:
    """The recorded outputs of every exit for the photos of a split, in the order of ``image_ids`` [n]; arrays are on
    disk."""

    image_ids: list[int]
    detections: list[dict[int, ImageDetections]]  # per exit, the full path last, image id -> detections
    labels: np.ndarray  # labels of the default boxes after matching with the objects, [n, A]
    exit_names: list[str]  # of the early exits, as the following
    empty: list[bool]  # whether they have no branch
    logits: list[np.ndarray]  # raw class logits [n, A, C]; [n, 1, C] for an empty exit
    taps: list[np.ndarray]  # the pooled tap [n, 2 * channels]

    def __len__(self) -> int:
        return len(self.image_ids)

    def only(self, names: Sequence[str]) -> Recording:
        """The recording of a model with only these early exits and the full path."""
        exits = [self.exit_names.index(name) for name in names]
        fields = ("exit_names", "empty", "logits", "taps")
        parts = {field: [getattr(self, field)[index] for index in exits] for field in fields}
        return replace(self, detections=[self.detections[index] for index in (*exits, -1)], **parts)

    @property
    def early_exits(self) -> int:
        """Number of exits before the full path."""
        return len(self.logits)

    def signals(self, exit_index: int) -> Iterator[ExitSignals]:
        """The router's inputs at an early exit, batch by batch."""
        for start in range(0, len(self), REPLAY_BATCH):
            rows = slice(start, start + REPLAY_BATCH)
            stored = self.logits[exit_index][rows], self.taps[exit_index][rows]
            logits, tap = (torch.from_numpy(np.array(values)) for values in stored)
            yield ExitSignals(logits, tap, self.empty[exit_index])

    @torch.no_grad()
    def confidences(self, router: Any) -> list[Tensor]:
        """Per early exit the router's confidence in every photo, [n]."""
        found = []
        for index in range(self.early_exits):
            batches = [router.confidence(signals, index).float() for signals in self.signals(index)]
            found.append(torch.cat(batches or [torch.zeros(0)]))
        return found


def record(
    model: nn.Module, loader: Batches, photos: int, folder: Path, key: str, pseudo_label_score: float | None = None
) -> Recording:
    """The recording in ``folder``; it is written first if it is missing or of other photos, weights or exits.

    Args:
        loader: batches of (images, targets) without augmentation. If its photos are split over processes, all of them
            write to the same ``folder``.
        key: text that identifies the photos; weights and exits are added to it.
        pseudo_label_score: the full path's detections of at least this score are the labels. None: the targets are.

    Raises:
        DataError: an image id occurs twice.
    """
    # empty exits have no weights, so the hash lacks them
    contents = f"{key} {weights_hash(model)} {model.exit_names} {tuple(model.empty)}"
    contents += "" if pseudo_label_score is None else f" taught from {pseudo_label_score}"
    store = ArrayStore(folder, "recording", contents, photos, _blank_rows(model))
    if not all(gathered(store.is_complete(), shares_photos(loader))):
        _write(store, model, loader, pseudo_label_score)
        store.read()
    names, arrays = list(model.exit_names[:-1]), store.arrays
    logits, taps = ([arrays[f"{kind}{index}"] for index in range(len(names))] for kind in ("logits", "tap"))
    return Recording(*store.rest, arrays["labels"], names, list(model.empty), logits, taps)


def _write(store: ArrayStore, model: nn.Module, loader: Batches, score: float | None) -> None:
    shared = shares_photos(loader)
    first = is_main() or not shared
    with failing_together(shared):
        if first:
            fix = "name another folder (--out), or fewer photos (CALIBRATION.TRAIN_PHOTOS, DATA.LIMIT)"
            store.create(f"recording {store.records} photos", fix)
    store.open()
    places = iter(list(loader.sampler) if shared else range(store.records))

    def of_batch(images: list[Tensor], targets: Targets) -> BatchDetections:
        outputs = model.exit_outputs(images)
        found = [model.detections(outputs, index) for index in range(len(model.exit_names))]
        labelled = targets if score is None else [_pseudo_labels(one, score) for one in found[-1]]
        rows = list(itertools.islice(places, len(images)))
        for name, values in _rows(model, outputs, labelled).items():
            store.arrays[name][rows] = values
        return _batch_on_cpu(targets, found)

    batches = over_batches(model, loader, of_batch, "record exits")
    with failing_together(shared):
        store.flush()
    with failing_together(shared):
        if first:
            store.finish(_joined(batches, len(model.exit_names)))


def _blank_rows(model: nn.Module) -> dict[str, np.ndarray]:
    """`_rows` of a blank photo without objects."""
    blank = torch.zeros(3, *model.transform.fixed_size, device=next(model.parameters()).device)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with evaluating(model):
        return _rows(model, model.exit_outputs([blank]), [nothing])


def _pseudo_labels(found: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    """Detections of at least this score as a target."""
    keep = found["scores"] >= score
    return {"boxes": found["boxes"][keep].float(), "labels": found["labels"][keep]}


def _rows(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> dict[str, np.ndarray]:
    rows = {"labels": _labels(model, outputs, targets)}
    for index, tap in enumerate(outputs.taps):
        logits = outputs.heads[index]["cls_logits"]
        # all default boxes of an empty exit have the same logits: store one
        rows |= {f"logits{index}": logits[:, :1] if model.empty[index] else logits, f"tap{index}": tap}
    return {name: (one.float() if one.is_floating_point() else one).cpu().numpy() for name, one in rows.items()}


def _labels(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> Tensor:
    """Labels of the default boxes after matching, [N, A] int16; 0 is background."""
    device = outputs.anchors[0].device
    scaled = []
    for target, (height, width), photo in zip(targets, outputs.network_sizes, outputs.photo_sizes, strict=True):
        scale = torch.tensor([width / photo[1], height / photo[0]] * 2, device=device)
        counted = torch.as_tensor(target.get("iscrowd", torch.zeros(len(target["labels"])))) == 0
        boxes, labels = target["boxes"][counted], target["labels"][counted]
        scaled.append({"boxes": boxes.to(device) * scale, "labels": labels.to(device)})
    return model.assign(scaled, outputs.anchors).labels.to(torch.int16)

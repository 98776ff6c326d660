"""Run a detector over photos and keep what every exit says: in memory, or on disk for any policy and threshold."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.engine.processes import failing_together, gathered, is_main
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.files import make_folder, new_array, require_space, stored_key, write_json, write_torch, writing
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.outputs import ExitOutputs, ExitSignals
from earlyexit_ssd.progress import progress

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every sub-module has its own train/eval flag back.

    The flags are restored one by one, because a model with a frozen part is in neither mode as a whole.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


# Run a detector over a data set once and keep what every exit found.

Targets = list[dict[str, Tensor | int]]
Batches = Iterable[tuple[list[Tensor], Targets]]
ImageDetections = dict[str, Tensor]
"""``boxes`` [N,4] xyxy, ``scores`` [N] and ``labels`` [N] of one photo."""


def shares_photos(loader: Batches) -> bool:
    """Whether several processes share the photos of a loader, see `earlyexit_ssd.data.build_loader`."""
    return getattr(getattr(loader, "sampler", None), "world_size", 1) > 1


def over_batches(
    model: nn.Module, loader: Batches, of_batch: Callable[[list[Tensor], Targets], T], title: str | None
) -> list[T]:
    """``of_batch(images, targets)`` of every batch, in order, with the images on the model's device, in eval mode and
    without gradients.

    Processes that share the photos of ``loader`` compute a part each, and all of them get everything. What is returned
    is sent between them then: tensors must be on the CPU.
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
    """What every exit says about every photo, on the CPU.

    image_ids: in the order of the loader.
    detections: per exit, shallow to deep, image id -> ``boxes`` [N,4] xyxy in the photo's pixels, ``scores``
        [N], ``labels`` [N].
    confidences: per exit the router's confidence [n] in the order of ``image_ids``; empty without a router.
    """

    image_ids: list[int]
    detections: list[dict[int, ImageDetections]]
    confidences: list[Tensor]


def collect(
    model: nn.Module, loader: Batches, router: Any | None = None, title: str | None = "evaluate exits"
) -> Collected:
    """All exits of ``model`` on every photo of ``loader``, each photo computed once.

    Args:
        model: an `EarlyExitSSDLite`; its mode is restored afterwards.
        loader: batches of (images, targets) as `earlyexit_ssd.data.build_loader` makes them, without
            augmentation.
        router: an `ExitRouter` for the confidences, or None for none.
        title: of the progress bar; None shows none.

    Raises:
        DataError: an image id occurs twice.
    """
    exits = range(len(model.exit_names))
    scored = exits if router is not None else ()

    def of_batch(images: list[Tensor], targets: Targets) -> tuple[list[int], list[list[ImageDetections]], list[Tensor]]:
        outputs = model.exit_outputs(images)
        if router is not None and router.hybrid:
            outputs = outputs.on_full_boxes()
        found = [list(map(compact, model.detections(outputs, index))) for index in exits]
        confidences = [router.confidence(outputs.signals(index), index).float().cpu() for index in scored]
        return _image_ids(targets), found, confidences

    batches = over_batches(model, loader, of_batch, title)
    image_ids, detections = _joined([batch[:2] for batch in batches], len(exits))
    confidences = [[of_exits[index] for _, _, of_exits in batches] for index in scored]
    return Collected(image_ids, detections, [torch.cat(values or [torch.zeros(0)]) for values in confidences])


def collect_detections(model: nn.Module, loader: Batches, title: str | None = "evaluate") -> dict[int, ImageDetections]:
    """Detections per image id of any detector with torchvision's interface, such as a reference."""

    def of_batch(images: list[Tensor], targets: Targets) -> tuple[list[int], list[list[ImageDetections]]]:
        return _image_ids(targets), [list(map(compact, model(images)))]

    return _joined(over_batches(model, loader, of_batch, title), 1)[1][0]


def _joined(
    batches: Sequence[tuple[list[int], list[list[ImageDetections]]]], exits: int
) -> tuple[list[int], list[dict[int, ImageDetections]]]:
    """The image ids of all batches, and per exit the detections by image id; an id that comes twice is an error."""
    image_ids = [image_id for ids, _ in batches for image_id in ids]
    require_unique(image_ids)
    found = ([one for _, of_exits in batches for one in of_exits[index]] for index in range(exits))
    return image_ids, [dict(zip(image_ids, of_exit, strict=True)) for of_exit in found]


def compact(found: dict[str, Tensor]) -> ImageDetections:
    """A photo's detections on the CPU, nothing else that a model says about it."""
    return {
        "boxes": found["boxes"].float().cpu(),
        "scores": found["scores"].float().cpu(),
        "labels": found["labels"].cpu(),
    }


def _image_ids(targets: Targets) -> list[int]:
    return [int(target["image_id"]) for target in targets]


def require_unique(image_ids: list[int]) -> None:
    """Raise a DataError where an id occurs twice."""
    for image_id, count in Counter(image_ids).items():
        if count > 1:
            raise DataError(f"image id {image_id} comes twice in the evaluated data set; ids must be unique")


# The routed detector, put together from what every exit found.


def choose_exits(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """The exit of every photo: the first whose confidence reaches its threshold; the last takes the rest.

    Args:
        confidences: per exit, shallow to deep, [n].
        thresholds: one per early exit; the last exit needs none.

    Returns:
        int64 [n], indices of exits.
    """
    last = len(confidences) - 1
    if len(thresholds) != last:
        raise EarlyExitError(f"{len(thresholds)} thresholds for {last} early exits: give one for each")
    if last == 0:
        return torch.zeros(len(confidences[0]), dtype=torch.int64)
    return torch.from_numpy(choose([values.numpy() for values in confidences[:-1]], thresholds).astype(np.int64))


def routed_detections(collected: Collected, chosen: Tensor) -> dict[int, ImageDetections]:
    """Per image id, the detections of its exit ``chosen`` [n] (in the order of ``collected.image_ids``)."""
    return {
        image_id: collected.detections[index][image_id]
        for image_id, index in zip(collected.image_ids, chosen.tolist(), strict=True)
    }


def exit_share(chosen: Tensor, exit_names: Sequence[str]) -> dict[str, float]:
    """Share of the photos that take each exit, in [0, 1], summing to 1 (all 0 without photos)."""
    counts = torch.bincount(chosen, minlength=len(exit_names)).tolist()
    return {name: count / max(len(chosen), 1) for name, count in zip(exit_names, counts, strict=True)}


def mean_cost(chosen: Tensor, costs: Sequence[float]) -> float | None:
    """Mean over the photos of the cost of the exit each takes (milliseconds, MMACs); None without photos."""
    return torch.tensor(costs, dtype=torch.float64)[chosen].mean().item() if len(chosen) else None


# Every exit's outputs for every photo of a split, on disk: one pass over the network, then any policy and threshold.

REPLAY_BATCH = 64
"""Photos whose logits are in memory at a time."""


class Recording:
    """A split as every exit saw it; rows are photos in the order of ``image_ids``.

    Args:
        folder: of a whole recording, see :func:`record`.

    Attributes:
        image_ids: [n].
        logits: per early exit [n, A, C], raw, on disk; [n, 1, C] of an empty exit.
        taps: per early exit [n, 2 * channels], pooled, on disk.
        exit_names: of the early exits; empty: whether they have no branch.
        labels: of the default boxes by matching with the objects, [n, A], on disk.
        detections: per exit, the full path last, image id -> ``boxes``, ``scores`` and ``labels``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        info = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        self.image_ids: list[int] = info["image_ids"]
        early = range(info["early_exits"])
        self.empty: list[bool] = info["empty"]
        self.exit_names: list[str] = info["exit_names"]
        self.logits = [np.load(folder / f"logits{index}.npy", mmap_mode="r") for index in early]
        self.taps = [np.load(folder / f"tap{index}.npy", mmap_mode="r") for index in early]
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        self.detections = torch.load(folder / "detections.pt", weights_only=True)

    def __len__(self) -> int:
        return len(self.image_ids)

    def only(self, names: Sequence[str]) -> Recording:
        """The recording of a model that has these early exits alone, and the full path."""
        part, exits = copy.copy(self), [self.exit_names.index(name) for name in names]
        part.exit_names = list(names)
        for name in ("logits", "taps", "empty"):
            setattr(part, name, [getattr(self, name)[index] for index in exits])
        part.detections = [self.detections[index] for index in (*exits, -1)]
        return part

    @property
    def early_exits(self) -> int:
        """How many exits come before the full path."""
        return len(self.logits)

    def signals(self, exit_index: int) -> Iterator[ExitSignals]:
        """What a router sees at an early exit, batch after batch."""
        for start in range(0, len(self), REPLAY_BATCH):
            rows = slice(start, start + REPLAY_BATCH)
            logits, tap = (_tensor(values[exit_index][rows]) for values in (self.logits, self.taps))
            yield ExitSignals(logits, tap, self.empty[exit_index])

    @torch.no_grad()
    def confidences(self, router: Any) -> list[Tensor]:
        """Per early exit the confidence that ``router`` has in every photo, [n]."""
        return [
            torch.cat(
                [router.confidence(signals, index).float() for signals in self.signals(index)] or [torch.zeros(0)]
            )
            for index in range(self.early_exits)
        ]


def record(
    model: nn.Module, loader: Batches, photos: int, folder: Path, key: str, taught_from: float | None = None
) -> Recording:
    """The recording in ``folder``, made first where it is missing or was made of something else.

    Args:
        model: an `EarlyExitSSDLite`; its mode is restored afterwards.
        loader: batches of (images, targets) without augmentation. Processes that share its photos record them
            together; ``folder`` is the same one for all.
        photos: how many there are.
        folder: to write to.
        key: a text that changes with everything a recording depends on but the weights: its photos.
        taught_from: for photos that nobody labelled: what the full path finds from this score on is what is there.

    Raises:
        DataError: an image id occurs twice.
    """
    exits = f"{model.exit_names} {tuple(model.empty)}"  # an empty exit has no weights to be known by
    key = f"{key} {weights_hash(model)} {exits}" + ("" if taught_from is None else f" taught from {taught_from}")
    key = hashlib.sha256(key.encode()).hexdigest()
    stored = _stored(folder, key)
    if all(gathered(stored is not None, shares_photos(loader))):
        return stored
    _fill(model, loader, photos, folder, key, taught_from)
    return Recording(folder)


def _stored(folder: Path, key: str) -> Recording | None:
    """The recording in the folder, if it is whole and has this key."""
    if stored_key(folder / "recording.json") != key:
        return None
    try:
        return Recording(folder)
    except Exception as error:  # damaged arrays and archives raise anything
        logger.warning("%s: the recording is damaged (%s); it is made anew", folder, type(error).__name__)
        return None


def _fill(model: nn.Module, loader: Batches, photos: int, folder: Path, key: str, taught_from: float | None) -> None:
    shared = shares_photos(loader)
    first = is_main() or not shared
    with failing_together(shared), evaluating(model):
        if first:
            make_folder(folder)
            with writing(folder):
                (folder / "recording.json").unlink(missing_ok=True)
            _make_arrays(model, photos, folder)
    early = range(model.num_early_exits)
    names = ["labels", *(f"logits{index}" for index in early), *(f"tap{index}" for index in early)]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names}
    places = iter(list(loader.sampler) if shared else range(photos))

    def of_batch(images: list[Tensor], targets: Targets) -> tuple[list[int], list[list[ImageDetections]]]:
        outputs = model.exit_outputs(images)
        answers = [model.detections(outputs, index) for index in range(len(model.exit_names))]
        seen = targets if taught_from is None else [_from(one, taught_from) for one in answers[-1]]
        rows = list(itertools.islice(places, len(images)))
        for name, values in _rows(model, outputs, seen).items():
            arrays[name][rows] = values
        return _image_ids(targets), [list(map(compact, answer)) for answer in answers]

    batches = over_batches(model, loader, of_batch, "record exits")
    image_ids, detections = _joined(batches, len(model.exit_names))
    with failing_together(shared), writing(folder):
        for array in arrays.values():
            array.flush()
    with failing_together(shared):  # the recording is whole when recording.json is there
        if first:
            write_torch(folder / "detections.pt", detections)
            info = {
                "image_ids": image_ids,
                "early_exits": model.num_early_exits,
                "empty": list(model.empty),
                "key": key,
            }
            info["exit_names"] = list(model.exit_names[:-1])
            write_json(folder / "recording.json", info)


def _make_arrays(model: nn.Module, photos: int, folder: Path) -> None:
    """The files that `_rows` go to, in the shapes that one photo has."""
    device = next(model.parameters()).device
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    outputs = model.exit_outputs([torch.zeros(3, *model.transform.fixed_size, device=device)])
    rows = _rows(model, outputs, [nothing])
    fix = "name another folder (--out), or fewer photos (CALIBRATION.TRAIN_PHOTOS, DATA.LIMIT)"
    require_space(folder, photos * sum(values.nbytes for values in rows.values()), f"recording {photos} photos", fix)
    for name, values in rows.items():
        new_array(folder / f"{name}.npy", values.dtype, (photos, *values.shape[1:]))


def _from(found: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    """Detections from this score on, as targets."""
    keep = found["scores"] >= score
    return {"boxes": found["boxes"][keep].float(), "labels": found["labels"][keep]}


def _rows(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> dict[str, np.ndarray]:
    rows = {"labels": _labels(model, outputs, targets)}
    for index, tap in enumerate(outputs.taps):
        logits = outputs.heads[index]["cls_logits"]
        # every default box of an empty exit says the same: one is enough
        rows |= {f"logits{index}": logits[:, :1] if model.empty[index] else logits, f"tap{index}": tap}
    return {
        name: (values.float() if values.is_floating_point() else values).cpu().numpy() for name, values in rows.items()
    }


def _labels(model: nn.Module, outputs: ExitOutputs, targets: Targets) -> Tensor:
    """Labels of the default boxes, [N, A] int16; 0 is background."""
    device = outputs.anchors[0].device
    scaled = []
    for target, (height, width), photo in zip(targets, outputs.network_sizes, outputs.photo_sizes, strict=True):
        scale = torch.tensor([width / photo[1], height / photo[0]] * 2, device=device)
        counted = torch.as_tensor(target.get("iscrowd", torch.zeros(len(target["labels"])))) == 0
        boxes, labels = target["boxes"][counted], target["labels"][counted]
        scaled.append({"boxes": boxes.to(device) * scale, "labels": labels.to(device)})
    return model.assign(scaled, outputs.anchors).labels.to(torch.int16)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values))

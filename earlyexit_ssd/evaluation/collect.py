"""Run a detector over a data set once and keep what every exit found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.mode import evaluating
from earlyexit_ssd.progress import progress

Batches = Iterable[tuple[list[Tensor], list[dict[str, Any]]]]
ImageDetections = dict[str, Tensor]


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
    image_ids: list[int] = []
    detections: list[dict[int, ImageDetections]] = [{} for _ in exits]
    confidences: list[list[Tensor]] = [[] for _ in exits]
    device = next(model.parameters()).device
    with evaluating(model):
        for images, targets in progress(loader, desc=title):
            outputs = model.exit_outputs([image.to(device) for image in images])
            if router is not None and router.hybrid:
                outputs = outputs.on_full_boxes()
            image_ids += _image_ids(targets)
            for index in exits:
                found = model.detections(outputs, index)
                detections[index].update(zip(_image_ids(targets), map(compact, found), strict=True))
                if router is not None:
                    confidence = router.confidence(outputs.signals(index), index)
                    confidences[index].append(confidence.float().cpu())
    require_unique(image_ids)
    kept = [torch.cat(values) if values else torch.zeros(0) for values in confidences] if router is not None else []
    return Collected(image_ids, detections, kept)


def collect_detections(model: nn.Module, loader: Batches, title: str | None = "evaluate") -> dict[int, ImageDetections]:
    """Detections per image id of any detector with torchvision's interface, such as a reference."""
    detections: dict[int, ImageDetections] = {}
    image_ids: list[int] = []
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    with evaluating(model):
        for images, targets in progress(loader, desc=title):
            found = model([image.to(device) for image in images])
            image_ids += _image_ids(targets)
            detections.update(zip(_image_ids(targets), map(compact, found), strict=True))
    require_unique(image_ids)
    return detections


def compact(found: dict[str, Tensor]) -> ImageDetections:
    """A photo's detections on the CPU, nothing else that a model says about it."""
    return {
        "boxes": found["boxes"].float().cpu(),
        "scores": found["scores"].float().cpu(),
        "labels": found["labels"].cpu(),
    }


def _image_ids(targets: list[dict[str, Any]]) -> list[int]:
    return [int(target["image_id"]) for target in targets]


def require_unique(image_ids: list[int]) -> None:
    """Raise a DataError where an id occurs twice."""
    seen: set[int] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise DataError(f"image id {image_id} comes twice in the evaluated data set; ids must be unique")
        seen.add(image_id)

"""A split as recorded by every exit, with all that routing is judged by."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torch import Tensor

from earlyexit_ssd.data import DetectionDataset, build_loader, load_dataset, to_coco
from earlyexit_ssd.data.classes import limit_photos
from earlyexit_ssd.data.disjoint import require_disjoint
from earlyexit_ssd.data.fingerprint import fingerprint, photo_hashes
from earlyexit_ssd.data.repeats import Repeats, distinct
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.evaluation.choices import ExitMatches, ap_of_choice, exit_matches
from earlyexit_ssd.evaluation.photo_losses import (
    Agreement,
    agreement,
    as_ground_truth,
    losses_against_full,
    losses_against_labels,
)
from earlyexit_ssd.evaluation.recording import Recording, record
from earlyexit_ssd.files import make_folder
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import evaluation_device, open_model, with_classes
from earlyexit_ssd.pipeline.rivals import check_rivals
from earlyexit_ssd.progress import progress
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.search import require_few


@dataclass
class Replay:
    """A recorded split. Every [n] and [n, exits] is by rising image id.

    Where nobody labelled the photos (``labelled`` False), ``ground_truth`` is what the full path finds at the deployed
    score: figures against it are agreement with the full path, no accuracy.
    """

    recording: Recording
    ground_truth: COCO
    photos_sha256: tuple[str, ...]
    score: float
    iou: float
    labelled: bool = True
    _losses: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Rows of the recording by rising image id, [n]."""
        return np.argsort(self.recording.image_ids)

    @functools.cached_property
    def matches(self) -> ExitMatches:
        """Every exit's matches with the objects, for AP of any choice."""
        return exit_matches(self.ground_truth, self.recording.detections)

    def ap50_of(self, choices: np.ndarray, title: str) -> np.ndarray:
        """[M]: AP50 of each choice of exits [M, n]; 0 without an object. ``title`` is the progress bar's."""
        found = (ap_of_choice(self.matches, choice, ap50_only=True).AP50 for choice in progress(choices, desc=title))
        return np.array([value or 0.0 for value in found])

    def losses(self, reference: str) -> np.ndarray:
        """Per photo and exit, [n, exits], against what the ``full`` path says or against the ``labels``."""
        if reference not in self._losses:
            measure = {"full": losses_against_full, "labels": losses_against_labels}[reference]
            self._losses[reference] = measure(self.ground_truth, self.recording.detections, self.score, self.iou)
        return self._losses[reference]

    def agreement(self, choice: np.ndarray) -> Agreement:
        """With the full path, where the photos take these exits [n]."""
        exits = self.recording.detections
        ids = np.asarray(self.recording.image_ids)[self.order]
        found = {int(image): exits[taken][int(image)] for image, taken in zip(ids, choice, strict=True)}
        return agreement(self.ground_truth, exits[-1], found, self.score, self.iou)

    def confidences(self, router: ExitRouter) -> list[np.ndarray]:
        """Per early exit [n]."""
        return [values.numpy()[self.order] for values in self.recording.confidences(router)]

    def logits_and_labels(self, exit_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw logits [N, A, C] of an early exit and the default boxes' labels [N, A], batch after batch."""
        start = 0
        for signals in self.recording.signals(exit_index):
            labels = self.recording.labels[start : start + len(signals.logits)]
            start += len(signals.logits)
            yield signals.logits, torch.from_numpy(np.array(labels))


def replay_split(cfg: CfgNode, model: EarlyExitSSDLite, dataset: DetectionDataset, folder: Path) -> Replay:
    """Record the data set's photos in ``folder`` unless that is done; the model is on the device to use.

    Raises:
        ConfigError: hybrid routing; what is recorded is what photos get that leave.
    """
    if cfg.ROUTING.HYBRID:
        raise ConfigError("ROUTING.HYBRID is true: calibration knows photos that leave only; set it to false")
    hashes = [digest for _, digest in photo_hashes(dataset)]
    ground_truth = to_coco(dataset)
    loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, train=False, seed=cfg.SEED)
    taught_from = None if dataset.labelled else cfg.EVAL.SCORE
    recording = record(model, loader, len(dataset), folder, fingerprint(dataset, hashes), taught_from)
    if not dataset.labelled:
        ground_truth = as_ground_truth(ground_truth, recording.detections[-1], cfg.EVAL.SCORE)
    return Replay(recording, ground_truth, tuple(hashes), cfg.EVAL.SCORE, cfg.EVAL.IOU, dataset.labelled)


@dataclass(frozen=True)
class Recorded:
    """A model, its splits, and where their recordings are.

    Attributes:
        cfg: with the classes of the weights; model: on its device; info: of the model's file.
        architecture: of the model; sets: TRAIN, CALIB and TEST, see :func:`disjoint_sets`.
        repeats: by set, photos that were left out since they are there already.
    """

    cfg: CfgNode
    model: EarlyExitSSDLite
    architecture: Architecture
    info: dict[str, Any]
    sets: dict[str, DetectionDataset]
    repeats: dict[str, Repeats]
    folder: Path

    def replay(self, name: str) -> Replay:
        """The split of that name, recorded if it is not yet."""
        return replay_split(self.cfg, self.model, self.sets[name], self.folder / name.lower())


def open_recorded(
    cfg: CfgNode,
    weights: str | os.PathLike[str],
    out: Path,
    measured: Sequence[str] = ("CALIB",),
    *,
    unlabelled: bool = False,
    once: Sequence[str] = ("CALIB",),
    near: bool = True,
) -> Recorded:
    """What can be missing is found here, before the network runs: runtime, weights, photos, room for results.

    Args:
        measured: splits that need labels; with CALIBRATION.REFERENCE labels those of TRAIN are needed too.
        unlabelled: photos that nobody labelled will do all the same, with the full path's answers as labels.
        once: sets in which equal photos count once; near: those that only look equal too, see `distinct`.

    Raises:
        EarlyExitError: unusable weights, data or settings, a certificate, or splits that share photos.
    """
    if cfg.ROUTING.CERTIFICATE:
        raise ConfigError(
            f"ROUTING.CERTIFICATE is {cfg.ROUTING.CERTIFICATE}: only tools/eval_exits.py goes by a certificate, here "
            "routing is found anew; leave it out, or give ROUTING.CERTIFICATE ''"
        )
    make_folder(out)
    device = evaluation_device(cfg)
    check_rivals(cfg, device)
    model, architecture, info = open_model(cfg, weights)
    require_few(model.num_early_exits)
    cfg = with_classes(cfg, architecture.classes)
    sets, repeats = disjoint_sets(cfg, measured, unlabelled, once, near)
    return Recorded(cfg, model.to(device), architecture, info, sets, repeats, out / "recordings")


def disjoint_sets(
    cfg: CfgNode,
    measured: Sequence[str] = ("CALIB",),
    unlabelled: bool = False,
    once: Sequence[str] = ("CALIB",),
    near: bool = True,
) -> tuple[dict[str, DetectionDataset], dict[str, Repeats]]:
    """TRAIN (CALIBRATION.TRAIN_PHOTOS of it, not augmented), CALIB and TEST; arguments as in `open_recorded`.

    Raises:
        DataError: a photo is in two of the whole splits, or photos that measure have no box.
    """
    labelled = {*measured, "TRAIN"} if cfg.CALIBRATION.REFERENCE == "labels" else {*measured}
    sets = {
        name: load_dataset(cfg, cfg.DATA[name], need_boxes=name in labelled, unlabelled=unlabelled)
        for name in ("TRAIN", "CALIB", "TEST")
    }
    repeats = {}
    for name in once:
        sets[name], repeats[name] = distinct(sets[name], near)
    require_disjoint(**sets)
    sets["TRAIN"] = sets["TRAIN"].subset(limit_photos(sets["TRAIN"].records, cfg.CALIBRATION.TRAIN_PHOTOS, cfg.SEED))
    return sets, repeats

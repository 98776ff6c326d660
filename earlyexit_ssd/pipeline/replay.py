"""Replay routing on a split from the recorded outputs of every exit, without running the network again."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.calibration.certificate import CertifiedCosts
from earlyexit_ssd.calibration.thresholds import (
    FittedTemperature,
    contested_boxes,
    fit_temperature,
    reliability,
    require_few_exits,
    stopped_by,
)
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data import DetectionDataset, build_loader, load_dataset, to_coco
from earlyexit_ssd.data.dataset import fingerprint, photo_hashes, require_disjoint
from earlyexit_ssd.data.records import limit_photos
from earlyexit_ssd.data.repeats import Repeats, distinct
from earlyexit_ssd.engine.processes import rank, world_size
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.cost import (
    ONNX_RUNTIME,
    PlainPath,
    count_mmacs,
    example_input,
    runtime_installed,
    time_in_runtime,
)
from earlyexit_ssd.evaluation.matches import (
    Agreement,
    Detections,
    ExitMatches,
    agreement,
    ap_of_choice,
    as_ground_truth,
    exit_matches,
    losses_against_full,
    photo_counts,
)
from earlyexit_ssd.evaluation.outputs import Recording, record
from earlyexit_ssd.files import make_folder
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.build import build_evaluation, evaluation_device, open_model, with_classes
from earlyexit_ssd.pipeline.evaluate import check_rivals
from earlyexit_ssd.progress import progress
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import FITTED_POLICIES, at_likeliest_boxes, cross_fits, reads_taps

logger = logging.getLogger(__name__)


@dataclass
class Replay:
    """A recorded split. Every [n] and [n, exits] is in the order of increasing image ids.

    For photos without labels (``labelled`` False), ``ground_truth`` holds the full path's detections of at least
    ``score``: figures then measure agreement with the full path, not accuracy.
    """

    recording: Recording
    ground_truth: COCO
    photos_sha256: tuple[str, ...]
    score: float
    iou: float
    labelled: bool = True

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Rows of the recording in the order of increasing image ids, [n]."""
        return np.argsort(self.recording.image_ids)

    @functools.cached_property
    def matches(self) -> ExitMatches:
        """Matches of every exit's detections with the objects."""
        return exit_matches(self.ground_truth, self.recording.detections, self.iou)

    def only(self, names: Sequence[str]) -> Replay:
        """The replay of a model with only these exits and the full path."""
        return replace(self, recording=self.recording.only(names))

    def matches_beside(self, reference: Detections | None) -> tuple[ExitMatches, np.ndarray]:
        """The matches with ``reference`` as an additional last exit, and the choice [n] of it by every photo. None: the
        full path is the reference."""
        if reference is None:
            return self.matches, np.full(len(self.recording), self.matches.exits - 1)
        exits = [*self.recording.detections, reference]
        return exit_matches(self.ground_truth, exits, self.iou), np.full(len(self.recording), len(exits) - 1)

    def ap50_of(self, choices: np.ndarray, title: str) -> np.ndarray:
        """AP50 [M] of each choice of exits [M, n]; 0 without objects. ``title``: title of the progress bar."""
        found = (ap_of_choice(self.matches, choice, ap50_only=True).AP50 for choice in progress(choices, desc=title))
        return np.array([value or 0.0 for value in found])

    def losses(self, reference: str) -> np.ndarray:
        """Loss per photo and exit [n, exits] in [0, 1] against the ``full`` path's detections or the ``labels``."""
        if reference == "labels":
            return photo_counts(self.matches, self.score).losses_against_labels()
        return self._losses_against_full

    @functools.cached_property
    def _losses_against_full(self) -> np.ndarray:
        return losses_against_full(self.ground_truth, self.recording.detections, self.score, self.iou)

    def detections_of(self, choice: np.ndarray) -> Detections:
        """Image id -> detections if the photos leave at these exits [n]."""
        exits, image_ids = self.recording.detections, sorted(self.recording.image_ids)
        return {image_id: exits[taken][image_id] for image_id, taken in zip(image_ids, choice.tolist(), strict=True)}

    def agreement(self, choice: np.ndarray, reference: Detections | None = None) -> Agreement:
        """Agreement with ``reference`` (None: the full path) if the photos leave at these exits [n]."""
        reference = self.recording.detections[-1] if reference is None else reference
        return agreement(self.ground_truth, reference, self.detections_of(choice), self.score, self.iou)

    def confidences(self, router: ExitRouter) -> list[np.ndarray]:
        """Per early exit the router's confidences [n]."""
        return [values.numpy()[self.order] for values in self.recording.confidences(router)]

    def logits_and_labels(self, exit_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw logits [N, A, C] of an early exit and the default boxes' labels [N, A], batch by batch."""
        start = 0
        for signals in self.recording.signals(exit_index):
            labels = self.recording.labels[start : start + len(signals.logits)]
            start += len(signals.logits)
            yield signals.logits, torch.from_numpy(np.array(labels))


@dataclass(frozen=True)
class Recorded:
    """A model, its splits, and the folder of their recordings."""

    cfg: CfgNode  # with the classes of the weights
    model: EarlyExitSSDLite  # on its device
    architecture: Architecture
    info: dict[str, Any]  # of the model's file
    sets: dict[str, DetectionDataset]  # TRAIN, CALIB and TEST
    repeats: dict[str, Repeats]  # per set the duplicate photos left out, see :func:`disjoint_sets`
    folder: Path

    def replay(self, name: str) -> Replay:
        """The replay of a split; it is recorded first if needed."""
        cfg, dataset = self.cfg, self.sets[name]
        hashes = [digest for _, digest in photo_hashes(dataset)]
        batch_size, workers = cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS
        loader = build_loader(dataset, batch_size, workers, False, cfg.SEED, rank(), world_size())
        pseudo_label_score = None if dataset.labelled else cfg.EVAL.SCORE
        key = fingerprint(dataset, hashes)
        recording = record(self.model, loader, len(dataset), self.folder / name.lower(), key, pseudo_label_score)
        ground_truth = to_coco(dataset)
        if not dataset.labelled:
            ground_truth = as_ground_truth(ground_truth, recording.detections[-1], cfg.EVAL.SCORE)
        return Replay(recording, ground_truth, tuple(hashes), cfg.EVAL.SCORE, cfg.EVAL.IOU, dataset.labelled)


def open_recorded(cfg: CfgNode, weights: str | os.PathLike[str], out: Path, **splits: Any) -> Recorded:
    """Open a model and its splits. A missing runtime, weights file or photo is an error before the network runs.

    ``splits`` are arguments of `disjoint_sets`.

    Raises:
        EarlyExitError: unusable weights, data or settings, a certificate, or splits that share photos.
    """
    if cfg.ROUTING.HYBRID:
        raise ConfigError("ROUTING.HYBRID is true: calibration does not support hybrid routing; set it to false")
    if cfg.ROUTING.CERTIFICATE:
        raise ConfigError(
            f"ROUTING.CERTIFICATE is {cfg.ROUTING.CERTIFICATE}: only tools/eval_exits.py uses a certificate, here "
            "routing is calibrated again; leave it out, or give ROUTING.CERTIFICATE ''"
        )
    make_folder(out)
    device = evaluation_device(cfg)
    check_rivals(cfg, device)
    model, architecture, info = open_model(cfg, weights)
    require_few_exits(model.num_early_exits)
    cfg = with_classes(cfg, architecture.classes)
    return Recorded(cfg, model.to(device), architecture, info, *disjoint_sets(cfg, **splits), out / "recordings")


def disjoint_sets(
    cfg: CfgNode,
    needs_labels: Sequence[str] = ("CALIB",),
    unlabelled: bool = False,
    deduplicate: Sequence[str] = ("CALIB",),
    include_near_duplicates: bool = True,
) -> tuple[dict[str, DetectionDataset], dict[str, Repeats]]:
    """TRAIN (CALIBRATION.TRAIN_PHOTOS of it, not augmented), CALIB and TEST, and the duplicates that were left out.

    Args:
        needs_labels: splits that need labels; TRAIN needs them too if CALIBRATION.REFERENCE is ``labels``.
        unlabelled: accept photos without labels and use the full path's detections as labels.
        deduplicate: splits in which duplicate photos count once.
        include_near_duplicates: whether near-duplicates are duplicates too, see `distinct`.

    Raises:
        DataError: a photo is in two splits (TRAIN in full), or a split that needs labels has no box.
    """
    labelled = {*needs_labels, "TRAIN"} if cfg.CALIBRATION.REFERENCE == "labels" else {*needs_labels}
    needed = "replaced" if unlabelled else "required"
    sets = {
        name: load_dataset(cfg, cfg.DATA[name], labels=needed if name in labelled else "optional")
        for name in ("TRAIN", "CALIB", "TEST")
    }
    repeats = {}
    for name in deduplicate:
        sets[name], repeats[name] = distinct(sets[name], include_near_duplicates)
    require_disjoint(**sets)
    sets["TRAIN"] = sets["TRAIN"].subset(limit_photos(sets["TRAIN"].records, cfg.CALIBRATION.TRAIN_PHOTOS, cfg.SEED))
    return sets, repeats


def fit_temperatures(cfg: CfgNode, calib: Replay) -> list[FittedTemperature]:
    """Maximum-likelihood temperature of every exit with a branch; logs a warning where one reaches its bounds."""
    bounds, found = cfg.ROUTING.TEMPERATURE_BOUNDS, []
    for index, name in enumerate(calib.recording.exit_names):
        if calib.recording.empty[index]:
            continue
        logits, labels = contested_boxes(calib.logits_and_labels(index))
        temperature = fit_temperature(logits, labels, bounds)
        bound = stopped_by(temperature, bounds)
        if bound is not None:
            said = "temperature of %s is at its bound %g: no allowed one calibrates its probabilities"
            logger.warning(said, name, bound)
        before, after = reliability(logits, labels, 1.0), reliability(logits, labels, temperature)
        found.append(FittedTemperature(name, temperature, before, after))
    return found


def temperatures_of(fitted: Sequence[FittedTemperature], exit_names: Sequence[str]) -> list[float]:
    """The temperature of every early exit; 1 for exits without one. ``exit_names`` ends with the full path."""
    found = {one.exit_name: one.temperature for one in fitted}
    return [found.get(name, 1.0) for name in exit_names[:-1]]


@dataclass(frozen=True)
class FittingPhotos:
    """A recorded split for fitting policies, see `RecordedPhotos`; [n] is in the order of the recording."""

    replay: Replay
    temperatures: Sequence[float]
    reference: str
    seed: int

    def signals(self, exit_index: int, boxes: int | None = None) -> Iterator[ExitSignals]:
        """The policy's inputs at an early exit, logits divided by the temperature, batch by batch."""
        for signals in self.replay.recording.signals(exit_index):
            seen = at_likeliest_boxes(signals, boxes)
            yield ExitSignals(seen.logits / self.temperatures[exit_index], seen.tap, seen.empty)

    def losses(self) -> Tensor:
        """Loss per photo and exit [n, exits] against CALIBRATION.REFERENCE."""
        losses = self.replay.losses(self.reference)
        return torch.from_numpy(losses[np.argsort(self.replay.order)]).float()  # back to the order of the recording

    def largest_scores(self) -> Tensor:
        """Largest score of the full path per photo [n]; 0 without a detection."""
        recording = self.replay.recording
        scores = (recording.detections[-1][photo]["scores"].tolist() for photo in recording.image_ids)
        return torch.tensor([max(one, default=0.0) for one in scores])

    def object_counts(self) -> list[int]:
        """Number of labelled objects per class, without crowds."""
        truth = self.replay.ground_truth
        counts = Counter(one["category_id"] for one in truth.anns.values() if not one["iscrowd"])
        return [counts[category] for category in sorted(truth.getCatIds())]


def fit_router(
    cfg: CfgNode,
    policy: str,
    temperatures: Sequence[float],
    calib: Replay,
    train: Replay | None = None,
    *,
    cross_fit: bool = True,
    groups: np.ndarray | None = None,
) -> tuple[ExitRouter, list[np.ndarray]]:
    """A router with this policy and all exits closed, and per early exit its confidences [n] in the photos ``calib``.

    A policy with parameters is fitted on ``train``. One that can be cross-fitted is fitted on both sets: ``calib`` is
    divided into CALIBRATION.FOLDS folds in the order of the groups' numbers, so that neighbouring frames of a video are
    in one fold, and each confidence comes from a fit without the photo's fold.

    Args:
        temperatures: one per early exit.
        calib: n calibration photos; [n] is in the order of increasing image ids.
        train: training photos; None: ``calib``.
        cross_fit: False for a risk, whose bound needs a policy that was fixed before the calibration photos were seen.
        groups: number (from 0) of the group of each calibration photo, [n]. A group is never divided. None: each photo
            is a group, numbered in this order.
    """
    sets = [FittingPhotos(one, temperatures, cfg.CALIBRATION.REFERENCE, cfg.SEED) for one in (train or calib, calib)]
    fitted, folds, parameters, confidences = FITTED_POLICIES.get(policy), cfg.CALIBRATION.FOLDS, None, None
    if cross_fit and folds and train is not None and cross_fits(policy):
        groups = np.arange(len(calib.recording)) if groups is None else groups
        fold_of_row = np.empty(len(groups), np.int64)
        fold_of_row[calib.order] = groups * folds // (groups.max() + 1)
        parameters, by_row = fitted.cross_fit(*sets, torch.from_numpy(fold_of_row))
        confidences = [values.numpy()[calib.order] for values in by_row]
    elif fitted is not None:
        parameters = fitted.fit(sets[0])
    settings = {"temperatures": temperatures, "temperature_bounds": cfg.ROUTING.TEMPERATURE_BOUNDS}
    router = ExitRouter(len(temperatures), policy=policy, parameters=parameters, thresholds=CLOSED, **settings)
    return router, confidences or calib.confidences(router)


def require_deciding(policy: str, model: EarlyExitSSDLite, weights: str | os.PathLike[str]) -> None:
    """Raise an EarlyExitError if no photo can leave: every exit is empty, and the policy reads only logits."""
    if all(model.empty) and not reads_taps(policy):
        fits = " or ".join(name for name in FITTED_POLICIES if reads_taps(name))
        raise EarlyExitError(
            f"policy '{policy}' reads logits, but all exits of {weights} are empty and have none; "
            f"use {fits} (ROUTING.POLICY)"
        )


@dataclass(frozen=True)
class CostModel:
    """Costs of one photo.

    Attributes:
        unit: ``ms`` or ``mmacs``.
        paths: key: whether each earlier exit is open, shallow to deep (the length is the exit's index). Value: cost up
            to and including that exit: trunk, open branches and their confidences.
        plain: cost of the detector without exits.
        measured: runtime, threads, runs and machine; empty for MMACs.
    """

    unit: str
    paths: dict[tuple[bool, ...], float]
    early_exits: int
    plain: float
    measured: dict[str, Any]

    def per_exit(self, thresholds: Sequence[float] | None = None) -> np.ndarray:
        """Cost [exits] to each exit with these thresholds, the full path last; None: all exits are open."""
        opened = (True,) * self.early_exits if thresholds is None else tuple(value < CLOSED for value in thresholds)
        return np.array([self.paths[opened[:index]] for index in range(self.early_exits + 1)])

    def of_each(self, thresholds: np.ndarray) -> np.ndarray:
        """Costs [M, exits] for thresholds [M, early exits], see :meth:`per_exit`."""
        return np.stack([self.per_exit(row) for row in thresholds])

    def speedup(self, choice: np.ndarray, thresholds: Sequence[float]) -> float:
        """Speed relative to the detector without exits if the photos leave at these exits [n]."""
        return self.plain / float(self.per_exit(thresholds)[choice].mean())

    def certified(self, thresholds: Sequence[float] | None = None) -> CertifiedCosts:
        """The costs with these thresholds, for a certificate or a results file."""
        exits = tuple(self.per_exit(thresholds).tolist())
        return CertifiedCosts(unit=self.unit, exits=exits, plain=self.plain, measured=self.measured)


def measure_cost_model(
    cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter, plain: nn.Module | None = None
) -> CostModel:
    """Measure the costs in the unit of CALIBRATION.COST with the timing settings of EVAL, router included.

    ``plain`` replaces the model without its exits as the detector to compare with.
    """
    settings, example, early_exits = build_evaluation(cfg), example_input(model), router.num_exits
    paths = [opened for count in range(early_exits + 1) for opened in itertools.product((True, False), repeat=count)]
    plain = model if plain is None else plain
    networks: list[nn.Module] = []
    for opened in paths:
        thresholds = [0.0 if flag else CLOSED for flag in opened] + [0.0] * (early_exits - len(opened))
        on_the_way = ExitRouter(**{**router.to_dict(), "thresholds": thresholds}).to(example.device)
        networks.append(AllOutputs(PathToExit(model, len(opened), on_the_way)))
    networks.append(PlainPath(plain))
    examples = [*[example] * len(paths), example_input(plain)]
    if cfg.CALIBRATION.COST == "mmacs":
        unit, measured, costs = "mmacs", {}, list(map(count_mmacs, networks, examples))
    else:
        runs, threads = settings.runs, settings.threads
        on_cuda, runtime = example.device.type == "cuda", settings.runtime
        if cfg.CALIBRATION.COST == "auto" and example.device.type == "cpu" and runtime_installed():
            runtime = ONNX_RUNTIME
        try:
            timings = time_in_runtime(networks, examples, runtime, runs, threads)
        except EarlyExitError as error:
            if runtime == settings.runtime:
                raise
            logger.warning("costs are measured in %s instead of ONNX Runtime: %s", settings.runtime, error)
            runtime = settings.runtime
            timings = time_in_runtime(networks, examples, runtime, runs, threads)
        machine = torch.cuda.get_device_name(example.device) if on_cuda else platform.processor() or platform.machine()
        unit, costs = "ms", [one.ms for one in timings]
        measured = {"runtime": runtime, "threads": threads, "runs": runs, "machine": machine}
    return CostModel(unit, dict(zip(paths, costs, strict=False)), early_exits, costs[-1], measured)

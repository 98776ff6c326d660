"""Evaluate any routing on a split from the recorded outputs of all exits, without running the network again."""

import functools
import itertools
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.calibration.certificate import CertifiedCosts
from earlyexit_ssd.calibration.thresholds import FittedTemperature, contested_boxes, fit_exit, require_few_exits
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.console import progress
from earlyexit_ssd.data import DetectionDataset, load_dataset, to_coco
from earlyexit_ssd.data.dataset import fingerprint, photo_hashes, require_disjoint
from earlyexit_ssd.data.duplicates import Duplicates, distinct
from earlyexit_ssd.data.records import limit_photos
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation import cost
from earlyexit_ssd.evaluation.matches import (
    Agreement,
    DetectionsById,
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
from earlyexit_ssd.modeling.detector import AllOutputs
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.pipeline.evaluate import check_rivals
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES, at_likeliest_boxes, is_fitted, reads_taps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay(Recording):
    """A recorded split of n photos with its objects. In all arrays the photos have the order of ``image_ids``.

    If ``labelled`` is False, ``ground_truth`` holds the full path's detections with a score of at least ``score``, and
    figures measure agreement with the full path.
    """

    ground_truth: COCO
    photos_sha256: tuple[str, ...]
    score: float
    iou: float
    labelled: bool

    @functools.cached_property
    def matches(self) -> ExitMatches:
        """Matches of every exit's detections with the objects."""
        return exit_matches(self.ground_truth, self.detections, self.iou)

    def matches_with_extra_exit(self, reference: DetectionsById | None) -> tuple[ExitMatches, np.ndarray]:
        """Add the detections ``reference`` as the last exit (None: add none, so the full path is last). Return the
        matches, and the choice [n] of the last exit for every photo."""
        if reference is None:
            return self.matches, np.full(len(self), self.matches.exits - 1)
        exits = [*self.detections, reference]
        return exit_matches(self.ground_truth, exits, self.iou), np.full(len(self), len(exits) - 1)

    def ap50_of(self, choices: np.ndarray, title: str) -> np.ndarray:
        """Return the AP50 [M] of choices of exits [M, n], 0 without objects. ``title`` is for the progress bar."""
        ap50 = (ap_of_choice(self.matches, choice, ap50_only=True).AP50 for choice in progress(choices, desc=title))
        return np.array([value or 0.0 for value in ap50])

    def losses(self, reference: str) -> np.ndarray:
        """Return the loss [n, exits] in [0, 1] against the ``full`` path's detections or against the ``labels``."""
        if reference == "labels":
            return photo_counts(self.matches, self.score).losses_against_labels()
        return self._losses_against_full

    @functools.cached_property
    def _losses_against_full(self) -> np.ndarray:
        return losses_against_full(self.ground_truth, self.detections, self.score, self.iou)

    def agreement(self, choice: np.ndarray, reference: DetectionsById | None = None) -> Agreement:
        """Return the agreement with ``reference`` (None: the full path) if photos leave at the exits ``choice`` [n]."""
        reference = self.detections[-1] if reference is None else reference
        pairs = zip(self.image_ids, choice.tolist(), strict=True)
        routed = {image_id: self.detections[index][image_id] for image_id, index in pairs}
        return agreement(self.ground_truth, reference, routed, self.score, self.iou)

    def logits_and_labels(self, exit_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of an early exit's raw logits [N, A, C] and the default boxes' labels [N, A]."""
        start = 0
        for signals in self.signals(exit_index):
            labels = self.labels[start : start + len(signals.logits)]
            start += len(signals.logits)
            yield signals.logits, torch.from_numpy(np.array(labels))


@dataclass(frozen=True)
class ModelOnSplits:
    """A model, its splits, and the folder of their recordings."""

    cfg: CfgNode  # with the classes of the weights
    model: EarlyExitSSDLite  # on the device of the evaluation
    architecture: Architecture
    info: dict[str, Any]  # other content of the model's file
    sets: dict[str, DetectionDataset]  # by split: TRAIN, CALIB and TEST
    duplicates: dict[str, Duplicates]  # duplicate photos that were left out, by split, see `disjoint_sets`
    folder: Path

    def replay(self, name: str) -> Replay:
        """Return the replay of the split ``name``, which is recorded unless its recording is stored."""
        settings, dataset, ground_truth = self.cfg.EVAL, self.sets[name], to_coco(self.sets[name])
        hashes = [digest for _, digest in photo_hashes(dataset)]
        loader, key = build.evaluation_loader(self.cfg, dataset), fingerprint(dataset, hashes)
        folder, min_score = self.folder / name.lower(), None if dataset.labelled else settings.SCORE
        recording = record(self.model, loader, [*ground_truth.imgs], folder, key, min_score)
        if not dataset.labelled:
            ground_truth = as_ground_truth(ground_truth, recording.detections[-1], settings.SCORE)
        return Replay(
            **vars(recording),
            ground_truth=ground_truth,
            photos_sha256=tuple(hashes),
            score=settings.SCORE,
            iou=settings.IOU,
            labelled=dataset.labelled,
        )


def open_model_on_splits(cfg: CfgNode, weights: str | os.PathLike[str], out: Path, **splits: Any) -> ModelOnSplits:
    """Open a model and its splits; ``splits`` are arguments of `disjoint_sets`. Recordings are stored below ``out``.

    Raise EarlyExitError, before the network runs, if weights, data, settings or packages are unusable, if a certificate
    is configured, or if splits share photos.
    """
    device = build.evaluation_device(cfg)
    check_settings(build.with_values(cfg, {"EVAL.RIVALS.ENABLED": False}), device)  # no rival is evaluated
    make_folder(out)
    model, architecture, info = build.open_model(cfg, weights)
    if not model.num_early_exits:
        raise EarlyExitError(f"{weights}: the model has no early exit to calibrate; train exits (EXITS.LAYERS)")
    require_few_exits(model.num_early_exits)
    cfg = build.with_classes(cfg, architecture.classes)
    return ModelOnSplits(cfg, model.to(device), architecture, info, *disjoint_sets(cfg, **splits), out / "recordings")


def check_settings(cfg: CfgNode, device: torch.device) -> None:
    """Raise EarlyExitError if the routing is unknown or cannot be calibrated, or `check_rivals` misses anything."""
    build.require_policy(cfg)
    if cfg.ROUTING.HYBRID:
        raise ConfigError("ROUTING.HYBRID is true: calibration does not support hybrid routing; set it to false")
    if cfg.ROUTING.CERTIFICATE:
        fix = "this command calibrates anew; set it to '' (tools/eval_exits.py uses a certificate)"
        raise ConfigError(f"ROUTING.CERTIFICATE is {cfg.ROUTING.CERTIFICATE}, but {fix}")
    check_rivals(cfg, device)


def disjoint_sets(
    cfg: CfgNode,
    needs_labels: Sequence[str] = ("CALIB",),
    unlabelled: bool = False,
    deduplicate: Sequence[str] = ("CALIB",),
    include_near_duplicates: bool = True,
) -> tuple[dict[str, DetectionDataset], dict[str, Duplicates]]:
    """Return the splits TRAIN, CALIB and TEST without augmentation, and the duplicates that were left out, by split.
    TRAIN has CALIBRATION.TRAIN_PHOTOS photos.

    Args:
        needs_labels: splits that need labels; TRAIN needs them too if CALIBRATION.REFERENCE is ``labels``.
        unlabelled: whether photos without labels are accepted and get the full path's detections as labels.
        deduplicate: splits in which only the first of duplicate photos is kept.
        include_near_duplicates: whether near-duplicates count as duplicates, see `distinct`.

    Raises:
        DataError: a photo is in two splits (TRAIN is compared in full), or a split that needs labels has no box.
    """
    with_labels = {*needs_labels, "TRAIN"} if cfg.CALIBRATION.REFERENCE == "labels" else {*needs_labels}
    condition = "replaced" if unlabelled else "required"  # see `load_dataset`
    sets = {
        name: load_dataset(cfg, cfg.DATA[name], labels=condition if name in with_labels else "optional")
        for name in ("TRAIN", "CALIB", "TEST")
    }
    duplicates = {}
    for name in deduplicate:
        sets[name], duplicates[name] = distinct(sets[name], include_near_duplicates)
    require_disjoint(**sets)
    sets["TRAIN"] = sets["TRAIN"].subset(limit_photos(sets["TRAIN"].records, cfg.CALIBRATION.TRAIN_PHOTOS, cfg.SEED))
    return sets, duplicates


def fit_temperatures(cfg: CfgNode, calib: Replay) -> list[FittedTemperature]:
    """Fit the maximum-likelihood temperature of every early exit with a branch. Warn if one reaches a bound."""
    bounds, exits = cfg.ROUTING.TEMPERATURE_BOUNDS, enumerate(zip(calib.exit_names, calib.empty, strict=True))
    with_branch = [(index, name) for index, (name, empty) in exits if not empty]
    return [fit_exit(name, *contested_boxes(calib.logits_and_labels(index)), bounds) for index, name in with_branch]


def temperatures_of(fitted: Sequence[FittedTemperature], exit_names: Sequence[str]) -> list[float]:
    """Return the temperature of every early exit, 1 if none was fitted. ``exit_names`` ends with the full path."""
    by_name = {fit.exit_name: fit.temperature for fit in fitted}
    return [by_name.get(name, 1.0) for name in exit_names[:-1]]


@dataclass(frozen=True)
class FittingPhotos:
    """A recorded split for fitting policies. See `RecordedPhotos` for the methods."""

    replay: Replay
    temperatures: Sequence[float]
    reference: str
    seed: int

    def signals(self, exit_index: int, boxes: int | None = None) -> Iterator[ExitSignals]:
        for batch in self.replay.signals(exit_index):
            signals = at_likeliest_boxes(batch, boxes)
            yield ExitSignals(signals.logits / self.temperatures[exit_index], signals.tap, signals.empty)

    def losses(self) -> Tensor:
        return torch.from_numpy(self.replay.losses(self.reference)).float()

    def largest_scores(self) -> Tensor:
        full = self.replay.detections[-1]
        scores = (full[image_id]["scores"].tolist() for image_id in self.replay.image_ids)
        return torch.tensor([max(of_photo, default=0.0) for of_photo in scores])

    def object_counts(self) -> list[int]:
        truth = self.replay.ground_truth
        counts = Counter(row["category_id"] for row in truth.anns.values() if not row["iscrowd"])
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
    """Fit a policy, and return its router with all exits closed and its confidences in ``calib``, [n] per early exit.

    A policy with parameters is fitted on ``train``. If it supports cross-fitting, it is fitted on ``train`` and
    ``calib``. For this ``calib`` is divided into CALIBRATION.FOLDS folds in the order of the group numbers, so that
    neighbouring frames of a video are in one fold. The confidence of a photo comes from a fit without its fold.

    Args:
        temperatures: one per early exit.
        calib: n calibration photos, by increasing image id.
        train: training photos; None: ``calib``.
        cross_fit: False for a risk. Its bound needs a policy that does not depend on the calibration photos.
        groups: group number (from 0) of each calibration photo, [n]. A group is never divided. None: every photo is a
            group, numbered by image id.
    """
    reference, folds = cfg.CALIBRATION.REFERENCE, cfg.CALIBRATION.FOLDS
    sets = [FittingPhotos(split, temperatures, reference, cfg.SEED) for split in (train or calib, calib)]
    parameters = confidences = None
    if cross_fit and folds and train is not None and POLICIES[policy].cross_fits:
        groups = np.arange(len(calib)) if groups is None else groups
        fold_of_photo = torch.from_numpy(groups * folds // (groups.max() + 1))
        parameters, values = POLICIES[policy].cross_fit(*sets, fold_of_photo)
        confidences = [of_exit.numpy() for of_exit in values]
    elif is_fitted(policy):
        parameters = POLICIES[policy].fit(sets[0])
    settings = {"temperatures": temperatures, "temperature_bounds": cfg.ROUTING.TEMPERATURE_BOUNDS}
    router = ExitRouter(len(temperatures), policy=policy, parameters=parameters, thresholds=CLOSED, **settings)
    return router, confidences or calib.confidences(router)


def require_deciding(policy: str, empty: Sequence[bool], source: str | os.PathLike[str]) -> None:
    """Raise an EarlyExitError if no photo can leave, because all exits of ``source`` are empty and the policy reads
    logits only."""
    if all(empty) and not reads_taps(policy):
        usable = " or ".join(filter(reads_taps, POLICIES))
        exits = f"all exits of {source} are empty and have none"
        raise EarlyExitError(f"policy '{policy}' reads logits, but {exits}; use {usable} (ROUTING.POLICY)")


@dataclass(frozen=True)
class CostModel:
    """Costs of one photo.

    Attributes:
        unit: ``ms`` or ``mmacs``.
        paths: cost up to and including an exit: trunk, open branches and their confidences. The key says whether each
            earlier exit is open, shallow to deep, so its length is the index of the exit.
        early_exits: number of early exits.
        plain: cost of the detector without exits.
        measured: runtime, threads, runs and machine of the measurement; empty for MMACs.
    """

    unit: str
    paths: dict[tuple[bool, ...], float]
    early_exits: int
    plain: float
    measured: dict[str, Any]

    def per_exit(self, thresholds: Sequence[float] | None = None) -> np.ndarray:
        """Return the cost up to each exit with these thresholds, [exits]; None: all exits are open."""
        opened = (True,) * self.early_exits if thresholds is None else tuple(value < CLOSED for value in thresholds)
        return np.array([self.paths[opened[:index]] for index in range(self.early_exits + 1)])

    def of_each(self, thresholds: np.ndarray) -> np.ndarray:
        """Return the costs [M, exits] for thresholds [M, early exits], see `per_exit`."""
        return np.stack([self.per_exit(row) for row in thresholds])

    def speedup(self, choice: np.ndarray, thresholds: Sequence[float]) -> float:
        """Return the speed relative to the detector without exits if the photos leave at the exits ``choice`` [n]."""
        return self.plain / float(self.per_exit(thresholds)[choice].mean())

    def certified(self, thresholds: Sequence[float] | None = None) -> CertifiedCosts:
        """Return the costs with these thresholds, for a certificate or a results file."""
        exits = tuple(self.per_exit(thresholds).tolist())
        return CertifiedCosts(unit=self.unit, exits=exits, plain=self.plain, measured=self.measured)


def measure_cost_model(
    cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter, plain: nn.Module | None = None
) -> CostModel:
    """Measure the costs, router included, in the unit of CALIBRATION.COST and with the timing settings of EVAL.

    Args:
        plain: detector to compare with; None: ``model`` without exits, which is the path with all exits closed.
    """
    settings, example, early_exits = build.build_evaluation(cfg), cost.example_input(model), router.num_exits
    paths = [opened for count in range(early_exits + 1) for opened in itertools.product((True, False), repeat=count)]
    networks: list[nn.Module] = []
    for opened in paths:
        thresholds = build.open_thresholds(opened + (True,) * (early_exits - len(opened)))
        path_router = ExitRouter(**{**router.to_dict(), "thresholds": thresholds}).to(example.device)
        networks.append(AllOutputs(model, len(opened), path_router))
    examples = [example] * len(paths)
    if plain is not None:
        networks.append(cost.PlainPath(plain))
        examples.append(cost.example_input(plain))
    if cfg.CALIBRATION.COST == "mmacs":
        unit, measured, costs = "mmacs", {}, list(map(cost.count_mmacs, networks, examples))
    else:
        on_cuda, runtime = example.device.type == "cuda", settings.runtime
        if cfg.CALIBRATION.COST == "auto" and example.device.type == "cpu" and cost.runtime_installed():
            runtime = cost.ONNX_RUNTIME
        try:
            timings = cost.time_in_runtime(networks, examples, runtime, settings.runs, settings.threads)
        except EarlyExitError as error:
            if runtime == settings.runtime:
                raise
            logger.warning("costs are measured in %s instead of ONNX Runtime: %s", settings.runtime, error)
            runtime = settings.runtime
            timings = cost.time_in_runtime(networks, examples, runtime, settings.runs, settings.threads)
        machine = torch.cuda.get_device_name(example.device) if on_cuda else platform.processor() or platform.machine()
        unit, costs = "ms", [timing.ms for timing in timings]
        measured = {"runtime": runtime, "threads": settings.threads, "runs": settings.runs, "machine": machine}
    return CostModel(unit, dict(zip(paths, costs, strict=False)), early_exits, costs[-1], measured)

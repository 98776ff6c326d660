"""Gates: figures that a phase must reach before the next one starts."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import albumentations
import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import DetectionDataset, build_loader, to_coco
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.evaluate import evaluate_detections
from earlyexit_ssd.evaluation.matches import Detections, ap_of_choice, exit_matches
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.evaluation.outputs import choose_exits, collect, collect_detections, exit_share
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.files import make_folder, write_json, write_text, writing
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import takes_over
from earlyexit_ssd.plain import parse_yaml, read_yaml

logger = logging.getLogger(__name__)


DEEPEST_USEFUL_LAYER = 12
"""A branch behind a later layer saves next to nothing."""


@dataclass(frozen=True)
class Check:
    """One figure against its limit; None (undefined) fails.

    Attributes:
        limit: the least value; None where the figure is only shown.
        of: what the limit is a share of, in words; empty for an absolute one.
    """

    name: str
    value: float | None
    limit: float | None
    of: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure reaches the limit."""
        return self.limit is None or (self.value is not None and self.value >= self.limit)

    def __str__(self) -> str:
        value = "undefined" if self.value is None else f"{self.value:.3f}"
        if self.limit is None:
            return f"{self.name} {value}"
        of = f" ({self.of})" if self.of else ""
        return f"{self.name} {value} {'>=' if self.passed else '<'} {self.limit:.3f}{of}"


@dataclass(frozen=True)
class Gate:
    """The outcome of a phase's gate.

    Attributes:
        phase: name of the phase.
        checks: what was looked at.
        advice: what to try if a check fails.
        forced: the run went on although the gate failed.
    """

    phase: str
    checks: tuple[Check, ...]
    advice: tuple[str, ...] = field(default=())
    forced: bool = False

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        state = "passed" if self.passed else "failed, forced" if self.forced else "failed"
        return f"gate of phase {self.phase} {state}: {', '.join(map(str, self.checks))}"

    def to_dict(self) -> dict:
        """For gate.json."""
        return {
            "phase": self.phase,
            "passed": self.passed,
            "forced": self.forced,
            "checks": [vars(check) | {"passed": check.passed} for check in self.checks],
        }


class GateFailed(EarlyExitError):
    """A phase's detector does not do what the next phase needs."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate)
        self.gate = gate

    @property
    def advice(self) -> list[str]:
        """What to do now, a line each."""
        tries = [f"  try: {line}" for line in self.gate.advice]
        return [*tries, "  or go on with --force, which every later report will say"]


def baseline_limits(cfg: CfgNode, reference: Mapping[str, float | None] | None = None) -> dict[str, float | None]:
    """What the full path must reach, by figure; None where a figure is only shown.

    A checkpoint that is taken over as it is need only detect, which no limit of the configuration can take away; of
    those the ones count for it that are not the default.

    Args:
        reference: figures of the checkpoint that BASELINE.GATE.RELATIVE speaks of.
    """
    gate, default = cfg.BASELINE.GATE, get_cfg().BASELINE.GATE
    keys = {"AP50": "AP50", "precision": "PRECISION", "recall": "RECALL"}
    if reference is not None:
        limits = {name: gate.RELATIVE * (reference[name] or 0.0) for name in keys}
    elif takes_over(cfg):
        limits = {name: gate[key] if gate[key] != default[key] else None for name, key in keys.items()}
    else:
        return {name: gate[key] for name, key in keys.items()}
    return {**limits, "AP50": max(limits["AP50"] or 0.0, DETECTS_AP50)}


def baseline_gate(
    figures: Mapping[str, float | None], limits: Mapping[str, float | None], advice: tuple[str, ...] = ()
) -> Gate:
    """AP50, precision and recall of the full path (``figures``) against :func:`baseline_limits`."""
    return Gate("baseline", tuple(Check(name, figures[name], limit) for name, limit in limits.items()), advice)


def baseline_advice(cfg: CfgNode) -> tuple[str, ...]:
    """What to try after the gate; nothing that is set already."""
    phase, model = cfg.BASELINE, cfg.MODEL
    if not phase.EPOCHS:
        train = "train the full path: BASELINE.EPOCHS is 0"
    else:
        train = (
            f"more epochs than {phase.EPOCHS} (BASELINE.EPOCHS) or another rate than {phase.LR:g} (BASELINE.LR); "
            "log.jsonl shows whether the loss still falls"
        )
    advice = [train, "look at training_photos.png in the run's folder: are boxes missing, shifted or of another class?"]
    if model.WEIGHTS:
        advice.append("are the checkpoint's classes in its own order, and does it detect by itself?")
    elif model.WEIGHTS_BACKBONE:
        advice.append("start from weights of a trained detector (MODEL.WEIGHTS)")
    else:
        advice.append("start from trained weights (MODEL.WEIGHTS) or an ImageNet trunk (MODEL.WEIGHTS_BACKBONE)")
    return tuple(advice)


def exits_gate(
    ap50: Mapping[str, float | None],
    first_limit: float,
    deepest_share: float,
    advice: tuple[str, ...] = (),
    first_share: float | None = None,
) -> Gate:
    """The first exit's AP50, and the deepest early exit's against the full path's.

    Args:
        ap50: of the exits that have a branch, shallow to deep, and of the full path, by name.
        first_limit, deepest_share: absolute for the first exit, a share of the full path's AP50 for the deepest.
        first_share: of a full path that was taken over as it is: replaces ``first_limit``, and the full path must
            detect at all.
    """
    names, values = list(ap50), list(ap50.values())
    if len(names) == 1:
        return Gate("exits", ())
    found = values[-1] or 0.0
    full = found or 1.0  # where the full path finds nothing, no exit passes
    of = "{:.0%} of " + f"{names[-1]}'s {found:.3f}"
    deepest = Check(f"{names[-2]} AP50", values[-2], deepest_share * full, of.format(deepest_share))
    if first_share is None:
        return Gate("exits", (Check(f"{names[0]} AP50", values[0], first_limit), deepest), advice)
    first = Check(f"{names[0]} AP50", values[0], first_share * full, of.format(first_share))
    return Gate("exits", (Check(f"{names[-1]} AP50", values[-1], DETECTS_AP50), first, deepest), advice)


def exits_advice(cfg: CfgNode, first: str, layer: int) -> tuple[str, ...]:
    """What to try after the gate; nothing that is set already, or as far as it goes.

    Args:
        first, layer: name and trunk layer of the first exit with a branch.
    """
    phase, advice = cfg.EXITS_PHASE, []
    if layer < DEEPEST_USEFUL_LAYER:
        advice.append(f"move the exit deeper (EXITS.LAYERS): {first} sees too little of the trunk")
    more = [f"more epochs than {phase.EPOCHS} (EXITS_PHASE.EPOCHS)"]
    if not phase.EPOCHS:
        more = ["train the exits: EXITS_PHASE.EPOCHS is 0"]
    elif phase.CACHE:
        more.append(f"more views of a photo than {phase.CACHE_VIEWS} (EXITS_PHASE.CACHE_VIEWS)")
    if min(cfg.EXITS.COPY) < 1:
        more.append(f"wider branches than {', '.join(f'{share:g}' for share in cfg.EXITS.COPY)} (EXITS.COPY)")
    advice.append(", ".join(more))
    teacher = "; the full path alone can teach from photos without boxes (LOSS.SUPERVISION teacher)"
    advice.append("more photos" + ("" if cfg.LOSS.SUPERVISION == "teacher" else teacher))
    return tuple(advice)


# The folder of a run: its configuration, versions, phases, and what was already done.

_MAY_CHANGE = (
    "OUTPUT_DIR",
    "DEVICE",
    "THREADS",
    "DATA.ROOT",
    "DATA.WORKERS",
    "ENGINE.CHECKPOINT_PERIOD",
    "ENGINE.LOG_PERIOD",
    "ENGINE.CURVE_PERIOD",
    "EVAL.",
    "CALIBRATION.",
    "EXITS_PHASE.CACHE_GIB",
)
_SETTINGS_OF_PHASES = {
    "baseline": ("BASELINE.",),
    "exits": ("EXITS_PHASE.", "EXITS.", "ROUTING."),
    "joint": ("JOINT.",),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run below ``root``; ``shared_taps`` is a tap cache that stays, for several runs."""

    root: Path
    shared_taps: Path | None = None

    @property
    def model(self) -> Path:
        """The final model."""
        return self.root / "model.pth"

    def phase(self, name: str) -> Path:
        """Folder of one phase."""
        return self.root / name

    @property
    def taps(self) -> Path:
        """The tap cache of the exits phase; gigabytes, so it goes when the phase is finished."""
        return self.shared_taps or self.phase("exits") / "taps"

    def remove_taps(self) -> None:
        """Delete the tap cache if the exits phase is finished; one that was stopped goes on with it."""
        if self.finished("exits") and not self.shared_taps:
            shutil.rmtree(self.taps, ignore_errors=True)

    def require_free(self, cfg: CfgNode, resume: bool) -> None:
        """Check that the folder holds no run, or, to resume, one that this configuration goes on with.

        The settings of a phase that is not finished may change, as its gate advises; :meth:`start` then sets aside
        what it has trained.

        Raises:
            EarlyExitError: the folder holds a run already, or one of another configuration.
        """
        make_folder(self.root)
        path = self.root / "config.yaml"
        if path.is_file():
            if not resume:
                raise EarlyExitError(
                    f"{self.root} holds a run already: go on with it (--resume), "
                    "name another folder (OUTPUT_DIR), or delete it"
                )
            self._changed_phases(cfg)
        elif (self.root / "metrics.json").exists():
            raise EarlyExitError(f"{self.root} holds other results; name another folder (OUTPUT_DIR), or delete it")

    def start(self, cfg: CfgNode) -> None:
        """Set aside what phases with changed settings have trained; write configuration and versions."""
        for phase, key in self._changed_phases(cfg).items():
            logger.info("phase %s starts afresh, since %s has changed", phase, key)
            self._set_aside(phase)
        write_text(self.root / "config.yaml", cfg.dump())
        write_json(self.root / "run.json", describe_run(cfg))

    def _changed_phases(self, cfg: CfgNode) -> dict[str, str]:
        """Unfinished phase -> a key by which the stored configuration and ``cfg`` train it differently.

        Raises:
            EarlyExitError: they differ in what a finished phase, or the whole run, was made with.
        """
        path = self.root / "config.yaml"
        if not path.is_file():
            return {}
        # a key that came later had its default
        defaults, current = (_flat(parse_yaml(one.dump())) for one in (get_cfg(), cfg))
        stored = {**defaults, **_flat(_read_dict(path))}
        changed = {}
        for key in sorted({*stored, *current}):
            if stored.get(key) == current.get(key) or key.startswith(_MAY_CHANGE):
                continue
            if key == "PHASES" and self._only_the_end_differs(stored[key], current[key]):
                continue
            phase = next((phase for phase, keys in _SETTINGS_OF_PHASES.items() if key.startswith(keys)), None)
            if phase is None or self.finished(phase):
                raise EarlyExitError(
                    f"{path}: the run to resume has {key} = {shown(stored.get(key))}, now it is "
                    f"{shown(current.get(key))}; "
                    "set it back, or name another folder (OUTPUT_DIR)"
                )
            if ".GATE." not in key:  # another gate looks at the same training
                changed[phase] = key
        return changed

    def _only_the_end_differs(self, stored: Sequence[str], current: Sequence[str]) -> bool:
        """Phases were added behind those of before, or unfinished ones at the end left out."""
        shorter, longer = sorted((list(stored), list(current)), key=len)
        return longer[: len(shorter)] == shorter and not any(map(self.finished, longer[len(shorter) :]))

    def _set_aside(self, phase: str) -> None:
        """Move a phase's files into ``before_1``, ``before_2`` ...; the taps stay, a key tells whether they fit."""
        folder = self.phase(phase)
        files = [path for path in folder.glob("*") if path.name != "taps" and not path.name.startswith("before_")]
        if files:
            target = next(path for number in count(1) if not (path := folder / f"before_{number}").exists())
            with writing(target):
                target.mkdir()
                for path in files:
                    path.rename(target / path.name)

    def write_gate(self, gate: Gate) -> None:
        """Record a phase as finished."""
        write_json(self.phase(gate.phase) / "gate.json", gate.to_dict())

    def finished(self, phase: str) -> bool:
        """Whether the phase is trained and its gate passed or was forced."""
        gate = self._read_gate(phase)
        return bool(gate.get("passed") or gate.get("forced"))

    def forced(self) -> bool:
        """Whether any phase went on past a failed gate."""
        gates = [self._read_gate(path.parent.name) for path in self.root.glob("*/gate.json")]
        return any(gate.get("forced") for gate in gates)

    def _read_gate(self, phase: str) -> dict:
        """Empty before the phase's gate was asked."""
        path = self.phase(phase) / "gate.json"
        return _read_dict(path) if path.is_file() else {}


def _read_dict(path: Path) -> dict:
    """A YAML or JSON file that this class has written; JSON is YAML."""
    fix = "restore it, or name another folder (OUTPUT_DIR)"
    content = read_yaml(path, "file of a run", fix)
    if not isinstance(content, dict):
        raise EarlyExitError(f"{path}: not what a run has written (got {shown(content)}); {fix}")
    return content


def describe_run(cfg: CfgNode) -> dict:
    """Versions, machine, seed and command."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": cfg.SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "albumentations": albumentations.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# Figures of a model on one split, for the gates and for the curves of a training.

Figures = dict[str, Any]


class SplitQuality:
    """AP50, precision and recall on ``dataset``, of the full path or of every exit."""

    def __init__(self, dataset: DetectionDataset, settings: EvaluationSettings, batch_size: int, workers: int) -> None:
        self._loader = build_loader(dataset, batch_size, workers, train=False, seed=0)
        self._ground_truth = to_coco(dataset)
        self._settings = settings

    def of_full_path(self, model: EarlyExitSSDLite) -> Figures:
        """Figures of the model without routing."""
        router, model.router = model.router, None
        try:
            detections = collect_detections(model, self._loader)
        finally:
            model.router = router
        return evaluate_detections(self._ground_truth, detections, self._settings).figures

    def of_exits(self, model: EarlyExitSSDLite) -> list[Figures]:
        """Figures of every exit, the full path last."""
        detections = collect(model, self._loader).detections
        return [evaluate_detections(self._ground_truth, found, self._settings).figures for found in detections]

    def curve_point(self, model: EarlyExitSSDLite) -> dict[str, float | None]:
        """``AP/<exit>`` and ``AP50/<exit>`` of the exits that have a branch; ``share/<exit>`` of the photos that leave
        there and ``temperature/<exit>``. Without a router, which comes with the exits, of the full path alone."""
        router = model.router
        if router is None:
            return self._ap("full", collect_detections(model, self._loader, title=None))
        collected = collect(model, self._loader, router, title=None)
        point: dict[str, float | None] = {}
        for name, empty, found in zip(model.exit_names, (*model.empty, False), collected.detections, strict=True):
            point |= {} if empty else self._ap(name, found)
        shares = exit_share(choose_exits(collected.confidences, router.thresholds.tolist()), model.exit_names)
        temperatures = dict(zip(model.exit_names, router.temperatures.tolist(), strict=False))
        named = {"share": shares, "temperature": temperatures}
        return point | {f"{key}/{name}": value for key, values in named.items() for name, value in values.items()}

    def _ap(self, name: str, found: Detections) -> dict[str, float | None]:
        matches = exit_matches(self._ground_truth, [found])
        figures = ap_of_choice(matches, np.zeros(matches.photos, np.int64))
        return {f"AP/{name}": figures.AP, f"AP50/{name}": figures.AP50}


# What all phases of a run work on.


@dataclasses.dataclass
class Run:
    """What all phases work on."""

    cfg: CfgNode
    folder: RunFolder
    model: EarlyExitSSDLite
    architecture: Architecture
    train_set: DetectionDataset
    calib_set: DetectionDataset
    device: torch.device

    @property
    def calib_quality(self) -> SplitQuality:
        """Figures on the calib split; intervals are left out, a gate compares single figures."""
        return self._quality(self.calib_set, self.cfg.DATA.WORKERS)

    @property
    def curve_quality(self) -> SplitQuality:
        """The same on a few of the photos, for the training's curves."""
        photos = len(self.calib_set)
        chosen = np.random.default_rng(self.cfg.SEED).permutation(photos)[: self.cfg.ENGINE.CURVE_PHOTOS]
        return self._quality(self.calib_set.repeated(np.isin(np.arange(photos), chosen).tolist()), workers=0)

    def _quality(self, photos: DetectionDataset, workers: int) -> SplitQuality:
        settings = EvaluationSettings(score=self.cfg.EVAL.SCORE, iou=self.cfg.EVAL.IOU, resamples=0)
        return SplitQuality(photos, settings, self.cfg.EVAL.BATCH_SIZE, workers)

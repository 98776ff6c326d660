"""A training run: its folder, its gates, the state shared by its phases, and figures on the calib split."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import albumentations
import numpy as np
import torch
import torchvision
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import DetectionDataset, build_loader, to_coco
from earlyexit_ssd.engine.processes import rank, world_size
from earlyexit_ssd.errors import EarlyExitError, GateFailed, shown
from earlyexit_ssd.evaluation.evaluate import evaluate_detections
from earlyexit_ssd.evaluation.matches import Detections, ap_of_choice, exit_matches
from earlyexit_ssd.evaluation.metrics import EvaluationSettings, Figures
from earlyexit_ssd.evaluation.outputs import choose_exits, collect, collect_detections, exit_share
from earlyexit_ssd.files import make_folder, write_json, write_text, writing
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.plain import parse_yaml, read_yaml

logger = logging.getLogger(__name__)

_MAY_CHANGE = (
    *("OUTPUT_DIR", "DEVICE", "THREADS", "DATA.ROOT", "DATA.WORKERS", "EVAL.", "CALIBRATION.", "FINE_TUNING."),
    *("EXITS_PHASE.CACHE_GIB", "ENGINE.CHECKPOINT_PERIOD", "ENGINE.LOG_PERIOD", "ENGINE.CURVE_PERIOD"),
)
_SETTINGS_OF_PHASES = {"baseline": "BASELINE.", "exits": ("EXITS_PHASE.", "EXITS.", "ROUTING."), "joint": "JOINT."}


@dataclass(frozen=True)
class Check:
    """One figure against its limit."""

    name: str
    value: float | None  # None is undefined, which fails
    limit: float | None  # the least value; None where the figure is only shown
    of: str = ""  # what the limit is a share of, empty for an absolute one

    @property
    def passed(self) -> bool:
        return self.limit is None or (self.value is not None and self.value >= self.limit)

    def __str__(self) -> str:
        value = "undefined" if self.value is None else f"{self.value:.3f}"
        if self.limit is None:
            return f"{self.name} {value}"
        of = f" ({self.of})" if self.of else ""
        return f"{self.name} {value} {'>=' if self.passed else '<'} {self.limit:.3f}{of}"


@dataclass(frozen=True)
class Gate:
    """What a phase must reach before the next one starts, and what to try if a check fails."""

    phase: str
    checks: tuple[Check, ...]
    advice: tuple[str, ...] = ()
    forced: bool = False  # the run went on although the gate failed

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        state = "passed" if self.passed else "failed, forced" if self.forced else "failed"
        return f"gate of phase {self.phase} {state}: {', '.join(map(str, self.checks))}"

    def failed(self) -> GateFailed:
        """The error of it, with what to do now."""
        tries = [f"  try: {line}" for line in self.advice]
        return GateFailed(str(self), [*tries, "  or go on with --force, which every later report will say"])

    def to_dict(self) -> dict:
        """For gate.json."""
        checks = [vars(check) | {"passed": check.passed} for check in self.checks]
        return {"phase": self.phase, "passed": self.passed, "forced": self.forced, "checks": checks}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run below ``root``: the final model, and a folder for each phase."""

    root: Path
    shared_taps: Path | None = None  # of a tap cache that several runs share, which is not deleted

    @property
    def model(self) -> Path:
        return self.root / "model.pth"

    def phase(self, name: str) -> Path:
        return self.root / name

    @property
    def taps(self) -> Path:
        """Folder of the tap cache; it takes gigabytes and is deleted after the exits phase."""
        return self.shared_taps or self.phase("exits") / "taps"

    def remove_taps(self) -> None:
        """Delete the tap cache if the exits phase is finished; a stopped phase needs it to resume."""
        if self.finished("exits") and not self.shared_taps:
            shutil.rmtree(self.taps, ignore_errors=True)

    def require_free(self, cfg: CfgNode, resume: bool) -> None:
        """Check that the folder holds no run or, with ``resume``, one that this configuration can continue.

        Settings of unfinished phases may change, as a failed gate advises; :meth:`start` then moves their files aside.

        Raises:
            EarlyExitError: the folder holds a run already, or one of another configuration.
        """
        make_folder(self.root)
        fix = "name another folder (OUTPUT_DIR), or delete it"
        if (self.root / "config.yaml").is_file():
            if not resume:
                raise EarlyExitError(f"{self.root} holds a run already: continue it (--resume), {fix}")
            self._changed_phases(cfg)
        elif (self.root / "metrics.json").exists():
            raise EarlyExitError(f"{self.root} holds other results; {fix}")

    def start(self, cfg: CfgNode) -> None:
        """Move the files of unfinished phases with changed settings into ``before_1``, ``before_2`` and so on in the
        phase's folder, then write configuration and versions."""
        for phase, key in self._changed_phases(cfg).items():
            logger.info("phase %s starts again, since %s has changed", phase, key)
            folder = self.phase(phase)  # the taps stay: their key is checked
            files = [path for path in folder.glob("*") if path.name != "taps" and not path.name.startswith("before_")]
            if files:
                target = next(path for number in count(1) if not (path := folder / f"before_{number}").exists())
                with writing(target):
                    target.mkdir()
                    for path in files:
                        path.rename(target / path.name)
        write_text(self.root / "config.yaml", cfg.dump())
        versions = {one.__name__: one.__version__ for one in (torch, torchvision, albumentations)}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        entries = {"command": command, "seed": cfg.SEED, "python": platform.python_version(), **versions, **machine}
        write_json(self.root / "run.json", entries)

    def _changed_phases(self, cfg: CfgNode) -> dict[str, str]:
        """Unfinished phase -> a key of its training settings in which ``cfg`` and the stored configuration differ. An
        EarlyExitError if they differ in a setting of a finished phase or of the whole run."""
        path = self.root / "config.yaml"
        if not path.is_file():
            return {}
        # a key that the stored configuration lacks has its default
        defaults, current = (_flat(parse_yaml(one.dump())) for one in (get_cfg(), cfg))
        stored = {**defaults, **_flat(_read_dict(path))}
        changed = {}
        for key in sorted({*stored, *current}):
            if stored.get(key) == current.get(key) or key.startswith(_MAY_CHANGE):
                continue
            if key == "PHASES":  # added at the end, or unfinished ones at the end left out
                shorter, longer = sorted((list(stored[key]), list(current[key])), key=len)
                if longer[: len(shorter)] == shorter and not any(map(self.finished, longer[len(shorter) :])):
                    continue
            phase = next((phase for phase, keys in _SETTINGS_OF_PHASES.items() if key.startswith(keys)), None)
            if phase is None or self.finished(phase):
                values = f"{key} = {shown(stored.get(key))}, now it is {shown(current.get(key))}"
                fix = "set it back, or name another folder (OUTPUT_DIR)"
                raise EarlyExitError(f"{path}: the run to resume has {values}; {fix}")
            if ".GATE." not in key:  # a changed gate needs no new training
                changed[phase] = key
        return changed

    def write_gate(self, gate: Gate) -> None:
        write_json(self.phase(gate.phase) / "gate.json", gate.to_dict())

    def finished(self, phase: str) -> bool:
        """Whether the phase was trained and its gate was passed or forced."""
        gate = self._read_gate(phase)
        return bool(gate.get("passed") or gate.get("forced"))

    def forced(self) -> bool:
        """Whether any failed gate was forced."""
        gates = [self._read_gate(path.parent.name) for path in self.root.glob("*/gate.json")]
        return any(gate.get("forced") for gate in gates)

    def _read_gate(self, phase: str) -> dict:
        """Content of gate.json; empty if the gate was not checked yet."""
        path = self.phase(phase) / "gate.json"
        return _read_dict(path) if path.is_file() else {}


def _read_dict(path: Path) -> dict:
    """Read a YAML or JSON file of a run (JSON is YAML)."""
    fix = "restore it, or name another folder (OUTPUT_DIR)"
    content = read_yaml(path, "file of a run", fix)
    if not isinstance(content, dict):
        raise EarlyExitError(f"{path}: expected a dict written by a run, got {shown(content)}; {fix}")
    return content


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class SplitQuality:
    """Computes figures such as AP50 on ``dataset``, of the full path or of every exit; every process must call it."""

    def __init__(self, dataset: DetectionDataset, cfg: CfgNode, workers: int) -> None:
        self._loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, workers, False, 0, rank(), world_size())
        self._ground_truth = to_coco(dataset)
        # gates compare figures without intervals: no bootstrap
        self._settings = EvaluationSettings(score=cfg.EVAL.SCORE, iou=cfg.EVAL.IOU, resamples=0)

    def of_full_path(self, model: EarlyExitSSDLite) -> Figures:
        """Figures of the model without routing."""
        router, model.router = model.router, None
        try:
            return self._figures(collect_detections(model, self._loader))
        finally:
            model.router = router

    def of_exits(self, model: EarlyExitSSDLite) -> list[Figures]:
        """Figures of every exit, the full path last."""
        return list(map(self._figures, collect(model, self._loader).detections))

    def _figures(self, found: Detections) -> Figures:
        return evaluate_detections(self._ground_truth, found, self._settings).figures

    def curve_point(self, model: EarlyExitSSDLite) -> dict[str, float | None]:
        """A point of the training curves: ``AP/<exit>`` and ``AP50/<exit>`` of exits with a branch, ``share/<exit>`` of
        leaving photos, ``temperature/<exit>`` and the mean ``confidence/<exit>`` of early ones. Without a router
        (before the exits phase): only the full path's AP."""
        router = model.router
        if router is None:
            return self._ap("full", collect_detections(model, self._loader, title=None))
        collected = collect(model, self._loader, router, title=None)
        point: dict[str, float | None] = {}
        for name, empty, found in zip(model.exit_names, (*model.empty, False), collected.detections, strict=True):
            point |= {} if empty else self._ap(name, found)
        shares = exit_share(choose_exits(collected.confidences, router.thresholds.tolist()), model.exit_names)
        point |= {f"share/{name}": share for name, share in shares.items()}
        early = zip(model.exit_names, router.temperatures.tolist(), collected.confidences, strict=False)
        for name, temperature, confidences in early:
            point |= {f"temperature/{name}": temperature, f"confidence/{name}": confidences.mean().item()}
        return point

    def _ap(self, name: str, found: Detections) -> dict[str, float | None]:
        matches = exit_matches(self._ground_truth, [found])
        ap, ap50 = ap_of_choice(matches, np.zeros(matches.photos, np.int64))
        return {f"AP/{name}": ap, f"AP50/{name}": ap50}


@dataclass
class Run:
    """State shared by all phases."""

    cfg: CfgNode
    folder: RunFolder
    model: EarlyExitSSDLite
    architecture: Architecture
    train_set: DetectionDataset
    calib_set: DetectionDataset
    device: torch.device

    @property
    def calib_quality(self) -> SplitQuality:
        return SplitQuality(self.calib_set, self.cfg, self.cfg.DATA.WORKERS)

    @property
    def curve_quality(self) -> SplitQuality:
        """Figures on ENGINE.CURVE_PHOTOS photos of the calib split, for the training curves."""
        records = self.calib_set.records
        chosen = np.random.default_rng(self.cfg.SEED).permutation(len(records))[: self.cfg.ENGINE.CURVE_PHOTOS]
        return SplitQuality(self.calib_set.subset([records[place] for place in sorted(chosen)]), self.cfg, workers=0)

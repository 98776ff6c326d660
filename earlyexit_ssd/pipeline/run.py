"""A training run: its folder, its gates, the state shared by its phases, and figures on the calib split."""

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
from earlyexit_ssd.evaluation.matches import DetectionsById, ap_of_choice, exit_matches
from earlyexit_ssd.evaluation.metrics import EvaluationSettings, Figures
from earlyexit_ssd.evaluation.outputs import choose_exits, collect, collect_detections, exit_share
from earlyexit_ssd.files import make_folder, write_json, write_text, writing
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.plain import parse_yaml, read_yaml

logger = logging.getLogger(__name__)

_CHANGEABLE = (  # keys, or beginnings of keys, that a resumed run may change
    *("OUTPUT_DIR", "DEVICE", "THREADS", "DATA.ROOT", "DATA.WORKERS", "EVAL.", "CALIBRATION.", "FINE_TUNING."),
    *("EXITS_PHASE.CACHE_GIB", "ENGINE.CHECKPOINT_PERIOD", "ENGINE.LOG_PERIOD", "ENGINE.CURVE_PERIOD"),
)
_SETTINGS_OF_PHASES = {"baseline": "BASELINE.", "exits": ("EXITS_PHASE.", "EXITS.", "ROUTING."), "joint": "JOINT."}


@dataclass(frozen=True)
class GateCheck:
    """One figure of a gate and its limit."""

    name: str
    value: float | None  # None: undefined, which reaches only a limit of 0
    limit: float | None  # minimum; None: the figure is shown but not checked
    of: str = ""  # the figure that the limit is a share of; empty: the limit is absolute

    @property
    def passed(self) -> bool:
        return self.limit is None or (self.value or 0.0) >= self.limit

    def __str__(self) -> str:
        value = "undefined" if self.value is None else f"{self.value:.3f}"
        if self.limit is None:
            return f"{self.name} {value}"
        of = f" ({self.of})" if self.of else ""
        return f"{self.name} {value} {'>=' if self.passed else '<'} {self.limit:.3f}{of}"


@dataclass(frozen=True)
class Gate:
    """The checks that a phase must pass before the next phase starts, and advice for a failed check."""

    phase: str
    checks: tuple[GateCheck, ...]
    advice: tuple[str, ...] = ()
    forced: bool = False  # whether the run continued although the gate failed

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        state = "passed" if self.passed else "failed, forced" if self.forced else "failed"
        return f"gate of phase {self.phase} {state}: {', '.join(map(str, self.checks)) or 'nothing to check'}"

    def failed(self) -> GateFailed:
        """Return the error for a failed gate, with the advice."""
        tries = [f"  try: {line}" for line in self.advice]
        return GateFailed(str(self), [*tries, "  or continue with --force, which every later report will mention"])

    def to_dict(self) -> dict:
        """Return the content of gate.json."""
        checks = [vars(check) | {"passed": check.passed} for check in self.checks]
        return {"phase": self.phase, "passed": self.passed, "forced": self.forced, "checks": checks}


@dataclass(frozen=True)
class RunFolder:
    """The folder ``root`` of a run: the final model, and a folder for each phase."""

    root: Path
    shared_taps: Path | None = None  # folder of a tap cache that several runs share; it is not deleted

    @property
    def model(self) -> Path:
        return self.root / "model.pth"

    def phase(self, name: str) -> Path:
        return self.root / name

    @property
    def taps(self) -> Path:
        """Folder of the tap cache, which takes gigabytes and is deleted after the exits phase."""
        return self.shared_taps or self.phase("exits") / "taps"

    def remove_taps(self) -> None:
        """Delete the tap cache if the exits phase is finished. A stopped phase needs the cache to resume."""
        if self.finished("exits") and not self.shared_taps:
            shutil.rmtree(self.taps, ignore_errors=True)

    def require_free(self, cfg: CfgNode, resume: bool) -> None:
        """Raise EarlyExitError if the folder holds other results, or a run that ``cfg`` may not continue: ``resume`` is
        not set, or settings of a finished phase have changed. Settings of unfinished phases may change, because a
        failed gate may advise this. Then :meth:`start` moves the files of these phases aside."""
        make_folder(self.root)
        fix = "choose another folder (OUTPUT_DIR), or delete this one"
        if (self.root / "config.yaml").is_file():
            if not resume:
                raise EarlyExitError(f"{self.root} already holds a run; continue it (--resume), {fix}")
            self._changed_phases(cfg)  # raises if a setting may not change
        for name in ("metrics.json", "model.pth", "report.html"):
            if not (self.root / "config.yaml").is_file() and (self.root / name).exists():
                raise EarlyExitError(f"{self.root} holds other results ({name}); {fix}")

    def start(self, cfg: CfgNode) -> None:
        """Move the files of each unfinished phase with changed settings into a new folder ``before_N`` of the phase.
        Then write the configuration and the versions."""
        for phase, key in self._changed_phases(cfg).items():
            logger.info("phase %s starts again, since %s has changed", phase, key)
            folder = self.phase(phase)
            # the tap cache stays; if the new settings need other taps, they are recorded again
            files = [path for path in folder.glob("*") if path.name != "taps" and not path.name.startswith("before_")]
            if files:
                target = next(path for number in count(1) if not (path := folder / f"before_{number}").exists())
                with writing(target):
                    target.mkdir()
                    for path in files:
                        path.rename(target / path.name)
        write_text(self.root / "config.yaml", cfg.dump())
        versions = {package.__name__: package.__version__ for package in (torch, torchvision, albumentations)}
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        entries = {"command": command, "seed": cfg.SEED, "python": platform.python_version(), **versions, **machine}
        write_json(self.root / "run.json", entries)

    def _changed_phases(self, cfg: CfgNode) -> dict[str, str]:
        """Return a dict: unfinished phase -> a key of its training settings that differs between ``cfg`` and the stored
        configuration. Raise EarlyExitError if a setting of a finished phase or of the whole run differs."""
        path = self.root / "config.yaml"
        if not path.is_file():
            return {}
        # dumped and parsed, so that their values have the types of the stored YAML, such as lists for tuples
        defaults, current = (_flat(parse_yaml(each.dump())) for each in (get_cfg(), cfg))
        stored = {**defaults, **_flat(_read_dict(path))}  # a file of an older version lacks newer keys
        changed = {}
        for key in sorted({*stored, *current}):
            if stored.get(key) == current.get(key) or key.startswith(_CHANGEABLE):
                continue
            if key == "PHASES":  # phases may be added at the end, and unfinished phases at the end may be removed
                shorter, longer = sorted((list(stored[key]), list(current[key])), key=len)
                if longer[: len(shorter)] == shorter and not any(map(self.finished, longer[len(shorter) :])):
                    continue
            phase = next((phase for phase, keys in _SETTINGS_OF_PHASES.items() if key.startswith(keys)), None)
            if phase is None or self.finished(phase):
                values = f"{key} = {shown(stored.get(key))}, now it is {shown(current.get(key))}"
                fix = "use the stored value, or choose another folder (OUTPUT_DIR)"
                raise EarlyExitError(f"{path}: the run to resume has {values}; {fix}")
            if ".GATE." not in key:  # another limit of the gate needs no new training
                changed[phase] = key
        return changed

    def finished(self, phase: str) -> bool:
        """Return whether the phase is trained and its gate is passed or forced."""
        gate = self.gate(phase)
        return bool(gate.get("passed") or gate.get("forced"))

    def forced(self) -> bool:
        """Return whether the run continued after a failed gate."""
        gates = [self.gate(path.parent.name) for path in self.root.glob("*/gate.json")]
        return any(gate.get("forced") for gate in gates)

    def gate(self, phase: str) -> dict:
        """Return the content of gate.json, or an empty dict if the gate is not checked yet."""
        path = self.phase(phase) / "gate.json"
        return _read_dict(path) if path.is_file() else {}


def _read_dict(path: Path) -> dict:
    """Read a YAML or JSON file of a run (JSON is YAML). Raise EarlyExitError if its content is not a dict."""
    fix = "restore it, or choose another folder (OUTPUT_DIR)"
    content = read_yaml(path, "file of a run", fix)
    if not isinstance(content, dict):
        raise EarlyExitError(f"{path}: expected a dict written by a run, got {shown(content)}; {fix}")
    return content


def _flat(tree: dict, prefix: str = "") -> dict:
    """Return a dict with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class SplitQuality:
    """AP and other figures of models on ``dataset``. Under torchrun every process must call the same methods."""

    def __init__(self, dataset: DetectionDataset, cfg: CfgNode, workers: int) -> None:
        self._loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, workers, False, 0, rank(), world_size())
        self._ground_truth = to_coco(dataset)
        # no bootstrap, since gates do not use intervals
        self._settings = EvaluationSettings(score=cfg.EVAL.SCORE, iou=cfg.EVAL.IOU, resamples=0)

    def of_full_path(self, model: EarlyExitSSDLite) -> Figures:
        router, model.router = model.router, None  # without a router every photo takes the full path
        try:
            return self._figures(collect_detections(model, self._loader))
        finally:
            model.router = router

    def of_exits(self, model: EarlyExitSSDLite) -> list[Figures]:
        """Return the figures of every exit, with the full path last."""
        return list(map(self._figures, collect(model, self._loader).detections))

    def _figures(self, detections: DetectionsById) -> Figures:
        return evaluate_detections(self._ground_truth, detections, self._settings).figures

    def curve_point(self, model: EarlyExitSSDLite) -> dict[str, float | None]:
        """Return a point of the training curves.

        Keys are ``AP/<exit>`` and ``AP50/<exit>`` for exits with a branch and for the full path, ``share/<exit>`` (of
        the photos) for every exit, and ``temperature/<exit>`` and ``confidence/<exit>`` (mean) for early exits. Without
        a router, as before the exits phase, the point has only the full path's AP and AP50.
        """
        router = model.router
        if router is None:
            return self._ap("full", collect_detections(model, self._loader, title=None))
        collected = collect(model, self._loader, router, title=None)
        point: dict[str, float | None] = {}
        for name, empty, detections in zip(model.exit_names, (*model.empty, False), collected.detections, strict=True):
            point |= {} if empty else self._ap(name, detections)
        shares = exit_share(choose_exits(collected.confidences, router.thresholds.tolist()), model.exit_names)
        point |= {f"share/{name}": share for name, share in shares.items()}
        early = zip(model.exit_names, router.temperatures.tolist(), collected.confidences, strict=False)
        for name, temperature, confidences in early:
            point |= {f"temperature/{name}": temperature, f"confidence/{name}": confidences.mean().item()}
        return point

    def _ap(self, name: str, detections: DetectionsById) -> dict[str, float | None]:
        matches = exit_matches(self._ground_truth, [detections])
        ap, ap50 = ap_of_choice(matches, np.zeros(matches.photos, np.int64))
        return {f"AP/{name}": ap, f"AP50/{name}": ap50}


@dataclass
class Run:
    """State of a training that all phases share."""

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
        """Figures on a seeded sample of ENGINE.CURVE_PHOTOS photos of the calib split, for the training curves."""
        records = self.calib_set.records
        indices = np.random.default_rng(self.cfg.SEED).permutation(len(records))[: self.cfg.ENGINE.CURVE_PHOTOS]
        return SplitQuality(self.calib_set.subset([records[index] for index in sorted(indices)]), self.cfg, workers=0)

"""The folder of a run: its configuration, versions, phases, and what was already done."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import albumentations
import torch
import torchvision
import yaml
from fvcore.common.config import CfgNode

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import make_folder, write_json, write_text
from earlyexit_ssd.pipeline.gates import Gate

logger = logging.getLogger(__name__)

_MAY_CHANGE = (
    "OUTPUT_DIR",
    "DEVICE",
    "DATA.ROOT",
    "DATA.WORKERS",
    "ENGINE.CHECKPOINT_PERIOD",
    "ENGINE.LOG_PERIOD",
    "EVAL.",
    "EXITS_PHASE.CACHE_GIB",
)
_SETTINGS_OF_PHASES = {
    "baseline": ("BASELINE.",),
    "exits": ("EXITS_PHASE.", "EXITS.", "ROUTING."),
    "joint": ("JOINT.", "PHASES"),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run below ``root``."""

    root: Path

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
        return self.phase("exits") / "taps"

    def remove_taps(self) -> None:
        """Delete the tap cache."""
        shutil.rmtree(self.taps, ignore_errors=True)

    def require_free(self, cfg: CfgNode, resume: bool) -> None:
        """Check that the folder holds no run, or, to resume, one that this configuration goes on with.

        The settings of a phase that is not finished may change, as its gate advises; the phase then starts afresh.

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
            self._go_on(cfg, path)
        elif (self.root / "metrics.json").exists():
            raise EarlyExitError(f"{self.root} holds other results; name another folder (OUTPUT_DIR), or delete it")

    def start(self, cfg: CfgNode) -> None:
        """Write configuration and versions."""
        write_text(self.root / "config.yaml", cfg.dump())
        write_json(self.root / "run.json", describe_run(cfg))

    def _go_on(self, cfg: CfgNode, path: Path) -> None:
        stored, current = (
            _flat(yaml.safe_load(path.read_text(encoding="utf-8"))),
            _flat(yaml.safe_load(cfg.dump())),
        )
        changed = [key for key in sorted({*stored, *current}) if stored.get(key) != current.get(key)]
        afresh = {}
        for key in changed:
            phases = [phase for phase, sections in _SETTINGS_OF_PHASES.items() if key.startswith(sections)]
            if key.startswith(_MAY_CHANGE) or ("GATE" in key.split(".") and not self.finished(phases[0])):
                continue
            if not phases or any(self.finished(phase) for phase in phases):
                raise EarlyExitError(
                    f"{path}: the run to resume has {key} = {stored.get(key)!r}, now it is {current.get(key)!r}; "
                    "set it back, or name another folder (OUTPUT_DIR)"
                )
            afresh |= dict.fromkeys(phases, key)
        for phase, key in afresh.items():
            logger.info("phase %s starts afresh, since %s has changed", phase, key)
            (self.phase(phase) / "last.pth").unlink(missing_ok=True)

    def write_gate(self, gate: Gate) -> None:
        """Record a phase as finished."""
        write_json(self.phase(gate.phase) / "gate.json", gate.to_dict())

    def finished(self, phase: str) -> bool:
        """Whether the phase is trained and its gate passed or was forced."""
        gate = self._read_gate(phase)
        return gate is not None and (gate["passed"] or gate["forced"])

    def forced(self) -> bool:
        """Whether any phase went on past a failed gate."""
        gates = [self._read_gate(path.parent.name) for path in self.root.glob("*/gate.json")]
        return any(gate and gate["forced"] for gate in gates)

    def _read_gate(self, phase: str) -> dict | None:
        path = self.phase(phase) / "gate.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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

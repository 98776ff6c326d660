"""What a photo costs by the exit it takes, as calibration and its certificate use it."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from earlyexit_ssd.evaluation.metrics import measure_costs
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import build_evaluation
from earlyexit_ssd.routing import ExitRouter


@dataclass(frozen=True)
class CostModel:
    """Costs of one photo.

    Attributes:
        unit: ``ms`` or ``mmacs``.
        exits: to each exit, every branch on the way and its scoring included, the full path last.
        plain: of the detector without exits.
        measured: how: runtime, threads, runs and machine; empty for MMACs.
    """

    unit: str
    exits: tuple[float, ...]
    plain: float
    measured: dict[str, Any]

    @property
    def per_exit(self) -> np.ndarray:
        """``exits`` as an array."""
        return np.array(self.exits)

    def speedup(self, choice: np.ndarray) -> float:
        """Against the detector without exits, of photos that take these exits [n]."""
        return self.plain / float(self.per_exit[choice].mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {**dataclasses.asdict(self), "exits": list(self.exits)}


def measure_cost_model(cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter) -> CostModel:
    """In the unit of CALIBRATION.COST, with the timing settings of EVAL."""
    settings = build_evaluation(cfg)
    costs = measure_costs(model, settings, router)
    if cfg.CALIBRATION.COST == "mmacs":
        return CostModel("mmacs", tuple(costs.mmacs), costs.plain_mmacs, {})
    measured = {
        "runtime": settings.runtime,
        "threads": settings.timing_threads,
        "runs": settings.timing_runs,
        "machine": platform.processor() or platform.machine(),
    }
    return CostModel("ms", tuple(timing.ms for timing in costs.timings), costs.plain_timing.ms, measured)

"""What a photo costs by the exit it takes and the exits that are open, as calibration and its certificate use it."""

from __future__ import annotations

import itertools
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import PlainPath, Timing, count_mmacs, example_input
from earlyexit_ssd.evaluation.quality import EvaluationSettings
from earlyexit_ssd.evaluation.runtime import ONNX_RUNTIME, runtime_installed, time_in_runtime
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.paths import AllOutputs, PathToExit
from earlyexit_ssd.pipeline.build import build_evaluation
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CostModel:
    """Costs of one photo.

    Attributes:
        unit: ``ms`` or ``mmacs``.
        paths: which early exits before it are open (a text of 0 and 1, shallow to deep, without its own) -> cost of
            the way to an exit: the trunk to there, the open branches on the way with their scoring, and its own.
        early_exits: how many there are.
        plain: of the detector without exits.
        measured: how: runtime, threads, runs and machine; empty for MMACs.
    """

    unit: str
    paths: dict[str, float]
    early_exits: int
    plain: float
    measured: dict[str, Any]

    def per_exit(self, thresholds: Sequence[float] | None = None) -> np.ndarray:
        """[exits]: cost to each exit with these thresholds, the full path last; None: everything is open."""
        flags = [1] * self.early_exits if thresholds is None else [int(value < CLOSED) for value in thresholds]
        text = "".join(map(str, flags))
        return np.array([self.paths[text[:index]] for index in range(self.early_exits + 1)])

    def of_each(self, thresholds: np.ndarray) -> np.ndarray:
        """[M, exits] for the thresholds [M, early exits]."""
        return np.stack([self.per_exit(row) for row in thresholds])

    def speedup(self, choice: np.ndarray, thresholds: Sequence[float]) -> float:
        """Against the detector without exits, of photos that take these exits [n]."""
        return self.plain / float(self.per_exit(thresholds)[choice].mean())

    def to_dict(self, thresholds: Sequence[float] | None = None) -> dict[str, Any]:
        """Plain types for JSON; the exits' costs are those with these thresholds."""
        exits = self.per_exit(thresholds).tolist()
        return {"unit": self.unit, "exits": exits, "plain": self.plain, "measured": self.measured}


def measure_cost_model(cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter) -> CostModel:
    """In the unit of CALIBRATION.COST, with the timing settings of EVAL; the router's policy is scored on the way."""
    settings, example = build_evaluation(cfg), example_input(model)
    keys, networks = [], []
    for count in range(router.num_exits + 1):
        for flags in itertools.product((1, 0), repeat=count):
            thresholds = [0.0 if flag else CLOSED for flag in flags] + [0.0] * (router.num_exits - count)
            opened = ExitRouter(**{**router.to_dict(), "thresholds": thresholds}).to(example.device)
            keys.append("".join(map(str, flags)))
            networks.append(AllOutputs(PathToExit(model, count, opened)))
    plain = PlainPath(model)
    if cfg.CALIBRATION.COST == "mmacs":
        costs = [count_mmacs(network, example) for network in (*networks, plain)]
        return CostModel("mmacs", dict(zip(keys, costs, strict=False)), router.num_exits, costs[-1], {})
    deployed = cfg.CALIBRATION.COST == "auto" and example.device.type == "cpu" and runtime_installed()
    runtime = ONNX_RUNTIME if deployed else settings.runtime
    networks.append(plain)
    try:
        timings = _timed(networks, example, runtime, settings)
    except EarlyExitError as error:
        if runtime == settings.runtime:
            raise
        logger.warning("costs are measured in %s instead of ONNX Runtime: %s", settings.runtime, error)
        runtime = settings.runtime
        timings = _timed(networks, example, runtime, settings)
    measured = {
        "runtime": runtime,
        "threads": settings.timing_threads,
        "runs": settings.timing_runs,
        "machine": torch.cuda.get_device_name(example.device)
        if example.device.type == "cuda"
        else platform.processor() or platform.machine(),
    }
    costs = [timing.ms for timing in timings]
    return CostModel("ms", dict(zip(keys, costs, strict=False)), router.num_exits, costs[-1], measured)


def _timed(networks: Sequence[nn.Module], example: Tensor, runtime: str, settings: EvaluationSettings) -> list[Timing]:
    return time_in_runtime(networks, [example] * len(networks), runtime, settings.timing_runs, settings.timing_threads)

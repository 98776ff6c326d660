"""Static detectors that a routed one is held against: what one would ship instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from torch import Tensor, nn

from earlyexit_ssd.evaluation.coco import Detections
from earlyexit_ssd.evaluation.collect import Batches, Collected, collect_detections
from earlyexit_ssd.evaluation.cost import Timing, count_mmacs, example_input
from earlyexit_ssd.evaluation.quality import EvaluationSettings, Quality, evaluate_detections
from earlyexit_ssd.evaluation.runtime import ONNX_RUNTIME, OnnxNetwork
from earlyexit_ssd.modeling.paths import PathToExit

PLAIN, CUT_HEAD, SINGLE_EXIT, ONNX = "plain", "cut_head", "single_exit", "onnx"
"""Kinds: the detector without exits at another size, the same with a head of the wanted classes alone, one exit shipped
alone, a foreign detector from a file."""


@dataclass(frozen=True)
class Rival:
    """A detector that has no choice.

    name: in tables.
    kind: `PLAIN`, `CUT_HEAD`, `SINGLE_EXIT` or `ONNX`.
    network: what is timed, on ``example`` [1, 3, height, width].
    mmacs: millions of multiply-accumulates; None where they cannot be counted.
    found: its detections, or a module of torchvision's interface that finds them; labels are the evaluated ones.
    source: the file it comes from; None where it is the evaluated model's.
    """

    name: str
    kind: str
    network: nn.Module
    example: Tensor
    mmacs: float | None
    found: nn.Module | Detections
    source: str | None = None

    def runtime(self, default: str) -> str:
        """What it is timed in, ``default`` for everything that is not a graph from a file."""
        return ONNX_RUNTIME if isinstance(self.network, OnnxNetwork) else default


def exits_alone(model: nn.Module, collected: Collected) -> list[Rival]:
    """Every exit of an `EarlyExitSSDLite` that has a branch, as a detector of its own: a branch has nothing of the
    others in it, so its detections are the same without them."""
    rivals, example = [], example_input(model)
    for index, name in enumerate(model.exit_names[:-1]):
        if not model.empty[index]:
            network = PathToExit(model, index, alone=True)
            mmacs = count_mmacs(network, example)
            rivals.append(Rival(f"{name} alone", SINGLE_EXIT, network, example, mmacs, collected.detections[index]))
    return rivals


def evaluate_rivals(
    rivals: Sequence[Rival],
    timings: Sequence[Timing],
    loader: Batches,
    ground_truth: COCO,
    routed: Quality,
    settings: EvaluationSettings,
) -> list[dict[str, Any]]:
    """The rows of metrics.json, in the order of ``rivals``.

    Args:
        rivals: the detectors.
        timings: of their networks, measured in turns with the exits.
        loader, ground_truth: the photos that the exits were evaluated on.
        routed: of the routed detector.
        settings: the same as for the exits.
    """
    rows = []
    for rival, timing in zip(rivals, timings, strict=True):
        found = collect_detections(rival.found, loader) if isinstance(rival.found, nn.Module) else rival.found
        quality = evaluate_detections(ground_truth, found, settings)
        rows.append(
            {
                "name": rival.name,
                "kind": rival.kind,
                "source": Path(rival.source).name if rival.source else None,
                "input_size": list(rival.example.shape[-2:]),
                **quality.figures,
                "routed_minus_rival_AP50_interval": routed.ap50_minus(quality),
                "mmacs": rival.mmacs,
                "ms": timing.ms,
                "ms_interval": [timing.low, timing.high],
                "runtime": rival.runtime(settings.runtime),
            }
        )
    return rows

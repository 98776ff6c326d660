"""The routed detector, put together from what every exit found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.collect import Collected, ImageDetections
from earlyexit_ssd.routing.search import choose


def choose_exits(confidences: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """The exit of every photo: the first whose confidence reaches its threshold; the last takes the rest.

    Args:
        confidences: per exit, shallow to deep, [n].
        thresholds: one per early exit; the last exit needs none.

    Returns:
        int64 [n], indices of exits.
    """
    last = len(confidences) - 1
    if len(thresholds) != last:
        raise EarlyExitError(f"{len(thresholds)} thresholds for {last} early exits: give one for each")
    if last == 0:
        return torch.zeros(len(confidences[0]), dtype=torch.int64)
    return torch.from_numpy(choose([values.numpy() for values in confidences[:-1]], thresholds).astype(np.int64))


def routed_detections(collected: Collected, chosen: Tensor) -> dict[int, ImageDetections]:
    """Per image id, the detections of its exit ``chosen`` [n] (in the order of ``collected.image_ids``)."""
    return {
        image_id: collected.detections[index][image_id]
        for image_id, index in zip(collected.image_ids, chosen.tolist(), strict=True)
    }


def exit_share(chosen: Tensor, exit_names: Sequence[str]) -> dict[str, float]:
    """Share of the photos that take each exit, in [0, 1], summing to 1 (all 0 without photos)."""
    counts = torch.bincount(chosen, minlength=len(exit_names)).tolist()
    return {name: count / max(len(chosen), 1) for name, count in zip(exit_names, counts, strict=True)}


def mean_cost(chosen: Tensor, costs: Sequence[float]) -> float | None:
    """Mean over the photos of the cost of the exit each takes (milliseconds, MMACs); None without photos."""
    return torch.tensor(costs, dtype=torch.float64)[chosen].mean().item() if len(chosen) else None

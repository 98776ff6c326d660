"""Where to put exits: what one behind each trunk layer costs, how much it can save, and which of them to take."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from earlyexit_ssd.evaluation.cost import EAGER, PlainPath, count_mmacs, example_input, time_in_runtime
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit
from earlyexit_ssd.modeling.outputs import Router

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the photos that leave early for which the speed-up is given."""


@dataclass(frozen=True)
class Placement:
    """One exit, alone in the detector.

    Attributes:
        layer: trunk layer behind which it leaves.
        mmacs, ms: cost of a photo that leaves there.
        full_ms: cost of a photo that goes on, the branch that it has tried included.
        plain_ms: cost of the detector without exits.
        AP50: of the exit, where it was trained; else None.
    """

    layer: int
    mmacs: float
    ms: float
    full_ms: float
    plain_ms: float
    AP50: float | None = None

    def speedup(self, share: float) -> float:
        """Against the detector without exits, if ``share`` in [0, 1] of the photos leave here."""
        return self.plain_ms / (share * self.ms + (1 - share) * self.full_ms)

    def share_for(self, speedup: float) -> float | None:
        """The share that must leave here for ``speedup``; None if all of them would not do."""
        wanted_ms = self.plain_ms / speedup
        if self.ms > wanted_ms:
            return None
        return max(0.0, (self.full_ms - wanted_ms) / (self.full_ms - self.ms)) if self.full_ms > self.ms else 0.0


@dataclass(frozen=True)
class Proposal:
    """A set of exits, and what it gives if chance chose who leaves; a router should do better.

    Attributes:
        layers: of the exits, shallow to deep.
        AP50: expected, the mean of the exits' weighted by the shares.
        shares: of the photos that leave at each exit, the full path's last.
    """

    layers: tuple[int, ...]
    AP50: float
    shares: tuple[float, ...]


def measure_placements(
    models: Mapping[int, nn.Module], router: Router, runs: int = 30, threads: int = 1, runtime: str = EAGER
) -> list[Placement]:
    """Cost of each model's one exit, all of them timed in turns with the detector without exits.

    Args:
        models: trunk layer -> an `EarlyExitSSDLite` with one exit behind it; all with the same full path.
        router: of one exit; its scoring counts.
        runs, threads: of the timing; see `time_modules`.
        runtime: what runs the networks, `EAGER` or `ONNX_RUNTIME`.
    """
    first = next(iter(models.values()))
    paths = [AllOutputs(PathToExit(model, index, router)) for model in models.values() for index in (0, 1)]
    networks = [*paths, PlainPath(first)]
    *timings, plain = time_in_runtime(networks, [example_input(first)] * len(networks), runtime, runs, threads)
    mmacs = [count_mmacs(AllOutputs(PathToExit(model, 0)), example_input(model)) for model in models.values()]
    return [
        Placement(layer, cost, leaves.ms, goes_on.ms, plain.ms)
        for layer, cost, leaves, goes_on in zip(models, mmacs, timings[::2], timings[1::2], strict=True)
    ]


def propose(placements: Sequence[Placement], full_ap50: float, speedup: float) -> Proposal | None:
    """One or two of the exits with the highest expected AP50 at the wanted speed-up; None where none reaches it.

    Args:
        placements: with their AP50; those without are left out.
        full_ap50: of the full path.
        speedup: wanted, against the detector without exits.
    """
    usable = [one for one in placements if one.AP50 is not None]
    best: Proposal | None = None
    for chosen in (*itertools.combinations(usable, 1), *itertools.combinations(usable, 2)):
        points = _points(chosen, full_ap50)
        mix = best_mix(points, chosen[0].plain_ms / speedup)
        if mix is None:
            continue
        value = sum(share * ap50 for share, (_, ap50) in zip(mix, points, strict=True))
        if best is None or value > best.AP50 + 1e-9:
            best = Proposal(tuple(one.layer for one in chosen), value, mix)
    return best


def _points(exits: Sequence[Placement], full_ap50: float) -> list[tuple[float, float]]:
    """(milliseconds, AP50) of each exit of a set and of the full path; who goes on has tried the exits before."""
    tried, points = 0.0, []
    for one in exits:
        points.append((one.ms + tried, one.AP50 or 0.0))
        tried += one.full_ms - one.plain_ms
    return [*points, (exits[-1].plain_ms + tried, full_ap50)]


def best_mix(points: Sequence[tuple[float, float]], limit: float) -> tuple[float, ...] | None:
    """Shares of (cost, value) points with the highest mean value at a mean cost of at most ``limit``; None if none.

    A linear programme with two constraints: at most two of the points have a share.
    """
    best: tuple[float, tuple[float, ...]] | None = None
    for first, second in itertools.product(range(len(points)), repeat=2):
        cheap, dear = points[first], points[second]
        if cheap[0] > limit or cheap[0] > dear[0]:
            continue
        share = 1.0 if dear[0] <= limit else (limit - cheap[0]) / (dear[0] - cheap[0])
        value = share * dear[1] + (1 - share) * cheap[1]
        if best is None or value > best[0]:
            shares = [0.0] * len(points)
            shares[first] += 1 - share
            shares[second] += share
            best = value, tuple(shares)
    return best[1] if best else None

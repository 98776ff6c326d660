"""Gates: figures that a phase must reach before the next one starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from earlyexit_ssd.errors import EarlyExitError


@dataclass(frozen=True)
class Check:
    """One figure against its limit; None (undefined) fails."""

    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure reaches the limit."""
        return self.value is not None and self.value >= self.limit

    def __str__(self) -> str:
        value = "undefined" if self.value is None else f"{self.value:.3f}"
        return f"{self.name} {value} {'>=' if self.passed else '<'} {self.limit:.3f}"


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


def baseline_gate(figures: dict, limits: dict[str, float]) -> Gate:
    """AP50, precision and recall of the full path (``figures``) against ``limits``, keys in lower case but AP50."""
    checks = tuple(Check(name, figures[name], limit) for name, limit in limits.items())
    advice = (
        "more epochs (BASELINE.EPOCHS) or a higher rate (BASELINE.LR); log.jsonl shows whether the loss still falls",
        "look at training_photos.png in the run's folder: are boxes missing, shifted or of another class?",
        "start from trained weights (MODEL.WEIGHTS) or an ImageNet trunk (MODEL.WEIGHTS_BACKBONE)",
    )
    return Gate("baseline", checks, advice)


def exits_gate(ap50: Mapping[str, float | None], first_limit: float, deepest_share: float) -> Gate:
    """The first exit's AP50, and the deepest early exit's against the full path's.

    Args:
        ap50: of the exits that have a branch, shallow to deep, and of the full path, by name.
    """
    names, values = list(ap50), list(ap50.values())
    if len(names) == 1:
        return Gate("exits", ())
    full = values[-1] or 1.0  # where the full path finds nothing, no exit passes
    checks = (
        Check(f"{names[0]} AP50", values[0], first_limit),
        Check(f"{names[-2]} AP50", values[-2], deepest_share * full),
    )
    advice = (
        f"move the exit deeper (EXITS.LAYERS): {names[0]} sees too little of the trunk",
        "more epochs (EXITS_PHASE.EPOCHS), more views (EXITS_PHASE.CACHE_VIEWS) or a wider branch (EXITS.COPY)",
        "more photos; the full path alone can teach from photos without boxes (LOSS.SUPERVISION teacher)",
    )
    return Gate("exits", checks, advice)

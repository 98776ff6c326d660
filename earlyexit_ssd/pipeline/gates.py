"""Gates: figures that a phase must reach before the next one starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.errors import GateFailed
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.pipeline.build import takes_over

DEEPEST_USEFUL_LAYER = 12  # a branch after a later layer saves next to nothing


@dataclass(frozen=True)
class Check:
    """One figure against its limit; None (undefined) fails.

    limit: the least value; None where the figure is only shown. of: what it is a share of, empty for an absolute one.
    """

    name: str
    value: float | None
    limit: float | None
    of: str = ""

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
    """The outcome of a phase's gate: what was looked at, and what to try if a check fails.

    forced: the run went on although the gate failed.
    """

    phase: str
    checks: tuple[Check, ...]
    advice: tuple[str, ...] = ()
    forced: bool = False

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


def baseline_limits(cfg: CfgNode, reference: Mapping[str, float | None] | None = None) -> dict[str, float | None]:
    """What the full path must reach, by figure; None where a figure is only shown.

    A checkpoint that is taken over as it is need only detect. Of the configuration's limits those count for it that are
    not the default; none of them can lower that. ``reference`` has the figures that BASELINE.GATE.RELATIVE multiplies.
    """
    gate, default = cfg.BASELINE.GATE, get_cfg().BASELINE.GATE
    limits = {name: gate[name.upper()] for name in ("AP50", "precision", "recall")}
    if reference is not None:
        limits = {name: gate.RELATIVE * (reference[name] or 0.0) for name in limits}
    elif takes_over(cfg):
        limits = {name: limit if limit != default[name.upper()] else None for name, limit in limits.items()}
    else:
        return limits
    return {**limits, "AP50": max(limits["AP50"] or 0.0, DETECTS_AP50)}


def baseline_gate(
    figures: Mapping[str, float | None], limits: Mapping[str, float | None], advice: tuple[str, ...] = ()
) -> Gate:
    """AP50, precision and recall of the full path against :func:`baseline_limits`."""
    return Gate("baseline", tuple(Check(name, figures[name], limit) for name, limit in limits.items()), advice)


def baseline_advice(cfg: CfgNode) -> tuple[str, ...]:
    """What to try after the gate; nothing that is set already."""
    phase, train = cfg.BASELINE, "train the full path: BASELINE.EPOCHS is 0"
    if phase.EPOCHS:
        more = f"more epochs than {phase.EPOCHS} (BASELINE.EPOCHS) or another rate than {phase.LR:g} (BASELINE.LR)"
        train = f"{more}; log.jsonl shows whether the loss still falls"
    start = "start from trained weights (MODEL.WEIGHTS) or an ImageNet trunk (MODEL.WEIGHTS_BACKBONE)"
    if cfg.MODEL.WEIGHTS:
        start = "are the checkpoint's classes in its own order, and does it detect by itself?"
    elif cfg.MODEL.WEIGHTS_BACKBONE:
        start = "start from weights of a trained detector (MODEL.WEIGHTS)"
    look = "look at training_photos.png in the run's folder: are boxes missing, shifted or of another class?"
    return train, look, start


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

    def share_of_full(index: int, share: float) -> Check:
        return Check(f"{names[index]} AP50", values[index], share * full, f"{share:.0%} of {names[-1]}'s {found:.3f}")

    deepest = share_of_full(-2, deepest_share)
    if first_share is None:
        return Gate("exits", (Check(f"{names[0]} AP50", values[0], first_limit), deepest), advice)
    detects = Check(f"{names[-1]} AP50", values[-1], DETECTS_AP50)
    return Gate("exits", (detects, share_of_full(0, first_share), deepest), advice)


def exits_advice(cfg: CfgNode, first: str, layer: int) -> tuple[str, ...]:
    """What to try after the gate; nothing that is set already, or as far as it goes. ``first`` and ``layer`` are name
    and trunk layer of the first exit with a branch."""
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

"""What the doctor finds, and the registry of its checks.

A check is a function from evidence to figures by subject (an exit, a split). It leaves a subject out that it cannot
judge. The decorator `check` adds the thresholds, what a bad figure means and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from earlyexit_ssd.evaluation.results import Record

Measure = Callable[[Any], Mapping[str, float]]  # evidence -> figure by subject


@dataclass(frozen=True)
class Finding(Record):
    """One figure of one subject."""

    check: str  # name of the check
    subject: str  # exit, split or class that the figure is of
    bad: bool  # the figure is below ``least`` or above ``most``
    figure: float  # the measured value
    least: float | None  # threshold; None where there is none on that side
    most: float | None
    meaning: str  # what a bad figure means, one sentence
    advice: str  # what to do then, one sentence

    @property
    def wanted(self) -> str:
        """The thresholds in words."""
        sides = [("at least", self.least), ("at most", self.most)]
        return ", ".join(f"{word} {limit:.4g}" for word, limit in sides if limit is not None)

    @property
    def distance(self) -> float:
        """How far the figure is beyond its threshold; 0 if it is not, NaN if it is NaN."""
        below = 0.0 if self.least is None else self.least - self.figure
        above = 0.0 if self.most is None else self.figure - self.most
        return below + above if math.isnan(self.figure) else max(below, above, 0.0)

    @property
    def shown(self) -> str:
        """The figure, rounded."""
        return f"{self.figure:.0f}" if abs(self.figure) >= 1000 else f"{self.figure:.3g}"

    def __str__(self) -> str:
        what = f"{self.check} ({self.subject}): {self.shown}, expected {self.wanted}"
        return f"{what}; {self.meaning}: {self.advice}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check with its thresholds, see `Finding`."""

    name: str
    measure: Measure
    least: float | None = None
    most: float | None = None
    meaning: str
    advice: str

    def findings(self, evidence: Any) -> list[Finding]:
        """One for each subject that can be judged; a figure that is NaN is bad."""
        words = self.least, self.most, self.meaning, self.advice
        least, most = -math.inf if self.least is None else self.least, math.inf if self.most is None else self.most
        figures = self.measure(evidence).items()
        return [Finding(self.name, subject, not least <= figure <= most, figure, *words) for subject, figure in figures]


def check(checks: list[Check], **limits_and_words: Any) -> Callable[[Measure], Measure]:
    """Decorator that adds a function to ``checks`` under its own name; the keywords are further fields of `Check`."""

    def register(measure: Measure) -> Measure:
        checks.append(Check(name=measure.__name__, measure=measure, **limits_and_words))
        return measure

    return register


@dataclass(frozen=True)
class Diagnosis(Record):
    """All findings, bad ones first, and the names of the checks that could judge nothing."""

    findings: tuple[Finding, ...]
    not_judged: list[str]

    @property
    def bad(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.bad)

    def __str__(self) -> str:
        """A table; below each bad finding what it means and what to do."""
        cells = [("", "check", "subject", "figure", "limit")]
        cells += [("BAD" if one.bad else "ok", one.check, one.subject, one.shown, one.wanted) for one in self.findings]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        header, *rows = (
            f"{state:3}  {check:{widths[1]}}  {subject:{widths[2]}}  {figure:>{widths[3]}}  {limit}"
            for state, check, subject, figure, limit in cells
        )
        lines = [header] if rows else []
        for one, row in zip(self.findings, rows, strict=True):
            lines.append(row)
            lines += [f"     {one.meaning}", f"     what to do: {one.advice}"] if one.bad else []
        if self.not_judged:
            lines.append(f"not judged, too little to judge by: {', '.join(self.not_judged)}")
        count = f"{len(self.bad)} of {len(self.findings)} figures are bad" if self.bad else "nothing bad was found"
        return "\n".join([*lines, count])


def diagnose(checks: Sequence[Check], evidence: Any) -> Diagnosis:
    found = {one.name: one.findings(evidence) for one in checks}
    findings = sorted((finding for all_of in found.values() for finding in all_of), key=lambda one: not one.bad)
    return Diagnosis(tuple(findings), [name for name, all_of in found.items() if not all_of])

"""The checks of the doctor and their findings.

A check measures one figure per subject, such as an exit or a split. It leaves out subjects that it cannot judge. The
decorator `check` adds thresholds, the meaning of a bad figure, and advice.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from earlyexit_ssd.evaluation.results import JsonDataclass

Measure = Callable[[Any], Mapping[str, float]]  # function from evidence to figures by subject


@dataclass(frozen=True)
class DoctorFinding(JsonDataclass):
    """One figure of one subject."""

    check: str  # name of the check
    subject: str  # such as an exit or a split
    bad: bool  # whether the figure is below ``least``, above ``most`` or NaN
    figure: float
    least: float | None  # lower threshold; None if there is none
    most: float | None  # upper threshold; None if there is none
    meaning: str  # of a bad figure, one sentence
    advice: str  # for a bad figure, one sentence

    def to_json(self) -> dict[str, Any]:
        """Return plain types. A figure that is NaN or infinite becomes None, because JSON has neither."""
        return super().to_json() | {"figure": self.figure if math.isfinite(self.figure) else None}

    @property
    def expected(self) -> str:
        """The thresholds as text."""
        sides = [("at least", self.least), ("at most", self.most)]
        return ", ".join(f"{word} {limit:.4g}" for word, limit in sides if limit is not None)

    @property
    def distance(self) -> float:
        """Distance of a bad figure from its threshold; 0 if it is not bad, NaN if it is NaN."""
        below = 0.0 if self.least is None else self.least - self.figure
        above = 0.0 if self.most is None else self.figure - self.most
        return below + above if math.isnan(self.figure) else max(below, above, 0.0)

    @property
    def rounded(self) -> str:
        """The figure as text."""
        return f"{self.figure:.0f}" if abs(self.figure) >= 1000 else f"{self.figure:.3g}"

    def __str__(self) -> str:
        result = f"{self.check} ({self.subject}): {self.rounded}, expected {self.expected}"
        return f"{result}; {self.meaning}: {self.advice}"


Check = Callable[[Any], list[DoctorFinding]]  # function from evidence to a finding for each subject that can be judged


def check(
    checks: dict[str, Check], *, least: float | None = None, most: float | None = None, meaning: str, advice: str
) -> Callable[[Measure], Measure]:
    """Decorate a measure to add its check to ``checks`` under the measure's name. See `DoctorFinding` for the rest."""
    low, high = -math.inf if least is None else least, math.inf if most is None else most

    def register(measure: Measure) -> Measure:
        def findings(evidence: Any) -> list[DoctorFinding]:
            return [
                DoctorFinding(measure.__name__, subject, not low <= value <= high, value, least, most, meaning, advice)
                for subject, value in measure(evidence).items()
            ]

        checks[measure.__name__] = findings
        return measure

    return register


@dataclass(frozen=True)
class Diagnosis(JsonDataclass):
    """The findings of all checks."""

    findings: tuple[DoctorFinding, ...]  # bad findings first
    not_judged: list[str]  # names of the checks without a finding

    @property
    def bad(self) -> tuple[DoctorFinding, ...]:
        return tuple(finding for finding in self.findings if finding.bad)

    def __str__(self) -> str:
        """A table, with meaning and advice below each bad finding."""
        cells = [("", "check", "subject", "figure", "limit")]
        for finding in self.findings:
            state = "BAD" if finding.bad else "ok"
            cells.append((state, finding.check, finding.subject, finding.rounded, finding.expected))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        header, *rows = (
            f"{state:3}  {check:{widths[1]}}  {subject:{widths[2]}}  {figure:>{widths[3]}}  {limit}"
            for state, check, subject, figure, limit in cells
        )
        lines = [header] if rows else []
        for finding, row in zip(self.findings, rows, strict=True):
            lines.append(row)
            lines += [f"     {finding.meaning}", f"     what to do: {finding.advice}"] if finding.bad else []
        if self.not_judged:
            lines.append(f"not judged, too little to judge by: {', '.join(self.not_judged)}")
        verdict = "nothing bad was found" if self.findings else "nothing could be judged"
        count = f"{len(self.bad)} of {len(self.findings)} figures are bad" if self.bad else verdict
        return "\n".join([*lines, count])


def diagnose(checks: Mapping[str, Check], evidence: Any) -> Diagnosis:
    """Run the checks on ``evidence``."""
    by_check = {name: run(evidence) for name, run in checks.items()}
    findings = sorted(itertools.chain(*by_check.values()), key=lambda finding: not finding.bad)
    return Diagnosis(tuple(findings), [name for name, of_check in by_check.items() if not of_check])

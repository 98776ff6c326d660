"""Results of an evaluation: dataclasses with the JSON form of metrics.json (see docs/metrics.md), and table rows."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypedDict

from earlyexit_ssd.evaluation.cost import EAGER, RUNTIME_TITLES
from earlyexit_ssd.evaluation.metrics import Figure, Figures

Target = Mapping[str, str | float | None]
"""Target of a certificate: ``kind``, ``value`` or ``epsilon``, ``reference``, ``score``, ``iou`` and ``delta``."""
Interval = list[float] | None  # ends of a 95 % interval; None if it is undefined


class JsonDataclass:
    """Base of dataclasses with a JSON form: one key per field.

    Each entry of the field ``figures`` has a key of its own. A field that is None becomes ``null``, or is omitted if
    ``omitted_if_none`` contains its name.
    """

    omitted_if_none: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers, strings and None."""
        entries: dict[str, Any] = {}
        for name in (part.name for part in fields(self)):
            value = getattr(self, name)
            if name == "figures":
                entries |= value
            elif value is not None or name not in self.omitted_if_none:
                entries[name] = _plain(value)
        return entries

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> typing.Self:
        """Invert `to_json`. Fields whose keys are missing, as in older results, get their default. Keys without a field
        become figures.

        Raises:
            TypeError: a key is missing whose field has no default.
        """
        hints, figures, values = typing.get_type_hints(cls), dict(entries), {}
        names = [part.name for part in fields(cls)]
        for name in (name for name in names if name in entries):
            value = figures.pop(name)
            # the record class in hints such as `Verdict | None` and `tuple[ExitResult, ...]`
            record = next(filter(is_dataclass, (hints[name], *typing.get_args(hints[name]))), None)
            if isinstance(value, list) and (record or typing.get_origin(hints[name]) is tuple):
                value = tuple(map(record.from_json, value) if record else value)
            values[name] = record.from_json(value) if isinstance(value, dict) and record else value
        return cls(**values, **({"figures": figures} if "figures" in names else {}))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_json() if isinstance(value, JsonDataclass) else value


@dataclass(frozen=True)
class Context(JsonDataclass):
    """Photos and settings of an evaluation."""

    splits: list[str] = field(default_factory=list)
    images: int = 0
    empty_images: int = 0
    classes: list[str] = field(default_factory=list)
    score: float | None = None
    iou: float | None = None
    runs: int | None = None
    threads: int | None = None
    resamples: int | None = None
    seed: int | None = None
    runtime: str = EAGER
    device: str = "cpu"
    torch: str | None = None
    torchvision: str | None = None
    forced: bool = False  # the training continued after a failed gate
    taken_over: bool = False  # the full path is an unchanged checkpoint
    untrained: bool = False  # the exits have branches, and no phase has trained them
    labelled: bool = True
    weights_sha256: str | None = None
    omitted_if_none = ("weights_sha256",)


@dataclass(frozen=True)
class ConfidenceSummary(JsonDataclass):
    """Mean, population standard deviation and range of an exit's confidences, all in [0, 1]."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class BoxSummary(JsonDataclass):
    """Summary of all boxes of a detector, at any score, to recognise a broken detector."""

    boxes: int
    score_mean: float | None  # None without boxes, as the next fields
    score_std: float | None
    outside_share: float | None  # share of boxes with less than half of their area inside the photo, or no area


@dataclass(frozen=True)
class DetectorResult(JsonDataclass):
    """Base of results with a field ``figures``: the quality figures of `earlyexit_ssd.evaluation.metrics`."""

    def number(self, name: str) -> float | None:
        """Return a figure; None if it is undefined or was not measured."""
        value: Figure = self.figures.get(name)  # type: ignore[attr-defined]
        return value if isinstance(value, int | float) else None

    @property
    def ap50(self) -> float | None:
        return self.number("AP50")


@dataclass(frozen=True)
class ExitResult(DetectorResult):
    """Results of one exit. Early exits have ``empty`` and ``AP50_below_full_interval``, the full path has ``found``."""

    name: str
    layer: int | None = None
    figures: Figures = field(default_factory=dict)
    empty: bool | None = None  # the exit has no branch
    AP50_below_full_interval: Interval = None
    confidence: ConfidenceSummary | None = None
    mmacs: float | None = None
    ms: float | None = None
    ms_interval: Interval = None
    found: BoxSummary | None = None

    @property
    def omitted_if_none(self) -> tuple[str, ...]:
        # ``empty`` is None for the full path only
        return ("empty", "found") if self.empty is not None else ("empty", "found", "AP50_below_full_interval")


@dataclass(frozen=True)
class CostResult(JsonDataclass):
    """Cost of one image by the detector without exits."""

    mmacs: float | None = None
    ms: float | None = None
    ms_interval: Interval = None


@dataclass(frozen=True)
class RoutedResult(DetectorResult):
    """Results of the detector with its router. Costs are means over the photos."""

    policy: str | None = None
    thresholds: list[float] | None = None
    hybrid: bool = False
    figures: Figures = field(default_factory=dict)
    exit_share: dict[str, float] = field(default_factory=dict)
    mmacs: float | None = None
    ms: float | None = None
    speedup: float | None = None
    speedup_interval: Interval = None
    omitted_if_none = ("speedup_interval",)


@dataclass(frozen=True)
class RivalResult(DetectorResult):
    """Results of a rival, a detector that could be shipped instead of the routed one."""

    name: str
    kind: str = "plain"
    source: str | None = None
    input_size: list[int] | None = None
    figures: Figures = field(default_factory=dict)
    routed_minus_rival_AP50_interval: Interval = None
    mmacs: float | None = None
    ms: float | None = None
    ms_interval: Interval = None
    runtime: str = EAGER


@dataclass(frozen=True)
class CertificateResult(JsonDataclass):
    """Target of a certificate, and the figure measured on these photos."""

    target: Target
    measured: float | None  # loss of AP50, mean loss of a photo, or speed-up in ``unit``
    interval: Interval  # bootstrap interval of ``measured``
    kept: bool | None  # ``measured`` meets the target; None if it is undefined
    unit: str | None = None  # of the costs, for a speed-up: "ms" or "mmacs"


@dataclass(frozen=True)
class DriftResult(JsonDataclass):
    """Comparison of the photos with the calibration photos."""

    window: int  # photos compared at a time
    warnings: list[str]  # one line per cause
    shares: dict[str, float] | None = None  # of the exits in the last window
    calibration_shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Finding(JsonDataclass):
    """One line of the verdict. A ``veto`` forbids shipping the exits."""

    line: str
    veto: bool = False


@dataclass(frozen=True)
class Verdict(JsonDataclass):
    """The recommendation and its reasons."""

    ship: bool  # no finding is a veto
    what: str | None = None  # detector to ship, such as ``routed`` or ``exit8 alone``; None if ``ship`` is False
    findings: tuple[Finding, ...] = ()  # in the order of the rules

    @property
    def lines(self) -> list[str]:
        """Texts of the findings."""
        return [finding.line for finding in self.findings]


@dataclass(frozen=True)
class Results(JsonDataclass):
    """All results of an evaluation, the content of metrics.json."""

    context: Context = Context()
    exits: tuple[ExitResult, ...] = ()  # shallow to deep, the full path last
    without_exits: CostResult = CostResult()
    routed: RoutedResult = RoutedResult()
    rivals: tuple[RivalResult, ...] = ()
    certificate: CertificateResult | None = None
    drift: DriftResult | None = None
    verdict: Verdict | None = None
    omitted_if_none = ("certificate", "drift")

    @property
    def full(self) -> ExitResult:
        return self.exits[-1]

    @property
    def early(self) -> tuple[ExitResult, ...]:
        return self.exits[:-1]


@dataclass(frozen=True)
class TableRow:
    """A row of the table: an exit, the routed detector, the detector without exits or a rival."""

    name: str
    kind: str  # ``exit``, ``routed``, or the kind of a rival
    figures: Figures
    mmacs: float | None
    ms: float | None
    ms_interval: Interval = None
    layer: int | None = None
    confidence: ConfidenceSummary | None = None
    share: float | None = None  # share of the photos that leave at this exit
    source: str | None = None
    other_runtime: str | None = None  # ``ORT`` (ONNX Runtime) if the exits were timed in another runtime
    empty: bool = False

    def number(self, name: str) -> float | None:
        """Return ``ms``, ``mmacs`` or the figure with this name."""
        return getattr(self, name) if name in ("ms", "mmacs") else self.figures.get(name)


def table_rows(results: Results) -> list[TableRow]:
    """Return the rows of the exits, ``routed``, ``without exits`` (with the full path's figures), and of the rivals."""
    routed, plain, rows = results.routed, results.without_exits, []
    for exit_ in results.exits:
        parts = exit_.name, "exit", exit_.figures, exit_.mmacs, exit_.ms, exit_.ms_interval, exit_.layer
        share = routed.exit_share.get(exit_.name)
        rows.append(TableRow(*parts, confidence=exit_.confidence, share=share, empty=bool(exit_.empty)))
    rows.append(TableRow("routed", "routed", routed.figures, routed.mmacs, routed.ms))
    rows.append(TableRow("without exits", "plain", results.full.figures, **vars(plain)))
    for rival in results.rivals:
        other = None if rival.runtime == results.context.runtime else "ORT"  # only ONNX files have their own runtime
        parts = rival.name, rival.kind, rival.figures, rival.mmacs, rival.ms, rival.ms_interval
        rows.append(TableRow(*parts, source=rival.source, other_runtime=other))
    return rows


def timing_title(results: Results) -> str:
    """Return runtime, device and threads with which the milliseconds were measured."""
    context = results.context
    return f"{RUNTIME_TITLES[context.runtime]} on {context.device}, {context.threads} thread(s)"


def data_title(results: Results) -> str:
    return f"{', '.join(results.context.splits) or 'unnamed data'}: {results.context.images} photos"


class SearchedCandidate(TypedDict):
    """What the report needs of a candidate in optimize.json (`earlyexit_ssd.pipeline.candidates.Candidate`)."""

    name: str
    exits: list[str]
    AP50: float | None
    ms: float | None
    rival: bool


class SearchOutcome(TypedDict):
    """What the report needs of optimize.json (`earlyexit_ssd.pipeline.optimize.Outcome`)."""

    candidates: list[SearchedCandidate]
    chosen: SearchedCandidate | None
    test: dict[str, float] | None  # fields of `TestFigures`
    ship: bool
    summary: str

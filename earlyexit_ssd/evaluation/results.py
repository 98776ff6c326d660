"""What an evaluation found, as dataclasses with the JSON of metrics.json (keys: docs/metrics.md), and as rows."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from earlyexit_ssd.evaluation.cost import EAGER, ONNX_RUNTIME, OPENVINO, RUNTIME_TITLES
from earlyexit_ssd.evaluation.metrics import Figure, Figures

Target = Mapping[str, str | float | None]
"""A certificate's: ``kind``, its number (``value``), ``reference``, ``score``, ``iou`` and ``delta``."""
Interval = list[float] | None  # both ends of a 95 % interval; None where it is undefined


class Record:
    """A dataclass with one JSON form: its fields in their order, ``figures`` spread among them. Keys that are no field
    are figures. Fields named in ``left_out`` are no keys where they are None; others are ``null``."""

    left_out: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and None."""
        entries: dict[str, Any] = {}
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if name == "figures":
                entries |= value
            elif value is not None or name not in self.left_out:
                entries[name] = _plain(value)
        return entries

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> typing.Self:
        """The inverse. Keys that older evaluations lack get the field's default. A TypeError if a key without a default
        is missing."""
        hints, figures, values = typing.get_type_hints(cls), dict(entries), {}
        names = [one.name for one in fields(cls)]
        for name in (name for name in names if name in entries):
            value = figures.pop(name)
            record = next(filter(is_dataclass, (hints[name], *typing.get_args(hints[name]))), None)
            if isinstance(value, list) and record:
                value = tuple(map(record.from_json, value))
            values[name] = record.from_json(value) if isinstance(value, dict) and record else value
        return cls(**values, **({"figures": figures} if "figures" in names else {}))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_json() if isinstance(value, Record) else value


@dataclass(frozen=True)
class Context(Record):
    """What was evaluated, and how."""

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
    forced: bool = False
    taken_over: bool = False
    labelled: bool = True
    weights_sha256: str | None = None
    left_out = ("weights_sha256",)


@dataclass(frozen=True)
class ConfidenceSummary(Record):
    """Mean, standard deviation (population) and range of an exit's confidence, all in [0, 1]."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class BoxSummary(Record):
    """All boxes of a detector, at any score: it shows a detector that is broken. None where there is no box."""

    boxes: int
    score_mean: float | None
    score_std: float | None
    outside_share: float | None  # of the boxes, those with less than half of their area inside the photo, or no area


@dataclass(frozen=True)
class DetectorResult(Record):
    """A detector's figures of quality, by the names of `earlyexit_ssd.evaluation.metrics`."""

    def number(self, name: str) -> float | None:
        """A figure; None where it is undefined, or was not measured."""
        value: Figure = self.figures.get(name)  # type: ignore[attr-defined]
        return value if isinstance(value, int | float) else None

    @property
    def ap50(self) -> float | None:
        return self.number("AP50")


@dataclass(frozen=True)
class ExitResult(DetectorResult):
    """An exit. Only early exits have ``empty`` (no branch) and the interval, only the full path has ``found``."""

    name: str
    layer: int | None = None
    figures: Figures = field(default_factory=dict)
    empty: bool | None = None
    AP50_below_full_interval: Interval = None
    confidence: ConfidenceSummary | None = None
    mmacs: float | None = None
    ms: float | None = None
    ms_interval: Interval = None
    found: BoxSummary | None = None

    @property
    def left_out(self) -> tuple[str, ...]:
        return ("empty", "found") if self.empty is not None else ("empty", "found", "AP50_below_full_interval")


@dataclass(frozen=True)
class CostResult(Record):
    """Cost of one image by the detector without exits."""

    mmacs: float | None = None
    ms: float | None = None
    ms_interval: Interval = None


@dataclass(frozen=True)
class RoutedResult(DetectorResult):
    """The detector in which each photo takes its exit; costs are means over the photos."""

    policy: str | None = None
    thresholds: list[float] | None = None
    hybrid: bool = False
    figures: Figures = field(default_factory=dict)
    exit_share: dict[str, float] = field(default_factory=dict)
    mmacs: float | None = None
    ms: float | None = None
    speedup: float | None = None
    speedup_interval: Interval = None
    left_out = ("speedup_interval",)


@dataclass(frozen=True)
class RivalResult(DetectorResult):
    """A static detector: what one would ship instead."""

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
class CertificateResult(Record):
    """What a certificate was asked for, and what these photos say of it."""

    target: Target
    measured: float | None  # AP50 lost, missed and added per photo, or the speed-up in the certificate's unit of cost
    interval: Interval  # by bootstrap
    kept: bool | None  # whether it is what was asked for


@dataclass(frozen=True)
class DriftResult(Record):
    """Whether the photos look like those of calibration."""

    window: int  # photos compared at a time
    warnings: list[str]  # one line per cause
    shares: dict[str, float] | None = None  # of the exits in the last window
    calibration_shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Finding(Record):
    """One sentence of the verdict; with ``veto``, a reason not to ship the exits."""

    line: str
    veto: bool = False


@dataclass(frozen=True)
class Verdict(Record):
    """What the rules found."""

    ship: bool  # no finding is a veto
    what: str | None = None  # routed, or the one exit that takes every photo (exit8 alone); None if not ship
    findings: tuple[Finding, ...] = ()  # in the order of the rules

    @property
    def lines(self) -> list[str]:
        """The sentences alone."""
        return [finding.line for finding in self.findings]


@dataclass(frozen=True)
class Results(Record):
    """All of an evaluation."""

    context: Context = Context()
    exits: tuple[ExitResult, ...] = ()  # shallow to deep, the full path last
    without_exits: CostResult = CostResult()
    routed: RoutedResult = RoutedResult()
    rivals: tuple[RivalResult, ...] = ()
    certificate: CertificateResult | None = None
    drift: DriftResult | None = None
    verdict: Verdict | None = None
    left_out = ("certificate", "drift")

    @property
    def full(self) -> ExitResult:
        return self.exits[-1]

    @property
    def early(self) -> tuple[ExitResult, ...]:
        return self.exits[:-1]


SHORT_RUNTIMES = {EAGER: "eager", ONNX_RUNTIME: "ORT", OPENVINO: "OpenVINO"}


@dataclass(frozen=True)
class Row:
    """What a table and a chart compare: an exit, the routed detector, or a static one."""

    name: str
    kind: str  # ``exit``, ``routed``, or a rival's
    figures: Figures
    mmacs: float | None
    ms: float | None
    ms_interval: Interval = None
    layer: int | None = None
    confidence: ConfidenceSummary | None = None
    share: float | None = None  # of the photos that leave there
    source: str | None = None
    other_runtime: str | None = None  # short name of the runtime, where it is not the exits'
    empty: bool = False

    def number(self, name: str) -> float | None:
        """``ms``, ``mmacs`` or a figure."""
        return getattr(self, name) if name in ("ms", "mmacs") else self.figures.get(name)


def exit_rows(results: Results) -> list[Row]:
    """The exits, then ``routed``."""
    routed = results.routed
    rows = []
    for one in results.exits:
        parts = one.name, "exit", one.figures, one.mmacs, one.ms, one.ms_interval, one.layer, one.confidence
        rows.append(Row(*parts, share=routed.exit_share.get(one.name), empty=bool(one.empty)))
    return [*rows, Row("routed", "routed", routed.figures, routed.mmacs, routed.ms)]


def static_rows(results: Results) -> list[Row]:
    """``without exits``, which finds what the full path finds, then the rivals."""
    plain = results.without_exits
    rows = [Row("without exits", "plain", results.full.figures, plain.mmacs, plain.ms, plain.ms_interval)]
    for one in results.rivals:
        other = None if one.runtime == results.context.runtime else SHORT_RUNTIMES[one.runtime]
        more = {"source": one.source, "other_runtime": other}
        rows.append(Row(one.name, one.kind, one.figures, one.mmacs, one.ms, one.ms_interval, **more))
    return rows


def timing_title(results: Results) -> str:
    """Runtime, device and threads of the milliseconds."""
    context = results.context
    return f"{RUNTIME_TITLES[context.runtime]} on {context.device}, {context.threads} thread(s)"


def data_title(results: Results) -> str:
    return f"{', '.join(results.context.splits) or 'unnamed data'}: {results.context.images} photos"

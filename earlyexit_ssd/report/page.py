"""The report page: one HTML file that opens from disk, without a network.

`Page` has the content. :func:`write_page` puts it as compressed JSON into page.html, with page.css, page.js and Plotly.
page.js draws figures that were computed in Python. For the threshold explorer it only counts: the matches come from
`earlyexit_ssd.evaluation.matches`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import gzip
import html
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.offline

from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.calibration.thresholds import CurvePoint, FittedTemperature
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.engine.hooks import LogLine
from earlyexit_ssd.evaluation.results import (
    Finding,
    Interval,
    Results,
    data_title,
    exit_rows,
    static_rows,
    timing_title,
)
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50, asked_value
from earlyexit_ssd.files import write_text
from earlyexit_ssd.report.page_photos import PagePhotos, photos_json
from earlyexit_ssd.report.pictures import PLAIN, ROUTED, STYLES, Candidate
from earlyexit_ssd.report.tables import calibration_report, figure, promise, share

logger = logging.getLogger(__name__)

LONGEST_LINE = 400
"""Largest number of points of a training curve; longer curves are thinned out."""


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: its name, its value, a note to compare the value with, and whether it is good."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Point:
    """A detector in the chart of AP against milliseconds; intervals are 95 %."""

    name: str
    kind: str
    ms: float
    AP50: float | None
    AP: float | None = None
    ms_interval: Interval = None
    AP50_interval: Interval = None
    AP_interval: Interval = None
    other_runtime: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a chart. ``bound``: whether it is a limit and not a measurement, and so drawn dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    bound: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of lines, with one sentence on how to read it."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page after the photos: a table, charts, and a text that a file of the run has too."""

    title: str
    table: tuple[tuple[str, ...], ...] = ()
    charts: tuple[Chart, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: the job and its photos.
        verdict, good: one sentence, and whether it is good news; None: neither good nor bad.
        tiles: figures of the first screen.
        findings: the reasons of the verdict.
        table: rows of cells; the first row is the heading.
        shares: exit name -> share of the photos that leave there.
        points, x_title: detectors in the chart of AP against milliseconds, and the title of the axis of milliseconds.
        photos: photos of the threshold explorer and of the gallery.
        sections: parts after the photos.
        command: shell command of a calibration, with ``{target}`` in place of its target.
        links: title -> path of another report, relative to this one.
    """

    title: str
    verdict: str
    good: bool | None = None
    tiles: tuple[Tile, ...] = ()
    findings: tuple[Finding, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    x_title: str = ""
    photos: PagePhotos | None = None
    sections: tuple[Section, ...] = ()
    command: str = ""
    links: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def never_failing(path: Path) -> Iterator[None]:
    """Context manager: if making the page at ``path`` fails, log a warning. The run does not fail, since its other
    results are already written."""
    try:
        yield
    except Exception as error:
        logger.warning("%s is not written (%s: %s); all other results are", path, type(error).__name__, error)


def write_page(path: Path, page: Page) -> None:
    """Write ``page`` as one HTML file."""
    folder = Path(__file__).parent
    template, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    parts = {
        "TITLE": html.escape(page.title),
        "VERDICT": html.escape(page.verdict),
        "STYLE": style,
        "PLOTLY": _packed_plotly(),
        "DATA": _packed(json.dumps(_page_json(page), allow_nan=False, separators=(",", ":"))),
        "SCRIPT": script,
    }
    for name, text in parts.items():  # texts of users are escaped or in base64: they have no placeholder
        template = template.replace(f"<!--{name}-->", text)
    write_text(path, template)


@functools.cache
def _packed_plotly() -> str:
    return _packed(plotly.offline.get_plotlyjs())


def _packed(text: str) -> str:
    """The text compressed and in base64, which needs no escapes in HTML. The gzip header has no time, so that equal
    runs have equal pages."""
    content = text.encode("utf-8", "backslashreplace")
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


def _page_json(page: Page) -> dict[str, Any]:
    content = dataclasses.asdict(dataclasses.replace(page, photos=None))
    content["photos"] = photos_json(page.photos) if page.photos else None
    colors = {kind: color for kind, (color, _) in STYLES.items()}
    return {**content, "colors": {**colors, "rival": PLAIN, "chosen": ROUTED}, "closed": CLOSED}


# Evaluation and calibration.


def evaluation_page(results: Results, **more: Any) -> Page:
    """The page of an evaluation; ``more`` are further fields of `Page`."""
    rows, routed, context = [*exit_rows(results), *static_rows(results)], results.routed, results.context
    points = tuple(
        Point(
            *(row.name, row.kind, row.ms, row.number("AP50"), row.number("AP"), row.ms_interval),
            *(row.figures.get("AP50_interval"), row.figures.get("AP_interval"), bool(row.other_runtime)),
        )
        for row in rows
        if row.ms is not None and not row.empty
    )
    heading = (
        "detector",
        "AP",
        "AP50",
        "95 % interval",
        "objects found",
        "false positives",
        "photos leave",
        "ms",
        "MMAC",
    )
    cells = [
        (
            f"{row.name} (empty)" if row.empty else row.name,
            *(figure(row.number("AP")), figure(row.number("AP50")), _interval(row.figures.get("AP50_interval"))),
            *(figure(row.number("true_positives"), 0), figure(row.number("false_positives"), 0)),
            *(share(row.share), figure(row.ms, 1), figure(row.mmacs, 0)),
        )
        for row in rows
    ]
    by = "" if context.labelled else "; nobody labelled them, so the figures measure agreement with the full path"
    verdict = results.verdict
    return Page(
        title=f"{data_title(results)}, {context.empty_images} without an object{by}",
        verdict=verdict_sentence(results),
        good=verdict.ship if verdict else None,
        tiles=_evaluation_tiles(results),
        findings=verdict.findings if verdict else (),
        table=(heading, *cells),
        shares=routed.exit_share,
        points=points,
        x_title=f"ms per photo ({timing_title(results)})",
        **more,
    )


def verdict_sentence(results: Results) -> str:
    """The recommendation and its main reason, in one sentence."""
    verdict, routed = results.verdict, results.routed
    if verdict is None:
        return "No verdict."
    if not verdict.ship:
        vetoes = [one.line for one in verdict.findings if one.veto]
        instead = next((line for line in vetoes if line.startswith("ship instead")), vetoes[0])
        return f"Do not ship the routed detector. {instead[0].upper()}{instead[1:]}."
    name = "the exits" if verdict.what == "routed" else verdict.what
    _, speedup = _shipped_time(results)
    times = "" if speedup is None else f"{speedup:.2f} times as fast as the detector without exits, "
    return f"Ship {name}: {times}AP50 {figure(routed.ap50)} against {figure(results.full.ap50)}."


def _shipped_time(results: Results) -> tuple[str, float | None]:
    """Text of the milliseconds, and speed-up, of the detector that the verdict recommends; by default of the routed
    detector."""
    routed, plain = results.routed, results.without_exits
    for one in results.rivals:
        if results.verdict and one.name == results.verdict.what and one.ms and plain.ms:
            return f"{figure(one.ms, 1)} ms {one.name}, {figure(routed.ms, 1)} routed", plain.ms / one.ms
    return f"{figure(routed.ms, 1)} ms routed", routed.speedup


def _evaluation_tiles(results: Results) -> tuple[Tile, ...]:
    routed, plain, full = results.routed, results.without_exits, results.full
    found, missed, of_full = (routed.number("true_positives"), routed.number("false_negatives"),
                              full.number("true_positives"))  # fmt: skip
    early = {name: value for name, value in routed.exit_share.items() if name != full.name}
    times, speedup = _shipped_time(results)
    over = f"{_interval(routed.speedup_interval, 2)} over the photos; " if speedup == routed.speedup else ""
    tiles = [
        Tile(
            "speed-up",
            "-" if speedup is None else f"{speedup:.2f}×",
            f"{over}{times}, {figure(plain.ms, 1)} without exits",
            _good(results, None if speedup is None else speedup > 1),
        ),
        Tile(
            "AP50 routed",
            figure(routed.ap50),
            f"{_interval(routed.figures.get('AP50_interval'))} full path {figure(full.ap50)}",
        ),
        Tile(
            "objects found",
            figure(found, 0),
            f"of {figure(None if found is None else found + missed, 0)}; the full path finds {figure(of_full, 0)}",
        ),
        Tile("photos leave early", share(sum(early.values())), ", ".join(f"{k} {share(v)}" for k, v in early.items())),
    ]
    if results.certificate is None:
        return (
            *tiles,
            Tile("target of the calibration", "none", "no certificate, so no target to check"),
        )
    certificate = results.certificate
    digits = 2 if certificate.target["kind"] == "speedup" else 4
    measured = f"{figure(certificate.measured, digits)} {_interval(certificate.interval, digits)}".strip()
    kept = {True: "kept", False: "not kept", None: "undefined"}[certificate.kept]
    if certificate.kept and certificate.interval:
        low, high = certificate.interval
        value = asked_value(certificate.target)
        if low < value if certificate.target["kind"] == "speedup" else high > value:
            kept = "kept, but not in the whole interval"
    asked = _asked(str(certificate.target["kind"]), asked_value(certificate.target))
    good = _good(results, certificate.kept)
    return (*tiles, Tile("target of the calibration", asked, f"on these photos {measured}: {kept}", good))


def _good(results: Results, value: bool | None) -> bool | None:
    """``value`` for the colour of a tile. No tile is green on the page of a detector that must not be shipped."""
    return None if value and results.verdict and not results.verdict.ship else value


def _asked(kind: str, value: float) -> str:
    return {
        "speedup": f"speed-up ≥ {value:g}×",
        "ap_drop": f"AP50 lost ≤ {value:g}",
        "risk": f"risk ≤ {value:g}",
    }[kind]


def _interval(values: Any, digits: int = 3) -> str:
    return f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]" if values else ""


def calibration_page(
    certificate: Certificate,
    temperatures: Sequence[FittedTemperature],
    curve: Sequence[CurvePoint],
    photos: PagePhotos | None = None,
    command: str = "",
) -> Page:
    """The page of a calibration; its figures are on the calibration photos."""
    measured, target, costs = certificate.measured, certificate.target, certificate.cost_model
    asked = target.epsilon if target.kind == "risk" else target.value
    speedup = f"{measured.speedup:.2f} times as fast as the detector without exits"
    opened = [name for name, value in zip(certificate.drift.exit_names, certificate.router["thresholds"], strict=False)
              if value < CLOSED]  # fmt: skip
    verdict = f"{' and '.join(opened)} opened: {speedup}; judge it on the test photos (earlyexit evaluate)."
    if not opened:
        verdict = f"No exit is opened: no thresholds hold {_asked(target.kind, asked)} on these photos."
    blind = measured.AP50_full is not None and measured.AP50_full < DETECTS_AP50
    if blind:
        verdict = (
            f"The full path does not detect (AP50 {measured.AP50_full:.3f}): train it before its exits are opened."
        )
    rows = zip(certificate.drift.exit_names, (*certificate.router["thresholds"], None), costs.exits, strict=True)
    cells = [
        (
            name,
            "-" if value is None else "closed" if value >= CLOSED else f"{value:.4f}",
            *(share(measured.exit_share[name]), figure(cost, 1)),
        )
        for name, value, cost in rows
    ]
    loss = measured.AP50_lost_bound if target.kind == "ap_drop" else measured.loss_bound
    promised = "" if loss is None else f"bound {loss:.4f}, probability {1 - target.delta:g}"
    return Page(
        title=f"Calibration on {measured.photos} photos, policy {certificate.router['policy']}",
        verdict=verdict,
        good=None if opened and not blind else False,
        tiles=(
            Tile("target", _asked(target.kind, asked), promised, None),
            Tile(
                "speed-up", f"{measured.speedup:.2f}×", f"{measured.cost:.1f} {costs.unit}, {costs.plain:.1f} without"
            ),
            Tile("AP50 routed", figure(measured.AP50), f"full path {figure(measured.AP50_full)}"),
            Tile("loss per photo", figure(measured.loss, 4), f"against {target.reference}"),
        ),
        findings=tuple(map(Finding, promise(certificate))),
        table=(("exit", "threshold", "photos leave", costs.unit), *cells),
        shares=measured.exit_share,
        photos=photos,
        command=command,
        sections=(calibration_section(certificate, temperatures, curve),),
    )


def calibration_section(
    certificate: Certificate, temperatures: Sequence[FittedTemperature], curve: Sequence[CurvePoint]
) -> Section:
    """The certificate, the curves of the loss and its bound against cost, and the reliability of each exit's
    probabilities."""
    target, unit = certificate.target, certificate.cost_model.unit
    charts = []
    if curve:
        cost = [one.cost for one in curve]
        limit = {"risk": target.epsilon, "ap_drop": target.value}.get(target.kind)
        lines = [Line("measured", cost, [one.loss for one in curve])]
        if any(one.bound is not None for one in curve):
            lines.append(Line("upper bound", cost, [one.bound for one in curve]))
        if limit is not None:
            lines.append(Line("target", [min(cost), max(cost)], [limit, limit], bound=True))
        what = "loss per photo" if target.kind == "risk" else "AP50 lost"
        note = "Each point is a set of thresholds. The cheapest set whose bound is below the dashed line is taken."
        if target.kind == "speedup":
            note = "Each point is a set of thresholds. Of those fast enough, the one that loses least is taken."
        charts.append(Chart(f"{what} against cost", f"{unit} per photo", what, tuple(lines), note))
    for one in temperatures:
        lines = [Line("perfect", [0, 1], [0, 1], bound=True)]
        for name, found in (("before", one.before), (f"after, temperature {one.temperature:.2f}", one.after)):
            filled = [index for index, count in enumerate(found.count) if count]
            x, y = ([values[index] for index in filled] for values in (found.confidence, found.accuracy))
            lines.append(Line(f"{name}: error {found.expected_error:.3f}", x, y))
        note = "On the dashed line an exit is right as often as its probabilities say. Below it, it is overconfident."
        charts.append(
            Chart(
                f"reliability of {one.exit_name}", "probability of the class", "share that is right", tuple(lines), note
            )
        )
    return Section("Calibration", charts=tuple(charts), text=calibration_report(certificate, temperatures))


# Training.

_CURVES = {
    "loss": "loss",
    "parts": "parts of the loss",
    "AP": "AP",
    "AP50": "AP50",
    "share": "share of photos",
    "temperature": "temperature",
    "confidence": "mean confidence",
}


def training_section(
    logs: dict[str, list[LogLine]], gates: Sequence[dict[str, Any]], bounds: Sequence[float] = ()
) -> Section:
    """Curves and gates of a training.

    Args:
        logs: phase -> lines of its log, in the order of training. Epochs are numbered across all phases.
        gates: contents of gate.json of each phase.
        bounds: limits of the temperatures, drawn as lines.
    """
    found: dict[str, dict[str, tuple[list, list]]] = {kind: {} for kind in _CURVES}
    start = 0.0
    for phase, lines in logs.items():
        every = -(-len(lines) // LONGEST_LINE) or 1
        for index, line in enumerate(lines):
            for key, value in line.items():
                kind, _, name = key.partition("/")
                measured = kind != "loss"  # a few lines have measurements, every line has losses
                kind = "parts" if kind == "loss" and name else kind
                if kind not in found or value is None or not (measured or index % every == 0):
                    continue
                name = name or "total"
                x, y = found[kind].setdefault(name if measured else f"{name} ({phase})", ([], []))
                x.append(round(start + line["epoch"], 3))
                y.append(float(f"{value:.4g}"))
        start += max((line["epoch"] for line in lines), default=0.0)
    charts = []
    for kind, lines in found.items():
        if lines:
            drawn = [Line(name, *points) for name, points in lines.items()]
            if kind == "temperature":
                drawn += [Line(f"bound {value:g}", [0, start], [value, value], bound=True) for value in bounds]
            charts.append(Chart(_CURVES[kind], "epoch", _CURVES[kind], tuple(drawn)))
    rows = [
        (
            gate["phase"],
            "passed" if gate["passed"] else "failed, forced" if gate["forced"] else "failed",
            "; ".join(map(_check, gate["checks"])) or "nothing to check",
        )
        for gate in gates
    ]
    return Section("Training", table=(("phase", "gate", "figures"), *rows) if rows else (), charts=tuple(charts))


def _check(check: dict[str, Any]) -> str:
    if check["limit"] is None:
        return f"{check['name']} {figure(check['value'])}"
    sign = "≥" if check["passed"] else "<"
    return f"{check['name']} {figure(check['value'])} {sign} {check['limit']:.3f}"


def training_page(section: Section, gates: Sequence[dict[str, Any]], photos: str) -> Page:
    """The page of a training that is not evaluated yet, or that a gate has ended; ``photos`` names its photos."""
    failed = [gate for gate in gates if not gate["passed"]]
    verdict = f"Phase {gates[-1]['phase']} has passed its gate; the training goes on." if gates else "Training."
    if failed:
        checks = "; ".join(_check(one) for one in failed[-1]["checks"] if not one["passed"])
        verdict = f"The gate of phase {failed[-1]['phase']} failed: {checks}."
    return Page(f"Training on {photos}", verdict, False if failed else None, sections=(section,))


# A search.


def search_page(
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    summary: str,
    ship: bool,
    results: Results | None,
    base: str = "",
) -> Page:
    """The page of a search of `earlyexit_ssd.pipeline.optimize`.

    Args:
        summary: text whose first sentence is the verdict.
        results: figures of the chosen candidate on the test photos.
        base: ``source`` of the user's own detector among the rivals of ``results``.
    """
    points = tuple(
        Point(one.name, "chosen" if one == chosen else "rival" if one.rival else "exit" if one.exits else "plain",
              one.ms, one.AP50)
        for one in candidates
        if one.ms is not None and one.AP50 is not None
    )  # fmt: skip
    rows = [(one.name, figure(one.AP50), figure(one.ms, 1), "chosen" if one == chosen else "") for one in candidates]
    verdict, rest = summary.split(". ", 1) if ". " in summary and chosen else (summary, "")
    tested = f" Figures at the top: {results.context.images} test photos." if results else ""
    return Page(
        title=f"Search over {len(candidates)} candidates. Chart and table: calib photos.{tested}",
        verdict=f"{verdict[:1].upper()}{verdict[1:].rstrip('.')}{': ' + chosen.name if chosen and ship else ''}.",
        good=ship,
        tiles=_search_tiles(results, base) if results else (),
        findings=(Finding(rest),) if rest else (),
        table=(("candidate", "AP50 (calib)", "ms", ""), *rows),
        points=points,
        x_title="ms per photo, mean over the calib photos",
        links={"the chosen detector on the test photos": "test/report.html"} if results else {},
    )


def _search_tiles(results: Results, base: str) -> tuple[Tile, ...]:
    """Tiles of an evaluation in which the user's own detector replaces the chosen detector without exits."""
    routed, own = results.routed, next(one for one in results.rivals if one.source == base)
    speedup, found = own.ms / routed.ms, [one.number("true_positives") for one in (routed, own)]
    times = f"{figure(routed.ms, 1)} ms, your detector {figure(own.ms, 1)}"
    labelled = None if found[0] is None else found[0] + routed.number("false_negatives")
    objects = f"of {figure(labelled, 0)}; your detector finds {figure(found[1], 0)}"
    return (
        Tile("speed-up", f"{speedup:.2f}×", times, speedup > 1),
        Tile("AP50", figure(routed.ap50), f"your detector {figure(own.ap50)}"),
        Tile("objects found", figure(found[0], 0), objects),
        *_evaluation_tiles(results)[3:],
    )

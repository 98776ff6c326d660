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
from collections.abc import Iterator, Mapping, Sequence
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
    RoutedResult,
    Row,
    data_title,
    exit_rows,
    static_rows,
    timing_title,
)
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50, target_value
from earlyexit_ssd.files import write_text
from earlyexit_ssd.report.page_photos import PagePhotos, photos_json
from earlyexit_ssd.report.pictures import PLAIN, ROUTED, STYLES, Candidate, log_curves, reliability_points
from earlyexit_ssd.report.tables import calibration_report, figure, promise, share

logger = logging.getLogger(__name__)

LONGEST_LINE = 400
"""Largest number of points of a training curve; longer curves are thinned out."""

Table = Sequence[Sequence[str]]  # rows of cells; the first row is the heading


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: its name, its value, a note to compare the value with, and whether it is good."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


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
    lines: Sequence[Line]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page after the photos: a table, charts, and a text that a file of the run has too."""

    title: str
    table: Table = ()
    charts: Sequence[Chart] = ()
    text: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: the job and its photos.
        verdict, good: one sentence, and whether it is good news; None: neither good nor bad.
        tiles: figures of the first screen.
        findings: the reasons of the verdict.
        table: of the detectors or exits.
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
    tiles: Sequence[Tile] = ()
    findings: Sequence[Finding] = ()
    table: Table = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    points: Sequence[Row] = ()
    x_title: str = ""
    photos: PagePhotos | None = None
    sections: Sequence[Section] = ()
    command: str = ""
    links: Mapping[str, str] = field(default_factory=dict)


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
    content = dataclasses.asdict(dataclasses.replace(page, photos=None))
    content["photos"] = photos_json(page.photos) if page.photos else None
    content["colors"] = {kind: color for kind, (color, _) in STYLES.items()} | {"rival": PLAIN, "chosen": ROUTED}
    content["closed"] = CLOSED
    parts = {
        "TITLE": html.escape(page.title),
        "VERDICT": html.escape(page.verdict),
        "STYLE": style,
        "PLOTLY": _packed_plotly(),
        "DATA": _packed(json.dumps(content, allow_nan=False, separators=(",", ":"))),
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


# Evaluation.


def evaluation_page(results: Results, **more: Any) -> Page:
    """The page of an evaluation; ``more`` are further fields of `Page`."""
    rows, context, verdict = [*exit_rows(results), *static_rows(results)], results.context, results.verdict
    columns = {
        "detector": lambda row: f"{row.name} (empty)" if row.empty else row.name,
        "AP": lambda row: figure(row.number("AP")),
        "AP50": lambda row: figure(row.number("AP50")),
        "95 % interval": lambda row: _interval(row.figures.get("AP50_interval")),
        "objects found": lambda row: figure(row.number("true_positives"), 0),
        "false positives": lambda row: figure(row.number("false_positives"), 0),
        "photos leave": lambda row: share(row.share),
        "ms": lambda row: figure(row.ms, 1),
        "MMAC": lambda row: figure(row.mmacs, 0),
    }
    by = "" if context.labelled else "; nobody labelled them, so the figures measure agreement with the full path"
    return Page(
        title=f"{data_title(results)}, {context.empty_images} without an object{by}",
        verdict=verdict_sentence(results),
        good=verdict.ship if verdict else None,
        tiles=_evaluation_tiles(results),
        findings=verdict.findings if verdict else (),
        table=[list(columns), *([cell(row) for cell in columns.values()] for row in rows)],
        shares=results.routed.exit_share,
        points=[row for row in rows if row.ms is not None and not row.empty],
        x_title=f"ms per photo ({timing_title(results)})",
        **more,
    )


def verdict_sentence(results: Results) -> str:
    """The recommendation and its main reason, in one sentence."""
    verdict = results.verdict
    if verdict is None:
        return "No verdict."
    if not verdict.ship:
        vetoes = [one.line for one in verdict.findings if one.veto]
        instead = next((line for line in vetoes if line.startswith("ship instead")), vetoes[0])
        return f"Do not ship the routed detector. {instead[0].upper()}{instead[1:]}."
    name = "the exits" if verdict.what == "routed" else verdict.what
    _, speedup = _shipped_time(results)
    times = "" if speedup is None else f"{speedup:.2f} times as fast as the detector without exits, "
    return f"Ship {name}: {times}AP50 {figure(results.routed.ap50)} against {figure(results.full.ap50)}."


def _shipped_time(results: Results) -> tuple[str, float | None]:
    """Text of the milliseconds, and speed-up, of the detector that the verdict recommends; by default of the routed
    detector."""
    routed, plain = results.routed, results.without_exits
    for one in results.rivals:
        if results.verdict and one.name == results.verdict.what and one.ms and plain.ms:
            return f"{figure(one.ms, 1)} ms {one.name}, {figure(routed.ms, 1)} routed", plain.ms / one.ms
    return f"{figure(routed.ms, 1)} ms routed", routed.speedup


def _evaluation_tiles(results: Results) -> list[Tile]:
    routed, full = results.routed, results.full
    times, speedup = _shipped_time(results)
    over = f"{_interval(routed.speedup_interval, 2)} over the photos; " if speedup == routed.speedup else ""
    spent = f"{over}{times}, {figure(results.without_exits.ms, 1)} without exits"
    faster = _good(results, None if speedup is None else speedup > 1)
    of_full = f"{_interval(routed.figures.get('AP50_interval'))} full path {figure(full.ap50)}"
    objects = f"of {_objects(routed)}; the full path finds {figure(full.number('true_positives'), 0)}"
    early = {name: value for name, value in routed.exit_share.items() if name != full.name}
    shares = ", ".join(f"{name} {share(value)}" for name, value in early.items())
    return [
        Tile("speed-up", "-" if speedup is None else f"{speedup:.2f}×", spent, faster),
        Tile("AP50 routed", figure(routed.ap50), of_full),
        Tile("objects found", figure(routed.number("true_positives"), 0), objects),
        Tile("photos leave early", share(sum(early.values())), shares),
        _target_tile(results),
    ]


def _objects(routed: RoutedResult) -> str:
    """The number of labelled objects."""
    found, missed = routed.number("true_positives"), routed.number("false_negatives")
    return figure(None if found is None else found + missed, 0)


def _target_tile(results: Results) -> Tile:
    certificate, name = results.certificate, "target of the calibration"
    if certificate is None:
        return Tile(name, "none", "no certificate, so no target to check")
    kind, value, interval = certificate.target["kind"], target_value(certificate.target), certificate.interval
    kept = {True: "kept", False: "not kept", None: "undefined"}[certificate.kept]
    if certificate.kept and interval and (interval[0] < value if kind == "speedup" else interval[1] > value):
        kept = "kept, but not in the whole interval"
    digits = 2 if kind == "speedup" else 4
    measured = f"{figure(certificate.measured, digits)} {_interval(interval, digits)}".strip()
    return Tile(name, _asked(kind, value), f"on these photos {measured}: {kept}", _good(results, certificate.kept))


def _good(results: Results, value: bool | None) -> bool | None:
    """``value`` for the colour of a tile. No tile is green on the page of a detector that must not be shipped."""
    return None if value and results.verdict and not results.verdict.ship else value


def _asked(kind: str, value: float) -> str:
    texts = {"speedup": f"speed-up ≥ {value:g}×", "ap_drop": f"AP50 lost ≤ {value:g}", "risk": f"risk ≤ {value:g}"}
    return texts[kind]


def _interval(values: Interval, digits: int = 3) -> str:
    return f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]" if values else ""


# Calibration.


def calibration_page(
    certificate: Certificate,
    temperatures: Sequence[FittedTemperature],
    curve: Sequence[CurvePoint],
    photos: PagePhotos | None = None,
    command: str = "",
) -> Page:
    """The page of a calibration; its figures are on the calibration photos."""
    measured, target, costs = certificate.measured, certificate.target, certificate.cost_model
    names, thresholds = certificate.drift.exit_names, certificate.router["thresholds"]
    asked = _asked(target.kind, target.epsilon if target.kind == "risk" else target.value)
    opened = [name for name, value in zip(names, thresholds, strict=False) if value < CLOSED]
    verdict = f"No exit is opened: no thresholds hold {asked} on these photos."
    speedup = f"{measured.speedup:.2f} times as fast as the detector without exits"
    blind = measured.AP50_full is not None and measured.AP50_full < DETECTS_AP50
    if blind:
        found = f"AP50 {measured.AP50_full:.3f}"
        verdict = f"The full path does not detect ({found}): train it before its exits are opened."
    elif opened:
        verdict = f"{' and '.join(opened)} opened: {speedup}; judge it on the test photos (earlyexit evaluate)."
    table = [("exit", "threshold", "photos leave", costs.unit)]
    for name, value, cost in zip(names, (*thresholds, None), costs.exits, strict=True):
        threshold = "-" if value is None else "closed" if value >= CLOSED else f"{value:.4f}"
        table.append((name, threshold, share(measured.exit_share[name]), figure(cost, 1)))
    loss = measured.AP50_lost_bound if target.kind == "ap_drop" else measured.loss_bound
    promised = "" if loss is None else f"bound {loss:.4f}, probability {1 - target.delta:g}"
    spent = f"{measured.cost:.1f} {costs.unit}, {costs.plain:.1f} without"
    return Page(
        title=f"Calibration on {measured.photos} photos, policy {certificate.router['policy']}",
        verdict=verdict,
        good=None if opened and not blind else False,
        tiles=(
            Tile("target", asked, promised),
            Tile("speed-up", f"{measured.speedup:.2f}×", spent),
            Tile("AP50 routed", figure(measured.AP50), f"full path {figure(measured.AP50_full)}"),
            Tile("loss per photo", figure(measured.loss, 4), f"against {target.reference}"),
        ),
        findings=tuple(map(Finding, promise(certificate))),
        table=table,
        shares=measured.exit_share,
        photos=photos,
        command=command,
        sections=(_calibration_section(certificate, temperatures, curve),),
    )


def _calibration_section(
    certificate: Certificate, temperatures: Sequence[FittedTemperature], curve: Sequence[CurvePoint]
) -> Section:
    """The certificate, the curves of the loss and its bound against cost, and the reliability of each exit's
    probabilities."""
    charts = [_loss_chart(certificate, curve)] if curve else []
    for one in temperatures:
        lines = [Line("perfect", [0, 1], [0, 1], bound=True)]
        for name, found in (("before", one.before), (f"after, temperature {one.temperature:.2f}", one.after)):
            lines.append(Line(f"{name}: error {found.expected_error:.3f}", *reliability_points(found)))
        note = "On the dashed line an exit is right as often as its probabilities say. Below it, it is overconfident."
        title = f"reliability of {one.exit_name}"
        charts.append(Chart(title, "probability of the class", "share that is right", lines, note))
    return Section("Calibration", charts=charts, text=calibration_report(certificate, temperatures))


def _loss_chart(certificate: Certificate, curve: Sequence[CurvePoint]) -> Chart:
    target, cost = certificate.target, [one.cost for one in curve]
    lines = [Line("measured", cost, [one.loss for one in curve])]
    if any(one.bound is not None for one in curve):
        lines.append(Line("upper bound", cost, [one.bound for one in curve]))
    note = "Each point is a set of thresholds. Of those fast enough, the one that loses least is taken."
    if target.kind != "speedup":
        limit = target.epsilon if target.kind == "risk" else target.value
        lines.append(Line("target", [min(cost), max(cost)], [limit, limit], bound=True))
        note = "Each point is a set of thresholds. The cheapest set whose bound is below the dashed line is taken."
    what = "loss per photo" if target.kind == "risk" else "AP50 lost"
    return Chart(f"{what} against cost", f"{certificate.cost_model.unit} per photo", what, lines, note)


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
    logs: Mapping[str, Sequence[LogLine]], gates: Sequence[dict[str, Any]], bounds: Sequence[float] = ()
) -> Section:
    """Curves and gates of a training.

    Args:
        logs: phase -> lines of its log, in the order of training. Epochs are numbered across all phases.
        gates: contents of gate.json of each phase.
        bounds: limits of the temperatures, drawn as lines.
    """
    curves, ends = log_curves(logs)
    charts = []
    for kind, title in _CURVES.items():
        lines = []
        for name, points in curves.get(kind, {}).items():
            points = points[:: -(-len(points) // LONGEST_LINE)]
            lines.append(Line(name, [round(x, 3) for x, _ in points], [float(f"{y:.4g}") for _, y in points]))
        if lines and kind == "temperature":
            lines += [Line(f"bound {value:g}", [0, ends[-1]], [value, value], bound=True) for value in bounds]
        if lines:
            charts.append(Chart(title, "epoch", title, lines))
    table = [("phase", "gate", "figures")] if gates else []
    for gate in gates:
        passed = "passed" if gate["passed"] else "failed, forced" if gate["forced"] else "failed"
        table.append((gate["phase"], passed, "; ".join(map(_check, gate["checks"])) or "nothing to check"))
    return Section("Training", table, charts)


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
    table, points = [("candidate", "AP50 (calib)", "ms", "")], []
    for one in candidates:
        table.append((one.name, figure(one.AP50), figure(one.ms, 1), "chosen" if one == chosen else ""))
        if one.ms is not None and one.AP50 is not None:
            kind = "chosen" if one == chosen else "rival" if one.rival else "exit" if one.exits else "plain"
            points.append(Row(one.name, kind, {"AP50": one.AP50}, None, one.ms))
    verdict, rest = summary.split(". ", 1) if ". " in summary and chosen else (summary, "")
    tested = f" Figures at the top: {results.context.images} test photos." if results else ""
    return Page(
        title=f"Search over {len(candidates)} candidates. Chart and table: calib photos.{tested}",
        verdict=f"{verdict[:1].upper()}{verdict[1:].rstrip('.')}{': ' + chosen.name if chosen and ship else ''}.",
        good=ship,
        tiles=_search_tiles(results, base) if results else (),
        findings=(Finding(rest),) if rest else (),
        table=table,
        points=points,
        x_title="ms per photo, mean over the calib photos",
        links={"the chosen detector on the test photos": "test/report.html"} if results else {},
    )


def _search_tiles(results: Results, base: str) -> tuple[Tile, ...]:
    """Tiles of an evaluation in which the user's own detector replaces the chosen detector without exits."""
    routed, own = results.routed, next(one for one in results.rivals if one.source == base)
    speedup, times = own.ms / routed.ms, f"{figure(routed.ms, 1)} ms, your detector {figure(own.ms, 1)}"
    found, of_own = (figure(one.number("true_positives"), 0) for one in (routed, own))
    return (
        Tile("speed-up", f"{speedup:.2f}×", times, speedup > 1),
        Tile("AP50", figure(routed.ap50), f"your detector {figure(own.ap50)}"),
        Tile("objects found", found, f"of {_objects(routed)}; your detector finds {of_own}"),
        *_evaluation_tiles(results)[3:],
    )

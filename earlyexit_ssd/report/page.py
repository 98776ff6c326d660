"""The report page: one HTML file that opens from disk, without a network.

:func:`write_page` puts the content (`Page`) as compressed JSON into page.html, with page.css, page.js and Plotly. The
figures are computed in Python. Only the threshold explorer of page.js computes figures, from the matches of
`earlyexit_ssd.evaluation.matches`.
"""

import base64
import contextlib
import dataclasses
import functools
import gzip
import html
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.offline

from earlyexit_ssd.calibration.certificate import Certificate, plain_part
from earlyexit_ssd.calibration.thresholds import CurvePoint, FittedTemperature
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.engine.loop import LogLine
from earlyexit_ssd.evaluation.results import (
    DetectorResult,
    Finding,
    Interval,
    Results,
    SearchOutcome,
    TableRow,
    Target,
    data_title,
    table_rows,
    timing_title,
)
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50, SHIP_INSTEAD, target_value
from earlyexit_ssd.files import write_text
from earlyexit_ssd.report.page_photos import PagePhotos, photos_json
from earlyexit_ssd.report.pictures import GREY, ORANGE, STYLES, candidate_rows, log_curves, reliability_points
from earlyexit_ssd.report.tables import calibration_report, figure, guarantee_lines, share, speedup_text, table_cells

logger = logging.getLogger(__name__)

MAX_CURVE_POINTS = 400  # of a training curve with more points, only every second, third, ... is drawn

Table = Sequence[Sequence[str]]  # rows of cells; the first row is the heading


@dataclass(frozen=True)
class Tile:
    """A figure of the first screen. ``note``: a value to compare with. ``good``: whether the figure is good news."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart. ``bound``: whether it is a limit, which is drawn dashed, and not a measurement."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    bound: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of lines, with the titles of its axes. ``note``: how to read it."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page below the photos."""

    title: str
    table: Table = ()
    charts: Sequence[Chart] = ()
    text: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a report."""

    title: str  # the job and its photos
    verdict: str  # one sentence
    good: bool | None = None  # whether the verdict is good news; None: neither good nor bad
    tiles: Sequence[Tile] = ()
    findings: Sequence[Finding] = ()  # reasons of the verdict
    table: Table = ()  # detectors or exits
    shares: Mapping[str, float] = field(default_factory=dict)  # exit name -> share of the photos that leave there
    points: Sequence[TableRow] = ()  # detectors in the chart of AP against milliseconds
    x_title: str = ""  # title of this chart's axis of milliseconds
    photos: PagePhotos | None = None  # for the threshold explorer and the gallery
    sections: Sequence[Section] = ()
    command: str = ""  # shell command of a calibration, with ``{target}`` in place of its target
    links: Mapping[str, str] = field(default_factory=dict)  # title -> relative path of another report


@contextlib.contextmanager
def never_failing(path: Path) -> Iterator[None]:
    """Log an exception while the page at ``path`` is made as a warning, so that the job keeps its other results. Remove
    the page of an earlier job, which has other figures."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink()
        logger.warning("%s is not written (%s: %s); all other results are", path, type(error).__name__, error)


def write_page(path: Path, page: Page) -> None:
    """Write ``page`` as one HTML file."""
    folder = Path(__file__).parent
    template, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    content = dataclasses.asdict(dataclasses.replace(page, photos=None))
    content["photos"] = photos_json(page.photos) if page.photos else None
    content["colors"] = {kind: color for kind, (color, _) in STYLES.items()} | {"rival": GREY, "chosen": ORANGE}
    content["closed"] = CLOSED
    parts = {
        "TITLE": html.escape(page.title),
        "VERDICT": html.escape(page.verdict),
        "STYLE": style,
        "PLOTLY": _packed_plotly(),
        "DATA": _packed(json.dumps(content, allow_nan=False, separators=(",", ":"))),
        "SCRIPT": script,
    }
    for name, text in parts.items():  # users' texts are escaped or packed, so they hold no placeholder
        template = template.replace(f"<!--{name}-->", text)
    write_text(path, template)


@functools.cache
def _packed_plotly() -> str:
    return _packed(plotly.offline.get_plotlyjs())


def _packed(text: str) -> str:
    """Return ``text`` as base64 of gzip. The gzip header has no time, so equal runs have equal pages."""
    content = text.encode("utf-8", "backslashreplace")
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()


# Evaluation.

_COLUMNS: dict[str, Callable[[TableRow], str]] = {
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


def evaluation_page(results: Results, **more: Any) -> Page:
    """Return the page of an evaluation. ``more`` are further fields of `Page`."""
    context, verdict = results.context, results.verdict
    note = "" if context.labelled else "; nobody labelled them, so the figures measure agreement with the full path"
    return Page(
        title=f"{data_title(results)}, {context.empty_images} without an object{note}",
        verdict=verdict_sentence(results),
        good=verdict.ship if verdict else None,
        tiles=_evaluation_tiles(results),
        findings=verdict.findings if verdict else (),
        table=table_cells(results, _COLUMNS),
        shares=results.routed.exit_share,
        points=[row for row in table_rows(results) if row.ms is not None and not row.empty],
        x_title=f"ms per photo ({timing_title(results)})",
        **more,
    )


def verdict_sentence(results: Results) -> str:
    """Return the recommendation and its main reason."""
    verdict = results.verdict
    if verdict is None:
        return "No verdict."
    if not verdict.ship:
        vetoes = [finding.line for finding in verdict.findings if finding.veto]
        reason = next((line for line in vetoes if line.startswith(SHIP_INSTEAD)), vetoes[0])
        return f"Do not ship the routed detector. {reason[0].upper()}{reason[1:]}."
    name = "the exits" if verdict.what == "routed" else verdict.what
    _, speedup = _shipped_time(results)
    times = "" if speedup is None else f"{speedup:.2f} times as fast as the detector without exits, "
    return f"Ship {name}: {times}AP50 {figure(results.routed.ap50)} against {figure(results.full.ap50)}."


def _shipped_time(results: Results) -> tuple[str, float | None]:
    """Return a text with the milliseconds of the recommended detector, and its speed-up. The detector is the rival that
    the verdict recommends, if this rival was timed, and otherwise the routed detector."""
    routed, plain = results.routed, results.without_exits
    for rival in results.rivals if results.verdict and plain.ms else ():
        if rival.name == results.verdict.what and rival.ms:
            return f"{figure(rival.ms, 1)} ms {rival.name}, {figure(routed.ms, 1)} routed", plain.ms / rival.ms
    return f"{figure(routed.ms, 1)} ms routed", routed.speedup


def _evaluation_tiles(results: Results) -> list[Tile]:
    routed, full = results.routed, results.full
    times, speedup = _shipped_time(results)
    # the interval is known for the routed detector only
    interval = f"{_interval(routed.speedup_interval, 2)} over the photos; " if speedup == routed.speedup else ""
    time_note = f"{interval}{times}, {figure(results.without_exits.ms, 1)} without exits"
    ap50_note = f"{_interval(routed.figures.get('AP50_interval'))} full path {figure(full.ap50)}"
    early = {name: value for name, value in routed.exit_share.items() if name != full.name}
    early_note = ", ".join(f"{name} {share(value)}" for name, value in early.items())
    faster = _good(results, None if speedup is None else speedup > 1)
    return [
        Tile("speed-up", "-" if speedup is None else f"{speedup:.2f}×", time_note, faster),
        Tile("AP50 routed", figure(routed.ap50), ap50_note),
        _objects_tile(routed, routed.number("true_positives"), full.number("true_positives"), "the full path"),
        Tile("photos leave early", share(sum(early.values())), early_note),
        _target_tile(results),
    ]


def _objects_tile(routed: DetectorResult, found: float | None, other: float | None, name: str) -> Tile:
    """Return the tile of the ``found`` objects, compared with those that the detector ``name`` finds (``other``)."""
    positives, missed = routed.number("true_positives"), routed.number("false_negatives")
    objects = figure(None if positives is None else positives + missed, 0)
    return Tile("objects found", figure(found, 0), f"of {objects}; {name} finds {figure(other, 0)}")


def _target_tile(results: Results) -> Tile:
    certificate, name = results.certificate, "target of the calibration"
    if certificate is None:
        return Tile(name, "none", "no certificate, so no target to check")
    is_speedup, value = certificate.target["kind"] == "speedup", target_value(certificate.target)
    interval, digits = certificate.interval, 2 if is_speedup else 4
    kept = {True: "kept", False: "not kept", None: "undefined"}[certificate.kept]
    if certificate.kept and interval and (interval[0] < value if is_speedup else interval[1] > value):
        kept = "kept, but not in the whole interval"
    measured = f"{figure(certificate.measured, digits)} {_interval(interval, digits)}".strip()
    note = f"on these photos {measured}: {kept}"
    return Tile(name, _target_text(certificate.target), note, _good(results, certificate.kept))


def _good(results: Results, value: bool | None) -> bool | None:
    """Return ``value``, or None instead of True if the verdict is not to ship, so that no tile is green then."""
    return None if value and results.verdict and not results.verdict.ship else value


def _target_text(target: Target) -> str:
    names = {"speedup": "speed-up ≥ {:g}×", "ap_drop": "AP50 lost ≤ {:g}", "risk": "risk ≤ {:g}"}
    return names[target["kind"]].format(target_value(target))


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
    """Return the page of a calibration. Its figures are on the calibration photos."""
    measured, target, costs = certificate.measured, certificate.target, certificate.cost_model
    names, thresholds = certificate.drift.exit_names, certificate.router["thresholds"]
    target_text = _target_text(plain_part(target))
    opened = [name for name, threshold in zip(names, thresholds, strict=False) if threshold < CLOSED]
    if measured.AP50_full is not None and measured.AP50_full < DETECTS_AP50:
        ap50 = f"AP50 {measured.AP50_full:.3f}"
        verdict, good = f"The full path does not detect ({ap50}): train it before its exits are opened.", False
    elif opened:
        advice = "judge it on the test photos (earlyexit evaluate)"
        verdict = f"{' and '.join(opened)} opened: {speedup_text(certificate)}; {advice}."
        good = None
    else:
        verdict, good = f"No exit is opened: no thresholds hold {target_text} on these photos.", False
    table = [("exit", "threshold", "photos leave", costs.unit)]
    for name, threshold, cost in zip(names, (*thresholds, None), costs.exits, strict=True):
        text = "-" if threshold is None else "closed" if threshold >= CLOSED else f"{threshold:.4f}"
        table.append((name, text, share(measured.exit_share[name]), figure(cost, 1)))
    bound = measured.AP50_lost_bound if target.kind == "ap_drop" else measured.loss_bound
    cost_text = f"{measured.cost:.1f} {costs.unit}, {costs.plain:.1f} without"
    bound_text = "" if bound is None else f"bound {bound:.4f}, probability {1 - target.delta:g}"
    return Page(
        title=f"Calibration on {measured.photos} photos, policy {certificate.router['policy']}",
        verdict=verdict,
        good=good,
        tiles=(
            Tile("target", target_text, bound_text),
            Tile("speed-up", f"{measured.speedup:.2f}×", cost_text),
            Tile("AP50 routed", figure(measured.AP50), f"full path {figure(measured.AP50_full)}"),
            Tile("loss per photo", figure(measured.loss, 4), f"against {target.reference}"),
        ),
        findings=tuple(map(Finding, guarantee_lines(certificate))),
        table=table,
        shares=measured.exit_share,
        photos=photos,
        command=command,
        sections=(_calibration_section(certificate, temperatures, curve),),
    )


def _calibration_section(
    certificate: Certificate, temperatures: Sequence[FittedTemperature], curve: Sequence[CurvePoint]
) -> Section:
    """Return the certificate, the chart of loss against cost, and the reliability of each exit's probabilities."""
    charts = [_loss_chart(certificate, curve)] if curve else []
    note = "On the dashed line an exit is right as often as its probabilities say. Below it, it is overconfident."
    for fitted in temperatures:
        lines = [Line("perfect", [0, 1], [0, 1], bound=True)]
        reliabilities = {"before": fitted.before, f"after, temperature {fitted.temperature:.2f}": fitted.after}
        for name, reliability in reliabilities.items():
            lines.append(Line(f"{name}: error {reliability.expected_error:.3f}", *reliability_points(reliability)))
        title = f"reliability of {fitted.exit_name}"
        charts.append(Chart(title, "probability of the class", "share that is right", lines, note))
    return Section("Calibration", charts=charts, text=calibration_report(certificate, temperatures))


def _loss_chart(certificate: Certificate, curve: Sequence[CurvePoint]) -> Chart:
    target, cost = certificate.target, [point.cost for point in curve]
    lines = [Line("measured", cost, [point.loss for point in curve])]
    if any(point.bound is not None for point in curve):
        lines.append(Line("upper bound", cost, [point.bound for point in curve]))
    note = "Each point is a set of thresholds. The set with the smallest loss of those fast enough is chosen."
    if target.kind != "speedup":
        limit = target_value(plain_part(target))
        lines.append(Line("target", [min(cost), max(cost)], [limit, limit], bound=True))
        note = "Each point is a set of thresholds. The cheapest set whose bound is below the dashed line is chosen."
    loss = "loss per photo" if target.kind == "risk" else "AP50 lost"
    return Chart(f"{loss} against cost", f"{certificate.cost_model.unit} per photo", loss, lines, note)


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
"""Figures of `log_curves` that are drawn -> title."""


def training_section(
    logs: Mapping[str, Sequence[LogLine]], gates: Sequence[dict[str, Any]], bounds: Sequence[float] = ()
) -> Section:
    """Return the curves and gates of a training. ``logs`` are those of `log_curves`, ``gates`` the contents of the
    phases' gate.json, and ``bounds`` the limits of the temperatures."""
    curves, ends = log_curves(logs)
    charts = []
    for kind, title in _CURVES.items():
        lines = []
        for name, points in curves.get(kind, {}).items():
            points = points[:: math.ceil(len(points) / MAX_CURVE_POINTS)]
            lines.append(Line(name, [round(x, 3) for x, _ in points], [float(f"{y:.4g}") for _, y in points]))
        if lines and kind == "temperature":
            lines += [Line(f"bound {value:g}", [0, ends[-1]], [value, value], bound=True) for value in bounds]
        if lines:
            charts.append(Chart(title, "epoch", title, lines))
    table = [("phase", "gate", "figures")] if gates else []
    for gate in gates:
        passed = "passed" if gate["passed"] else "failed, forced" if gate["forced"] else "failed"
        table.append((gate["phase"], passed, "; ".join(map(_check_text, gate["checks"])) or "nothing to check"))
    return Section("Training", table, charts)


def _check_text(check: dict[str, Any]) -> str:
    text = f"{check['name']} {figure(check['value'])}"
    return text if check["limit"] is None else f"{text} {'≥' if check['passed'] else '<'} {check['limit']:.3f}"


def training_page(section: Section, gates: Sequence[dict[str, Any]], photos: str) -> Page:
    """Return the page of a training that is not evaluated yet, or that ended at a gate. ``photos`` names the photos."""
    failed = [gate for gate in gates if not gate["passed"]]
    verdict = f"Phase {gates[-1]['phase']} has passed its gate; the training goes on." if gates else "Training."
    if failed:
        checks = "; ".join(_check_text(check) for check in failed[-1]["checks"] if not check["passed"])
        verdict = f"The gate of phase {failed[-1]['phase']} failed: {checks}."
    return Page(f"Training on {photos}", verdict, False if failed else None, sections=(section,))


# A search.


def search_page(outcome: SearchOutcome, results: Results | None) -> Page:
    """Return the page of a search. ``outcome`` is the content of optimize.json, and ``results`` are the chosen model's
    results on the test photos. The first sentence of the summary is the verdict."""
    candidates, chosen, summary = outcome["candidates"], outcome["chosen"], outcome["summary"]
    table = [("candidate", "AP50 (calib)", "ms", "")]
    for each in candidates:
        table.append((each["name"], figure(each["AP50"]), figure(each["ms"], 1), "chosen" if each == chosen else ""))
    verdict, rest = summary.split(". ", 1) if ". " in summary and chosen else (summary, "")
    shipped = f": {chosen['name']}" if chosen and outcome["ship"] else ""
    tested = f" Figures at the top: {results.context.images} test photos." if results else ""
    return Page(
        title=f"Search over {len(candidates)} candidates. Chart and table: calib photos.{tested}",
        verdict=f"{verdict[:1].upper()}{verdict[1:].rstrip('.')}{shipped}.",
        good=outcome["ship"],
        tiles=_search_tiles(results, outcome["test"]) if results else (),
        findings=(Finding(rest),) if rest else (),
        table=table,
        points=candidate_rows(outcome),
        x_title="ms per photo, mean over the calib photos",
        links={"the chosen detector on the test photos": "test/report.html"} if results else {},
    )


def _search_tiles(results: Results, test: Mapping[str, float]) -> tuple[Tile, ...]:
    """Return the tiles of an evaluation. ``test`` compares what is to be shipped, which may be in 8 bits, with the
    user's own detector."""
    speedup, times = test["ms_base"] / test["ms"], f"{test['ms']:.1f} ms, your detector {test['ms_base']:.1f}"
    return (
        Tile("speed-up", f"{speedup:.2f}×", times, speedup > 1),
        Tile("AP50", figure(test["AP50"]), f"your detector {figure(test['AP50_base'])}"),
        _objects_tile(results.routed, test["objects_found"], test["objects_found_base"], "your detector"),
        _evaluation_tiles(results)[3],  # the others compare with the full path of the chosen detector
    )

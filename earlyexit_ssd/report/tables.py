"""The figures of all exits and their rivals as tables: plain text for a terminal, Markdown for a README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from earlyexit_ssd.evaluation.cost import EAGER, ONNX_RUNTIME, OPENVINO, RUNTIME_TITLES
from earlyexit_ssd.evaluation.metrics import METRICS, Figures
from earlyexit_ssd.evaluation.results import ConfidenceSummary, Interval, Results, Verdict

SHORT_RUNTIMES = {EAGER: "eager", ONNX_RUNTIME: "ORT", OPENVINO: "OpenVINO"}


def figure(value: float | None, digits: int = 3) -> str:
    """Rounded; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """What a table and a chart compare: an exit, the routed detector, or a static one.

    kind: ``exit``, ``routed``, or a rival's. share: of the photos that leave there. other_runtime: short name of the
    runtime, where it is not the exits'.
    """

    name: str
    kind: str
    figures: Figures
    mmacs: float | None
    ms: float | None
    ms_interval: Interval = None
    layer: int | None = None
    confidence: ConfidenceSummary | None = None
    share: float | None = None
    source: str | None = None
    other_runtime: str | None = None
    empty: bool = False

    def number(self, name: str) -> float | None:
        """``ms``, ``mmacs`` or a figure."""
        return getattr(self, name) if name in ("ms", "mmacs") else self.figures.get(name)


def exit_rows(results: Results) -> list[Row]:
    """The exits, then ``routed``."""
    routed = results.routed
    rows = [
        Row(
            *(one.name, "exit", one.figures, one.mmacs, one.ms, one.ms_interval, one.layer, one.confidence),
            share=routed.exit_share.get(one.name),
            empty=bool(one.empty),
        )
        for one in results.exits
    ]
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
    """What was evaluated."""
    return f"{', '.join(results.context.splits) or 'unnamed data'}: {results.context.images} photos"


def share(value: float | None) -> str:
    """A share of the photos."""
    return "-" if value is None else f"{100 * value:.1f} %"


def columns() -> dict[str, Callable[[Row], str]]:
    """Heading -> text of a cell; the first column is aligned left, the others right."""
    figures = {heading: place for metric in METRICS for heading, place in metric.columns.items()}

    def cell(name: str, digits: int) -> Callable[[Row], str]:
        return lambda row: figure(row.number(name), digits)

    return {
        "exit": lambda row: row.name,
        "layer": lambda row: figure(row.layer, 0),
        **{heading: cell(*place) for heading, place in figures.items()},
        "confidence": lambda row: f"{row.confidence.mean:.2f} ± {row.confidence.std:.2f}" if row.confidence else "-",
        "MMAC": cell("mmacs", 0),
        "ms": lambda row: " ".join(filter(None, (figure(row.ms, 1), row.other_runtime))),
        "share": lambda row: share(row.share),
    }


def _cells(results: Results) -> list[list[str]]:
    """Heading and rows as text."""
    rows, cells = [*exit_rows(results), *static_rows(results)], columns()
    return [list(cells), *[[cell(row) for cell in cells.values()] for row in rows]]


def text_table(results: Results) -> str:
    """Exits, routed, without exits and rivals, one row each, columns aligned; undefined figures are "-"."""
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(results: Results) -> str:
    """The same table in Markdown."""
    header, *rows = _cells(results)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_report(results: Results) -> str:
    """What was evaluated, the table and the verdict, for the terminal and table.txt."""
    context = results.context
    others = any(row.other_runtime for row in static_rows(results))
    by = "" if context.labelled else " by the full path; nobody labelled them"
    agreement = "P to loc.err: agreement with what the full path finds; AP is not known"
    lines = [
        f"{data_title(results)}, {context.empty_images} of them without an object{by}",
        *([] if context.labelled else [agreement]),
        f"P to loc.err at score {context.score:g} and IoU {context.iou:g};"
        f" ms of one image in {timing_title(results)}"
        + ("; ORT: in ONNX Runtime, not to be compared" if others else ""),
        "",
        text_table(results),
        "",
        *(verdict_lines(results.verdict) if results.verdict else []),
    ]
    return "\n".join(lines)


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict, its reasons, and apart from them what was found besides."""
    vetoes = [f"  - veto: {one.line}" for one in verdict.findings if one.veto]
    others = [f"  - {one.line}" for one in verdict.findings if not one.veto]
    if verdict.ship:
        return [f"verdict: ship {'the exits' if verdict.what == 'routed' else verdict.what}", *others]
    return ["verdict: do not ship these exits as they are", *vetoes, *(["found besides:", *others] if others else [])]

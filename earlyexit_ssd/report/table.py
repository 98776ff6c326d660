"""The figures of all exits and their rivals as a table: plain text for a terminal, Markdown for a README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from earlyexit_ssd.report.rows import Row, exit_rows, static_rows, timing_title


def number(key: str, digits: int) -> Callable[[Row], str]:
    """A cell of a row's figure; ``-`` where it lacks it, or it is undefined."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def _confidence(row: Row) -> str:
    summary = row.get("confidence")
    return f"{summary['mean']:.2f} ± {summary['std']:.2f}" if summary else "-"


def share(row: Row) -> str:
    """A cell of the share of the photos."""
    return "-" if row.get("share") is None else f"{100 * row['share']:.1f} %"


def _milliseconds(row: Row) -> str:
    text, other = number("ms", 1)(row), row.get("other_runtime")
    return f"{text} {other}" if other else text


COLUMNS: dict[str, Callable[[Row], str]] = {
    "exit": lambda row: str(row["name"]),
    "layer": number("layer", 0),
    "AP": number("AP", 3),
    "AP50": number("AP50", 3),
    "P": number("precision", 3),
    "R": number("recall", 3),
    "F1": number("f1", 3),
    "FP/img": number("false_positives_per_image", 2),
    "FP/empty": number("false_positives_per_empty_image", 2),
    "loc.err": number("localization_error", 3),
    "confidence": _confidence,
    "MMAC": number("mmacs", 0),
    "ms": _milliseconds,
    "share": share,
}
"""Heading -> text of a cell; the first column is aligned left, the others right."""


def text_table(metrics: Mapping[str, Any]) -> str:
    """Exits, routed, without exits and rivals, one row each, columns aligned; undefined figures are "-"."""
    rows = _cells(metrics)
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    header, *rows = _cells(metrics)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_report(metrics: Mapping[str, Any]) -> str:
    """What was evaluated, the table and the verdict, for the terminal and table.txt."""
    context, verdict = metrics["context"], metrics["verdict"]
    splits = ", ".join(context["splits"]) or "unnamed data"
    others = any(row.get("other_runtime") for row in static_rows(metrics))
    labelled = context.get("labelled", True)
    lines = [
        f"{splits}: {context['images']} photos, {context['empty_images']} of them without an object"
        + ("" if labelled else " by the full path; nobody labelled them"),
        *([] if labelled else ["P to loc.err: agreement with what the full path finds; AP is not known"]),
        f"P to loc.err at score {context['score']:g} and IoU {context['iou']:g};"
        f" ms of one image in {timing_title(metrics)}"
        + ("; ORT: in ONNX Runtime, not to be compared" if others else ""),
        "",
        text_table(metrics),
        "",
        *verdict_lines(verdict),
    ]
    return "\n".join(lines)


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """The verdict, its reasons, and apart from them what was found besides."""
    vetoes = [f"  - veto: {one['line']}" for one in verdict["findings"] if one["veto"]]
    others = [f"  - {one['line']}" for one in verdict["findings"] if not one["veto"]]
    if verdict["ship"]:
        exits = "the exits" if verdict["what"] == "routed" else verdict["what"]
        return [f"verdict: ship {exits}", *others]
    return ["verdict: do not ship these exits as they are", *vetoes, *(["found besides:", *others] if others else [])]


def _cells(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Heading and rows as text."""
    rows = [*exit_rows(metrics), *static_rows(metrics)]
    return [list(COLUMNS), *[[cell(row) for cell in COLUMNS.values()] for row in rows]]

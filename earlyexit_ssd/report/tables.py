"""Numbers as the reports write them."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import EAGER, ONNX_RUNTIME, RUNTIME_TITLES, runtime_of
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling.checkpoint import FOLDER
from earlyexit_ssd.plain import read_json


def figure(value: float | None) -> str:
    """Three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


# Everything that a table or a chart compares: exits, routed, without exits, and the static rivals.

Row = Mapping[str, Any]
SHORT_RUNTIMES = {EAGER: "eager", ONNX_RUNTIME: "ORT"}


def timing_title(metrics: Mapping[str, Any]) -> str:
    """Runtime, device and threads of the milliseconds."""
    context = metrics["context"]
    return f"{RUNTIME_TITLES[runtime_of(metrics)]} on {context['device']}, {context['threads']} thread(s)"


def exit_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """The exits with the ``share`` of the photos that leave there, then ``routed``."""
    routed = metrics["routed"]
    shares = routed["exit_share"]
    return [*({**row, "share": shares.get(row["name"])} for row in metrics["exits"]), {"name": "routed", **routed}]


def with_branches(rows: Sequence[Row]) -> list[Row]:
    """The rows without empty exits, which have no accuracy to draw."""
    return [row for row in rows if not row.get("empty")]


def static_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """``without exits``, which finds what the full path finds, then the rivals.

    Rows of another runtime than the exits' have its short name in ``other_runtime``.
    """
    full = {key: value for key, value in metrics["exits"][-1].items() if key not in ("layer", "confidence")}
    rows = [{**full, "name": "without exits", **metrics["without_exits"]}]
    for rival in metrics.get("rivals", []):
        other = rival["runtime"] != runtime_of(metrics)
        rows.append({**rival, "other_runtime": SHORT_RUNTIMES[rival["runtime"]] if other else None})
    return rows


# The figures of all exits and their rivals as a table: plain text for a terminal, Markdown for a README.


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


# The tables of docs/model_zoo.md: ``python -m earlyexit_ssd.report.zoo docs/model_zoo.md``.

HEADER = """\
| test split | photos | exit | AP50 [95 %] | AP | MMAC | ms | share |
| :-- | --: | :-- | :-- | --: | --: | --: | --: |"""
BEGIN, END = "<!-- tables of report/zoo.py begin -->\n", "<!-- tables of report/zoo.py end -->"


def section(name: str, entry: Mapping[str, Any], page_folder: str = "docs") -> str:
    """One model: what it is, and its figures per test split and exit.

    Args:
        name: as ``from_pretrained`` knows it.
        entry: its description, as ``pipeline.ship`` writes it.
        page_folder: folder of the page, from the root of the repository, for the links to the results.
    """
    routing = entry["routing"]
    thresholds = ", ".join(f"{value:.3g}" for value in routing["thresholds"])
    size = f"{entry['num_params'] / 1e6:.2f} M parameters, {entry['bytes'] / 1e6:.1f} MB"
    lines = [
        f"## `{name}`",
        "",
        f"- {_plural(len(entry['classes']), 'class', 'classes')}: {', '.join(entry['classes'])}",
        f"- {size}, sha256 `{entry['sha256'][:8]}`",
        f"- routing: `{routing['policy']}`, thresholds {thresholds}",
        f"- recipe: `{entry['recipe']}`",
        "",
        HEADER,
    ]
    for split, figures in entry["metrics"].items():
        link = f"[{split}]({posixpath.relpath(figures['results'], page_folder)})"
        for exit_name, row in figures["exits"].items():
            lines.append(_row(link, figures["images"], exit_name, row))
        lines.append(_row(link, figures["images"], "without exits", figures["without_exits"]))
    return "\n".join(lines) + "\n"


def tables(folder: Path = FOLDER) -> str:
    """A section for each description in ``folder``."""
    paths = sorted(folder.glob("*.json"))
    return "\n".join(
        section(path.stem, read_json(path, "description of weights", "install the package again")) for path in paths
    )


def renew(page: str, content: str) -> str:
    """The page with ``content`` between its two marks.

    Raises:
        EarlyExitError: it lacks the marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise EarlyExitError(f"the page lacks the lines {BEGIN.strip()} and {END}; put them where the tables belong")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def _row(link: str, photos: int, exit_name: str, row: Mapping[str, Any]) -> str:
    """Cells that ``row`` lacks, or that are undefined, are ``-``."""
    bounds = row.get("AP50_interval")
    ap50 = number("AP50", 3)(row) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
    figures = [ap50, *(number(key, digits)(row) for key, digits in (("AP", 3), ("mmacs", 0), ("ms", 1))), share(row)]
    return f"| {' | '.join([link, str(photos), exit_name, *figures])} |"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/model_zoo.md")
    write_text(target, renew(target.read_text(encoding="utf-8"), tables()))

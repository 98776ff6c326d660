"""The tables of docs/model_zoo.md: ``python -m earlyexit_ssd.report.zoo docs/model_zoo.md``."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling.weights import FOLDER
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.report.table import number, share

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

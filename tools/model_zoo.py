#!/usr/bin/env python
"""For maintainers: write the tables of docs/model_zoo.md from the descriptions of the shipped weights."""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling.checkpoint import FOLDER
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.report.tables import figure, share

HEADER = """\
| test split | photos | exit | AP50 [95 %] | AP | MMAC | ms | share |
| :-- | --: | :-- | :-- | --: | --: | --: | --: |"""
BEGIN, END = "<!-- tables of tools/model_zoo.py begin -->\n", "<!-- tables of tools/model_zoo.py end -->"


def section(name: str, entry: dict) -> str:
    """Return the section of a model from its description ``entry``."""
    routing, count = entry["routing"], len(entry["classes"])
    early = [name for name in next(iter(entry["metrics"].values()))["exits"] if name not in ("full", "routed")]
    thresholds = ", ".join(
        f"{name} " + ("closed" if value >= CLOSED else f"{value:.3g}")
        for name, value in zip(early, routing["thresholds"], strict=True)
    )
    size = f"{entry['num_params'] / 1e6:.2f} M parameters, {entry['bytes'] / 1e6:.1f} MB"
    lines = [
        f"## `{name}`\n",
        f"- {count} {'class' if count == 1 else 'classes'}: {', '.join(entry['classes'])}",
        f"- {size}, sha256 `{entry['sha256'][:8]}`",
        f"- routing: `{routing['policy']}`, thresholds {thresholds}",
        f"- recipe: `{entry['recipe']}`\n",
        HEADER,
    ]
    for split, figures in entry["metrics"].items():
        link = f"[{split}]({posixpath.relpath(figures['results'], 'docs')})"
        for exit_name, row in {**figures["exits"], "without exits": figures["without_exits"]}.items():
            bounds = row.get("AP50_interval")
            ap50 = figure(row.get("AP50")) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
            numbers = [figure(row.get(key), digits) for key, digits in (("AP", 3), ("mmacs", 0), ("ms", 1))]
            cells = [link, str(figures["images"]), exit_name, ap50, *numbers, share(row.get("share"))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(folder: Path = FOLDER) -> str:
    """Return the sections of all descriptions in ``folder``."""
    entries = {path.stem: read_json(path, "description of weights", "restore it") for path in folder.glob("*.json")}
    return "\n".join(section(name, entries[name]) for name in sorted(entries))


def renew(page: str, content: str) -> str:
    """Replace the part of the page between `BEGIN` and `END`. Raise EarlyExitError if the page lacks these lines."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise EarlyExitError(f"the page lacks the lines {BEGIN.strip()} and {END}; add them around the tables")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/model_zoo.md")
    write_text(target, renew(target.read_text(encoding="utf-8"), tables()))

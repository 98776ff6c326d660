#!/usr/bin/env python
"""Generate docs/config.md from the defaults: ``python tools/document_config.py docs/config.md``."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg, load
from earlyexit_ssd.files import write_text

_HEADING = re.compile(r"# -{4} (.+?) -+$")
_KEY = re.compile(r"( *)(\w+|<<):(.*)")
_INTRODUCTION = """# Configuration

Every key with its default. The file is generated from `earlyexit_ssd/config/defaults.yaml`:
`python tools/document_config.py docs/config.md`.

A configuration is a YAML file with the keys that differ from the defaults. `_BASE_: other.yaml` (relative to the
file) adds the keys of another file, which have lower priority. A list, such as `DATA.DATASETS`, replaces the whole
list of that file. `KEY VALUE` pairs at the end of the command line have the highest priority:
`EXITS.LAYERS "[6, 12]" SEED 3`. Unknown and repeated keys, wrong types, impossible values and a chain of more than 20
`_BASE_` files are errors before the run starts. Dates are read as text, and only YAML's tags of plain types are
accepted.
"""


@dataclass(frozen=True)
class Entry:
    """A key, or a section with a comment."""

    heading: str  # "" for the first keys
    name: str  # full name; of a key that ``phases`` share, its name in each of them
    comment: str  # the lines directly above the key, joined
    phases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Full names of the keys that the entry describes."""
        return tuple(f"{phase}.{self.name}" for phase in self.phases) or (self.name,)


def read_entries(source: str) -> list[Entry]:
    """Return the entries of the text of defaults.yaml, in its order."""
    phases = tuple(re.findall(r"^(\w+):\n  <<: [&*]", source, re.MULTILINE))
    entries: list[Entry] = []
    heading, comments, path = "", [], []
    for line in source.splitlines():
        if match := _HEADING.match(line):
            heading, comments = match[1], []
        elif line.lstrip().startswith("#"):
            comments.append(line.lstrip().removeprefix("#").strip())
        elif match := _KEY.match(line):
            comment, comments = " ".join(comments), []
            path = [*path[: len(match[1]) // 2], match[2]]
            name, is_section = ".".join(path), not match[3] or match[2] == "<<"
            if path[1:2] == ["<<"] and not is_section:
                entries.append(Entry(heading, match[2], comment, phases))
            elif comment or not (is_section or any(name in entry.keys for entry in entries)):
                entries.append(Entry(heading, name, comment))
        else:
            comments = []
    return entries


def render(entries: Sequence[Entry], cfg: CfgNode) -> str:
    """Return the page, with a table per section and one for shared keys. ``cfg`` has the default values."""
    blocks, last_heading = [_INTRODUCTION], ""
    for (heading, phases), group in itertools.groupby(entries, lambda entry: (entry.heading, entry.phases)):
        if heading != last_heading:
            blocks.append(f"\n## {heading.capitalize()}\n")
        elif heading:
            blocks.append("")
        last_heading = heading
        values = [f"`{name}`" for name in phases] or ["Default"]
        columns = ["Key of each" if phases else "Key", *values, "Meaning"]
        rows = [columns, ["---"] * len(columns)]
        for entry in group:
            escaped = re.sub(r"([*<|])", r"\\\1", entry.comment)  # Markdown's own characters
            rows.append([f"`{entry.name}`", *(_default(cfg, key) for key in entry.keys), escaped])
        blocks += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(blocks) + "\n"


def _default(cfg: CfgNode, key: str) -> str:
    value = functools.reduce(CfgNode.get, key.split("."), cfg)
    return "" if isinstance(value, CfgNode) else f"`{json.dumps(value)}`"


def document() -> str:
    """Return the content of docs/config.md."""
    return render(read_entries(load.DEFAULTS.read_text(encoding="utf-8")), get_cfg())


if __name__ == "__main__":
    write_text(sys.argv[1], document()) if len(sys.argv) > 1 else sys.stdout.write(document())

#!/usr/bin/env python
"""docs/config.md from the file of the defaults: ``python tools/document_config.py docs/config.md``."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg, load
from earlyexit_ssd.files import write_text

_HEADING = re.compile(r"# -{4} (.+?) -+$")
_KEY = re.compile(r"( *)(\w+|<<):(.*)")
_INTRODUCTION = """# Configuration

Every key with its default. The file is generated from `earlyexit_ssd/config/defaults.yaml`:
`python tools/document_config.py docs/config.md`.

A configuration is a YAML file that names only what differs; `_BASE_: other.yaml` (relative to the file) puts another
one underneath. On the command line `KEY VALUE` pairs go last and win: `EXITS.LAYERS "[6, 12]" SEED 3`. Unknown keys,
wrong types and impossible values stop the run before it starts. So do a key given twice and a chain of more than 20
`_BASE_` files. A date is text; of YAML's tags only those of plain types are read.
"""


@dataclass(frozen=True)
class Entry:
    """A key, or a node that has a comment; ``name`` is in full, of a key that ``sections`` share the last part.

    ``section`` is the heading above it, empty for the first keys. ``comment`` stands directly above it, in one line.
    """

    section: str
    name: str
    comment: str
    sections: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Full names of the keys that it stands for."""
        return tuple(f"{section}.{self.name}" for section in self.sections) or (self.name,)


def read_entries(source: str) -> list[Entry]:
    """The keys of a text like the defaults', in its order."""
    users = tuple(re.findall(r"^(\w+):\n  <<: [&*]", source, re.MULTILINE))
    entries: list[Entry] = []
    section, comments, above = "", [], []
    for line in source.splitlines():
        if heading := _HEADING.match(line):
            section, comments = heading[1], []
        elif line.lstrip().startswith("#"):
            comments.append(line.lstrip().removeprefix("#").strip())
        elif match := _KEY.match(line):
            comment, comments = " ".join(comments), []
            above = [*above[: len(match[1]) // 2], match[2]]
            is_node = not match[3] or match[2] == "<<"
            # a node's own value of a shared key is in the table of the shared ones
            again = above[0] in users and any(above[1:] == [entry.name] for entry in entries if entry.sections)
            if above[1:2] == ["<<"] and not is_node:
                entries.append(Entry(section, match[2], comment, users))
            elif comment or not (is_node or again):
                entries.append(Entry(section, ".".join(above), comment))
        else:
            comments = []
    return entries


def render(entries: Sequence[Entry], cfg: CfgNode) -> str:
    """The page: a table per section, and one of its own for shared keys; ``cfg`` has the default values."""
    blocks, heading = [_INTRODUCTION], ""
    for (section, sections), group in itertools.groupby(entries, lambda entry: (entry.section, entry.sections)):
        if section != heading:
            blocks.append(f"\n## {section.capitalize()}\n")
            heading = section
        elif section:
            blocks.append("")
        values = [f"`{name}`" for name in sections] or ["Default"]
        rows = [[f"`{entry.name}`", *(_value(cfg, key) for key in entry.keys), _text(entry.comment)] for entry in group]
        columns = ["Key of each" if sections else "Key", *values, "Meaning"]
        blocks += [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(blocks) + "\n"


def _value(cfg: CfgNode, key: str) -> str:
    """A default as YAML takes it; empty for a node."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return "" if isinstance(value, CfgNode) else f"`{json.dumps(value)}`"


def _text(comment: str) -> str:
    """Signs that Markdown would take for its own are escaped."""
    return re.sub(r"([*<|])", r"\\\1", comment)


def document() -> str:
    """What docs/config.md should hold."""
    return render(read_entries(load.DEFAULTS.read_text(encoding="utf-8")), get_cfg())


if __name__ == "__main__":
    write_text(sys.argv[1], document()) if len(sys.argv) > 1 else sys.stdout.write(document())

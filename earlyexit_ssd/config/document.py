"""docs/config.md from the sources of the defaults: ``python -m earlyexit_ssd.config.document docs/config.md``."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config import defaults
from earlyexit_ssd.files import write_text

_HEADING = re.compile(r"# -{4} (.+?) -+$")
_KEY = re.compile(r"(_C|phase)\.([\w.]+) = (.*)")  # of the tree, or of the node that _phase() makes
_INTRODUCTION = """# Configuration

Every key with its default. The file is generated from `earlyexit_ssd/config/defaults.py`:
`python -m earlyexit_ssd.config.document docs/config.md`.

A configuration is a YAML file that names only what differs; `_BASE_: other.yaml` (relative to the file) puts another
one underneath. On the command line `KEY VALUE` pairs go last and win: `EXITS.LAYERS "[6, 12]" SEED 3`. Unknown keys,
wrong types and impossible values stop the run before it starts. So do a key given twice and a chain of more than 20
`_BASE_` files. A date is text; of YAML's tags only those of plain types are read.
"""


@dataclass(frozen=True)
class Entry:
    """A key, or a node that has a comment.

    Attributes:
        section: the heading above it in the source; empty for the first keys.
        name: the full name, such as ``DATA.ROOT``; of a key that all phases share the last part, ``EPOCHS``.
        comment: what stands directly above it, in one line; empty where nothing does.
        sections: of a shared key the nodes that have it, ``("BASELINE", ...)``; else empty.
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
    """The keys of a source like the defaults', in its order; shared keys come before the first node with them."""
    users = tuple(re.findall(r"^_C\.(\w+) = _phase\(", source, re.MULTILINE))
    entries: list[Entry] = []
    shared: list[Entry] = []
    section, comments = "", []
    for line in map(str.strip, source.splitlines()):
        if heading := _HEADING.match(line):
            section, comments = heading[1], []
        elif line.startswith("#"):
            comments.append(line.removeprefix("#").strip())
        else:
            comment, comments = " ".join(comments), []
            root, name, value = match.groups() if (match := _KEY.match(line)) else ("", "", "")
            if root == "phase":
                shared.append(Entry(section, name, comment, users))
            elif root:
                entries += shared if name in users[:1] else []
                if comment or not value.startswith(("Node(", "_phase(")):
                    entries.append(Entry(section, name, comment))
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
    return render(read_entries(sources()), defaults.get_cfg())


def sources() -> str:
    """The source of the defaults."""
    return Path(defaults.__file__).read_text(encoding="utf-8")


if __name__ == "__main__":
    write_text(sys.argv[1], document()) if len(sys.argv) > 1 else sys.stdout.write(document())

"""docs/config.md from the sources of the defaults: ``python -m earlyexit_ssd.config.document docs/config.md``."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config import defaults
from earlyexit_ssd.files import write_text

TREE, FACTORY, SHARED = "_C", "_phase", "phase"
"""Names in the sources: the tree, the function that makes a phase's node, and that node inside the function."""

_HEADING = re.compile(r"# -{4} (.+?) -+$")
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
    comments = _comments(source)
    entries: list[Entry] = []
    factory: ast.FunctionDef | None = None
    body = ast.parse(source).body
    users = tuple(name for statement in body if (name := _target(statement, TREE)) and _calls(statement, FACTORY))
    for statement in body:
        section = _section(comments, statement.lineno)
        if isinstance(statement, ast.FunctionDef) and statement.name == FACTORY:
            factory = statement
        elif name := _target(statement, TREE):
            if name in users[:1] and factory:
                shared = [(_target(line, SHARED), line.lineno) for line in factory.body]
                entries += [Entry(section, key, _above(comments, line), users) for key, line in shared if key]
            comment = _above(comments, statement.lineno)
            if comment or not isinstance(statement.value, ast.Call):
                entries.append(Entry(section, name, comment))
    return entries


def _comments(source: str) -> dict[int, str]:
    """Line number -> the comment that the line consists of."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string
        for token in tokens
        if token.type == tokenize.COMMENT and token.line.strip() == token.string
    }


def _above(comments: dict[int, str], line: int) -> str:
    """The comment that ends on the line above, headings apart."""
    lines: list[str] = []
    while (text := comments.get(line - 1 - len(lines))) and not _HEADING.match(text):
        lines.insert(0, text.removeprefix("#").strip())
    return " ".join(lines)


def _section(comments: dict[int, str], line: int) -> str:
    """The last heading above ``line``."""
    headings = [match[1] for number, text in comments.items() if number < line and (match := _HEADING.match(text))]
    return headings[-1] if headings else ""


def _target(statement: ast.stmt, root: str) -> str:
    """``DATA.ROOT`` for ``root.DATA.ROOT = ...``; empty for any other statement."""
    if not isinstance(statement, ast.Assign):
        return ""
    target, names = statement.targets[0], []
    while isinstance(target, ast.Attribute):
        names.insert(0, target.attr)
        target = target.value
    return ".".join(names) if isinstance(target, ast.Name) and target.id == root else ""


def _calls(statement: ast.stmt, function: str) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == function


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

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import get_cfg, load, load_config
from tools import document_config as document

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOURCE = """
# Of the file.

# Where it goes,
# in two lines.
FIRST: "a|b"

# ---- the data ------
DATA:
  SIZES: [8, 0.5]  # not this one

# The first phase.
ONE:
  <<: &phase
    # How long.
    EPOCHS: 3
  # Only here.
  EXTRA: true
TWO:
  <<: *phase
  EPOCHS: 4
"""


def entries() -> list[document.Entry]:
    return document.read_entries(load.DEFAULTS.read_text(encoding="utf-8"))


def keys_of(node: CfgNode, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, (*prefix, name))
        else:
            yield ".".join((*prefix, name))


def test_the_page_is_current():
    command = "python tools/document_config.py docs/config.md"
    assert (DOCS / "config.md").read_text(encoding="utf-8") == document.document(), f"run {command}"


def test_every_key_is_there_once_and_has_a_comment():
    found = [key for entry in entries() for key in entry.keys if not is_node(key)]
    assert sorted(found) == sorted(keys_of(get_cfg()))
    assert [entry.name for entry in entries() if not entry.comment] == []


def is_node(name: str) -> bool:
    value = get_cfg()
    for part in name.split("."):
        value = value[part]
    return isinstance(value, CfgNode)


def test_entries_of_a_source():
    assert document.read_entries(SOURCE) == [
        document.Entry("", "FIRST", "Where it goes, in two lines."),
        document.Entry("the data", "DATA.SIZES", ""),
        document.Entry("the data", "ONE", "The first phase."),
        document.Entry("the data", "EPOCHS", "How long.", ("ONE", "TWO")),
        document.Entry("the data", "ONE.EXTRA", "Only here."),
    ]


def test_page_of_entries():
    cfg = CfgNode({"DATA": {"SIZES": (8, 0.5)}, "ONE": {"EPOCHS": 3, "EXTRA": True}, "TWO": {"EPOCHS": 4}})
    page = document.render(document.read_entries(SOURCE)[1:], cfg)
    assert page.endswith(
        """
## The data

| Key | Default | Meaning |
| --- | --- | --- |
| `DATA.SIZES` | `[8, 0.5]` |  |
| `ONE` |  | The first phase. |

| Key of each | `ONE` | `TWO` | Meaning |
| --- | --- | --- | --- |
| `EPOCHS` | `3` | `4` | How long. |

| Key | Default | Meaning |
| --- | --- | --- |
| `ONE.EXTRA` | `true` | Only here. |
"""
    )


@pytest.mark.parametrize(("comment", "text"), [("<name> of a*", r"\<name> of a\*"), ("a | b", r"a \| b")])
def test_comments_are_no_markdown(comment, text):
    entry = document.Entry("", "SEED", comment)
    assert f"| `SEED` | `0` | {text} |" in document.render([entry], get_cfg())


def test_examples_of_the_documentation_are_configurations(tmp_path):
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    examples = re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL)
    for name, example in examples:
        (tmp_path / name).write_text(example)
    assert len(examples) == text.count("```yaml") > 0
    for name, _ in examples:
        load_config(tmp_path / name)

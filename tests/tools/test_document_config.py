import functools
import re
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

# Of no key.
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


def test_page_is_current():
    command = "python tools/document_config.py docs/config.md"
    assert (DOCS / "config.md").read_text(encoding="utf-8") == document.document(), f"run {command}"


def keys_of(node: CfgNode, above: str = "") -> list[str]:
    if not isinstance(node, CfgNode):
        return [above]
    return [key for name, value in node.items() for key in keys_of(value, f"{above}.{name}".lstrip("."))]


def test_every_key_has_one_entry_with_a_comment():
    entries, cfg = document.read_entries(load.DEFAULTS.read_text(encoding="utf-8")), get_cfg()
    keys = [key for entry in entries for key in entry.keys]
    sections = [key for key in keys if isinstance(functools.reduce(CfgNode.get, key.split("."), cfg), CfgNode)]
    assert sorted(keys) == sorted([*keys_of(cfg), *sections])
    assert all(entry.comment for entry in entries)


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
def test_markdown_in_comments_is_escaped(comment, text):
    entry = document.Entry("", "SEED", comment)
    assert f"| `SEED` | `0` | {text} |" in document.render([entry], get_cfg())


def test_yaml_examples_of_the_documentation_are_valid(tmp_path):
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    examples = re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL)
    for name, example in examples:
        (tmp_path / name).write_text(example)
    assert len(examples) == text.count("```yaml") > 0
    for name, _ in examples:
        load_config(tmp_path / name)

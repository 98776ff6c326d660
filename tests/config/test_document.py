import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import document, get_cfg, load_config

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOURCE = """
_C = Node()

# Where it goes,
# in two lines.
_C.FIRST = "a|b"

# ---- the data ------
_C.DATA = Node()
_C.DATA.SIZES = (8, 0.5)  # not this one

def _phase(epochs):
    # How long.
    phase.EPOCHS = epochs
    return phase

# The first phase.
_C.ONE = _phase(epochs=3)
# Only here.
_C.ONE.EXTRA = True
_C.TWO = _phase(epochs=4)
"""


def entries() -> list[document.Entry]:
    return document.read_entries(document.sources())


def keys_of(node: CfgNode, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, (*prefix, name))
        else:
            yield ".".join((*prefix, name))


def test_the_page_is_current():
    command = "python -m earlyexit_ssd.config.document docs/config.md"
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
        document.Entry("the data", "EPOCHS", "How long.", ("ONE", "TWO")),
        document.Entry("the data", "ONE", "The first phase."),
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

| Key of each | `ONE` | `TWO` | Meaning |
| --- | --- | --- | --- |
| `EPOCHS` | `3` | `4` | How long. |

| Key | Default | Meaning |
| --- | --- | --- |
| `ONE` |  | The first phase. |
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

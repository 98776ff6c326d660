"""Figures of the model zoo, and of the descriptions beside the weights, are those of the metrics.json files."""

import json
import re
from pathlib import Path

import pytest

from earlyexit_ssd import EarlyExitSSDLite_Weights
from earlyexit_ssd.errors import EarlyExitError
from tools.model_zoo import renew, section, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[(?P<split>[\w+]+)\]\((?P<path>results/\w+/metrics\.json)\) \| (?P<cells>.+) \|$", re.M)
MEMBERS = list(EarlyExitSSDLite_Weights)


def read(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def cells(metrics: dict, name: str) -> str:
    """Return the figures of a row from metrics.json."""
    photos = str(metrics["context"]["images"])
    if name == "without exits":
        plain = metrics["without_exits"]
        return f"{photos} | {name} | - | - | {plain['mmacs']:.0f} | {plain['ms']:.1f} | -"
    rows = {row["name"]: row for row in metrics["exits"]} | {"routed": metrics["routed"]}
    row, share = rows[name], metrics["routed"]["exit_share"].get(name)
    ap50 = "{:.3f} [{:.3f}, {:.3f}]".format(row["AP50"], *row["AP50_interval"])
    leaving = "-" if share is None else f"{100 * share:.1f} %"
    return f"{photos} | {name} | {ap50} | {row['AP']:.3f} | {row['mmacs']:.0f} | {row['ms']:.1f} | {leaving}"


def test_page_is_current():
    assert renew(PAGE, tables()) == PAGE, "run python tools/model_zoo.py"


def test_rows_of_the_page_are_those_of_metrics_json():
    rows = list(ROW.finditer(PAGE))
    assert len(rows) == PAGE.count("\n| [") >= 15
    for row in rows:
        metrics = read(f"docs/{row['path']}")
        assert row["split"] == "+".join(metrics["context"]["splits"])
        assert row["cells"] == cells(metrics, row["cells"].split(" | ")[1]), row.group()


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_figures_beside_the_weights_are_those_of_metrics_json(member):
    entry = json.loads(member.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert entry["metrics"]
    for split, figures in entry["metrics"].items():
        metrics = read(figures["results"])
        assert split == "+".join(metrics["context"]["splits"])
        assert metrics["context"]["weights_sha256"] == member.meta["sha256"]
        assert figures["images"] == metrics["context"]["images"]
        assert figures["without_exits"].items() <= metrics["without_exits"].items()
        measured = {row["name"]: row for row in metrics["exits"]} | {"routed": metrics["routed"]}
        assert list(figures["exits"]) == list(measured)
        for name, row in figures["exits"].items():
            assert row["share"] == metrics["routed"]["exit_share"].get(name)
            assert {**row, **measured[name]} == {**measured[name], "share": row["share"]}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_page_has_size_digest_and_recipe(member):
    assert f"{member.meta['bytes'] / 1e6:.1f} MB, sha256 `{member.meta['sha256'][:8]}`" in PAGE
    assert f"recipe: `{member.meta['recipe']}`" in PAGE


FIGURES = {"AP": 0.25, "AP50": 0.5, "AP50_interval": [0.4375, 0.5625], "mmacs": 245.6, "ms": 22.46, "share": 0.125}
ENTRY = {
    "classes": ["cat", "dog"],
    "num_params": 5_619_676,
    "bytes": 11_505_061,
    "sha256": "ba7816bf8f01cfea",
    "recipe": "train it",
    "routing": {"policy": "max_foreground", "thresholds": [0.800000011920929, 2.0]},
    "metrics": {
        "pets_test": {
            "results": "docs/results/pets/metrics.json",
            "images": 614,
            "without_exits": {"mmacs": 583.2, "ms": 35.0},
            "exits": {
                "exit8": FIGURES,
                "exit12": FIGURES,
                "routed": {**FIGURES, "AP": None, "AP50": None, "AP50_interval": None, "share": None},
            },
        }
    },
}


def test_section():
    assert (
        section("pets", ENTRY)
        == """\
## `pets`

- 2 classes: cat, dog
- 5.62 M parameters, 11.5 MB, sha256 `ba7816bf`
- routing: `max_foreground`, thresholds exit8 0.8, exit12 closed
- recipe: `train it`

| test split | photos | exit | AP50 [95 %] | AP | MMAC | ms | share |
| :-- | --: | :-- | :-- | --: | --: | --: | --: |
| [pets_test](results/pets/metrics.json) | 614 | exit8 | 0.500 [0.438, 0.562] | 0.250 | 246 | 22.5 | 12.5 % |
| [pets_test](results/pets/metrics.json) | 614 | exit12 | 0.500 [0.438, 0.562] | 0.250 | 246 | 22.5 | 12.5 % |
| [pets_test](results/pets/metrics.json) | 614 | routed | - | - | 246 | 22.5 | - |
| [pets_test](results/pets/metrics.json) | 614 | without exits | - | - | 583 | 35.0 | - |
"""
    )


def test_only_text_between_the_marks_is_replaced():
    page = "a\n<!-- tables of tools/model_zoo.py begin -->\nold\n<!-- tables of tools/model_zoo.py end -->\nb\n"
    new = "a\n<!-- tables of tools/model_zoo.py begin -->\n\nnew\n\n<!-- tables of tools/model_zoo.py end -->\nb\n"
    assert renew(page, "new\n") == renew(new, "new\n") == new
    with pytest.raises(EarlyExitError, match="lacks the lines <!-- tables of tools/model_zoo.py begin -->"):
        renew("a\nb\n", "new")

import pytest

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.report.zoo import renew, section

FIGURES = {"AP": 0.25, "AP50": 0.5, "AP50_interval": [0.4375, 0.5625], "mmacs": 245.6, "ms": 22.46, "share": 0.125}
ENTRY = {
    "classes": ["cat", "dog"],
    "num_params": 5_619_676,
    "bytes": 11_505_061,
    "sha256": "ba7816bf8f01cfea",
    "recipe": "train it",
    "routing": {"policy": "max_foreground", "thresholds": [0.800000011920929, 0.5]},
    "metrics": {
        "pets_test": {
            "results": "docs/results/pets/metrics.json",
            "images": 614,
            "without_exits": {"mmacs": 583.2, "ms": 35.0},
            "exits": {
                "exit8": FIGURES,
                "routed": {**FIGURES, "AP": None, "AP50": None, "AP50_interval": None, "share": None},
            },
        }
    },
}


def test_a_section():
    assert (
        section("pets", ENTRY)
        == """\
## `pets`

- 2 classes: cat, dog
- 5.62 M parameters, 11.5 MB, sha256 `ba7816bf`
- routing: `max_foreground`, thresholds 0.8, 0.5
- recipe: `train it`

| test split | photos | exit | AP50 [95 %] | AP | MMAC | ms | share |
| :-- | --: | :-- | :-- | --: | --: | --: | --: |
| [pets_test](results/pets/metrics.json) | 614 | exit8 | 0.500 [0.438, 0.562] | 0.250 | 246 | 22.5 | 12.5 % |
| [pets_test](results/pets/metrics.json) | 614 | routed | - | - | 246 | 22.5 | - |
| [pets_test](results/pets/metrics.json) | 614 | without exits | - | - | 583 | 35.0 | - |
"""
    )


def test_only_what_is_between_the_marks_is_renewed():
    page = "a\n<!-- tables of report/zoo.py begin -->\nold\n<!-- tables of report/zoo.py end -->\nb\n"
    new = "a\n<!-- tables of report/zoo.py begin -->\n\nnew\n\n<!-- tables of report/zoo.py end -->\nb\n"
    assert renew(page, "new\n") == renew(new, "new\n") == new
    with pytest.raises(EarlyExitError, match="lacks the lines <!-- tables of report/zoo.py begin -->"):
        renew("a\nb\n", "new")

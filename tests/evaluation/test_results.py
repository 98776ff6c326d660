"""Results and their JSON: stored results of every version are read without loss."""

import json
from pathlib import Path

import pytest

from earlyexit_ssd.evaluation.results import Finding, Results
from earlyexit_ssd.report.tables import markdown_table, text_report

RESULTS = sorted((Path(__file__).resolve().parents[2] / "docs" / "results").glob("*/metrics.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_stored_results_are_read_without_loss(path):
    """Only keys that are newer than the stored file are added."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    results = Results.from_json(stored)
    written = results.to_json()
    assert Results.from_json(written) == results
    for before, after in (
        *zip(stored["exits"], written["exits"], strict=True),
        *zip(stored["rivals"], written["rivals"], strict=True),
        *((stored[key], written[key]) for key in ("context", "without_exits", "routed")),
    ):
        assert after.items() >= before.items()
        assert set(after) - set(before) <= {"taken_over", "untrained", "labelled", "hybrid"}
    assert written["verdict"] == stored["verdict"]
    assert set(written) - {"certificate", "drift"} == set(stored) - {"certificate", "drift"}
    if (path.parent / "table.md").exists():
        assert markdown_table(results) + "\n" == (path.parent / "table.md").read_text(encoding="utf-8")
    assert text_report(results).startswith(", ".join(stored["context"]["splits"]))


def test_early_exits_and_the_full_path_have_different_keys():
    entries = {
        "exits": [{"name": "exit8", "empty": False, "AP50_below_full_interval": None, "AP50": 0.5}, {"name": "full"}],
        "verdict": {"ship": False, "findings": [{"line": "no"}]},
    }
    results = Results.from_json(entries)
    early, full = results.to_json()["exits"]
    assert early["AP50_below_full_interval"] is None and "found" not in early and early["AP50"] == 0.5
    assert "empty" not in full and "AP50_below_full_interval" not in full
    assert results.verdict.findings == (Finding("no"),)
    assert (results.early[0].ap50, results.full.ap50, results.full.number("AP")) == (0.5, None, None)

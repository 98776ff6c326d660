"""Every figure of the README's results table is the one in the metrics.json that it comes from."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(
    r"^\| \[(?P<run>\w+)\]\(docs/results/(?P=run)/metrics\.json\) \| (?P<exit>\w+) \| (?P<figures>.+) \|$", re.M
)


def cells(run: str, name: str) -> str:
    """A row's figures: AP, AP50 with its interval, precision, recall, MMACs, milliseconds."""
    metrics = json.loads((ROOT / "docs" / "results" / run / "metrics.json").read_text(encoding="utf-8"))
    entry = metrics["routed"] if name == "routed" else next(e for e in metrics["exits"] if e["name"] == name)
    low, high = entry["AP50_interval"]
    return (
        f"{entry['AP']:.3f} | {entry['AP50']:.3f} [{low:.3f}, {high:.3f}] | {entry['precision']:.2f} | "
        f"{entry['recall']:.2f} | {entry['mmacs']:.0f} | {entry['ms']:.1f}"
    )


def test_results_table_is_what_was_measured():
    rows = list(ROW.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(rows) == 20
    for row in rows:
        assert row["figures"] == cells(row["run"], row["exit"]), row.group()

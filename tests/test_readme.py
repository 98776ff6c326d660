"""Every figure of the README's results table is the one in the metrics.json that it comes from."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from earlyexit_ssd.evaluation.verdict import judge

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| \[(?P<run>\w+)\]\(docs/results/(?P=run)/metrics\.json\) \| (?P<figures>.+) \|$", re.M)


def cells(run: str) -> str:
    """A row's figures: photos, AP50 of the full path, the exits (deepest first) and routed, MMACs, milliseconds."""
    metrics = json.loads((ROOT / "docs" / "results" / run / "metrics.json").read_text(encoding="utf-8"))
    routed, plain = metrics["routed"], metrics["without_exits"]
    ap50 = [f"{one['AP50']:.3f} [{{:.3f}}, {{:.3f}}]".format(*one["AP50_interval"]) for one in metrics["exits"][::-1]]
    cost = [f"{routed['mmacs']:.0f} / {plain['mmacs']:.0f}", f"{routed['ms']:.1f} / {plain['ms']:.1f}"]
    return " | ".join([str(metrics["context"]["images"]), *ap50, f"{routed['AP50']:.3f}", *cost])


def test_results_table_is_what_was_measured():
    rows = list(ROW.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(rows) == 5
    for row in rows:
        assert row["figures"] == cells(row["run"]), row.group()


def rivals_rows() -> list[str]:
    """Exits, routed detector and static rivals of one run: AP, AP50, MMACs and milliseconds, from cheap to dear."""
    metrics = json.loads((ROOT / "docs" / "results" / "voc_rivals" / "metrics.json").read_text(encoding="utf-8"))
    *early, full = metrics["exits"]
    plain = {**full, **metrics["without_exits"], "name": "without exits"}
    rows = [*early, {**metrics["routed"], "name": "**routed**"}, plain, *metrics["rivals"]]
    return [
        "| {name} | {AP:.3f} | {AP50:.3f} [{AP50_interval[0]:.3f}, {AP50_interval[1]:.3f}] | {mmacs:.0f} | {ms:.1f} |"
        "".format(**row)
        for row in sorted(rows, key=lambda row: row["mmacs"])
    ]


def test_rivals_table_is_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(rivals_rows()) in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/*/metrics.json")), ids=lambda path: path.parent.name)
def test_stored_verdicts_are_today_s(path):
    metrics = json.loads(path.read_text(encoding="utf-8"))
    assert metrics["verdict"] == asdict(judge(metrics, metrics["context"]["forced"]))


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/results/*/metrics.json")), ids=lambda path: path.parent.name)
def test_stored_results_name_no_folder_of_one_machine(path):
    for rival in json.loads(path.read_text(encoding="utf-8")).get("rivals", []):
        assert rival["source"] is None or rival["source"] == Path(rival["source"]).name


def test_three_exits_table_is_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]+\]\(docs/results/(\w+)/metrics\.json\) \| (.+) \|$", text, re.M)
    rows = {run: figures for run, figures in rows if run in ("voc_exit6", "voc_joint", "chair_stream")}
    assert len(rows) == 3
    for run, figures in rows.items():
        metrics = json.loads((ROOT / "docs" / "results" / run / "metrics.json").read_text(encoding="utf-8"))
        exits = {one["name"]: one for one in metrics["exits"]}
        expected = [
            "{:.3f} [{:.3f}, {:.3f}]".format(exits[name]["AP50"], *exits[name]["AP50_interval"])
            if name in exits
            else "-"
            for name in ("full", "exit12", "exit8", "exit6")
        ]
        assert figures == " | ".join(expected), run
    metrics = json.loads((ROOT / "docs" / "results" / "chair_stream" / "metrics.json").read_text(encoding="utf-8"))
    routed, plain = metrics["routed"], metrics["without_exits"]
    assert f"routed {routed['AP50']:.3f} in {routed['ms']:.1f} ms against {plain['ms']:.1f} without exits" in text

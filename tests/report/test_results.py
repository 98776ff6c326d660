"""The folder of results."""

import json

import pytest
from PIL import Image

from earlyexit_ssd.report.results import write_results
from earlyexit_ssd.report.table import text_table


def test_files(metrics, tmp_path):
    paths = write_results(tmp_path / "new", metrics, {"detections": Image.new("RGB", (5, 4))})
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert {path.name for path in paths} == {
        *("metrics.json", "table.txt", "table.md", "ap50_against_ms.png", "ap_against_cost.png", "detections.png"),
    }
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == metrics
    assert text_table(metrics) in (tmp_path / "new" / "table.txt").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "new" / "detections.png").size == (5, 4)


def test_nan_is_refused_and_leaves_the_old_file(metrics, tmp_path):
    write_results(tmp_path, metrics)
    before = (tmp_path / "metrics.json").read_text()
    metrics["exits"][0]["AP"] = float("nan")
    with pytest.raises(ValueError):
        write_results(tmp_path, metrics)
    assert (tmp_path / "metrics.json").read_text() == before


def test_photos_are_a_table_of_comma_separated_values(metrics, tmp_path):
    rows = [
        {"file": "caf\udce9, \u043a.jpg", "exit": "exit8", "confidence": 0.5, "objects": 2, "found": 1},
        {"file": "b.jpg", "exit": "full", "confidence": None, "objects": 0, "found": 0},
    ]
    paths = write_results(tmp_path, metrics, photos=rows)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert (tmp_path / "photos.csv").read_text(encoding="utf-8").splitlines() == [
        "file,exit,confidence,objects,found",
        '"caf\\udce9, \u043a.jpg",exit8,0.5,2,1',
        "b.jpg,full,,0,0",
    ]

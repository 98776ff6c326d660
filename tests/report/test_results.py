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

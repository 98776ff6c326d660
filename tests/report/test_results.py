"""What calibration and evaluation write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from earlyexit_ssd.calibration.certificate import CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.calibration.temperature import FittedTemperature, Reliability
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.report.results import calibration_report, write_results
from earlyexit_ssd.report.tables import text_table


def test_the_temperature_is_the_router_s_own():
    """A risk target keeps those of the training; what was fitted stands beside them."""
    before, after = (Reliability((), (), (), error) for error in (0.2, 0.1))
    certificate = SimpleNamespace(
        router={"policy": "entropy", "thresholds": [0.5], "temperatures": [1.0]},
        measured=Measured(**{
            "photos": 9, "exit_share": {"exit8": 0.25, "full": 0.75}, "AP50": 0.5, "AP50_full": 0.6,
            "loss": 0.01, "loss_bound": 0.02, "cost": 3.0, "speedup": 1.5, "steps": 3,
        }),
        target=CertifiedTarget(
            kind="risk", epsilon=0.05, bound="betting", delta=0.05, reference="full", score=0.5, iou=0.5
        ),
        cost_model=CertifiedCosts(unit="mmacs", exits=(2.0, 4.0)),
        closed=False,
    )  # fmt: skip
    lines = calibration_report(certificate, [FittedTemperature("exit8", 1.7, before, after)]).splitlines()
    row = next(line for line in lines if line.startswith("exit8"))
    assert row.split() == ["exit8", "0.5000", "25.0", "%", "2.0", "1.00", "1.70", "0.200", "0.100"]


def test_photos_that_nobody_labelled_claim_no_ap():
    certificate = SimpleNamespace(
        router={"policy": "entropy", "thresholds": [0.5], "temperatures": [1.0]},
        measured=Measured(**{
            "photos": 60, "exit_share": {"exit8": 0.25, "full": 0.75}, "AP50": None, "AP50_full": None, "loss": 0.01,
            "loss_bound": 0.02, "cost": 3.0, "speedup": 1.5, "steps": 3, "labelled": False, "blocks": 12,
            "agreement": {"objects": 22, "kept": 21, "added": 1, "same_photos": 0.9},
            "equal_photos": 3, "near_equal_photos": 0,
        }),
        target=CertifiedTarget(**{
            "kind": "risk", "epsilon": 0.05, "bound": "betting", "delta": 0.05, "reference": "full", "score": 0.4,
            "iou": 0.5, "block": 5,
        }),
        cost_model=CertifiedCosts(unit="mmacs", exits=(2.0, 4.0)),
        closed=False,
    )  # fmt: skip
    text = calibration_report(certificate, [])
    assert "60 calibration photos (3 copies left out: each photo counts once)" in text
    assert "nobody labelled these photos, so AP is not known; loss per photo 0.0100" in text and "AP50" not in text
    assert (
        "agreement with the full path at score 0.4: 21 of its 22 objects kept, 1 added; the same answer for 90.0 %"
        in text
    )
    assert (
        "over the draw of the 12 blocks of 5 calibration photos the expected loss per block of 5 is at most 0.05"
        in text
    )


# The folder of results.


def test_files(metrics, tmp_path):
    paths = write_results(tmp_path / "new", Results.from_json(metrics), {"detections": Image.new("RGB", (5, 4))})
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert {path.name for path in paths} == {
        *("metrics.json", "table.txt", "table.md", "ap_against_cost.png", "detections.png"),
    }
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == Results.from_json(metrics).to_json()
    assert text_table(Results.from_json(metrics)) in (tmp_path / "new" / "table.txt").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "new" / "detections.png").size == (5, 4)


def test_nan_is_refused_and_leaves_the_old_file(metrics, tmp_path):
    write_results(tmp_path, Results.from_json(metrics))
    before = (tmp_path / "metrics.json").read_text()
    metrics["exits"][0]["AP"] = float("nan")
    with pytest.raises(ValueError):
        write_results(tmp_path, Results.from_json(metrics))
    assert (tmp_path / "metrics.json").read_text() == before


def test_photos_are_a_table_of_comma_separated_values(metrics, tmp_path):
    rows = [
        {"file": "caf\udce9, \u043a.jpg", "exit": "exit8", "confidence": 0.5, "objects": 2, "found": 1},
        {"file": "b.jpg", "exit": "full", "confidence": None, "objects": 0, "found": 0},
    ]
    paths = write_results(tmp_path, Results.from_json(metrics), photos=rows)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert (tmp_path / "photos.csv").read_text(encoding="utf-8").splitlines() == [
        "file,exit,confidence,objects,found",
        '"caf\\udce9, \u043a.jpg",exit8,0.5,2,1',
        "b.jpg,full,,0,0",
    ]

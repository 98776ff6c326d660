"""Tables of figures and verdicts, and what calibration and evaluation write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from earlyexit_ssd.calibration.certificate import CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.calibration.thresholds import FittedTemperature, Reliability
from earlyexit_ssd.evaluation.results import Results, exit_rows, static_rows, timing_title
from earlyexit_ssd.report.tables import (
    calibration_report,
    figure,
    markdown_table,
    text_report,
    text_table,
    write_results,
)


def test_three_decimals_or_a_dash():
    assert (figure(0.12345), figure(0.0), figure(None)) == ("0.123", "0.000", "-")


# What is compared.


def test_exits_and_routed(metrics):
    rows = exit_rows(Results.from_json(metrics))
    assert [row.name for row in rows] == ["exit8", "exit12", "full", "routed"]
    assert [row.share for row in rows] == [0.5, 0.25, 0.25, None]


def test_static_detectors(with_rivals):
    plain, small, foreign = static_rows(Results.from_json(with_rivals))
    assert (plain.name, plain.number("AP50"), plain.ms, plain.mmacs) == ("without exits", 0.72, 43.0, 405.3)
    assert plain.layer is None and plain.confidence is None
    assert (small.other_runtime, foreign.other_runtime) == (None, "ORT")


def test_metrics_of_before_the_rivals(metrics):
    assert timing_title(Results.from_json(metrics)) == "eager PyTorch on cpu, 1 thread(s)"
    assert len(static_rows(Results.from_json(metrics))) == 1


# The table as text and as Markdown.

ROUTED_CELLS = ["routed", "-", "0.390", "0.650", "0.800", "0.500", "0.615", "0.25", "0.12", "0.210", "-", "300", "30.0"]


def test_rows_and_cells(metrics):
    header, line, *rows = text_table(Results.from_json(metrics)).splitlines()
    expected = "exit layer AP AP50 P R F1 FP/img FP/empty loc.err confidence MMAC ms share"
    assert " ".join(header.split()) == expected
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["exit8", "exit12", "full", "routed", "without"]
    assert rows[3].split()[:13] == ROUTED_CELLS
    # what the full path finds, at the cost of the detector without exits
    assert rows[4].split()[1:5] == ["exits", "-", "0.432", "0.720"]
    assert rows[4].split()[-4:] == ["-", "405", "43.0", "-"]
    assert "0.61 ± 0.20" in rows[0]
    assert rows[0].endswith("50.0 %")


def test_undefined_is_a_dash(metrics):
    assert text_table(Results.from_json(metrics)).splitlines()[2].split()[8] == "-"


def test_columns_are_aligned(metrics):
    metrics["exits"][0]["mmacs"] = 123456.0
    lines = text_table(Results.from_json(metrics)).splitlines()
    assert len({len(line) for line in lines[1:5]}) == 1
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines[2:5], ["123456", "350", "480"], strict=True)]
    assert len(set(ends)) == 1


def test_markdown(metrics):
    lines = markdown_table(Results.from_json(metrics)).splitlines()
    assert lines[1].startswith("| :-- | --: |")
    assert {line.count("|") for line in lines} == {15}
    assert lines[-2].startswith("| routed | - | 0.390 | 0.650 |")
    assert lines[-1].startswith("| without exits | - | 0.432 | 0.720 |")


def test_report_says_what_and_how_and_the_verdict(metrics):
    text = text_report(Results.from_json(metrics))
    assert "toy_test: 614 photos, 0 of them without an object" in text
    assert "score 0.5 and IoU 0.5" in text
    assert text_table(Results.from_json(metrics)) in text
    assert "ms of one image in eager PyTorch on cpu, 1 thread(s)\n" in text
    assert "verdict: ship the exits\n  - exit8: AP50" in text


def test_what_is_no_reason_stands_apart_from_the_vetoes(metrics):
    slow = {"line": "no speed gain", "veto": True}
    metrics["verdict"] = {"ship": False, "what": None, "findings": [*metrics["verdict"]["findings"], slow]}
    assert text_report(Results.from_json(metrics)).endswith(
        "verdict: do not ship the routed detector as it is\n  - veto: no speed gain\n"
        "found besides:\n  - exit8: AP50 0.550 is above 0.35: accurate enough"
    )
    metrics["verdict"] = {"ship": False, "what": None, "findings": [slow]}
    assert text_report(Results.from_json(metrics)).endswith("as it is\n  - veto: no speed gain")


def test_one_exit_alone_is_named(metrics):
    metrics["verdict"]["what"] = "exit8 alone"
    assert "verdict: ship exit8 alone\n  - exit8: AP50" in text_report(Results.from_json(metrics))


def test_rivals_stand_below(with_rivals):
    *_, small, foreign = text_table(Results.from_json(with_rivals)).splitlines()
    assert small.split()[:5] == ["plain", "256", "-", "0.384", "0.640"]
    assert small.split()[-3:] == ["330", "33.0", "-"]
    assert foreign.split()[:4] == ["yolox_nano", "-", "0.426", "0.710"]
    assert foreign.split()[-4:] == ["-", "15.0", "ORT", "-"]


def test_another_runtime_is_said(with_rivals):
    assert "ORT: in ONNX Runtime, not to be compared" in text_report(Results.from_json(with_rivals))
    with_rivals["context"]["runtime"] = "onnxruntime"
    del with_rivals["rivals"][0]
    text = text_report(Results.from_json(with_rivals))
    assert "ms of one image in ONNX Runtime on cpu" in text
    assert "ORT" not in text


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

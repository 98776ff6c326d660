"""Tables of figures and verdicts, and the files of a calibration and an evaluation."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from earlyexit_ssd.calibration.certificate import CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.calibration.thresholds import FittedTemperature, Reliability
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.report.tables import (
    calibration_report,
    figure,
    markdown_table,
    text_report,
    text_table,
    write_results,
)


def table_lines(metrics: dict) -> list[str]:
    return text_table(Results.from_json(metrics)).splitlines()


def report(metrics: dict) -> str:
    return text_report(Results.from_json(metrics))


def test_figure_has_three_decimals_or_is_a_dash():
    assert (figure(0.12345), figure(0.0), figure(None)) == ("0.123", "0.000", "-")


# The table as text and as Markdown.

ROUTED_CELLS = ["routed", "-", "0.390", "0.650", "0.800", "0.500", "0.615", "0.25", "0.12", "0.210", "-", "300", "30.0"]


def test_table_has_a_row_for_each_exit_the_routed_and_the_plain_detector(metrics):
    header, line, *rows = table_lines(metrics)
    expected = "exit layer AP AP50 P R F1 FP/img FP/empty loc.err confidence MMAC ms share"
    assert " ".join(header.split()) == expected
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["exit8", "exit12", "full", "routed", "without"]
    assert [row.split()[-1] for row in rows] == ["%", "%", "%", "-", "-"]
    assert [row.split()[-2] for row in rows[:3]] == ["50.0", "25.0", "25.0"]
    assert rows[0].split()[8] == "-"  # undefined
    assert "0.61 ± 0.20" in rows[0]
    assert rows[3].split()[:13] == ROUTED_CELLS
    # the detector without exits: accuracy of the full path, cost of its own
    assert rows[4].split()[1:5] == ["exits", "-", "0.432", "0.720"]
    assert rows[4].split()[-4:] == ["-", "405", "43.0", "-"]


def test_columns_are_aligned(metrics):
    metrics["exits"][0]["mmacs"] = 123456.0
    lines = table_lines(metrics)
    assert len({len(line) for line in lines[1:5]}) == 1
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines[2:5], ["123456", "350", "480"], strict=True)]
    assert len(set(ends)) == 1


def test_markdown_table_has_the_same_cells(metrics):
    lines = markdown_table(Results.from_json(metrics)).splitlines()
    assert lines[1].startswith("| :-- | --: |")
    assert {line.count("|") for line in lines} == {15}
    assert lines[-2].startswith("| routed | - | 0.390 | 0.650 |")
    assert lines[-1].startswith("| without exits | - | 0.432 | 0.720 |")


def test_rivals_are_the_last_rows(with_rivals):
    *_, small, foreign = table_lines(with_rivals)
    assert small.split()[:5] == ["plain", "256", "-", "0.384", "0.640"]
    assert small.split()[-3:] == ["330", "33.0", "-"]
    assert foreign.split()[:4] == ["yolox_nano", "-", "0.426", "0.710"]
    assert foreign.split()[-4:] == ["-", "15.0", "ORT", "-"]


def test_report_names_the_photos_the_settings_and_the_runtimes(with_rivals):
    text = report(with_rivals)
    assert text.startswith("toy_test: 614 photos, 0 of them without an object\n")
    assert "score 0.5 and IoU 0.5; ms of one image in eager PyTorch on cpu, 1 thread(s); ORT: in ONNX Runtime," in text
    assert text_table(Results.from_json(with_rivals)) in text
    with_rivals["context"] |= {"runtime": "onnxruntime", "labelled": False}
    del with_rivals["rivals"][0]
    text = report(with_rivals)
    assert "ms of one image in ONNX Runtime on cpu, 1 thread(s)\n" in text and "ORT" not in text
    assert "without an object by the full path; nobody labelled them\nP to loc.err: agreement with" in text


@pytest.mark.parametrize(
    ("what", "vetoes", "expected"),
    [
        ("routed", [], "\n\nverdict: ship the exits\n  - accurate enough"),
        ("exit8 alone", [], "\n\nverdict: ship exit8 alone\n  - accurate enough"),
        (None, ["slow"], "ship the detector as it is\n  - veto: slow\nfound besides:\n  - accurate enough"),
    ],
)
def test_report_ends_with_the_verdict(metrics, what, vetoes, expected):
    vetoes = [{"line": line, "veto": True} for line in vetoes]
    metrics["verdict"] = {"ship": not vetoes, "what": what, "findings": [{"line": "accurate enough"}, *vetoes]}
    assert report(metrics).endswith(expected)
    if vetoes:
        metrics["verdict"]["findings"] = vetoes
        assert report(metrics).endswith("verdict: do not ship the detector as it is\n  - veto: slow")


# Calibration.


def report_of_certificate(temperatures=(), block=None, closed=False, **measured) -> list[str]:
    """Lines of the report on a certificate with a risk target."""
    shares = {"exit8": 0.25, "exit12": 0.0, "full": 0.75}
    figures = {"photos": 9, "exit_share": shares, "AP50": 0.5, "AP50_full": 0.6, "steps": 3}
    figures |= {"loss": 0.01, "loss_bound": 0.02, "cost": 3.0, "speedup": 1.5, **measured}
    risk = {"kind": "risk", "epsilon": 0.06, "bound": "betting", "delta": 0.05, "reference": "full"}
    certificate = SimpleNamespace(
        router={"policy": "entropy", "thresholds": [0.5, 2.0], "temperatures": [1.0, 1.0]},
        measured=Measured(**figures),
        target=CertifiedTarget(**risk, score=0.4, iou=0.5, block=block),
        cost_model=CertifiedCosts(unit="mmacs", exits=(2.0, 3.0, 4.0)),
        closed=closed,
    )
    return calibration_report(certificate, temperatures).splitlines()


def test_calibration_report_has_the_router_s_and_the_fitted_temperature():
    """They differ: a risk target keeps the temperatures of the training."""
    before, after = (Reliability((), (), (), error) for error in (0.2, 0.1))
    lines = report_of_certificate([FittedTemperature("exit8", 1.7, before, after)])
    assert lines[3].split() == ["exit8", "0.5000", "25.0", "%", "2.0", "1.00", "1.70", "0.200", "0.100"]
    assert lines[4].split() == ["exit12", "closed", "0.0", "%", "3.0"]
    assert lines[7] == "AP50 0.500, full path 0.600; loss per photo 0.0100 against what the full path says"


def test_calibration_report_on_unlabelled_photos_has_no_ap():
    agreement = {"objects": 22, "kept": 21, "added": 1, "same_photos": 0.9}
    unlabelled = {"AP50": None, "AP50_full": None, "labelled": False, "agreement": agreement}
    photos = {"photos": 60, "blocks": 12, "equal_photos": 3, "near_equal_photos": 0}
    lines = report_of_certificate(block=5, **unlabelled, **photos)
    assert lines[0] == "policy entropy, 60 calibration photos (3 copies left out: each photo counts once)"
    assert lines[7:] == [
        "nobody labelled these photos, so AP is not known; loss per photo 0.0100 against what the full path says",
        "agreement with the full path at score 0.4: 21 of its 22 objects kept, 1 added; the same answer for 90.0 % of "
        "the photos",
        "mean cost 3.0 mmacs: the detector without exits costs 1.50 times as many",
        "with probability 0.95 over the draw of the 12 blocks of 5 calibration photos the expected loss per block of 5 "
        "is at most 0.06 (bound 0.0200, betting)",
    ]


@pytest.mark.parametrize(("ap50", "fix"), [(0.05, "allow a larger loss, try another"), (0.049, "the full path does")])
def test_calibration_report_says_what_to_try_if_no_exit_opens(ap50, fix):
    lines = report_of_certificate(closed=True, AP50_full=ap50)
    assert lines[-1].startswith(f"no exit opens, so nothing is lost and nothing gained: {fix}")
    assert not any("with probability" in line for line in lines)


@pytest.mark.parametrize(
    ("block", "fix"),
    [(None, "at least 38 photos are needed"), (15, "at least 38 blocks are needed, from more photos or short")],
)
def test_calibration_report_says_how_many_photos_a_risk_needs(block, fix):
    lines = report_of_certificate(closed=True, AP50_full=0.6, photos_needed=38, blocks=13, block=block)
    assert lines[-1].startswith(f"no exit opens, so nothing is lost and nothing gained: {fix}")


# The files.


def test_evaluation_files_are_complete_and_stay_if_new_results_are_invalid(metrics, tmp_path):
    results, folder = Results.from_json(metrics), tmp_path / "new"
    write_results(folder, results, {"detections": Image.new("RGB", (5, 4))})
    names = {"metrics.json", "table.txt", "table.md", "ap_against_cost.png", "detections.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert text_table(results) in (folder / "table.txt").read_text(encoding="utf-8")
    assert Image.open(folder / "detections.png").size == (5, 4)
    metrics["exits"][0]["AP"] = float("nan")
    with pytest.raises(ValueError):
        write_results(folder, Results.from_json(metrics), {})
    assert json.loads((folder / "metrics.json").read_text()) == results.to_json()


def test_photos_are_written_as_comma_separated_values(metrics, tmp_path):
    rows = [
        {"file": "caf\udce9, \u043a.jpg", "exit": "exit8", "confidence": 0.5, "objects": 2, "found": 1},
        {"file": "b.jpg", "exit": "full", "confidence": None, "objects": 0, "found": 0},
    ]
    write_results(tmp_path, Results.from_json(metrics), {}, rows)
    assert (tmp_path / "photos.csv").read_text(encoding="utf-8").splitlines() == [
        "file,exit,confidence,objects,found",
        '"caf\\udce9, \u043a.jpg",exit8,0.5,2,1',
        "b.jpg,full,,0,0",
    ]

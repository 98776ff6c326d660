"""What is compared."""

from earlyexit_ssd.evaluation.runtime import runtime_of
from earlyexit_ssd.report.rows import exit_rows, static_rows, timing_title


def test_exits_and_routed(metrics):
    rows = exit_rows(metrics)
    assert [row["name"] for row in rows] == ["exit8", "exit12", "full", "routed"]
    assert [row.get("share") for row in rows] == [0.5, 0.25, 0.25, None]


def test_static_detectors(with_rivals):
    plain, small, foreign = static_rows(with_rivals)
    assert (plain["name"], plain["AP50"], plain["ms"], plain["mmacs"]) == ("without exits", 0.72, 43.0, 405.3)
    assert "layer" not in plain and "confidence" not in plain
    assert (small["other_runtime"], foreign["other_runtime"]) == (None, "ORT")


def test_metrics_of_before_the_rivals(metrics):
    assert runtime_of(metrics) == "eager"
    assert timing_title(metrics) == "eager PyTorch on cpu, 1 thread(s)"
    assert len(static_rows(metrics)) == 1

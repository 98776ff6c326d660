import copy

from earlyexit_ssd.report.placement import placement_chart, placement_report

ROW = {"layer": 8, "mmacs": 246.0, "ms": 20.0, "full_ms": 48.0, "plain_ms": 40.0, "AP50": 0.6}
PLAN = {
    "context": {"threads": 1, "runtime": "onnxruntime"},
    "speedup": 1.6,
    "plain_ms": 40.0,
    "full_AP50": 0.7,
    "placements": [{**ROW, "speedups": {"0.5": 40 / 34, "1": 2.0}, "share_for_speedup": 0.82}],
    "proposal": {"layers": [8], "AP50": 0.618, "shares": [0.82, 0.18]},
}


def changed(**changes):
    return {**copy.deepcopy(PLAN), **changes}


def test_table_and_proposal():
    lines = placement_report(PLAN).splitlines()
    assert "ms of one image in ONNX Runtime, 1 thread(s)" in lines[0]
    assert lines[3].split() == ["layer", "MMAC", "ms", "50%", "100%", "share", "for", "1.6x", "AP50"]
    assert lines[4].split() == ["8", "246", "20.0", "1.18x", "2.00x", "82%", "0.600"]
    assert lines[-2] == "1.6x can be reached by exits behind layers 8, if enough photos leave"
    assert "proposed: EXITS.LAYERS [8]: AP50 0.618 of 0.700" in lines[-1]
    assert "82% at exit8, 18% at full" in lines[-1]


def test_without_probes_it_says_how_to_get_them():
    assert "--probe-epochs 3" in placement_report(changed(full_AP50=None, proposal=None))


def test_out_of_reach():
    plan = changed(speedup=3.0, proposal=None)
    plan["placements"][0]["share_for_speedup"] = None
    report = placement_report(plan)
    assert "never" in report
    assert "no exit can reach 3x" in report


def test_chart_has_its_size():
    assert placement_chart(PLAN).size == (960, 640)

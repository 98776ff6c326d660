"""The chart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from PIL import ImageColor

from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.report.charts import (
    PLAIN,
    ROUTED,
    STYLES,
    accuracy_against_cost,
    accuracy_against_time,
    placement_chart,
    placement_report,
    training_curves,
)


def has(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1).any()


def test_size_and_points(metrics):
    picture = accuracy_against_time(Results.from_json(metrics))
    assert picture.size == (960, 640)
    assert has(picture, ROUTED)
    assert has(picture, PLAIN)


def test_undefined_points_are_left_out(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = row["AP50_interval"] = None
    assert not has(accuracy_against_time(Results.from_json(metrics)), ROUTED)


def test_interval_beside_its_value(metrics):
    metrics["routed"]["AP50_interval"] = [0.7, 0.8]  # a percentile interval may miss the value
    accuracy_against_time(Results.from_json(metrics))


def test_curves_of_a_training():
    baseline = [{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "AP/full": 0.1, "AP50/full": 0.2}]
    line = {"AP50/exit8": 0.1, "AP50/full": 0.2, "share/exit8": 0.25, "share/full": 0.75, "temperature/exit8": 1.5}
    exits = [{"epoch": 1.0, **line}, {"epoch": 2.0, **line, "AP50/exit8": None}]
    one, all_three = (training_curves(phases) for phases in ({"baseline": baseline}, {"exits": exits}))
    assert one.height < all_three.height  # AP50 alone; AP50, shares and temperatures
    both = training_curves({"baseline": baseline, "exits": exits, "joint": []})
    assert has(both, PLAIN)
    assert training_curves({"baseline": baseline[:1], "exits": []}) is None


@pytest.mark.parametrize("name", ["caf\udce9.onnx", "cost $5, $x_{$.onnx"])
def test_any_name_can_be_drawn(with_rivals, name):
    with_rivals["context"]["splits"] = [name]
    with_rivals["rivals"][0]["name"] = name
    assert has(accuracy_against_time(Results.from_json(with_rivals)), ROUTED)
    assert accuracy_against_cost(Results.from_json(with_rivals)).width > 0


# The chart of exits and rivals.


def pixels(picture, color):
    return (np.asarray(picture) == ImageColor.getrgb(color)).all(axis=-1)


def test_size_and_points_beside_rivals(with_rivals):
    picture = accuracy_against_cost(Results.from_json(with_rivals))
    assert picture.size == (1664, 1152)
    routed, foreign = pixels(picture, ROUTED), pixels(picture, STYLES["onnx"][0])
    half = picture.width // 2
    assert routed[:, :half].any() and routed[:, half:].any()
    assert foreign[:, :half].any() and not foreign[:, half:].any()  # its MMACs are unknown


def test_older_metrics_and_undefined_points(metrics):
    for row in (*metrics["exits"], metrics["routed"]):
        row["AP50"] = None
    picture = accuracy_against_cost(Results.from_json(metrics))
    assert pixels(picture, ROUTED)[: picture.height // 2].any()
    assert not pixels(picture, ROUTED)[picture.height // 2 :].any()


# The placement advisor's table and chart.

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

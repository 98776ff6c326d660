"""What a search ships, and its words."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from earlyexit_ssd.config import load_config
from earlyexit_ssd.deploy.benchmark import Ratio
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, describe_exits
from earlyexit_ssd.pipeline import optimize
from earlyexit_ssd.pipeline.int8 import Int8Figures, Kept
from earlyexit_ssd.pipeline.optimize import (
    OWN_HEAD,
    Candidate,
    Goal,
    Optimizer,
    _in_8_bits,
    _summary,
    _warn_if_busy,
    choose_candidate,
)


def candidate(name, speedup, lost, holds, ms=None):
    return Candidate(name, 320, "as it is", lost=lost, holds=holds, ms=ms or 10 / speedup, speedup=speedup)


BASE = candidate("base", 1.0, 0.0, True)
SAFE = candidate("safe", 1.5, 0.002, True)
FAST = candidate("fast", 2.0, 0.009, True)
BOLD = candidate("bold", 3.0, 0.03, False)
SLOW = candidate("slow", 0.9, 0.0, True)


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal(), FAST),  # the fastest that holds the budget
        (Goal(speedup=1.2), FAST),
        (Goal(speedup=2.5), BOLD),  # none that holds is so fast: the least loss among those that are
        (Goal(ms=4.0), BOLD),
        (Goal(speedup=9.0), FAST),  # nothing is so fast
    ],
)
def test_the_fastest_that_holds_the_budget_is_chosen(goal, expected):
    assert choose_candidate([BASE, SLOW, SAFE, FAST, BOLD], goal) == expected


def test_nothing_is_chosen_where_nothing_is_faster():
    assert choose_candidate([BASE, SLOW, candidate("undefined", 2.0, None, False)], Goal()) is None
    assert choose_candidate([BASE, BOLD], Goal()) is None


def test_a_candidate_whose_exits_stay_closed_is_not_chosen():
    closed = dataclasses.replace(candidate("closed", 2.5, 0.0, True), exits=("glance128",), thresholds=(2.0,))
    assert choose_candidate([BASE, SAFE, closed], Goal()) == SAFE
    opened = dataclasses.replace(closed, thresholds=(0.9,))
    assert choose_candidate([BASE, SAFE, opened], Goal()) == opened


def net(size, fold, exits=(), **training):
    return Candidate("", size, fold, exits, **training)


def search_of(exits):
    """A search over a detector with these exits, of 320 pixels and with one glance."""
    search = Optimizer.__new__(Optimizer)
    search.architecture = Architecture(("chair",), image_size=320, exits=exits)
    search.cfg = load_config(overrides=["EXITS.GLANCES", "[[128, 12]]"])
    search.model, search.goal = SimpleNamespace(last_layer=16), Goal(ap_drop=0.01)
    return search


@pytest.mark.parametrize(
    ("measured", "candidate", "skipped"),
    [
        (("compact", 0.03, False), net(288, "compact", ("glance128",)), True),  # hopeless without exits
        (("compact", 0.03, False), net(256, "compact", ("glance128",)), False),  # another net
        (("compact", 0.03, False), net(288, "compact"), False),  # without exits
        (("compact", 0.005, True), net(288, "as it is", ("glance128",)), True),  # the compact head holds the budget
        (("compact", 0.005, True), net(288, "as it is", ("exit8",)), False),  # branches are tried all the same
        (("as it is", 0.005, True), net(288, "as it is", ("glance128",)), False),
    ],
)
def test_exits_are_not_tried_where_they_cannot_help(measured, candidate, skipped):
    fold, lost, holds = measured
    measured = [Candidate("one", 288, fold, lost=lost, holds=holds)]
    assert search_of(describe_exits((8,))).skips(candidate, measured) is skipped


def test_a_detector_with_branches_has_them_at_all_sizes_and_no_empty_exits():
    search = search_of(describe_exits((8,)))

    def names(net):
        return [(one.layer, one.pixels, one.empty) for one in search.exits_of(net)]

    glance, branch = (12, 128, True), (8, None, False)
    assert names(net(320, OWN_HEAD)) == names(net(256, OWN_HEAD)) == [glance, branch]
    assert names(net(256, "compact")) == names(net(256, OWN_HEAD, fine_tuned=True)) == [glance]
    search = search_of(describe_exits((10,), empty=(10,)))
    assert names(net(320, OWN_HEAD)) == names(net(256, "compact")) == [glance, (10, None, True)]
    search = search_of(())
    assert names(net(320, OWN_HEAD)) == names(net(256, "compact")) == [glance, (12, None, True)]


@pytest.mark.parametrize(("load", "warned"), [(2.5, True), (1.5, False)])
def test_a_busy_machine_is_said(monkeypatch, caplog, load, warned):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    _warn_if_busy()
    assert ("the machine is busy (load 2.5 on 2 cores)" in caplog.text) is warned


def test_candidates_in_words():
    assert net(320, "as it is").describe((), 320) == "the detector as it is"
    words = net(256, "compact", ("glance96", "exit8"), fine_tuned=True)
    assert words.describe(("glance96", "exit8"), 320) == "256 px, compact head, fine-tuned, glance at 96 px, exit8"
    assert words.describe((), 320) == "256 px, compact head, fine-tuned (glance96, exit8 closed)"
    assert words.key == "256 compact fine-tuned glance96 exit8" and words.net == net(256, "compact", fine_tuned=True)
    found = Candidate("x", 256, "compact", lost=0.0061, objects=22, objects_kept=21, ms=5.0, speedup=2.8)
    assert str(found) == "x: 2.80 times as fast, 0.006 AP50 lost, 21 of 22 objects kept"
    assert Candidate.from_json(found.to_json()) == found or found.exits == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ap_drop": 2.0}, r"ap_drop is 2, expected a number in \[0, 1\]"),
        ({"coco_ap_drop": -0.1}, r"coco_ap_drop is -0.1, expected a number in \[0, 1\]"),
        ({"speedup": 0.0}, "speedup is 0, expected a number above 0"),
        ({"minutes": -1.0}, "minutes is -1, expected a number above 0"),
    ],
)
def test_an_impossible_goal_is_one_line(values, message):
    with pytest.raises(EarlyExitError, match=message):
        Goal(**values)


def test_a_detector_that_does_not_detect_is_not_shipped():
    figures = optimize.TestFigures(
        ["val"], 9, 0.0, 0.0, 0.01, 0.01, None, 0, 0, 5.0, 9.0, 5.0, 9.0, [8.0, 10.0], "eager", 1
    )
    assert not figures.base_detects
    assert "your detector itself does not detect (AP50 0.010)" in _summary(FAST, figures, False, Goal())
    assert dataclasses.replace(figures, AP50_base=0.2).base_detects


def test_8_bits_are_a_candidate_unless_they_are_refused(tmp_path, monkeypatch, caplog):
    sets = {"CALIB": "calib", "TRAIN": SimpleNamespace(records=[SimpleNamespace(path="train.jpg")])}
    search = SimpleNamespace(goal=Goal(ap_drop=0.02, delta=0.1), out=tmp_path, sets=sets, reference="base")

    def quantised(*arguments):
        assert arguments == ("model", tmp_path / "detector.xml", "openvino", "calib", 0.02, ["train.jpg"], "base", 0.1)
        speed = Ratio(1.25, 1.2, 1.3)
        return Int8Figures(
            tmp_path, 1, Kept(3, False), 9, True, (0.5, 0.4), (0.7, 0.69), 0.015, 0.1, 20, 19, speed, "openvino"
        )

    monkeypatch.setattr(optimize, "open_any", lambda path: "model")
    monkeypatch.setattr(optimize, "export_int8", quantised)
    found = _in_8_bits(search, FAST)
    assert (found.name, found.AP50, found.lost_bound, found.objects_kept) == ("fast, 8 bits", 0.69, 0.015, 19)
    assert found.lost == pytest.approx(0.01) and found.ms == pytest.approx(4.0) and found.speedup == pytest.approx(2.5)

    def refused(*arguments):
        raise EarlyExitError("8 bits are refused")

    monkeypatch.setattr(optimize, "export_int8", refused)
    caplog.set_level("INFO")
    assert _in_8_bits(search, FAST) is None and "no candidate in 8 bits: 8 bits are refused" in caplog.text
    limited = SimpleNamespace(**{**vars(search), "goal": Goal(coco_ap_drop=0.01)})
    assert _in_8_bits(limited, FAST) is None and "8 bits are not checked for it" in caplog.text

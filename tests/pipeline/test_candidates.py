"""Which candidates are tried, what they are called, and which one is chosen."""

import dataclasses
import json

import pytest

from earlyexit_ssd.calibration.thresholds import MOST_EXITS
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, describe_exits
from earlyexit_ssd.pipeline.calibrate import CalibrationTarget
from earlyexit_ssd.pipeline.candidates import OWN_HEAD, Candidate, Goal, Plan, choose_candidate


def candidate(name, speedup, lost, holds, ms=None):
    return Candidate(name, 320, "as it is", lost=lost, holds=holds, ms=ms or 10 / speedup, speedup=speedup)


BASE = candidate("base", 1.0, 0.0, True)
SAFE = candidate("safe", 1.5, 0.002, True)
FAST = candidate("fast", 2.0, 0.009, True)
BOLD = candidate("bold", 3.0, 0.03, False)
SLOW = candidate("slow", 0.9, 0.0, True)


UNDEFINED = candidate("undefined", 2.0, None, False)


@pytest.mark.parametrize(
    ("measured", "goal", "expected"),
    [
        ([SLOW, SAFE, FAST, BOLD], Goal(), FAST),  # the fastest that holds the budget
        ([SLOW, SAFE, FAST, BOLD], Goal(speedup=1.2), FAST),
        ([SLOW, SAFE, FAST, BOLD], Goal(speedup=2.5), BOLD),  # none that holds is so fast: the least loss
        ([SLOW, SAFE, FAST, BOLD], Goal(ms=4.0), BOLD),
        ([SLOW, SAFE, FAST, BOLD], Goal(speedup=9.0), FAST),  # nothing is so fast
        ([SLOW, UNDEFINED, BOLD], Goal(), None),
    ],
)
def test_the_fastest_candidate_within_the_budget_is_chosen(measured, goal, expected):
    assert choose_candidate([BASE, *measured], goal) == expected


def test_a_candidate_whose_exits_stay_closed_is_not_chosen():
    closed = dataclasses.replace(candidate("closed", 2.5, 0.0, True), exits=("glance128",), thresholds=(2.0,))
    assert choose_candidate([BASE, SAFE, closed], Goal()) == SAFE
    opened = dataclasses.replace(closed, thresholds=(0.9,))
    assert choose_candidate([BASE, SAFE, opened], Goal()) == opened


def test_the_target_is_the_budget_if_the_base_detector_is_fast_enough():
    assert Goal(ms=4.0).target(base_ms=8.0) == CalibrationTarget("speedup", 2.0)
    for goal, base_ms in ((Goal(ms=8.0), 8.0), (Goal(speedup=0.9), 8.0), (Goal(), 8.0)):
        assert goal.target(base_ms) == goal.budget


def net(size, fold, exits=(), **training):
    return Candidate("", size, fold, exits, **training)


def plan_of(exits):
    """The plan for a detector with these exits, of 320 pixels and with one glance."""
    cfg = load_config(overrides=["EXITS.GLANCES", "[[128, 12]]"])
    return Plan(cfg, Goal(ap_drop=0.01), Architecture(("chair",), image_size=320, exits=exits))


@pytest.mark.parametrize(
    ("measured", "candidate", "skipped"),
    [
        (("compact", 0.03, False), net(288, "compact", ("glance128",)), True),  # hopeless without exits
        (("compact", 0.03, False), net(256, "compact", ("glance128",)), False),  # another net
        (("compact", 0.03, False), net(288, "compact"), False),  # without exits
        (("compact", 0.005, True), net(288, "as it is", ("glance128",)), True),  # the compact head holds the budget
        (("compact", 0.005, True), net(288, "as it is", ("exit8",)), False),  # branches are tried all the same
        (("as it is", 0.005, True), net(288, "as it is", ("glance128",)), False),
        (("cut", 0.005, True), net(288, "compact", ("glance128",)), True),  # the cut head holds the budget
        (("cut", 0.005, True), net(288, "compact"), False),
        (("cut", 0.005, True), net(288, "compact", ("glance128",), fine_tuned=True), False),  # other weights
        (("compact", 0.005, True), net(288, "cut", ("glance128",)), False),  # a cut head has fewer outputs
    ],
)
def test_exits_are_not_tried_where_they_cannot_help(measured, candidate, skipped):
    fold, lost, holds = measured
    measured = [Candidate("one", 288, fold, lost=lost, holds=holds)]
    assert plan_of(describe_exits((8,))).skips(candidate, measured) is skipped


@pytest.mark.parametrize(("size", "holds", "skipped"), [(320, False, True), (320, True, False), (288, False, False)])
def test_a_cut_head_is_tried_further_if_it_holds_the_budget_at_the_own_size(size, holds, skipped):
    measured = [Candidate("cut", size, "cut", lost=0.005, holds=holds)]
    for candidate in (net(256, "cut"), net(256, "cut", ("glance128",))):
        assert plan_of(()).skips(candidate, measured) is skipped
    assert not plan_of(()).skips(net(256, "compact"), measured)


def test_the_smallest_size_is_tried_if_the_next_size_holds_the_budget():
    plan = plan_of(())
    assert plan.sizes() == [320, 288, 256, 224, 192]
    for holds in (True, False):
        measured = [Candidate("larger", 224, "compact", lost=0.005, holds=holds)]
        for candidate in (net(192, "compact"), net(192, "compact", ("glance128",))):
            assert plan.skips(candidate, measured) is not holds
        assert plan.skips(net(192, OWN_HEAD), measured)  # another head
        assert not plan.skips(net(192, "compact", fine_tuned=True), measured)
    assert plan.skips(net(192, "compact"), [])
    chosen = load_config(overrides=["EVAL.RIVALS.SIZES", "[256, 192]"])
    assert not dataclasses.replace(plan, cfg=chosen).skips(net(192, "compact"), measured)


@pytest.mark.parametrize(
    ("exits", "threshold", "skipped"),
    [(("glance128", "exit12"), CLOSED, True), (("glance128", "exit12"), 0.9, False), (("exit12",), CLOSED, False)],
)
def test_no_exits_are_tried_behind_one_that_stayed_closed(exits, threshold, skipped):
    alone = dataclasses.replace(net(288, "compact", ("glance128",)), thresholds=(threshold,))
    plan = plan_of(())
    assert plan.skips(net(288, "compact", exits), [alone]) is skipped
    plan = dataclasses.replace(plan, goal=Goal(speedup=2.0))  # two exits may reach what one cannot
    assert not plan.skips(net(288, "compact", exits), [alone])


def test_a_detector_with_branches_has_them_at_all_sizes_and_no_empty_exits():
    plan = plan_of(describe_exits((8,)))

    def names(net):
        return [(exit_.layer, exit_.pixels, exit_.empty) for exit_ in plan.exits_of(net)]

    glance, branch = (12, 128, True), (8, None, False)
    assert names(net(320, OWN_HEAD)) == names(net(256, OWN_HEAD)) == [glance, branch]
    assert names(net(256, "compact")) == names(net(256, OWN_HEAD, fine_tuned=True)) == [glance]
    plan = plan_of(describe_exits((10,), empty=(10,)))
    assert names(net(320, OWN_HEAD)) == names(net(256, "compact")) == [glance, (10, None, True)]
    plan = plan_of(())
    assert names(net(320, OWN_HEAD)) == names(net(256, "compact")) == [glance, (12, None, True)]


def test_sets_of_exits_are_small_enough_for_a_search_of_thresholds():
    plan = plan_of(describe_exits((4, 6, 8, 10, 12)))
    assert max(len(candidate.exits) for candidate in plan.candidates(with_empty_exits=True)) == MOST_EXITS


def test_nets_without_exits_are_tried_first():
    plan = Plan(load_config(), Goal(train=True), Architecture(("chair",), exits=())).candidates(with_empty_exits=True)
    have_exits = [bool(candidate.exits) for candidate in plan]
    assert have_exits == sorted(have_exits)
    assert not plan[0].fine_tuned and {plain.fine_tuned for plain in plan if not plain.exits} == {False, True}


@pytest.mark.parametrize(("size", "pixels"), [(320, [128, 160, 192]), (112, [48, 64]), (64, [32])])
def test_glances_of_small_inputs_are_tried_once(size, pixels):
    plan = Plan(load_config(), Goal(), Architecture(("chair",), image_size=size, exits=()))
    assert min(plan.sizes()) >= 64
    exits = plan.exits_of(net(size, OWN_HEAD))
    assert [exit_.pixels for exit_ in exits] == [*pixels, None]


def test_names_and_json_of_candidates():
    assert net(320, "as it is").describe((), 320) == "the detector as it is"
    words = net(256, "compact", ("glance96", "exit8"), fine_tuned=True)
    assert words.describe(("glance96", "exit8"), 320) == "256 px, compact head, fine-tuned, glance at 96 px, exit8"
    assert words.describe((), 320) == "256 px, compact head, fine-tuned (glance96, exit8 closed)"
    assert words.key == "256 compact fine-tuned glance96 exit8" and words.net == net(256, "compact", fine_tuned=True)
    found = Candidate("x", 256, "compact", lost=0.0061, objects=22, objects_kept=21, ms=5.0, speedup=2.8)
    assert str(found) == "x: 2.80 times as fast, 0.006 AP50 lost, 21 of 22 objects kept"
    for each in (found, words):
        assert Candidate.from_json(json.loads(json.dumps(each.to_json()))) == each  # lists become tuples again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ap_drop": 2.0}, r"ap_drop is 2, expected a number in \[0, 1\]"),
        ({"coco_ap_drop": -0.1}, r"coco_ap_drop is -0.1, expected a number in \[0, 1\]"),
        ({"speedup": 0.0}, "speedup is 0, expected a finite number above 0"),
        ({"speedup": float("inf")}, "speedup is inf, expected a finite number above 0"),
        ({"minutes": -1.0}, "minutes is -1, expected a finite number above 0"),
    ],
)
def test_a_goal_out_of_range_is_an_error(values, message):
    with pytest.raises(EarlyExitError, match=message):
        Goal(**values)

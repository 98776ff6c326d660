"""Each rule of the verdict."""

import copy

import pytest

from earlyexit_ssd.evaluation.verdict import RULES, Finding, judge

GOOD = {
    "exits": [
        {"name": "exit8", "AP50": 0.55, "ms": 20.0, "AP50_below_full_interval": [0.1, 0.2]},
        {"name": "exit12", "AP50": 0.66, "ms": 30.0, "AP50_below_full_interval": [0.02, 0.1]},
        {"name": "full", "AP50": 0.72, "ms": 45.0},
    ],
    "without_exits": {"ms": 40.0, "ms_interval": [38.0, 42.0]},
    "routed": {
        "AP50": 0.70,
        "exit_share": {"exit8": 0.5, "exit12": 0.2, "full": 0.3},
        "ms": 29.5,
        "speedup": 40 / 29.5,
    },
}

ALL_STAY = {"exit8_empty": True, "exit12_empty": True, "routed_exit_share": {"exit8": 0, "exit12": 0, "full": 1.0}}


def changed(**changes):
    """GOOD with ``exit8_AP50=0.2``-like changes of exits, or of ``routed``."""
    metrics = copy.deepcopy(GOOD)
    for key, value in changes.items():
        where, name = key.split("_", 1)
        row = metrics["routed"] if where == "routed" else next(e for e in metrics["exits"] if e["name"] == where)
        row[name] = value
    return metrics


def test_good_exits_ship():
    verdict = judge(GOOD)
    assert verdict.ship
    assert verdict.lines == [
        "exit8: AP50 0.550 is above 0.35: worth it",
        "routing is faster (29.5 ms routed against 40.0 ms without exits, 1.36x)",
        "routing keeps the accuracy (AP50 0.700 routed against 0.720)",
        "no static net was evaluated beside it (EVAL.RIVALS): a smaller one may be the better choice",
    ]


@pytest.mark.parametrize(
    ("changes", "words", "ships"),
    [
        ({"exit8_AP50": 0.299}, "move it deeper", False),
        ({"exit8_AP50": 0.30}, "borderline", True),
        ({"exit8_AP50": 0.35}, "borderline", True),
        ({"exit8_AP50": 0.351}, "worth it", True),
        ({"exit8_AP50": None}, "undefined", False),
        (
            {"exit12_AP50": 0.726, "exit12_AP50_below_full_interval": None},
            "exit12: AP50 0.726 is above full's 0.720: something is wrong",
            False,
        ),
        (
            {"exit8_AP50": 0.9, "exit8_AP50_below_full_interval": [-0.3, -0.1]},
            "exit8: AP50 0.900 is above full's 0.720: something is wrong",
            False,
        ),
        (
            {"routed_exit_share": {"exit8": 0.0, "exit12": 0.0, "full": 1.0}},
            "at full: routing collapsed",
            False,
        ),
        (
            {"routed_exit_share": {"exit8": 1.0, "exit12": 0.0, "full": 0.0}},
            "at exit8: routing collapsed",
            False,
        ),
        ({"exit8_empty": True, "exit8_AP50": 0.0}, "exit12: AP50 0.660 is above 0.35: worth it", True),
        ({"exit8_empty": True, "exit12_empty": True}, "the early exits are empty", True),
        (ALL_STAY, "tools/calibrate.py fit a policy that foresees", False),
        ({**ALL_STAY, "routed_policy": "learned_gain"}, "collapsed; change the thresholds (ROUTING.THRESHOLDS)", False),
        ({"routed_AP50": 0.649}, "routing keeps the accuracy", True),
        ({"routed_AP50": 0.64}, "routing loses 11% of the full path's AP50 (AP50 0.640 routed against 0.720)", False),
        ({"routed_speedup": 1.0, "routed_ms": 40.0}, "do not ship exits", False),
        ({"routed_speedup": 40 / 38, "routed_ms": 38.0}, "no clear speed gain", False),
        ({"routed_speedup": 40 / 37.9, "routed_ms": 37.9}, "routing is faster", True),
        ({"routed_speedup": 0.9, "routed_ms": 44.0}, "do not ship exits", False),
        ({"exit12_ms": 40.0}, "exit12: 40.0 ms, no less than the 40.0 ms without exits", True),
    ],
)
def test_rules(changes, words, ships):
    verdict = judge(changed(**changes))
    assert any(words in line for line in verdict.lines)
    assert verdict.ship is ships


@pytest.mark.parametrize("ap50", [0.72, 0.7249])
def test_a_tie_with_the_full_path_is_no_mistake(ap50):
    verdict = judge(changed(exit12_AP50=ap50))
    assert verdict.ship
    assert not any("something is wrong" in line for line in verdict.lines)


@pytest.mark.parametrize(("interval", "noisy"), [([-0.1, 0.05], True), ([-0.1, -0.02], False), (None, False)])
def test_what_may_be_chance_is_no_veto(interval, noisy):
    verdict = judge(changed(exit12_AP50=0.75, exit12_AP50_below_full_interval=interval))
    assert verdict.ship is noisy
    line = next(line for line in verdict.lines if line.startswith("exit12: AP50 0.750 is above full's 0.720"))
    assert ("not clearly" in line) is noisy and ("something is wrong" in line) is not noisy


def test_undefined_full_path_does_not_crash():
    assert not judge(changed(exit8_AP50=None, exit12_AP50=None, full_AP50=None, routed_speedup=None)).ship


def test_force_is_said_first_and_changes_nothing_else():
    verdict = judge(GOOD, forced=True)
    assert "--force" in verdict.lines[0]
    assert verdict.lines[1:] == judge(GOOD).lines
    assert verdict.ship


def test_without_early_exits_nothing_ships():
    metrics = copy.deepcopy(GOOD)
    metrics["exits"] = metrics["exits"][-1:]
    metrics["routed"]["exit_share"] = {"full": 1.0}
    verdict = judge(metrics)
    assert not verdict.ship
    assert not any("collapsed" in line for line in verdict.lines)


def test_a_rule_can_be_added():
    def rival(metrics):
        return [Finding("a smaller detector is as good and faster", blocks=True)]

    verdict = judge(GOOD, rules=(*RULES, rival))
    assert verdict.lines[-1] == "a smaller detector is as good and faster"
    assert not verdict.ship


def rival(name, ap50, ms, difference=(-0.02, 0.02), runtime="eager"):
    """``difference``: the interval of routed - rival; the milliseconds are known to 1."""
    return {
        "name": name,
        "AP50": ap50,
        "ms": ms,
        "ms_interval": [ms - 1, ms + 1],
        "routed_minus_rival_AP50_interval": difference,
        "runtime": runtime,
    }


def with_rivals(*rivals, **context):
    return {**GOOD, "rivals": list(rivals), "context": context}


SMALLER, LARGER = rival("plain 192", 0.60, 15.0), rival("plain 256", 0.71, 35.0)


@pytest.mark.parametrize(
    ("one", "ships"),
    [
        (rival("net", 0.70, 28.4), False),  # as good, and the time is outside its interval
        (rival("net", 0.6951, 28.4), False),  # half a point is a tie
        (rival("net", 0.6949, 28.4), True),
        (rival("net", 0.70, 28.5), True),  # as good, and faster by no more than the interval
        (rival("net", 0.75, 29.5, (-0.09, -0.01)), False),  # clearly better, and as fast
        (rival("net", 0.75, 29.5, (-0.09, 0.0)), True),
        (rival("net", 0.75, 29.5, None), True),
        (rival("net", 0.69, 10.0), True),  # less accurate, however fast
        (rival("net", 0.75, 29.6, (-0.09, -0.01)), True),  # slower, however accurate
        (rival("net", None, 10.0), True),
    ],
)
def test_a_static_net_that_dominates_is_to_be_shipped(one, ships):
    verdict = judge(with_rivals(SMALLER, one, LARGER))
    assert verdict.ship is ships
    line = "ship the small net: net has AP50"
    assert any(line in found for found in verdict.lines) is not ships


def test_the_best_static_net_is_named_with_its_figures():
    rivals = [rival("fast", 0.71, 10.0), rival("slow", 0.74, 25.0), rival("best", 0.74, 20.0), SMALLER]
    assert judge(with_rivals(*rivals)).lines[-1] == (
        "ship the small net: best has AP50 0.740 against 0.700 routed, in 20.0 ms against 29.5 (+0.040 AP50, -32% time)"
    )


def test_of_equally_good_static_nets_the_fastest_is_named():
    """Half a point of AP50 is what photos cannot tell; it must not decide which net to ship."""
    rivals = [rival("accurate", 0.74, 28.0), rival("as good", 0.736, 15.0), rival("worse", 0.734, 10.0)]
    assert judge(with_rivals(*rivals)).lines[-1].startswith("ship the small net: as good has AP50 0.736")


def test_otherwise_the_nearest_is_named():
    # plain 192 lacks a seventh of the accuracy; plain 256 takes a fifth longer; "close" lacks 1 % and 1 %
    verdict = judge(with_rivals(SMALLER, LARGER, rival("close", 0.693, 29.8)))
    assert verdict.ship
    assert verdict.lines[-1] == (
        "no static net is better than routing; the nearest: close has AP50 0.693 against 0.700 routed, in 29.8 ms"
        " against 29.5 (-0.007 AP50, +1% time)"
    )


def test_milliseconds_of_two_runtimes_are_not_compared():
    foreign = rival("yolox", 0.9, 5.0, (-0.3, -0.1), runtime="onnxruntime")
    verdict = judge(with_rivals(SMALLER, foreign))
    assert verdict.ship
    assert "the nearest: plain 192" in verdict.lines[-2]
    assert verdict.lines[-1] == (
        "yolox: timed in ONNX Runtime, the exits in eager PyTorch, so their ms are not compared;"
        " set EVAL.RUNTIME to onnxruntime"
    )
    assert judge(with_rivals(foreign)).lines[:-1] == judge(GOOD).lines[:-1]  # rivals there were
    assert not judge(with_rivals(foreign, runtime="onnxruntime")).ship


def test_without_rivals_nothing_changes():
    assert judge(with_rivals()) == judge(GOOD)


@pytest.mark.parametrize(
    ("one", "named"),
    [
        (rival("yolox", 0.726, 38.0), True),  # the detector without exits has 0.72 in 40 ms
        (rival("yolox", 0.725, 38.0), False),  # half a point is a tie
        (rival("yolox", 0.80, 39.0), False),  # as fast within its interval
        (rival("yolox", 0.80, 30.0, runtime="onnxruntime"), False),
        (rival("yolox", None, 30.0), False),
    ],
)
def test_a_rival_of_the_detector_without_exits_is_named(one, named):
    verdict = judge(with_rivals(SMALLER, one))
    figures = "AP50 0.726 against 0.720, in 38.0 ms against 40.0"
    line = f"yolox has more AP50 than the detector without exits, in less time ({figures})"
    assert any(line in found for found in verdict.lines) is named
    assert verdict.ship


def test_rivals_of_a_routed_detector_that_finds_nothing():
    metrics = changed(routed_AP50=0.0)
    assert not judge({**metrics, "rivals": [rival("net", 0.0, 20.0)]}).ship

"""Each rule of the verdict."""

import copy

import pytest

from earlyexit_ssd.evaluation import verdict as rules
from earlyexit_ssd.evaluation.results import Finding, Results
from earlyexit_ssd.evaluation.verdict import RULES


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


SMALLER, LARGER = rival("plain 192", 0.60, 15.0), rival("plain 256", 0.71, 35.0)
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
    "rivals": [SMALLER],
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


def judge(metrics, forced=False):
    context = {"forced": forced, **metrics.get("context", {})}
    return rules.judge(Results.from_json({**metrics, "context": context}))


def vetoes(verdict):
    return [finding.line for finding in verdict.findings if finding.veto]


def test_good_exits_ship():
    verdict = judge(GOOD)
    assert (verdict.ship, verdict.what) == (True, "routed")
    assert verdict.lines == [
        "exit8: AP50 0.550 is above 0.35: accurate enough",
        "routing is faster (29.5 ms routed against 40.0 ms without exits, 1.36x)",
        "routing keeps the accuracy (AP50 0.700 routed against 0.720)",
        "no other detector that was measured is as accurate in as little time; the nearest: "
        "plain 192 has AP50 0.600 against 0.700 routed, in 15.0 ms"
        " against 29.5 (-0.100 AP50, -49% time)",
    ]
    assert not any(finding.veto for finding in verdict.findings)


@pytest.mark.parametrize(
    ("changes", "words", "ships"),
    [
        ({"exit8_AP50": 0.299}, "move it deeper", False),
        ({"exit12_AP50": 0.611}, "exit12: AP50 0.611 is 84.9% of the full path's 0.720, under 85%", False),
        ({"exit12_AP50": 0.613}, "accurate enough", True),
        ({"exit8_AP50": 0.30}, "borderline", True),
        ({"exit8_AP50": 0.35}, "borderline", True),
        ({"exit8_AP50": 0.351}, "accurate enough", True),
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
            "no photo leaves early; every one takes the full path",
            False,
        ),
        (
            {"routed_exit_share": {"exit8": 1.0, "exit12": 0.0, "full": 0.0}, "routed_AP50": 0.55},
            "at exit8, which is not good enough alone",
            False,
        ),
        ({"exit8_empty": True, "exit8_AP50": 0.0}, "exit12: AP50 0.660 is above 0.35: accurate enough", True),
        ({"exit8_empty": True, "exit12_empty": True}, "the early exits are empty", True),
        (ALL_STAY, "tools/calibrate.py fit a policy that predicts", False),
        ({**ALL_STAY, "routed_policy": "learned_gain"}, "full path: change the thresholds (ROUTING.THRESHOLDS)", False),
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


def test_force_is_said_first_and_is_a_veto():
    verdict = judge(GOOD, forced=True)
    assert verdict.findings[0].veto and "--force" in verdict.lines[0]
    assert verdict.findings[1:-1] == judge(GOOD).findings
    assert verdict.lines[-1] == "until this is fixed, use the detector without exits (AP50 0.720, 40.0 ms)"
    assert (verdict.ship, verdict.what) == (False, None)


def test_a_detector_without_exits_is_held_against_rivals_alone():
    metrics = copy.deepcopy(GOOD)
    metrics["exits"] = metrics["exits"][-1:]
    metrics["routed"]["exit_share"] = {"full": 1.0}
    verdict = judge(metrics)
    assert (verdict.ship, verdict.what) == (True, "full alone")
    assert verdict.lines[0] == "the model has no early exit: every photo takes its full path"
    assert not any("not good enough" in line or "leaves early" in line for line in verdict.lines)
    metrics["rivals"] = []
    assert not judge(metrics).ship


def test_a_rule_can_be_added(monkeypatch):
    def rival(metrics):
        return [Finding("a smaller detector is as good and faster", veto=True)]

    monkeypatch.setattr(rules, "RULES", (*RULES, rival))
    verdict = judge(GOOD)
    assert verdict.lines[-2] == "a smaller detector is as good and faster"
    assert not verdict.ship


def with_rivals(*rivals, **context):
    return {**GOOD, "rivals": list(rivals), "context": context}


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
def test_a_rival_that_dominates_is_to_be_shipped(one, ships):
    verdict = judge(with_rivals(SMALLER, one, LARGER))
    assert verdict.ship is ships
    line = "ship instead: net has AP50"
    assert any(line in found for found in verdict.lines) is not ships


def test_the_best_rival_is_named_with_its_figures():
    rivals = [rival("fast", 0.71, 10.0), rival("slow", 0.74, 25.0), rival("best", 0.74, 20.0), SMALLER]
    assert judge(with_rivals(*rivals)).lines[-1] == (
        "ship instead: best has AP50 0.740 against 0.700 routed, in 20.0 ms against 29.5 (+0.040 AP50, -32% time)"
    )


def test_of_equally_good_rivals_the_fastest_is_named():
    """Half a point of AP50 is what photos cannot tell; it must not decide which rival to ship."""
    rivals = [rival("accurate", 0.74, 28.0), rival("as good", 0.736, 15.0), rival("worse", 0.734, 10.0)]
    assert judge(with_rivals(*rivals)).lines[-1].startswith("ship instead: as good has AP50 0.736")


def test_otherwise_the_nearest_is_named():
    # plain 192 lacks a seventh of the accuracy; plain 256 takes a fifth longer; "close" lacks 1 % and 1 %
    verdict = judge(with_rivals(SMALLER, LARGER, rival("close", 0.693, 29.8)))
    assert verdict.ship
    assert verdict.lines[-1] == (
        "no other detector that was measured is as accurate in as little time; the nearest: "
        "close has AP50 0.693 against 0.700 routed, in 29.8 ms"
        " against 29.5 (-0.007 AP50, +1% time)"
    )


def test_milliseconds_of_two_runtimes_are_not_compared():
    foreign = rival("yolox", 0.9, 5.0, (-0.3, -0.1), runtime="onnxruntime")
    verdict = judge(with_rivals(SMALLER, foreign))
    assert verdict.ship
    assert "the nearest: plain 192" in verdict.lines[-2] and not verdict.findings[-1].veto
    assert verdict.lines[-1] == (
        "yolox: timed in ONNX Runtime, the exits in eager PyTorch, so their ms are not compared;"
        " set EVAL.RUNTIME to onnxruntime"
    )
    in_openvino = judge(with_rivals(rival("plain 192", 0.60, 15.0, runtime="openvino"), foreign, runtime="openvino"))
    assert in_openvino.lines[-1].startswith("yolox: timed in ONNX Runtime, the exits in OpenVINO, so their ms")
    alone = judge(with_rivals(foreign))  # there was a rival, but nothing to compare
    assert any("no rival could be compared" in line for line in alone.lines) and not alone.ship
    assert not judge(with_rivals(foreign, runtime="onnxruntime")).ship


def test_nothing_is_shipped_that_was_compared_with_no_rival():
    line = "no rival was evaluated (EVAL.RIVALS): a smaller detector may be the better choice"
    for metrics in (with_rivals(), {key: value for key, value in GOOD.items() if key != "rivals"}):
        verdict = judge(metrics)
        assert not verdict.ship and vetoes(verdict) == [line]


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


EIGHT = {"exit8": 1.0, "exit12": 0.0, "full": 0.0}


def test_one_exit_that_does_for_every_photo_is_what_to_ship():
    """It keeps nine tenths of the accuracy and is clearly faster; itself shipped alone is no rival of it."""
    metrics = changed(routed_exit_share=EIGHT, routed_AP50=0.66, routed_ms=20.5, exit8_AP50=0.66)
    metrics["routed"]["speedup"] = 40 / 20.5
    metrics["rivals"].append(rival("exit8 alone", 0.66, 18.0))
    verdict = judge(metrics)
    assert (verdict.ship, verdict.what) == (True, "exit8 alone")
    assert "every photo leaves at exit8: ship exit8 alone, without the other branches and the router" in verdict.lines
    assert not any("not good enough" in line or "leaves early" in line for line in verdict.lines)
    metrics["rivals"].append(rival("plain 224", 0.67, 15.0))  # another net still is one
    assert vetoes(judge(metrics))[0].startswith("ship instead: plain 224")


@pytest.mark.parametrize(
    "changes",
    [
        {"AP50": 0.647},  # more than a tenth is lost
        {"ms": 38.0, "speedup": 40 / 38},  # inside the interval of the detector without exits
        {"hybrid": True},  # the boxes are the full path's
    ],
)
def test_otherwise_it_is_no_solution(changes):
    metrics = changed(routed_exit_share=EIGHT, exit8_AP50=0.66)
    metrics["routed"] |= {"AP50": 0.66, "ms": 20.5, "speedup": 40 / 20.5, **changes}
    verdict = judge(metrics)
    assert not verdict.ship and any("at exit8, which is not good enough alone" in line for line in vetoes(verdict))


def test_an_exit_above_the_full_path_that_takes_every_photo_is_to_be_shipped():
    metrics = changed(exit8_AP50=0.9, exit8_AP50_below_full_interval=[-0.3, -0.1], routed_exit_share=EIGHT)
    metrics["routed"] |= {"AP50": 0.9, "ms": 20.5, "speedup": 40 / 20.5}
    verdict = judge(metrics)
    assert (verdict.ship, verdict.what) == (True, "exit8 alone")
    assert "exit8: AP50 0.900 is above full's 0.720: was the full path trained to its end?" in verdict.lines


def test_until_routing_is_calibrated_the_verdict_says_so():
    nobody = {"routed_exit_share": {"exit8": 0.0, "exit12": 0.0, "full": 1.0}, "routed_thresholds": [2.0, 2.0]}
    verdict = judge(changed(**nobody, routed_speedup=0.99, routed_ms=40.4))
    assert vetoes(verdict) == [
        "every exit is closed until routing is calibrated; every photo takes the full path: open them with"
        " tools/calibrate.py (--ap-drop 0.01) and evaluate with its certificate"
    ]
    empty = changed(**nobody, exit8_empty=True, exit12_empty=True)
    assert "tools/calibrate.py (--ap-drop 0.01 ROUTING.POLICY foreseen_emptiness)" in vetoes(judge(empty))[0]
    with_certificate = {**changed(**nobody), "certificate": promise("ap_drop", 0.01, 0.0)}
    assert vetoes(judge(with_certificate))[0].startswith("the certificate opens no exit")


def test_exits_that_are_closed_are_not_judged():
    closed = {"routed_thresholds": [2.0, 0.5], "exit8_AP50": 0.1, "exit8_ms": 41.0}
    verdict = judge(changed(**closed))
    assert verdict.ship and verdict.lines[0] == "exit12: AP50 0.660 is above 0.35: accurate enough"
    assert not any("exit8" in line for line in verdict.lines)


@pytest.mark.parametrize(
    ("ap50", "ships"),
    [(0.151, True), (0.149, False)],
)
def test_exits_on_a_checkpoint_taken_over_are_held_against_it(ap50, ships):
    """AP50 0.2 is what the checkpoint has; three quarters of it are asked of the first exit, whatever 0.30 says."""
    metrics = changed(full_AP50=0.2, exit8_AP50=ap50, exit12_AP50=0.18, routed_AP50=0.19)
    metrics |= {"context": {"taken_over": True}, "rivals": [rival("plain 192", 0.1, 15.0)]}
    verdict = judge(metrics)
    assert verdict.ship is ships
    share = {0.151: "75.5% of the full path's 0.200, 75% or more: accurate enough"}
    share[0.149] = "74.5% of the full path's 0.200, under 75%: move it deeper"
    assert verdict.lines[0] == f"exit8: AP50 {ap50:.3f} is {share[ap50]}"
    assert not judge({**metrics, "context": {}}).ship


FOUND = {"boxes": 2400, "score_mean": 0.2, "score_std": 0.25, "outside_share": 0.01}


@pytest.mark.parametrize(
    ("ap50", "found", "words"),
    [
        (0.049, None, "AP50 0.049"),
        (0.0, {"boxes": 0, "score_mean": None, "score_std": None, "outside_share": None}, "without a single box"),
        (0.19, {**FOUND, "score_std": 0.039}, "AP50 0.190; its scores are all alike (0.200 ± 0.039)"),
        (0.19, {**FOUND, "outside_share": 0.51}, "AP50 0.190; 51% of its boxes lie outside the photos"),
        (None, FOUND, "AP50 is undefined, since the photos show no object to find"),
    ],
)
def test_of_a_detector_that_does_not_detect_nothing_else_is_said(ap50, found, words):
    for forced in (False, True):
        verdict = judge({**changed(full_AP50=ap50, full_found=found), "rivals": []}, forced)
        assert (verdict.ship, verdict.what) == (False, None)
        (finding,) = verdict.findings
        assert finding.veto and words in finding.line
        assert ("--force" in finding.line) is forced


@pytest.mark.parametrize(
    ("ap50", "found"),
    [
        (0.05, FOUND),
        (0.05, None),
        (0.20, {**FOUND, "score_std": 0.0, "outside_share": 1.0}),
        (0.06, {**FOUND, "boxes": 19, "score_std": 0.0}),
    ],
)
def test_a_weak_detector_is_still_a_detector(ap50, found):
    assert len(judge(changed(full_AP50=ap50, full_found=found)).findings) > 1


def promise(kind, asked, measured, interval=None, **more):
    kept = None if measured is None else measured >= asked if kind == "speedup" else measured <= asked
    more = {"value": asked, **more} if "epsilon" not in more else more
    return {"target": {"kind": kind, **more}, "measured": measured, "interval": interval, "kept": kept}


@pytest.mark.parametrize(
    ("certificate", "line", "kept"),
    [
        (
            promise("ap_drop", 0.01, 0.029, [0.002, 0.061], delta=0.05, score=0.5),
            "the certificate was asked for at most 0.01 AP50 lost (delta 0.05); on these photos 0.0290 [0.0020, 0.0610]"
            " is lost: not kept",
            False,
        ),
        (promise("ap_drop", 0.1, 0.029), "on these photos 0.0290 is lost: kept", True),
        (
            promise("risk", 0.05, 0.051, [0.03, 0.07], delta=0.1, score=0.4, epsilon=0.05),
            "asked for a mean loss of at most 0.05 per photo at score 0.4 (delta 0.1); on these photos it is 0.0510"
            " [0.0300, 0.0700]: not kept",
            False,
        ),
        (promise("risk", 0.05, 0.05, score=0.5), "it is 0.0500: kept", True),
        (
            promise("speedup", 1.4, 1.38, [1.37, 1.39]),
            "asked for a speed-up of 1.4x; on these photos 1.38x [1.37x, 1.39x] is reached: not kept",
            False,
        ),
        (promise("speedup", 1.4, 1.4), "1.40x is reached: kept", True),
        (promise("ap_drop", 0.01, None), "undefined is lost: not kept", False),
    ],
)
def test_what_was_asked_of_the_certificate_is_checked(certificate, line, kept):
    verdict = judge({**GOOD, "certificate": certificate})
    (finding,) = [one for one in verdict.findings if "the certificate was asked" in one.line]
    assert line in finding.line
    assert verdict.ship is kept and finding.veto is not kept
    if certificate["target"]["kind"] == "ap_drop":  # what was asked counts, no other measure of accuracy
        assert not any("keeps the accuracy" in one for one in verdict.lines)
        assert "accuracy: AP50 0.700 routed against 0.720" in verdict.lines


def test_a_loss_that_was_asked_for_may_be_large():
    metrics = {**changed(routed_AP50=0.61), "certificate": promise("ap_drop", 0.2, 0.11)}
    assert judge(metrics).ship
    other = {**changed(routed_AP50=0.61), "certificate": promise("risk", 0.2, 0.12, score=0.5)}
    assert "routing loses 15%" in vetoes(judge(other))[0] and "ROUTING.THRESHOLDS" not in vetoes(judge(other))[0]


def test_objects_found_at_the_deployed_score_stand_beside_ap50():
    metrics = changed(full_true_positives=22, full_false_negatives=114, routed_true_positives=21)
    metrics["context"] = {"score": 0.5}
    assert (
        "routing keeps the accuracy (AP50 0.700 routed against 0.720;"
        " at score 0.5 22 of 136 found by the full path, 21 routed)" in judge(metrics).lines
    )

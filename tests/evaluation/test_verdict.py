"""Each rule of the verdict."""

import copy

import pytest

from earlyexit_ssd.evaluation import verdict as rules
from earlyexit_ssd.evaluation.results import Results


def rival(name, ap50, ms, difference=(-0.02, 0.02), runtime="eager"):
    """``difference`` is the interval of (routed AP50 - rival's AP50). The interval of ``ms`` is ±1."""
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

EIGHT = {"exit8": 1.0, "exit12": 0.0, "full": 0.0}
NONE_LEAVES = {"routed_exit_share": {"exit8": 0.0, "exit12": 0.0, "full": 1.0}}
EMPTY = {"exit8_empty": True, "exit12_empty": True}
CLOSED = {**NONE_LEAVES, "routed_thresholds": [2.0, 2.0], "routed_speedup": 0.99, "routed_ms": 40.4}
EIGHT_ALONE = {"routed_exit_share": EIGHT, "routed_AP50": 0.66, "routed_ms": 20.5, "routed_speedup": 40 / 20.5}


def changed(more=None, **changes):
    """Return GOOD with the sections ``more`` and with changes in an exit or ``routed``, such as ``exit8_AP50=0.2``."""
    metrics = copy.deepcopy(GOOD) | (more or {})
    for key, value in changes.items():
        section, name = key.split("_", 1)
        row = metrics["routed"] if section == "routed" else next(e for e in metrics["exits"] if e["name"] == section)
        row[name] = value
    return metrics


def judge(metrics, forced=False):
    context = {"forced": forced, "images": 614, **metrics.get("context", {})}
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
        "no other detector that was measured is clearly better; the nearest: "
        "plain 192 has AP50 0.600 against 0.700 routed, in 15.0 ms"
        " against 29.5 (-0.100 AP50 [-0.020, +0.020], -49% time, 614 photos)",
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
        ({"exit12_AP50": 0.75, "exit12_AP50_below_full_interval": [-0.1, -0.02]}, "something is wrong", False),
        ({"exit12_AP50": 0.75, "exit12_AP50_below_full_interval": [-0.1, 0.05]}, "full's 0.720, but not clearly", True),
        (
            {**EIGHT_ALONE, "exit8_AP50": 0.9, "exit8_AP50_below_full_interval": [-0.3, -0.1], "routed_AP50": 0.9},
            "exit8: AP50 0.900 is above full's 0.720: was the full path trained to its end?",
            True,
        ),
        (NONE_LEAVES, "no photo leaves early; every one takes the full path", False),
        # an exit is not good enough alone if it loses more than a tenth, is not clearly faster, or uses the full boxes
        *(
            ({**EIGHT_ALONE, "exit8_AP50": 0.66, **reason}, "at exit8, which is not good enough alone", False)
            for reason in ({"routed_AP50": 0.647}, {"routed_ms": 38.0, "routed_speedup": 40 / 38}, {"routed_hybrid": 1})
        ),
        ({"exit8_empty": True, "exit8_AP50": 0.0}, "exit12: AP50 0.660 is above 0.35: accurate enough", True),
        (EMPTY, "the early exits are empty", True),
        ({**EMPTY, **NONE_LEAVES}, "tools/calibrate.py fit a policy that predicts", False),
        ({**EMPTY, **NONE_LEAVES, "routed_policy": "learned_gain"}, "path: change the thresholds (ROUTING", False),
        ({**EMPTY, **CLOSED}, "tools/calibrate.py (--ap-drop 0.01 ROUTING.POLICY foreseen_emptiness)", False),
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


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"exit12_AP50": 0.7249}, "is above full's"),  # within the tolerance
        ({"routed_thresholds": [2.0, 0.5], "exit8_AP50": 0.1, "exit8_ms": 41.0}, "exit8"),  # closed exits do not count
    ],
)
def test_findings_that_do_not_apply(changes, absent):
    verdict = judge(changed(**changes))
    assert verdict.ship and not any(absent in line for line in verdict.lines)


def test_use_of_force_is_the_first_finding_and_a_veto():
    verdict = judge(GOOD, forced=True)
    assert verdict.findings[0].veto and "--force" in verdict.lines[0]
    assert verdict.findings[1:-1] == judge(GOOD).findings
    assert verdict.lines[-1] == "until this is fixed, use the detector without exits (AP50 0.720, 40.0 ms)"
    assert (verdict.ship, verdict.what) == (False, None)


def test_a_detector_without_exits_is_only_compared_with_rivals():
    metrics = copy.deepcopy(GOOD)
    metrics["exits"] = metrics["exits"][-1:]
    metrics["routed"]["exit_share"] = {"full": 1.0}
    verdict = judge(metrics)
    assert (verdict.ship, verdict.what) == (True, "full alone")
    assert verdict.lines[0] == "the model has no early exit: every photo takes its full path"
    assert not any("not good enough" in line or "leaves early" in line for line in verdict.lines)
    metrics["rivals"] = []
    assert not judge(metrics).ship


def test_untrained_exits_are_not_judged():
    verdict = judge(changed({"context": {"untrained": True}}, exit8_AP50=0.0, exit12_AP50=0.0, **CLOSED))
    line = "the exits are untrained: train them (PHASES), or use the detector without exits"
    assert vetoes(verdict) == [line] and not verdict.ship
    assert not any("exit8" in line or "calibrat" in line for line in verdict.lines)


def with_rivals(*rivals, **context):
    return {**GOOD, "rivals": list(rivals), "context": context}


@pytest.mark.parametrize(
    ("rival", "better"),
    [
        (rival("net", 0.70, 28.4), True),  # as accurate, and the interval of its time is below the routed time
        (rival("net", 0.6951, 28.4), True),  # within the tolerance
        (rival("net", 0.6949, 28.4), False),
        (rival("net", 0.70, 28.5), False),  # as accurate, and faster by no more than the interval
        (rival("net", 0.75, 29.5, (-0.09, -0.01)), True),  # clearly more accurate, and as fast
        (rival("net", 0.75, 29.5, (-0.09, 0.0)), False),
        (rival("net", 0.75, 29.5, None), False),
        (rival("net", 0.69, 10.0), False),  # less accurate, but fast
        (rival("net", 0.75, 29.6, (-0.09, -0.01)), False),  # more accurate, but slower
        (rival("net", None, 10.0), False),
    ],
)
def test_a_better_rival_is_to_be_shipped_instead(rival, better):
    verdict = judge(with_rivals(SMALLER, rival, LARGER))
    assert verdict.ship is not better
    assert any(line.startswith("ship instead: net has AP50") for line in verdict.lines) is better


@pytest.mark.parametrize(
    ("rivals", "line"),
    [
        (
            [rival("fast", 0.71, 10.0), rival("slow", 0.74, 25.0), rival("best", 0.74, 20.0), SMALLER],
            "ship instead: best has AP50 0.740 against 0.700 routed, in 20.0 ms against 29.5"
            " (+0.040 AP50 [-0.020, +0.020], -32% time, 614 photos)",
        ),
        # of rivals that differ by no more than the tolerance, the fastest
        (
            [rival("accurate", 0.74, 28.0), rival("equal", 0.736, 15.0), rival("worse", 0.734, 10.0)],
            "ship instead: equal has AP50 0.736 against 0.700 routed, in 15.0 ms against 29.5"
            " (+0.036 AP50 [-0.020, +0.020], -49% time, 614 photos)",
        ),
        # no rival is better: "plain 192" loses a seventh of AP50, "plain 256" is a fifth slower
        (
            [SMALLER, LARGER, rival("close", 0.693, 29.8)],
            "no other detector that was measured is clearly better; the nearest: "
            "close has AP50 0.693 against 0.700 routed, in 29.8 ms against 29.5"
            " (-0.007 AP50 [-0.020, +0.020], +1% time, 614 photos)",
        ),
    ],
)
def test_one_rival_is_named_with_its_figures(rivals, line):
    verdict = judge(with_rivals(*rivals))
    assert verdict.lines[-1] == line and verdict.ship is line.startswith("no other")


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


def test_missing_rivals_are_a_veto():
    line = "no rival was evaluated (EVAL.RIVALS): a smaller detector may be the better choice"
    for metrics in (with_rivals(), {key: value for key, value in GOOD.items() if key != "rivals"}):
        verdict = judge(metrics)
        assert not verdict.ship and vetoes(verdict) == [line]


@pytest.mark.parametrize(
    ("rival", "named"),
    [
        (rival("yolox", 0.726, 38.0), True),  # the detector without exits has 0.72 in 40 ms
        (rival("yolox", 0.725, 38.0), False),  # within the tolerance
        (rival("yolox", 0.80, 39.0), False),  # as fast within its interval
        (rival("yolox", 0.80, 30.0, runtime="onnxruntime"), False),
        (rival("yolox", None, 30.0), False),
    ],
)
def test_a_rival_that_is_better_than_the_detector_without_exits_is_named(rival, named):
    verdict = judge(with_rivals(SMALLER, rival))
    figures = "AP50 0.726 against 0.720, in 38.0 ms against 40.0"
    line = f"yolox has more AP50 than the detector without exits, in less time ({figures}): look at it first"
    assert (line in verdict.lines) is named and verdict.ship


@pytest.mark.parametrize(
    ("photos", "difference", "interval", "uncertain"),
    [
        (100, (-0.09, 0.069), "[-0.069, +0.090]", False),
        (99, (-0.09, 0.069), "[-0.069, +0.090]", True),
        (614, (-0.09, 0.071), "[-0.071, +0.090]", True),  # a loss of more than a tenth of the routed AP50
    ],
)
def test_a_better_rival_may_be_uncertain(photos, difference, interval, uncertain):
    (line,) = vetoes(judge(with_rivals(rival("net", 0.75, 15.0, difference), images=photos)))
    assert f"(+0.050 AP50 {interval}, -49% time, {photos} photos)" in line
    assert line.endswith("; this is uncertain: evaluate on more photos") is uncertain


@pytest.mark.parametrize(("ap50", "named"), [(0.75, False), (0.755, False), (0.756, True)])
def test_no_second_rival_is_named_unless_it_is_more_accurate(ap50, named):
    """The other is slower than the routed detector, and faster than the detector without exits."""
    verdict = judge(with_rivals(rival("plain 192", 0.75, 15.0), rival("plain 224", ap50, 35.0)))
    assert vetoes(verdict)[0].startswith("ship instead: plain 192")
    assert any("look at it first" in line for line in verdict.lines) is named


def test_rivals_of_a_routed_detector_that_finds_nothing():
    assert not judge(changed({"rivals": [rival("net", 0.0, 20.0)]}, routed_AP50=0.0)).ship


def test_an_exit_that_every_photo_takes_is_to_be_shipped_alone():
    """It keeps nine tenths of AP50 and is clearly faster. As a rival, it is not compared with itself."""
    metrics = changed({"rivals": [SMALLER, rival("exit8 alone", 0.66, 18.0)]}, **EIGHT_ALONE, exit8_AP50=0.66)
    verdict = judge(metrics)
    assert (verdict.ship, verdict.what) == (True, "exit8 alone")
    assert "every photo leaves at exit8: ship exit8 alone, without the other branches and the router" in verdict.lines
    assert not any("not good enough" in line or "leaves early" in line for line in verdict.lines)
    metrics["rivals"].append(rival("plain 224", 0.67, 15.0))
    assert vetoes(judge(metrics))[0].startswith("ship instead: plain 224")


def test_closed_exits_are_the_only_veto():
    assert vetoes(judge(changed(**CLOSED))) == [
        "every exit is closed until routing is calibrated; every photo takes the full path: open them with"
        " tools/calibrate.py (--ap-drop 0.01) and evaluate with its certificate"
    ]
    with_certificate = changed({"certificate": certificate("ap_drop", 0.01, 0.0)}, **CLOSED)
    assert vetoes(judge(with_certificate))[0].startswith("the certificate opens no exit")


@pytest.mark.parametrize(
    ("ap50", "line", "ships"),
    [
        (0.151, "exit8: AP50 0.151 is 75.5% of the full path's 0.200, 75% or more: accurate enough", True),
        (0.149, "exit8: AP50 0.149 is 74.5% of the full path's 0.200, under 75%: move it deeper", False),
    ],
)
def test_the_first_exit_on_an_unchanged_checkpoint_is_compared_with_the_full_path(ap50, line, ships):
    more = {"context": {"taken_over": True}, "rivals": [rival("plain 192", 0.1, 15.0)]}
    metrics = changed(more, full_AP50=0.2, exit8_AP50=ap50, exit12_AP50=0.18, routed_AP50=0.19)
    verdict = judge(metrics)
    assert verdict.ship is ships and verdict.lines[0] == line
    assert not judge({**metrics, "context": {}}).ship  # otherwise it must reach 0.30


def test_exits_may_be_better_than_an_unchanged_checkpoint():
    better = {"exit12_AP50": 0.75, "exit12_AP50_below_full_interval": [-0.1, -0.02]}
    verdict = judge(changed({"context": {"taken_over": True}}, **better))
    line = "exit12: AP50 0.750 is above full's 0.720: the exits were trained, the full path is the checkpoint as it was"
    assert verdict.ship and line in [finding.line for finding in verdict.findings]


@pytest.mark.parametrize(("layer", "fix"), [(11, "move it deeper"), (12, "it needs more training")])
@pytest.mark.parametrize(
    ("taken_over", "limit"), [(True, "of the full path's 0.720, under 75%"), (False, "under 0.30")]
)
def test_an_exit_gets_one_veto_and_the_last_place_no_advice_to_move(layer, fix, taken_over, limit):
    changes = {"routed_thresholds": [2.0, 0.5], "exit12_AP50": 0.2, "exit12_layer": layer}
    found = vetoes(judge(changed({"context": {"taken_over": taken_over}}, **changes)))
    assert len(found) == 1 and found[0].startswith("exit12: AP50 0.200 is ") and found[0].endswith(f"{limit}: {fix}")


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
def test_a_full_path_that_does_not_detect_is_the_only_finding(ap50, found, words):
    for forced in (False, True):
        verdict = judge(changed({"rivals": []}, full_AP50=ap50, full_found=found), forced)
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
def test_a_weak_full_path_is_judged_by_all_rules(ap50, found):
    assert len(judge(changed(full_AP50=ap50, full_found=found)).findings) > 1


def certificate(kind, value, measured, interval=None, **more):
    kept = None if measured is None else measured >= value if kind == "speedup" else measured <= value
    target = {"kind": kind, "epsilon" if kind == "risk" else "value": value, **more}
    return {"target": target, "measured": measured, "interval": interval, "kept": kept}


@pytest.mark.parametrize(
    ("certificate", "line", "kept"),
    [
        (
            certificate("ap_drop", 0.01, 0.029, [0.002, 0.061], delta=0.05, score=0.5),
            "the certificate was asked for at most 0.01 AP50 lost (delta 0.05); on these photos 0.0290 [0.0020, 0.0610]"
            " is lost: not kept",
            False,
        ),
        (certificate("ap_drop", 0.1, 0.029), "on these photos 0.0290 is lost: kept", True),
        (
            certificate("risk", 0.05, 0.051, [0.03, 0.07], delta=0.1, score=0.4),
            "asked for a mean loss of at most 0.05 per photo at score 0.4 (delta 0.1); on these photos it is 0.0510"
            " [0.0300, 0.0700]: not kept",
            False,
        ),
        (certificate("risk", 0.05, 0.05, score=0.5), "it is 0.0500: kept", True),
        (
            certificate("speedup", 1.4, 1.38, [1.37, 1.39]),
            "asked for a speed-up of 1.4x; on these photos 1.38x [1.37x, 1.39x] is reached: not kept",
            False,
        ),
        (certificate("speedup", 1.4, 1.4), "1.40x is reached: kept", True),
        (certificate("ap_drop", 0.01, None), "undefined is lost: not kept", False),
    ],
)
def test_the_target_of_the_certificate_is_checked(certificate, line, kept):
    verdict = judge({**GOOD, "certificate": certificate})
    (finding,) = [finding for finding in verdict.findings if "the certificate was asked" in finding.line]
    assert line in finding.line
    assert verdict.ship is kept and finding.veto is not kept
    if certificate["target"]["kind"] == "ap_drop":  # the certificate's target replaces the limit of a tenth
        assert not any("keeps the accuracy" in line for line in verdict.lines)
        assert "accuracy: AP50 0.700 routed against 0.720" in verdict.lines


def test_a_certificate_that_limits_the_loss_of_ap50_may_allow_a_large_loss():
    assert judge(changed({"certificate": certificate("ap_drop", 0.2, 0.11)}, routed_AP50=0.61)).ship
    other = changed({"certificate": certificate("risk", 0.2, 0.12, score=0.5)}, routed_AP50=0.61)
    assert "routing loses 15%" in vetoes(judge(other))[0] and "ROUTING.THRESHOLDS" not in vetoes(judge(other))[0]


def test_objects_found_at_the_score_threshold_are_reported_with_ap50():
    counts = {"full_true_positives": 22, "full_false_negatives": 114, "routed_true_positives": 21}
    metrics = changed({"context": {"score": 0.5}}, **counts)
    assert (
        "routing keeps the accuracy (AP50 0.700 routed against 0.720;"
        " at score 0.5 22 of 136 found by the full path, 21 routed)" in judge(metrics).lines
    )

"""The figures in plain words: are these exits worth shipping?

The first question is whether the full path detects; where it does not, nothing else is said. Then each rule reads the
results of `evaluate_exits` and says what it finds; add a rule by adding a function to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.results import ExitResult, Finding, Results, RivalResult, RoutedResult, Verdict
from earlyexit_ssd.routing.policies import foresees

DETECTS_AP50 = 0.05
"""Below it a full path does not detect, whatever else is measured."""
DOUBTFUL_AP50 = 0.20
"""Below it scores that are all alike, or boxes outside the photos, show a detector that does not detect either."""
ALIKE = 0.2
"""Scores are alike where their standard deviation is below this share of their mean; a detector's is some 1 or more."""
ENOUGH_BOXES = 20
"""Fewer show no pattern."""

MOVE_DEEPER_AP50 = 0.30
WORTH_IT_AP50 = 0.35
FIRST_EXIT_SHARE = 0.75
"""Of the full path's AP50, for the first exit on a checkpoint that was taken over as it is."""
DEEPEST_SHARE = 0.85
LARGEST_LOSS = 0.10
AP50_TOLERANCE = 0.005
"""Half a point of AP50 is less than a few hundred photos can tell apart: no sign of a mistake, no reason for exits."""

Rule = Callable[[Results], list[Finding]]


def full_path_detects(results: Results) -> list[Finding]:
    """The rule before all others: exits on a detector that does not detect are worth nothing."""
    full = results.full
    ap50, found = full.ap50, full.found
    if ap50 is None:
        return [Finding("AP50 is undefined, since the photos show no object to find: nothing can be said", veto=True)]
    signs = []
    enough = found is not None and found.boxes >= ENOUGH_BOXES
    if enough and found.score_std < ALIKE * found.score_mean:
        signs.append(f"its scores are all alike ({found.score_mean:.3f} ± {found.score_std:.3f})")
    if enough and found.outside_share > 0.5:
        signs.append(f"{found.outside_share:.0%} of its boxes lie outside the photos")
    if ap50 >= (DOUBTFUL_AP50 if signs else DETECTS_AP50):
        return []
    signs.insert(0, f"AP50 {ap50:.3f}" if found is None or found.boxes else f"AP50 {ap50:.3f}, without a single box")
    fix = "train it, or look at its weights, classes and boxes, before anything is said of exits"
    return [Finding(f"the full path does not detect ({'; '.join(signs)}): {fix}", veto=True)]


def exits_pass_their_gates(results: Results) -> list[Finding]:
    """The first exit in use against 0.30 and 0.35 AP50, the deepest against the full path; on a checkpoint that was
    taken over as it is, both against that checkpoint on the same photos."""
    if len(results.exits) < 2:
        return [Finding("the model has no early exit: there is nothing to ship", veto=True)]
    used = _exits_in_use(results)
    if not used:
        return [Finding("the early exits are empty: only photos that seem to show nothing leave there")]
    first, deepest, full = used[0], used[-1], results.full.ap50
    if first.ap50 is None or deepest.ap50 is None:
        return [Finding(f"{first.name}: AP50 is undefined, since the photos show no object to find", veto=True)]
    findings = [_first_exit(first, full, results.context.taken_over)]
    if full and deepest.ap50 < DEEPEST_SHARE * full:
        share = f"{deepest.name}: AP50 {deepest.ap50:.3f} is {deepest.ap50 / full:.1%} of the full path's"
        findings.append(Finding(f"{share} {full:.3f}, under {DEEPEST_SHARE:.0%}: it needs more training", veto=True))
    return findings


def _first_exit(first: ExitResult, full: float | None, taken_over: bool) -> Finding:
    ap50, figure = first.ap50, f"{first.name}: AP50 {first.ap50:.3f}"
    if taken_over and full:
        share = f"{figure} is {ap50 / full:.1%} of the {full:.3f} of the checkpoint taken over"
        if ap50 < FIRST_EXIT_SHARE * full:
            return Finding(f"{share}, under {FIRST_EXIT_SHARE:.0%}: move it deeper", veto=True)
        return Finding(f"{share}, {FIRST_EXIT_SHARE:.0%} or more: worth it")
    if ap50 < MOVE_DEEPER_AP50:
        return Finding(f"{figure} is under {MOVE_DEEPER_AP50:.2f}: move it deeper", veto=True)
    if ap50 > WORTH_IT_AP50:
        return Finding(f"{figure} is above {WORTH_IT_AP50:.2f}: worth it")
    return Finding(f"{figure} is between {MOVE_DEEPER_AP50:.2f} and {WORTH_IT_AP50:.2f}: borderline")


def exits_stay_below_full(results: Results) -> list[Finding]:
    """An early exit that beats the full path shows a mistake (a spoilt full path, exits mixed up), unless the paired
    interval of (full - exit) reaches above zero: then other photos might say otherwise, and it is no veto. Nor is it
    where that exit takes every photo: nobody takes the full path then."""
    *early, full = results.exits
    if full.ap50 is None:
        return []
    limit = full.ap50 + AP50_TOLERANCE
    findings = []
    for one in early:
        if one.ap50 is None or one.ap50 <= limit:
            continue
        figures = f"{one.name}: AP50 {one.ap50:.3f} is above {full.name}'s {full.ap50:.3f}"
        if _within_noise(one):
            findings.append(Finding(f"{figures}, but not clearly: with other photos it might not be"))
        elif one.name == exit_that_does(results):
            findings.append(Finding(f"{figures}: was the full path trained to its end?"))
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If the exits have learnt from photos of a kind that it never saw, ship that exit alone"
            findings.append(Finding(f"{figures}: {wrong} {unless}", veto=True))
    return findings


def exits_save_time(results: Results) -> list[Finding]:
    """Note the early exits that take as long as the whole detector without exits; no veto by itself."""
    plain = results.without_exits.ms
    return [
        Finding(
            f"{one.name}: {one.ms:.1f} ms, no less than the {plain:.1f} ms without exits: leaving there saves nothing"
        )
        for one in _open_exits(results)
        if one.ms >= plain
    ]


def routing_uses_exits(results: Results) -> list[Finding]:
    """Where every photo takes one exit the router decides nothing: that exit alone is to be shipped, if it is good."""
    only = _only_exit(results)
    if only is None:
        return []
    if only == results.full.name:
        return [Finding(_why_nobody_leaves(results), veto=True)]
    if only == exit_that_does(results):
        return [Finding(f"every image leaves at {only}: ship {only} alone, without the other branches and the router")]
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    return [Finding(f"every image leaves at {only}: routing collapsed; {fix}", veto=True)]


def _why_nobody_leaves(results: Results) -> str:
    routed = results.routed
    closed = routed.thresholds and not _open_exits(results)
    if closed and results.certificate:
        return "the certificate opens no exit, every image takes the full path: allow a larger loss, or train the exits"
    blind = all(one.empty for one in results.early) and not foresees(routed.policy)
    if closed:
        policy = " ROUTING.POLICY foreseen_emptiness" if blind else ""
        fix = f"open them with tools/calibrate.py (--ap-drop 0.01{policy}) and evaluate with its certificate"
        return f"every exit is closed until routing is calibrated, every image takes the full path: {fix}"
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    if blind:
        fix = "let tools/calibrate.py fit a policy that foresees empty frames (ROUTING.POLICY foreseen_emptiness)"
    return f"every image leaves at {results.full.name}: routing collapsed; {fix}"


def routing_is_faster(results: Results) -> list[Finding]:
    """The routed detector must take less time than the same detector without exits."""
    speedup = results.routed.speedup
    if speedup is None or _nobody_leaves(results):
        return []
    routed, plain = results.routed.ms, results.without_exits.ms
    times = f"{routed:.1f} ms routed against {plain:.1f} ms without exits, {speedup:.2f}x"
    if speedup <= 1.0:
        return [Finding(f"no speed gain ({times}): do not ship exits", veto=True)]
    low, high = results.without_exits.ms_interval
    if routed >= low:
        noise = f"{times}, inside the interval {low:.1f} to {high:.1f} ms of the latter"
        return [Finding(f"no clear speed gain ({noise}): do not ship exits", veto=True)]
    return [Finding(f"routing is faster ({times})")]


def promise_is_kept(results: Results) -> list[Finding]:
    """What the certificate was asked for, against what these photos say; what was not kept is a veto."""
    promise = results.certificate
    if not promise:
        return []
    target, measured, interval = promise.target, promise.measured, promise.interval
    value, kind = asked_value(target), target["kind"]
    figure = "{:.2f}x" if kind == "speedup" else "{:.4f}"
    text = "undefined" if measured is None else figure.format(measured)
    if interval:
        text += " [{}, {}]".format(*map(figure.format, interval))
    score = f" at score {target['score']:g}" if target.get("score") is not None else ""
    asked, got = {
        "speedup": (f"a speed-up of {value:g}x", f"{text} is reached"),
        "ap_drop": (f"at most {value:g} AP50 lost", f"{text} is lost"),
        "risk": (f"at most {value:g} missed and added per photo{score}", f"{text} is missed and added"),
    }[kind]
    sure = f" (delta {target['delta']:g})" if "delta" in target else ""
    kept = bool(promise.kept)
    line = f"the certificate was asked for {asked}{sure}; on these photos {got}: {'kept' if kept else 'not kept'}"
    return [Finding(line, veto=not kept)]


def routing_keeps_accuracy(results: Results) -> list[Finding]:
    """The routed detector may lose a tenth of the full path's AP50, the bargain that this project is after; where a
    certificate names another loss, that one counts."""
    full, routed = results.full.ap50, results.routed.ap50
    if not full or routed is None or _nobody_leaves(results):
        return []
    lost = 1 - routed / full
    figures = f"AP50 {routed:.3f} routed against {full:.3f}{_objects_found(results)}"
    if _asked_for_ap(results):
        return [Finding(f"accuracy: {figures}")]
    if lost > LARGEST_LOSS:
        line = f"routing loses {lost:.0%} of the full path's AP50 ({figures}), more than {LARGEST_LOSS:.0%}"
        fix = "calibrate to lose less" if results.certificate else "raise ROUTING.THRESHOLDS, or calibrate"
        return [Finding(f"{line}: {fix}", veto=True)]
    return [Finding(f"routing keeps the accuracy ({figures})")]


def no_static_net_is_better(results: Results) -> list[Finding]:
    """A rival that is at least as accurate and as fast, and clearly better in one of them, is what to ship."""
    routed, comparable = results.routed, _comparable(results)
    if not comparable or routed.ap50 is None or routed.ms is None:
        return []
    better = [one for one in comparable if _dominates(one, routed)]
    if better:
        most = max(one.ap50 for one in better)
        best = min((one for one in better if one.ap50 >= most - AP50_TOLERANCE), key=lambda one: one.ms)
        return [Finding(f"ship the small net: {_comparison(best, routed)}", veto=True)]
    nearest = min(comparable, key=lambda one: _shortfall(one, routed))
    return [Finding(f"no static net is better than routing; the nearest: {_comparison(nearest, routed)}")]


def rivals_were_evaluated(results: Results) -> list[Finding]:
    """Without a rival nobody knows whether a smaller net is the better choice, so nothing is shipped."""
    if len(results.exits) < 2 or _comparable(results):
        return []
    what = "could be compared with it" if results.rivals else "was evaluated beside it"
    return [Finding(f"no static net {what} (EVAL.RIVALS): a smaller one may be the better choice", veto=True)]


def full_path_is_worth_having(results: Results) -> list[Finding]:
    """A rival that beats the detector without exits too: then the exits are not what to look at first; no veto."""
    full, plain = results.full, results.without_exits
    if full.ap50 is None:
        return []
    more = [one for one in _comparable(results) if one.ap50 > full.ap50 + AP50_TOLERANCE]
    better = [one for one in more if one.ms_interval[1] < plain.ms]
    if not better:
        return []
    best = max(better, key=lambda one: one.ap50)
    against = f"AP50 {best.ap50:.3f} against {full.ap50:.3f}, in {best.ms:.1f} ms against {plain.ms:.1f}"
    line = f"{best.name} has more AP50 than the detector without exits, in less time ({against})"
    return [Finding(f"{line}: look at it first")]


def rivals_share_the_runtime(results: Results) -> list[Finding]:
    """Milliseconds of two runtimes say nothing about two networks."""
    others = [one.name for one in results.rivals if one.runtime != results.context.runtime]
    if not others:
        return []
    line = f"{', '.join(others)}: timed in ONNX Runtime, the exits in eager PyTorch, so their ms are not compared"
    return [Finding(f"{line}; set EVAL.RUNTIME to onnxruntime")]


RULES: tuple[Rule, ...] = (
    exits_pass_their_gates,
    exits_stay_below_full,
    exits_save_time,
    routing_uses_exits,
    routing_is_faster,
    promise_is_kept,
    routing_keeps_accuracy,
    rivals_were_evaluated,
    full_path_is_worth_having,
    no_static_net_is_better,
    rivals_share_the_runtime,
)


def agrees_with_full(results: Results) -> list[Finding]:
    """On photos that nobody labelled: how far routing says what the full path says, right or wrong."""
    kept, lost, added = map(results.routed.number, ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {kept} of the {kept + lost} objects that the full path finds and adds {added}"
    line = f"nobody labelled these photos: {figures}; how accurate either is they cannot say"
    return [Finding(line, veto=True)]


def judge(results: Results, forced: bool = False, rules: Sequence[Rule] = RULES) -> Verdict:
    """Whether the full path detects; if it does, what the rules say to the results of `evaluate_exits`.

    Args:
        results: their own verdict is not read.
        forced: the run went on with --force past a gate that had failed: a veto, which the verdict says first.
        rules: the rules, in the order of their lines.
    """
    if not results.context.labelled:
        rules = (agrees_with_full, routing_is_faster)  # the others speak of accuracy
    elif findings := full_path_detects(results):
        said = "; --force was used on the way" if forced else ""
        return Verdict(False, None, (Finding(findings[0].line + said, veto=True),))
    findings = [finding for rule in rules for finding in rule(results)]
    if forced:
        line = "--force was used: a gate failed on the way to these figures, and the run went on"
        findings.insert(0, Finding(line, veto=True))
    if any(finding.veto for finding in findings):
        return Verdict(False, None, tuple(findings))
    one = exit_that_does(results)
    return Verdict(True, f"{one} alone" if one else "routed", tuple(findings))


def asked_value(target: Mapping[str, Any]) -> float:
    """The number of a certificate's target; of a risk it was called ``epsilon``."""
    return target["value"] if "value" in target else target["epsilon"]


def exit_that_does(results: Results) -> str | None:
    """The early exit that takes every photo, keeps the accuracy and is clearly faster than the detector without exits;
    None where there is none."""
    only, routed, full = _only_exit(results), results.routed, results.full
    if only in (None, full.name) or routed.hybrid or routed.ap50 is None or routed.speedup is None:
        return None
    if _asked_for_ap(results):
        keeps = results.certificate.kept
    else:
        keeps = routed.ap50 >= (1 - LARGEST_LOSS) * (full.ap50 or 0.0)
    faster = routed.speedup > 1 and routed.ms < results.without_exits.ms_interval[0]
    return only if keeps and faster else None


def _only_exit(results: Results) -> str | None:
    """The exit that every photo takes."""
    share = results.routed.exit_share
    return next((name for name, value in share.items() if value == 1.0), None) if len(share) > 1 else None


def _nobody_leaves(results: Results) -> bool:
    return _only_exit(results) == results.full.name


def _asked_for_ap(results: Results) -> bool:
    promise = results.certificate
    return bool(promise) and promise.target["kind"] == "ap_drop"


def _open_exits(results: Results) -> list[ExitResult]:
    """The early exits where photos may leave."""
    early = results.early
    thresholds = results.routed.thresholds or [0.0] * len(early)
    return [one for one, threshold in zip(early, thresholds, strict=True) if threshold < CLOSED]


def _exits_in_use(results: Results) -> list[ExitResult]:
    """The exits with a branch whose accuracy counts: the one that does for all, else the open ones, else all."""
    one = exit_that_does(results)
    candidates = [row for row in results.early if row.name == one] or _open_exits(results)
    return [row for row in candidates or results.early if not row.empty]


def _objects_found(results: Results) -> str:
    """Objects found at the deployed score, by the full path and routed."""
    full, missed = map(results.full.number, ("true_positives", "false_negatives"))
    routed = results.routed.number("true_positives")
    if full is None or routed is None:
        return ""
    score = "" if results.context.score is None else f"at score {results.context.score:g} "
    return f"; {score}{full} of {full + missed} found by the full path, {routed} routed"


def _within_noise(one: ExitResult) -> bool:
    """Whether the paired interval of (full - exit) reaches above zero."""
    below_full = one.AP50_below_full_interval
    return bool(below_full and below_full[1] > 0)


def _comparable(results: Results) -> list[RivalResult]:
    """The rivals that were timed in the exits' runtime and have an AP50; not the exit that is to be shipped itself."""
    runtime, itself = results.context.runtime, f"{exit_that_does(results)} alone"
    return [one for one in results.rivals if one.ap50 is not None and one.runtime == runtime and one.name != itself]


def _dominates(rival: RivalResult, routed: RoutedResult) -> bool:
    """In neither figure worse (AP50 within the tolerance), and in one of them better by more than its interval."""
    if rival.ap50 < routed.ap50 - AP50_TOLERANCE or rival.ms > routed.ms:
        return False
    difference = rival.routed_minus_rival_AP50_interval
    return rival.ms_interval[1] < routed.ms or (difference is not None and difference[1] < 0)


def _shortfall(rival: RivalResult, routed: RoutedResult) -> float:
    """What the rival lacks, as shares of the routed detector's figures; 0 where it lacks nothing."""
    accuracy = 1 - rival.ap50 / routed.ap50 if routed.ap50 else 0.0
    return max(accuracy, 0.0) + max(rival.ms / routed.ms - 1, 0.0)


def _comparison(rival: RivalResult, routed: RoutedResult) -> str:
    return (
        f"{rival.name} has AP50 {rival.ap50:.3f} against {routed.ap50:.3f} routed, in {rival.ms:.1f} ms"
        f" against {routed.ms:.1f} ({rival.ap50 - routed.ap50:+.3f} AP50,"
        f" {rival.ms / routed.ms - 1:+.0%} time)"
    )

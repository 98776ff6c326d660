"""The figures in plain words: are these exits worth shipping?

The first question is whether the full path detects; where it does not, nothing else is said. Then each rule of `RULES`
reads the results and says what it finds. What a rule says when, is in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.results import ExitResult, Finding, Results, RivalResult, RoutedResult, Target, Verdict
from earlyexit_ssd.routing.policies import reads_taps

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

Rule = Callable[[Results], Iterable[Finding]]


def judge(results: Results, rules: Sequence[Rule] | None = None) -> Verdict:
    """Whether the full path detects; if it does, what the rules say, `RULES` by default, in their order.

    That the run went on with --force past a gate that had failed is a veto, which the verdict says first.
    """
    forced = results.context.forced
    if rules is None:
        rules = RULES if results.early else (has_no_exits, no_static_net_is_better, rivals_share_the_runtime)
    if not results.context.labelled:
        rules = (agrees_with_full, routing_is_faster)  # the others speak of accuracy
    elif findings := list(full_path_detects(results)):
        said = "; --force was used on the way" if forced else ""
        return Verdict(False, None, (Finding(findings[0].line + said, veto=True),))
    findings = [finding for rule in rules for finding in rule(results)]
    if forced:
        line = "--force was used: a gate failed on the way to these figures, and the run went on"
        findings.insert(0, Finding(line, veto=True))
    ship = not any(finding.veto for finding in findings)
    one = exit_that_does(results)
    what = f"{one} alone" if one else "routed" if results.early else f"{results.full.name} alone"
    return Verdict(ship, what if ship else None, tuple(findings))


def has_no_exits(results: Results) -> Iterator[Finding]:
    """A detector without exits, such as a smaller one that a search has chosen, is held against rivals alone."""
    yield Finding("the model has no early exit: every photo takes its full path")
    yield from rivals_were_evaluated(results)


def full_path_detects(results: Results) -> Iterator[Finding]:
    """The rule before all others: exits on a detector that does not detect are worth nothing."""
    ap50, boxes = results.full.ap50, results.full.found
    if ap50 is None:
        yield Finding("AP50 is undefined, since the photos show no object to find: nothing can be said", veto=True)
        return
    signs = []
    if boxes is not None and boxes.boxes >= ENOUGH_BOXES:
        if boxes.score_std < ALIKE * boxes.score_mean:
            signs.append(f"its scores are all alike ({boxes.score_mean:.3f} ± {boxes.score_std:.3f})")
        if boxes.outside_share > 0.5:
            signs.append(f"{boxes.outside_share:.0%} of its boxes lie outside the photos")
    if ap50 < (DOUBTFUL_AP50 if signs else DETECTS_AP50):
        none = ", without a single box" if boxes is not None and not boxes.boxes else ""
        fix = "train it, or look at its weights, classes and boxes, before anything is said of exits"
        signs = "; ".join([f"AP50 {ap50:.3f}{none}", *signs])
        yield Finding(f"the full path does not detect ({signs}): {fix}", veto=True)


def exits_pass_their_gates(results: Results) -> Iterator[Finding]:
    """The first exit in use against 0.30 and 0.35 AP50, the deepest against the full path; on a checkpoint that was
    taken over as it is, both against that checkpoint on the same photos."""
    only = [one for one in results.early if one.name == exit_that_does(results)]
    used = [one for one in only or _open_exits(results) or results.early if not one.empty]
    full = results.full.ap50
    if not used:
        yield Finding("the early exits are empty: only photos that seem to show nothing leave there")
    elif used[0].ap50 is None or used[-1].ap50 is None:
        yield Finding(f"{used[0].name}: AP50 is undefined, since the photos show no object to find", veto=True)
    else:
        first = f"{used[0].name}: AP50 {used[0].ap50:.3f}"
        if results.context.taken_over and full:
            first += f" is {used[0].ap50 / full:.1%} of the {full:.3f} of the checkpoint taken over"
            deep_enough = used[0].ap50 >= FIRST_EXIT_SHARE * full
            said = (
                f"{FIRST_EXIT_SHARE:.0%} or more: worth it"
                if deep_enough
                else f"under {FIRST_EXIT_SHARE:.0%}: move it deeper"
            )
            yield Finding(f"{first}, {said}", veto=not deep_enough)
        elif used[0].ap50 < MOVE_DEEPER_AP50:
            yield Finding(f"{first} is under {MOVE_DEEPER_AP50:.2f}: move it deeper", veto=True)
        elif used[0].ap50 > WORTH_IT_AP50:
            yield Finding(f"{first} is above {WORTH_IT_AP50:.2f}: worth it")
        else:
            yield Finding(f"{first} is between {MOVE_DEEPER_AP50:.2f} and {WORTH_IT_AP50:.2f}: borderline")
        name, ap50 = used[-1].name, used[-1].ap50
        if full and ap50 < DEEPEST_SHARE * full:
            share = f"{name}: AP50 {ap50:.3f} is {ap50 / full:.1%} of the full path's {full:.3f}"
            yield Finding(f"{share}, under {DEEPEST_SHARE:.0%}: it needs more training", veto=True)


def exits_stay_below_full(results: Results) -> Iterator[Finding]:
    """An early exit that beats the full path shows a mistake: a spoilt full path, or exits mixed up.

    It is no veto where the paired interval of (full - exit) reaches above zero, since other photos might say otherwise,
    nor where that exit takes every photo, since nobody takes the full path then.
    """
    full = results.full
    for one in results.early:
        if full.ap50 is None or one.ap50 is None or one.ap50 <= full.ap50 + AP50_TOLERANCE:
            continue
        figures = f"{one.name}: AP50 {one.ap50:.3f} is above {full.name}'s {full.ap50:.3f}"
        difference = one.AP50_below_full_interval
        if difference and difference[1] > 0:
            yield Finding(f"{figures}, but not clearly: with other photos it might not be")
        elif one.name == exit_that_does(results):
            yield Finding(f"{figures}: was the full path trained to its end?")
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If the exits have learnt from photos of a kind that it never saw, ship that exit alone"
            yield Finding(f"{figures}: {wrong} {unless}", veto=True)


def exits_save_time(results: Results) -> Iterator[Finding]:
    """Early exits that take as long as the whole detector without exits; no veto by itself."""
    plain = results.without_exits.ms
    for one in _open_exits(results):
        if one.ms >= plain:
            figures = f"{one.name}: {one.ms:.1f} ms, no less than the {plain:.1f} ms without exits"
            yield Finding(f"{figures}: leaving there saves nothing")


def routing_uses_exits(results: Results) -> Iterator[Finding]:
    """Where every photo takes one exit the router decides nothing: that exit alone is to be shipped, if it is good."""
    only = _only_exit(results)
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    if only == results.full.name:
        yield Finding(_why_nobody_leaves(results, fix), veto=True)
    elif only and only == exit_that_does(results):
        yield Finding(f"every image leaves at {only}: ship {only} alone, without the other branches and the router")
    elif only:
        yield Finding(f"every image leaves at {only}: routing collapsed; {fix}", veto=True)


def _why_nobody_leaves(results: Results, fix: str) -> str:
    closed = results.routed.thresholds and not _open_exits(results)
    if closed and results.certificate:
        return "the certificate opens no exit, every image takes the full path: allow a larger loss, or train the exits"
    blind = all(one.empty for one in results.early) and not reads_taps(results.routed.policy)
    if closed:
        policy = " ROUTING.POLICY foreseen_emptiness" if blind else ""
        fix = f"open them with tools/calibrate.py (--ap-drop 0.01{policy}) and evaluate with its certificate"
        return f"every exit is closed until routing is calibrated, every image takes the full path: {fix}"
    if blind:
        fix = "let tools/calibrate.py fit a policy that foresees empty frames (ROUTING.POLICY foreseen_emptiness)"
    return f"every image leaves at {results.full.name}: routing collapsed; {fix}"


def routing_is_faster(results: Results) -> Iterator[Finding]:
    """The routed detector must take less time than the same detector without exits."""
    speedup, routed, plain = results.routed.speedup, results.routed.ms, results.without_exits
    if speedup is None or _only_exit(results) == results.full.name:
        return
    times = f"{routed:.1f} ms routed against {plain.ms:.1f} ms without exits, {speedup:.2f}x"
    low, high = plain.ms_interval
    if speedup <= 1.0:
        yield Finding(f"no speed gain ({times}): do not ship exits", veto=True)
    elif routed >= low:
        noise = f"{times}, inside the interval {low:.1f} to {high:.1f} ms of the latter"
        yield Finding(f"no clear speed gain ({noise}): do not ship exits", veto=True)
    else:
        yield Finding(f"routing is faster ({times})")


def promise_is_kept(results: Results) -> Iterator[Finding]:
    """What the certificate was asked for, against what these photos say; what was not kept is a veto."""
    promise = results.certificate
    if promise is None:
        return
    target, value, kind = promise.target, asked_value(promise.target), promise.target["kind"]
    figure = "{:.2f}x" if kind == "speedup" else "{:.4f}"
    text = "undefined" if promise.measured is None else figure.format(promise.measured)
    if promise.interval:
        text += " [{}, {}]".format(*map(figure.format, promise.interval))
    score = f" at score {target['score']:g}" if target.get("score") is not None else ""
    asked, got = {
        "speedup": (f"a speed-up of {value:g}x", f"{text} is reached"),
        "ap_drop": (f"at most {value:g} AP50 lost", f"{text} is lost"),
        "risk": (f"at most {value:g} missed and added per photo{score}", f"{text} is missed and added"),
    }[kind]
    sure, kept = f" (delta {target['delta']:g})" if "delta" in target else "", "kept" if promise.kept else "not kept"
    line = f"the certificate was asked for {asked}{sure}; on these photos {got}: {kept}"
    yield Finding(line, veto=not promise.kept)


def routing_keeps_accuracy(results: Results) -> Iterator[Finding]:
    """The routed detector may lose a tenth of the full path's AP50; where a certificate names another loss, that one
    counts."""
    full, routed = results.full.ap50, results.routed.ap50
    if not full or routed is None or _only_exit(results) == results.full.name:
        return
    figures, lost = f"AP50 {routed:.3f} routed against {full:.3f}", 1 - routed / full
    found, missed = map(results.full.number, ("true_positives", "false_negatives"))
    hits, score = results.routed.number("true_positives"), results.context.score
    if found is not None and hits is not None:
        at = "" if score is None else f"at score {score:g} "
        figures += f"; {at}{found} of {found + missed} found by the full path, {hits} routed"
    if _asked_for_ap(results):
        yield Finding(f"accuracy: {figures}")
    elif lost > LARGEST_LOSS:
        fix = "calibrate to lose less" if results.certificate else "raise ROUTING.THRESHOLDS, or calibrate"
        line = f"routing loses {lost:.0%} of the full path's AP50 ({figures}), more than {LARGEST_LOSS:.0%}"
        yield Finding(f"{line}: {fix}", veto=True)
    else:
        yield Finding(f"routing keeps the accuracy ({figures})")


def rivals_were_evaluated(results: Results) -> Iterator[Finding]:
    """Without a rival nobody knows whether a smaller net is the better choice, so nothing is shipped."""
    if not _comparable(results):
        what = "could be compared with it" if results.rivals else "was evaluated beside it"
        yield Finding(f"no static net {what} (EVAL.RIVALS): a smaller one may be the better choice", veto=True)


def full_path_is_worth_having(results: Results) -> Iterator[Finding]:
    """A rival that beats the detector without exits too: then the exits are not what to look at first; no veto."""
    full, plain, rivals = results.full.ap50, results.without_exits.ms, _comparable(results)
    if full is None or not rivals:
        return
    better = [one for one in rivals if one.ap50 > full + AP50_TOLERANCE and one.ms_interval[1] < plain]
    for best in sorted(better, key=lambda one: -one.ap50)[:1]:
        against = f"AP50 {best.ap50:.3f} against {full:.3f}, in {best.ms:.1f} ms against {plain:.1f}"
        line = f"{best.name} has more AP50 than the detector without exits, in less time ({against})"
        yield Finding(f"{line}: look at it first")


def no_static_net_is_better(results: Results) -> Iterator[Finding]:
    """A rival that is at least as accurate and as fast, and clearly better in one of them, is what to ship."""
    routed, comparable = results.routed, _comparable(results)
    if not comparable or routed.ap50 is None or routed.ms is None:
        return
    better = [one for one in comparable if _dominates(one, routed)]
    if better:
        most = max(one.ap50 for one in better)
        best = min((one for one in better if one.ap50 >= most - AP50_TOLERANCE), key=lambda one: one.ms)
        said = "ship the small net"
    else:
        best = min(comparable, key=lambda one: _shortfall(one, routed))
        said = "no static net is better than routing; the nearest"
    figures = f"has AP50 {best.ap50:.3f} against {routed.ap50:.3f} routed, in {best.ms:.1f} ms against {routed.ms:.1f}"
    change = f"{best.ap50 - routed.ap50:+.3f} AP50, {best.ms / routed.ms - 1:+.0%} time"
    yield Finding(f"{said}: {best.name} {figures} ({change})", veto=bool(better))


def rivals_share_the_runtime(results: Results) -> Iterator[Finding]:
    """Milliseconds of two runtimes say nothing about two networks."""
    others = [one.name for one in results.rivals if one.runtime != results.context.runtime]
    if others:
        line = "timed in ONNX Runtime, the exits in eager PyTorch, so their ms are not compared"
        yield Finding(f"{', '.join(others)}: {line}; set EVAL.RUNTIME to onnxruntime")


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


def agrees_with_full(results: Results) -> Iterator[Finding]:
    """On photos that nobody labelled: how far routing says what the full path says, right or wrong."""
    kept, lost, added = map(results.routed.number, ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {kept} of the {kept + lost} objects that the full path finds and adds {added}"
    yield Finding(f"nobody labelled these photos: {figures}; how accurate either is they cannot say", veto=True)


def asked_value(target: Target) -> float:
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
    """The exit that every photo takes; None where there is no early exit."""
    share = results.routed.exit_share
    return next((name for name, value in share.items() if value == 1.0), None) if len(share) > 1 else None


def _asked_for_ap(results: Results) -> bool:
    return results.certificate is not None and results.certificate.target["kind"] == "ap_drop"


def _open_exits(results: Results) -> list[ExitResult]:
    """The early exits where photos may leave."""
    thresholds = results.routed.thresholds or [0.0] * len(results.early)
    return [one for one, threshold in zip(results.early, thresholds, strict=True) if threshold < CLOSED]


def _comparable(results: Results) -> list[RivalResult]:
    """The rivals that were timed in the exits' runtime and have an AP50; not the exit that is to be shipped itself."""
    itself = f"{exit_that_does(results)} alone"
    same = [one for one in results.rivals if one.runtime == results.context.runtime]
    return [one for one in same if one.ap50 is not None and one.name != itself]


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

"""The verdict: whether to ship the exits, and the findings that lead to it.

The first rule is whether the full path detects. If it does not, no other rule is applied. Each rule of `RULES` reads
the results and yields findings. docs/metrics.md lists every finding and its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.results import ExitResult, Finding, Results, RivalResult, RoutedResult, Target, Verdict
from earlyexit_ssd.routing.policies import reads_taps

DETECTS_AP50 = 0.05
"""A full path with a lower AP50 does not detect, whatever its other figures are."""
DOUBTFUL_AP50 = 0.20
"""With a lower AP50, scores that are all alike or boxes outside the photos show that the full path does not detect."""
ALIKE = 0.2
"""Scores are alike if standard deviation / mean is below this. A detector that works has about 1 or more."""
ENOUGH_BOXES = 20
"""With fewer boxes, neither scores nor places are judged."""
MOVE_DEEPER_AP50 = 0.30
"""A first exit with a lower AP50 must move to a deeper layer."""
WORTH_IT_AP50 = 0.35
"""A first exit with a higher AP50 is worth it."""
FIRST_EXIT_SHARE = 0.75
"""Least AP50 of the first exit / AP50 of the full path, if the full path is a checkpoint taken as it is."""
DEEPEST_SHARE = 0.85
"""Least AP50 of the deepest exit / AP50 of the full path."""
LARGEST_LOSS = 0.10
"""Largest loss of AP50 by routing / AP50 of the full path."""
AP50_TOLERANCE = 0.005
"""A smaller difference in AP50 counts as equal: a few hundred photos cannot show it."""

Rule = Callable[[Results], Iterable[Finding]]


def judge(results: Results, rules: Sequence[Rule] | None = None) -> Verdict:
    """The verdict by ``rules``, `RULES` by default. If the full path does not detect, this is the only finding. A
    failed gate that --force passed is a veto, listed first."""
    forced = results.context.forced
    if rules is None:
        rules = RULES if results.early else (has_no_exits, no_rival_is_better, rivals_share_the_runtime)
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
    one = sufficient_single_exit(results)
    what = f"{one} alone" if one else "routed" if results.early else f"{results.full.name} alone"
    return Verdict(ship, what if ship else None, tuple(findings))


def has_no_exits(results: Results) -> Iterator[Finding]:
    """A detector without exits, such as one that `optimize` has chosen, is compared with rivals only."""
    yield Finding("the model has no early exit: every photo takes its full path")
    yield from rivals_were_evaluated(results)


def full_path_detects(results: Results) -> Iterator[Finding]:
    """The first rule: exits on a detector that does not detect are worth nothing."""
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
        fix = "train it, or check its weights, classes and boxes, before judging exits"
        signs = "; ".join([f"AP50 {ap50:.3f}{none}", *signs])
        yield Finding(f"the full path does not detect ({signs}): {fix}", veto=True)


def exits_pass_their_gates(results: Results) -> Iterator[Finding]:
    """Compare the first exit in use with 0.30 and 0.35 AP50 (with the full path, if that is a checkpoint as it was),
    and the deepest exit with the full path."""
    only = [one for one in results.early if one.name == sufficient_single_exit(results)]
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
    """An early exit that is better than the full path hints at a mistake, such as a damaged full path.

    It is no veto if the paired interval of (full - exit) includes values above 0: other photos might give the opposite
    result. Nor is it one if that exit takes every photo: no photo takes the full path then.
    """
    full = results.full
    for one in results.early:
        if full.ap50 is None or one.ap50 is None or one.ap50 <= full.ap50 + AP50_TOLERANCE:
            continue
        figures = f"{one.name}: AP50 {one.ap50:.3f} is above {full.name}'s {full.ap50:.3f}"
        difference = one.AP50_below_full_interval
        if difference and difference[1] > 0:
            yield Finding(f"{figures}, but not clearly: with other photos it might not be")
        elif one.name == sufficient_single_exit(results):
            yield Finding(f"{figures}: was the full path trained to its end?")
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If only the exits were trained on such photos, ship that exit alone"
            yield Finding(f"{figures}: {wrong} {unless}", veto=True)


def exits_save_time(results: Results) -> Iterator[Finding]:
    """Name the open exits that take as long as the detector without exits. This is no veto."""
    plain = results.without_exits.ms
    for one in _open_exits(results):
        if one.ms >= plain:
            figures = f"{one.name}: {one.ms:.1f} ms, no less than the {plain:.1f} ms without exits"
            yield Finding(f"{figures}: leaving there saves nothing")


def routing_uses_exits(results: Results) -> Iterator[Finding]:
    """If every photo takes the same exit, the router is useless. That exit is shipped alone if it is good enough."""
    only = _only_exit(results)
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    if only == results.full.name:
        yield Finding(_why_nobody_leaves(results, fix), veto=True)
    elif only and only == sufficient_single_exit(results):
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
        fix = "let tools/calibrate.py fit a policy that predicts empty photos (ROUTING.POLICY foreseen_emptiness)"
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


def certificate_is_kept(results: Results) -> Iterator[Finding]:
    """Compare the target of the certificate with the figure on these photos. A target that is not met is a veto."""
    certificate = results.certificate
    if certificate is None:
        return
    target, value, kind = certificate.target, asked_value(certificate.target), certificate.target["kind"]
    figure = "{:.2f}x" if kind == "speedup" else "{:.4f}"
    text = "undefined" if certificate.measured is None else figure.format(certificate.measured)
    if certificate.interval:
        text += " [{}, {}]".format(*map(figure.format, certificate.interval))
    score = f" at score {target['score']:g}" if target.get("score") is not None else ""
    asked, got = {
        "speedup": (f"a speed-up of {value:g}x", f"{text} is reached"),
        "ap_drop": (f"at most {value:g} AP50 lost", f"{text} is lost"),
        "risk": (f"at most {value:g} missed and added per photo{score}", f"{text} is missed and added"),
    }[kind]
    sure = f" (delta {target['delta']:g})" if "delta" in target else ""
    kept = "kept" if certificate.kept else "not kept"
    line = f"the certificate was asked for {asked}{sure}; on these photos {got}: {kept}"
    yield Finding(line, veto=not certificate.kept)


def routing_keeps_accuracy(results: Results) -> Iterator[Finding]:
    """The routed detector may lose a tenth of the full path's AP50, or what its certificate allows (``ap_drop``)."""
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
    """Without a rival nothing is shipped, since a smaller detector may be the better choice."""
    if not _comparable(results):
        what = "could be compared with it" if results.rivals else "was evaluated beside it"
        yield Finding(f"no rival {what} (EVAL.RIVALS): a smaller detector may be the better choice", veto=True)


def full_path_is_worth_having(results: Results) -> Iterator[Finding]:
    """Name a rival that is better than the detector without exits: try it before exits. This is no veto."""
    full, plain, rivals = results.full.ap50, results.without_exits.ms, _comparable(results)
    if full is None or not rivals:
        return
    better = [one for one in rivals if one.ap50 > full + AP50_TOLERANCE and one.ms_interval[1] < plain]
    for best in sorted(better, key=lambda one: -one.ap50)[:1]:
        against = f"AP50 {best.ap50:.3f} against {full:.3f}, in {best.ms:.1f} ms against {plain:.1f}"
        line = f"{best.name} has more AP50 than the detector without exits, in less time ({against})"
        yield Finding(f"{line}: look at it first")


def no_rival_is_better(results: Results) -> Iterator[Finding]:
    """Ship a rival instead if it matches the routed detector in AP50 and time and is clearly better in one of them."""
    routed, comparable = results.routed, _comparable(results)
    if not comparable or routed.ap50 is None or routed.ms is None:
        return
    better = [one for one in comparable if _dominates(one, routed)]
    if better:
        most = max(one.ap50 for one in better)
        best = min((one for one in better if one.ap50 >= most - AP50_TOLERANCE), key=lambda one: one.ms)
        said = "ship instead"
    else:
        best = min(comparable, key=lambda one: _shortfall(one, routed))
        said = "no rival is better than routing; the nearest"
    figures = f"has AP50 {best.ap50:.3f} against {routed.ap50:.3f} routed, in {best.ms:.1f} ms against {routed.ms:.1f}"
    change = f"{best.ap50 - routed.ap50:+.3f} AP50, {best.ms / routed.ms - 1:+.0%} time"
    yield Finding(f"{said}: {best.name} {figures} ({change})", veto=bool(better))


def rivals_share_the_runtime(results: Results) -> Iterator[Finding]:
    """Name the rivals that were timed in another runtime: their milliseconds cannot be compared."""
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
    certificate_is_kept,
    routing_keeps_accuracy,
    rivals_were_evaluated,
    full_path_is_worth_having,
    no_rival_is_better,
    rivals_share_the_runtime,
)


def agrees_with_full(results: Results) -> Iterator[Finding]:
    """On photos without labels: the agreement of the routed detector with the full path, right or wrong."""
    kept, lost, added = map(results.routed.number, ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {kept} of the {kept + lost} objects that the full path finds and adds {added}"
    yield Finding(f"nobody labelled these photos: {figures}; the accuracy of neither is known", veto=True)


def asked_value(target: Target) -> float:
    """The number of a certificate's target (older certificates of a risk call it ``epsilon``)."""
    return target["value"] if "value" in target else target["epsilon"]


def sufficient_single_exit(results: Results) -> str | None:
    """The early exit that takes every photo, keeps the accuracy and is clearly faster than the detector without exits;
    None if there is none."""
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
    """The exit that every photo takes; None if photos take several, or if there is no early exit."""
    share = results.routed.exit_share
    return next((name for name, value in share.items() if value == 1.0), None) if len(share) > 1 else None


def _asked_for_ap(results: Results) -> bool:
    return results.certificate is not None and results.certificate.target["kind"] == "ap_drop"


def _open_exits(results: Results) -> list[ExitResult]:
    """The early exits where photos may leave."""
    thresholds = results.routed.thresholds or [0.0] * len(results.early)
    return [one for one, threshold in zip(results.early, thresholds, strict=True) if threshold < CLOSED]


def _comparable(results: Results) -> list[RivalResult]:
    """The rivals with an AP50 that were timed in the runtime of the exits, without the exit that is shipped."""
    itself = f"{sufficient_single_exit(results)} alone"
    same = [one for one in results.rivals if one.runtime == results.context.runtime]
    return [one for one in same if one.ap50 is not None and one.name != itself]


def _dominates(rival: RivalResult, routed: RoutedResult) -> bool:
    """Whether the rival is not worse in AP50 (within the tolerance) or time, and clearly better in one of them: its
    whole time interval is below the routed time, or the paired AP50 interval is below 0."""
    if rival.ap50 < routed.ap50 - AP50_TOLERANCE or rival.ms > routed.ms:
        return False
    difference = rival.routed_minus_rival_AP50_interval
    return rival.ms_interval[1] < routed.ms or (difference is not None and difference[1] < 0)


def _shortfall(rival: RivalResult, routed: RoutedResult) -> float:
    """Missing AP50 plus additional time, each relative to the routed detector; 0 if the rival lacks neither."""
    accuracy = 1 - rival.ap50 / routed.ap50 if routed.ap50 else 0.0
    return max(accuracy, 0.0) + max(rival.ms / routed.ms - 1, 0.0)

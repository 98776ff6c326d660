"""The verdict: whether to ship the exits, and the findings that lead to it.

A rule is a function that reads the results and yields findings. A finding with ``veto`` is a reason not to ship. If
`check_full_path` yields a finding, the full path does not detect, and the rules of `RULES` are not applied.
docs/metrics.md lists every finding and its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import ExitResult, Finding, Results, RivalResult, RoutedResult, Target, Verdict
from earlyexit_ssd.routing.policies import reads_taps

DETECTS_AP50 = 0.05  # a full path with a lower AP50 does not detect, whatever its other figures are
DOUBTFUL_AP50 = 0.20  # with a lower AP50 it does not detect if its scores are alike or most boxes outside the photos
ALIKE = 0.2  # scores are alike if standard deviation / mean is below this; it is about 1 or more in a working detector
ENOUGH_BOXES = 20  # with fewer boxes, neither their scores nor their positions are judged
MOVE_DEEPER_AP50 = 0.30  # a first exit with a lower AP50 must move to a deeper layer
ENOUGH_AP50 = 0.35  # a first exit with a higher AP50 is accurate enough
FIRST_EXIT_SHARE = 0.75  # least AP50 of the first exit / AP50 of a full path that is an unchanged checkpoint
DEEPEST_SHARE = 0.85  # least AP50 of the deepest exit / AP50 of the full path
LARGEST_LOSS = 0.10  # largest loss of AP50 by routing / AP50 of the full path
AP50_TOLERANCE = 0.005  # AP50s that differ by less count as equal: a few hundred photos cannot show less
SHIP_INSTEAD = "ship instead"  # start of the finding that names a better rival

Rule = Callable[[Results], Iterable[Finding]]


def judge(results: Results) -> Verdict:
    """Return the verdict.

    If the full path does not detect, there is no other finding. If --force was used at a failed gate, this finding
    mentions it. Otherwise the use of --force is the first finding, and a veto.
    """
    forced = results.context.forced
    rules = RULES if results.early else (report_no_exits, compare_with_rivals, report_other_runtimes)
    if not results.context.labelled:
        rules = (report_agreement, check_speedup)  # the other rules need the accuracy, which is unknown
    elif findings := list(check_full_path(results)):
        said = "; --force was used on the way" if forced else ""
        return Verdict(False, None, (Finding(findings[0].line + said, veto=True),))
    findings = [finding for rule in rules for finding in rule(results)]
    if forced:
        line = "--force was used: a gate failed on the way to these figures, and the run went on"
        findings.insert(0, Finding(line, veto=True))
    ship = not any(finding.veto for finding in findings)
    if results.context.labelled and not ship and not any(one.line.startswith(SHIP_INSTEAD) for one in findings):
        ms = results.without_exits.ms
        figures = f"AP50 {results.full.ap50:.3f}" + ("" if ms is None else f", {ms:.1f} ms")
        findings.append(Finding(f"until this is fixed, use the detector without exits ({figures})"))
    single = exit_to_ship_alone(results)
    what = f"{single} alone" if single else "routed" if results.early else f"{results.full.name} alone"
    return Verdict(ship, what if ship else None, tuple(findings))


def report_no_exits(results: Results) -> Iterator[Finding]:
    """Report that the model has no early exit (`optimize` may choose such a detector), and require a rival."""
    yield Finding("the model has no early exit: every photo takes its full path")
    yield from check_rivals_exist(results)


def check_full_path(results: Results) -> Iterator[Finding]:
    """Veto if the full path does not detect, or if AP50 is undefined."""
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


def check_exit_accuracy(results: Results) -> Iterator[Finding]:
    """Judge the AP50 of the first and of the deepest exit in use.

    The first is compared with two limits, or with the full path if that is an unchanged checkpoint (``taken_over``).
    The deepest is compared with the full path.
    """
    single = [one for one in results.early if one.name == exit_to_ship_alone(results)]
    used = [one for one in single or _open_exits(results) or results.early if not one.empty]
    full = results.full.ap50
    if not used:
        yield Finding("the early exits are empty: only photos that seem to show nothing leave there")
        return
    ap50, deepest = used[0].ap50, used[-1].ap50
    first = f"{used[0].name}: AP50 {ap50:.3f}"
    if results.context.taken_over and full:
        first += f" is {ap50 / full:.1%} of the full path's {full:.3f}"
        limit, deep_enough = f"{FIRST_EXIT_SHARE:.0%}", ap50 >= FIRST_EXIT_SHARE * full
        said = f"{limit} or more: accurate enough" if deep_enough else f"under {limit}: move it deeper"
        yield Finding(f"{first}, {said}", veto=not deep_enough)
    elif ap50 < MOVE_DEEPER_AP50:
        yield Finding(f"{first} is under {MOVE_DEEPER_AP50:.2f}: move it deeper", veto=True)
    elif ap50 > ENOUGH_AP50:
        yield Finding(f"{first} is above {ENOUGH_AP50:.2f}: accurate enough")
    else:
        yield Finding(f"{first} is between {MOVE_DEEPER_AP50:.2f} and {ENOUGH_AP50:.2f}: borderline")
    if full and deepest < DEEPEST_SHARE * full:
        share = f"{used[-1].name}: AP50 {deepest:.3f} is {deepest / full:.1%} of the full path's {full:.3f}"
        yield Finding(f"{share}, under {DEEPEST_SHARE:.0%}: it needs more training", veto=True)


def check_exits_below_full(results: Results) -> Iterator[Finding]:
    """Name the early exits that are better than the full path. They hint at a mistake, such as a damaged full path.
    No veto if the interval of (AP50 of the full path - AP50 of the exit) reaches above 0, or if the exit is to be
    shipped alone."""
    full = results.full
    for one in results.early:
        if one.ap50 <= full.ap50 + AP50_TOLERANCE:
            continue
        figures = f"{one.name}: AP50 {one.ap50:.3f} is above {full.name}'s {full.ap50:.3f}"
        if one.AP50_below_full_interval and one.AP50_below_full_interval[1] > 0:
            yield Finding(f"{figures}, but not clearly: with other photos it might not be")
        elif one.name == exit_to_ship_alone(results):
            yield Finding(f"{figures}: was the full path trained to its end?")
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If only the exits were trained on photos like these, ship that exit alone"
            yield Finding(f"{figures}: {wrong} {unless}", veto=True)


def check_exit_times(results: Results) -> Iterator[Finding]:
    """Name, without a veto, the open exits that take at least as long as the detector without exits."""
    plain = results.without_exits.ms
    for one in _open_exits(results):
        if one.ms >= plain:
            figures = f"{one.name}: {one.ms:.1f} ms, no less than the {plain:.1f} ms without exits"
            yield Finding(f"{figures}: leaving there saves nothing")


def check_exit_use(results: Results) -> Iterator[Finding]:
    """If every photo takes the same exit, the router is useless. Recommend that exit alone if it is good enough,
    otherwise veto."""
    only = _exit_of_all_photos(results)
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    if only == results.full.name:
        yield Finding(_why_nobody_leaves(results, fix), veto=True)
    elif only and only == exit_to_ship_alone(results):
        yield Finding(f"every photo leaves at {only}: ship {only} alone, without the other branches and the router")
    elif only:
        yield Finding(f"every photo leaves at {only}, which is not good enough alone: {fix}", veto=True)


def _why_nobody_leaves(results: Results, fix: str) -> str:
    """The text of the finding if no photo leaves early; ``fix`` is the advice unless a special one applies."""
    closed = results.routed.thresholds and not _open_exits(results)
    no_logits = all(one.empty for one in results.early) and not reads_taps(results.routed.policy)
    policy = "ROUTING.POLICY foreseen_emptiness"
    if closed and results.certificate:
        return "the certificate opens no exit; every photo takes the full path: allow a larger loss, or train the exits"
    if closed:
        flags = f"--ap-drop 0.01 {policy}" if no_logits else "--ap-drop 0.01"
        fix = f"open them with tools/calibrate.py ({flags}) and evaluate with its certificate"
        return f"every exit is closed until routing is calibrated; every photo takes the full path: {fix}"
    if no_logits:
        fix = f"let tools/calibrate.py fit a policy that predicts empty photos ({policy})"
    return f"no photo leaves early; every one takes the full path: {fix}"


def check_speedup(results: Results) -> Iterator[Finding]:
    """Veto if the routed detector is not clearly faster than the detector without exits."""
    speedup, routed, plain = results.routed.speedup, results.routed.ms, results.without_exits
    if speedup is None or _exit_of_all_photos(results) == results.full.name:
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


def check_certificate(results: Results) -> Iterator[Finding]:
    """Veto if the certificate's target is not met on these photos."""
    certificate = results.certificate
    if certificate is None:
        return
    target, value = certificate.target, target_value(certificate.target)
    kind = target["kind"]
    figure = "{:.2f}x" if kind == "speedup" else "{:.4f}"
    text = "undefined" if certificate.measured is None else figure.format(certificate.measured)
    if certificate.interval:
        text += " [{}, {}]".format(*map(figure.format, certificate.interval))
    score = f" at score {target['score']:g}" if target.get("score") is not None else ""
    asked, got = {
        "speedup": (f"a speed-up of {value:g}x", f"{text} is reached"),
        "ap_drop": (f"at most {value:g} AP50 lost", f"{text} is lost"),
        "risk": (f"a mean loss of at most {value:g} per photo{score}", f"it is {text}"),
    }[kind]
    sure = f" (delta {target['delta']:g})" if "delta" in target else ""
    line = f"the certificate was asked for {asked}{sure}; on these photos {got}"
    yield Finding(f"{line}: {'kept' if certificate.kept else 'not kept'}", veto=not certificate.kept)


def check_routed_accuracy(results: Results) -> Iterator[Finding]:
    """Veto if routing loses more than `LARGEST_LOSS` of the full path's AP50, unless a certificate limits that loss."""
    full, routed = results.full.ap50, results.routed.ap50
    if not full or routed is None or _exit_of_all_photos(results) == results.full.name:
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


def check_rivals_exist(results: Results) -> Iterator[Finding]:
    """Veto if there is no rival to compare with."""
    if not _comparable(results):
        what = "could be compared" if results.rivals else "was evaluated"
        yield Finding(f"no rival {what} (EVAL.RIVALS): a smaller detector may be the better choice", veto=True)


def report_better_rival(results: Results) -> Iterator[Finding]:
    """Name, without a veto, the best rival with more AP50 and less time than the detector without exits."""
    full, plain = results.full.ap50, results.without_exits.ms
    better = [one for one in _comparable(results) if one.ap50 > full + AP50_TOLERANCE and one.ms_interval[1] < plain]
    for best in sorted(better, key=lambda one: -one.ap50)[:1]:
        against = f"AP50 {best.ap50:.3f} against {full:.3f}, in {best.ms:.1f} ms against {plain:.1f}"
        line = f"{best.name} has more AP50 than the detector without exits, in less time ({against})"
        yield Finding(f"{line}: look at it first")


def compare_with_rivals(results: Results) -> Iterator[Finding]:
    """Veto if a rival is better than the routed detector, and name it; otherwise name the nearest rival."""
    routed, comparable = results.routed, _comparable(results)
    if not comparable or routed.ap50 is None or routed.ms is None:
        return
    better = [one for one in comparable if _dominates(one, routed)]
    if better:
        most = max(one.ap50 for one in better)
        best = min((one for one in better if one.ap50 >= most - AP50_TOLERANCE), key=lambda one: one.ms)
        said = SHIP_INSTEAD
    else:
        best = min(comparable, key=lambda one: _relative_loss(one, routed))
        said = "no other detector that was measured is as accurate in as little time; the nearest"
    figures = f"has AP50 {best.ap50:.3f} against {routed.ap50:.3f} routed, in {best.ms:.1f} ms against {routed.ms:.1f}"
    change = f"{best.ap50 - routed.ap50:+.3f} AP50, {best.ms / routed.ms - 1:+.0%} time"
    yield Finding(f"{said}: {best.name} {figures} ({change})", veto=bool(better))


def report_other_runtimes(results: Results) -> Iterator[Finding]:
    """Name the rivals that were timed in another runtime."""
    others = [one.name for one in results.rivals if one.runtime != results.context.runtime]
    if others:
        exits = RUNTIME_TITLES[results.context.runtime]
        line = f"timed in ONNX Runtime, the exits in {exits}, so their ms are not compared"
        yield Finding(f"{', '.join(others)}: {line}; set EVAL.RUNTIME to onnxruntime")


RULES: tuple[Rule, ...] = (
    check_exit_accuracy,
    check_exits_below_full,
    check_exit_times,
    check_exit_use,
    check_speedup,
    check_certificate,
    check_routed_accuracy,
    check_rivals_exist,
    report_better_rival,
    compare_with_rivals,
    report_other_runtimes,
)


def report_agreement(results: Results) -> Iterator[Finding]:
    """For photos without labels: veto, and report the agreement of the routed detector with the full path."""
    found, lost, added = map(results.routed.number, ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {found} of the {found + lost} objects that the full path finds and adds {added}"
    yield Finding(f"nobody labelled these photos: {figures}; the accuracy of neither is known", veto=True)


def target_value(target: Target) -> float:
    """Return the number of a certificate's target: its ``value``, or ``epsilon`` for a risk."""
    return target["value"] if "value" in target else target["epsilon"]


def exit_to_ship_alone(results: Results) -> str | None:
    """Return the early exit that takes every photo, keeps the accuracy and is clearly faster than the detector without
    exits; None if there is none."""
    only, routed, full = _exit_of_all_photos(results), results.routed, results.full
    if only in (None, full.name) or routed.hybrid or routed.ap50 is None or routed.speedup is None:
        return None
    accurate = results.certificate.kept if _asked_for_ap(results) else routed.ap50 >= (1 - LARGEST_LOSS) * full.ap50
    faster = routed.speedup > 1 and routed.ms < results.without_exits.ms_interval[0]
    return only if accurate and faster else None


def _exit_of_all_photos(results: Results) -> str | None:
    """Return the exit that every photo takes, early or full; None if they take several or there is no early exit."""
    share = results.routed.exit_share
    return next((name for name, value in share.items() if value == 1.0), None) if len(share) > 1 else None


def _asked_for_ap(results: Results) -> bool:
    """Return whether there is a certificate whose target limits the loss of AP50."""
    return results.certificate is not None and results.certificate.target["kind"] == "ap_drop"


def _open_exits(results: Results) -> list[ExitResult]:
    """Return the open early exits."""
    thresholds = results.routed.thresholds or [0.0] * len(results.early)
    return [one for one, threshold in zip(results.early, thresholds, strict=True) if threshold < CLOSED]


def _comparable(results: Results) -> list[RivalResult]:
    """Return the rivals with an AP50 and timed in the exits' runtime, except the exit that is shipped alone."""
    itself = f"{exit_to_ship_alone(results)} alone"
    same = [one for one in results.rivals if one.runtime == results.context.runtime]
    return [one for one in same if one.ap50 is not None and one.name != itself]


def _dominates(rival: RivalResult, routed: RoutedResult) -> bool:
    """Whether the rival has no less AP50 (within `AP50_TOLERANCE`), takes no more time, and is clearly better in one of
    the two. It is clearly better if its whole time interval is below the routed time, or if the paired interval of
    (routed AP50 - rival's AP50) is below 0."""
    if rival.ap50 < routed.ap50 - AP50_TOLERANCE or rival.ms > routed.ms:
        return False
    difference = rival.routed_minus_rival_AP50_interval
    return rival.ms_interval[1] < routed.ms or (difference is not None and difference[1] < 0)


def _relative_loss(rival: RivalResult, routed: RoutedResult) -> float:
    """Lost AP50 plus additional time of the rival, each as a share of the routed detector's; a gain counts as 0. The
    nearest rival has the smallest sum."""
    accuracy = 1 - rival.ap50 / routed.ap50 if routed.ap50 else 0.0
    return max(accuracy, 0.0) + max(rival.ms / routed.ms - 1, 0.0)

"""The verdict: whether to ship the exits, and the findings that lead to it.

A rule is a function that yields findings from the results. A finding with ``veto`` is a reason not to ship.
docs/metrics.md lists every finding and its condition.
"""

from collections.abc import Callable, Iterable, Iterator

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.config.check import C4_LAYER
from earlyexit_ssd.evaluation.cost import RUNTIME_TITLES
from earlyexit_ssd.evaluation.results import ExitResult, Finding, Results, RivalResult, RoutedResult, Target, Verdict
from earlyexit_ssd.routing.policies import reads_taps

DETECTS_AP50 = 0.05  # a full path with a lower AP50 does not detect
DOUBTFUL_AP50 = 0.20  # with a lower AP50 it does not detect if its scores are alike or most boxes lie outside photos
ALIKE = 0.2  # scores are alike if standard deviation / mean is lower; in a working detector it is about 1 or more
ENOUGH_BOXES = 20  # with fewer boxes, neither scores nor positions are judged
MOVE_DEEPER_AP50 = 0.30  # the first exit must move to a deeper layer if its AP50 is lower
ENOUGH_AP50 = 0.35  # the first exit is accurate enough if its AP50 is higher
FIRST_EXIT_SHARE = 0.75  # minimum of AP50 of the first exit / AP50 of a full path that is an unchanged checkpoint
DEEPEST_SHARE = 0.85  # minimum of AP50 of the deepest exit / AP50 of the full path
LARGEST_LOSS = 0.10  # maximum of AP50 lost by routing / AP50 of the full path
ENOUGH_PHOTOS = 100  # with fewer photos it is uncertain whether a rival is better
AP50_TOLERANCE = 0.005  # smaller differences in AP50 do not count, because a few hundred photos cannot show them
SHIP_INSTEAD = "ship instead"  # start of the finding that names a better rival

Rule = Callable[[Results], Iterable[Finding]]


def judge(results: Results) -> Verdict:
    """Return the verdict. If the full path does not detect, this is the only finding."""
    context = results.context
    rules = RULES
    if context.untrained or not results.early:
        rules = (report_no_exits, compare_with_rivals, report_other_runtimes)
    if not context.labelled:
        rules = (report_agreement, check_certificate, check_speedup)  # the other rules need AP, which needs labels
    elif findings := list(check_full_path(results)):
        forced = "; --force was used on the way" if context.forced else ""
        return Verdict(False, None, (Finding(findings[0].line + forced, veto=True),))
    findings = [finding for rule in rules for finding in rule(results)]
    if context.forced:
        line = "--force was used: a gate failed on the way to these figures, and the run went on"
        findings.insert(0, Finding(line, veto=True))
    ship = not any(finding.veto for finding in findings)
    if context.labelled and not ship and not any(finding.line.startswith(SHIP_INSTEAD) for finding in findings):
        ms = results.without_exits.ms
        figures = f"AP50 {results.full.ap50:.3f}" + ("" if ms is None else f", {ms:.1f} ms")
        findings.append(Finding(f"until this is fixed, use the detector without exits ({figures})"))
    single = exit_to_ship_alone(results)
    what = f"{single} alone" if single else "routed" if results.early else f"{results.full.name} alone"
    return Verdict(ship, what if ship else None, tuple(findings))


def report_no_exits(results: Results) -> Iterator[Finding]:
    """Report that the model has no early exit, or veto because its exits are untrained. Veto if there is no rival.
    (`optimize` may choose a detector without exits.)"""
    if results.early:
        yield Finding("the exits are untrained: train them (PHASES), or use the detector without exits", veto=True)
    else:
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
    """Judge the AP50 of the first and of the deepest exit with a branch: of the open exits, or of all if none is open.
    If an exit is to be shipped alone, only this exit is judged.

    The first is compared with two limits, or with the full path if this is an unchanged checkpoint (``taken_over``).
    The deepest is compared with the full path.
    """
    single = [early for early in results.early if early.name == exit_to_ship_alone(results)]
    judged = single or _open_exits(results) or results.early
    used = [early for early in judged if not early.empty]
    full = results.full.ap50
    if not used:
        yield Finding("the early exits are empty: only photos that seem to show nothing leave there")
        return
    ap50, deepest = used[0].ap50, used[-1].ap50
    first, train = f"{used[0].name}: AP50 {ap50:.3f}", "it needs more training"
    fix = "move it deeper" if (used[0].layer or 0) < C4_LAYER - 1 else train
    if results.context.taken_over and full:
        first += f" is {ap50 / full:.1%} of the full path's {full:.3f}"
        limit, too_low = f"{FIRST_EXIT_SHARE:.0%}", ap50 < FIRST_EXIT_SHARE * full
        judgement = f"under {limit}: {fix}" if too_low else f"{limit} or more: accurate enough"
        yield Finding(f"{first}, {judgement}", veto=too_low)
    elif too_low := ap50 < MOVE_DEEPER_AP50:
        yield Finding(f"{first} is under {MOVE_DEEPER_AP50:.2f}: {fix}", veto=True)
    elif ap50 > ENOUGH_AP50:
        yield Finding(f"{first} is above {ENOUGH_AP50:.2f}: accurate enough")
    else:
        yield Finding(f"{first} is between {MOVE_DEEPER_AP50:.2f} and {ENOUGH_AP50:.2f}: borderline")
    if full and deepest < DEEPEST_SHARE * full and not (too_low and len(used) == 1):  # one veto per exit
        share = f"{used[-1].name}: AP50 {deepest:.3f} is {deepest / full:.1%} of the full path's {full:.3f}"
        yield Finding(f"{share}, under {DEEPEST_SHARE:.0%}: {train}", veto=True)


def check_exits_below_full(results: Results) -> Iterator[Finding]:
    """Veto if an early exit is clearly better than the full path, which may be damaged. An exit that is to be shipped
    alone gives no veto, nor does one that was trained behind an unchanged checkpoint (``taken_over``)."""
    full = results.full
    for early in results.early:
        if early.ap50 <= full.ap50 + AP50_TOLERANCE:
            continue
        figures = f"{early.name}: AP50 {early.ap50:.3f} is above {full.name}'s {full.ap50:.3f}"
        full_minus_exit = early.AP50_below_full_interval
        if full_minus_exit and full_minus_exit[1] > 0:
            yield Finding(f"{figures}, but not clearly: with other photos it might not be")
        elif early.name == exit_to_ship_alone(results):
            yield Finding(f"{figures}: was the full path trained to its end?")
        elif results.context.taken_over:
            yield Finding(f"{figures}: the exits were trained, the full path is the checkpoint as it was")
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If only the exits were trained on photos like these, ship that exit alone"
            yield Finding(f"{figures}: {wrong} {unless}", veto=True)


def check_exit_times(results: Results) -> Iterator[Finding]:
    """Name, without a veto, the open exits that take at least as long as the detector without exits."""
    plain = results.without_exits.ms
    for early in _open_exits(results):
        if early.ms >= plain:
            figures = f"{early.name}: {early.ms:.1f} ms, no less than the {plain:.1f} ms without exits"
            yield Finding(f"{figures}: leaving there saves nothing")


def check_exit_use(results: Results) -> Iterator[Finding]:
    """If every photo takes the same exit, recommend this exit alone if it is good enough, otherwise veto."""
    only = _exit_of_all_photos(results)
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    if only == results.full.name:
        yield Finding(_no_photo_leaves(results, fix), veto=True)
    elif only and only == exit_to_ship_alone(results):
        yield Finding(f"every photo leaves at {only}: ship {only} alone, without the other branches and the router")
    elif only:
        yield Finding(f"every photo leaves at {only}, which is not good enough alone: {fix}", veto=True)


def _no_photo_leaves(results: Results, fix: str) -> str:
    """Return the text of the finding that no photo leaves early. ``fix`` is the advice if no other is known."""
    closed = results.routed.thresholds and not _open_exits(results)
    # the policy reads logits, which empty exits do not have
    unsuitable = all(early.empty for early in results.early) and not reads_taps(results.routed.policy)
    policy = "ROUTING.POLICY foreseen_emptiness"
    if closed and results.certificate:
        return "the certificate opens no exit; every photo takes the full path: allow a larger loss, or train the exits"
    if closed:
        flags = f"--ap-drop 0.01 {policy}" if unsuitable else "--ap-drop 0.01"
        fix = f"open them with tools/calibrate.py ({flags}) and evaluate with its certificate"
        return f"every exit is closed until routing is calibrated; every photo takes the full path: {fix}"
    if unsuitable:
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
    """Veto if the certificate's target is not met on these photos. Without labels some targets cannot be judged."""
    certificate = results.certificate
    needs_labels = certificate and "labels" in (certificate.target.get("reference"), certificate.target["kind"])
    if certificate is None or (not results.context.labelled and (needs_labels or certificate.measured is None)):
        return
    target, value = certificate.target, target_value(certificate.target)
    kind = target["kind"]
    figure = "{:.2f}x" if kind == "speedup" else "{:.4f}"
    text = "undefined" if certificate.measured is None else figure.format(certificate.measured)
    if certificate.interval:
        text += " [{}, {}]".format(*map(figure.format, certificate.interval))
    score = f" at score {target['score']:g}" if target.get("score") is not None else ""
    unit = {"ms": " in ms", "mmacs": " in MMAC"}.get(certificate.unit, "")
    target_text, measured = {
        "speedup": (f"a speed-up of {value:g}x{unit}", f"{text} is reached"),
        "ap_drop": (f"at most {value:g} AP50 lost", f"{text} is lost"),
        "risk": (f"a mean loss of at most {value:g} per photo{score}", f"it is {text}"),
    }[kind]
    delta = f" (delta {target['delta']:g})" if "delta" in target else ""
    line = f"the certificate was asked for {target_text}{delta}; on these photos {measured}"
    yield Finding(f"{line}: {'kept' if certificate.kept else 'not kept'}", veto=not certificate.kept)


def check_routed_accuracy(results: Results) -> Iterator[Finding]:
    """Veto if routing loses more than `LARGEST_LOSS` of the full path's AP50, unless a certificate limits that loss."""
    full, routed = results.full.ap50, results.routed.ap50
    if not full or routed is None or _exit_of_all_photos(results) == results.full.name:
        return
    figures, lost = f"AP50 {routed:.3f} routed against {full:.3f}", 1 - routed / full
    found, missed = map(results.full.number, ("true_positives", "false_negatives"))
    found_routed, score = results.routed.number("true_positives"), results.context.score
    if found is not None and found_routed is not None:
        at = "" if score is None else f"at score {score:g} "
        figures += f"; {at}{found} of {found + missed} found by the full path, {found_routed} routed"
    if _certificate_limits_ap(results):
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
        reason = "could be compared" if results.rivals else "was evaluated"
        yield Finding(f"no rival {reason} (EVAL.RIVALS): a smaller detector may be the better choice", veto=True)


def report_better_rival(results: Results) -> Iterator[Finding]:
    """Report, without a veto, the fastest of the best rivals that are better and faster than the detector without
    exits, unless the rival to ship instead has as much AP50."""
    full, plain = results.full.ap50, results.without_exits.ms
    more_accurate = [rival for rival in _comparable(results) if rival.ap50 > full + AP50_TOLERANCE]
    best = _fastest_of_best(rival for rival in more_accurate if rival.ms_interval[1] < plain)
    named = _rival_to_ship(results)
    if best and (named is None or named.ap50 < best.ap50 - AP50_TOLERANCE):
        figures = f"AP50 {best.ap50:.3f} against {full:.3f}, in {best.ms:.1f} ms against {plain:.1f}"
        line = f"{best.name} has more AP50 than the detector without exits, in less time ({figures})"
        yield Finding(f"{line}: look at it first")


def compare_with_rivals(results: Results) -> Iterator[Finding]:
    """Veto if there is a `_rival_to_ship`. Otherwise name the rival that comes nearest. A better rival is uncertain on
    few photos, or if its AP50 may be lower by more than `LARGEST_LOSS`."""
    routed, comparable = results.routed, _comparable(results)
    if not comparable or routed.ap50 is None or routed.ms is None:
        return
    better = _rival_to_ship(results)
    start = SHIP_INSTEAD if better else "no other detector that was measured is clearly better; the nearest"
    best = better or min(comparable, key=lambda rival: _relative_loss(rival, routed))
    figures = f"has AP50 {best.ap50:.3f} against {routed.ap50:.3f} routed, in {best.ms:.1f} ms against {routed.ms:.1f}"
    photos, lost = results.context.images, best.routed_minus_rival_AP50_interval
    interval = f" [{-lost[1]:+.3f}, {-lost[0]:+.3f}]" if lost else ""
    change = f"{best.ap50 - routed.ap50:+.3f} AP50{interval}, {best.ms / routed.ms - 1:+.0%} time, {photos} photos"
    uncertain = better and (photos < ENOUGH_PHOTOS or (lost and lost[1] > LARGEST_LOSS * routed.ap50))
    doubt = "; this is uncertain: evaluate on more photos" if uncertain else ""
    yield Finding(f"{start}: {best.name} {figures} ({change}){doubt}", veto=bool(better))


def report_other_runtimes(results: Results) -> Iterator[Finding]:
    """Name the rivals that were timed in another runtime."""
    others = [rival.name for rival in results.rivals if rival.runtime != results.context.runtime]
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
    """Veto because the photos have no labels. Report the agreement of the routed detector with the full path."""
    found, lost, added = map(results.routed.number, ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {found} of the {found + lost} objects that the full path finds and adds {added}"
    yield Finding(f"nobody labelled these photos: {figures}; the accuracy of neither is known", veto=True)


def target_value(target: Target) -> float:
    """Return the limit in a certificate's target: ``epsilon`` for a risk, otherwise ``value``."""
    return target["value"] if "value" in target else target["epsilon"]


def exit_to_ship_alone(results: Results) -> str | None:
    """Return the early exit that takes every photo, keeps the accuracy and is clearly faster than the detector without
    exits; None if there is none."""
    only, routed, full = _exit_of_all_photos(results), results.routed, results.full
    if only in (None, full.name) or routed.hybrid or routed.ap50 is None or routed.speedup is None:
        return None
    accurate = routed.ap50 >= (1 - LARGEST_LOSS) * full.ap50
    if _certificate_limits_ap(results):
        accurate = results.certificate.kept
    faster = routed.speedup > 1 and routed.ms < results.without_exits.ms_interval[0]
    return only if accurate and faster else None


def _exit_of_all_photos(results: Results) -> str | None:
    """Return the exit that every photo takes, early or full; None if they take several or there is no early exit."""
    share = results.routed.exit_share
    return next((name for name, value in share.items() if value == 1.0), None) if len(share) > 1 else None


def _certificate_limits_ap(results: Results) -> bool:
    return results.certificate is not None and results.certificate.target["kind"] == "ap_drop"


def _open_exits(results: Results) -> list[ExitResult]:
    thresholds = results.routed.thresholds or [0.0] * len(results.early)
    return [early for early, threshold in zip(results.early, thresholds, strict=True) if threshold < CLOSED]


def _comparable(results: Results) -> list[RivalResult]:
    """Return the rivals with an AP50 that were timed in the exits' runtime, except the exit that is shipped alone."""
    shipped = f"{exit_to_ship_alone(results)} alone"
    timed_alike = [rival for rival in results.rivals if rival.runtime == results.context.runtime]
    return [rival for rival in timed_alike if rival.ap50 is not None and rival.name != shipped]


def _fastest_of_best(rivals: Iterable[RivalResult]) -> RivalResult | None:
    """Return the fastest of the rivals within `AP50_TOLERANCE` of the highest AP50; None without rivals."""
    rivals = list(rivals)
    limit = max((rival.ap50 for rival in rivals), default=0.0) - AP50_TOLERANCE
    return min((rival for rival in rivals if rival.ap50 >= limit), key=lambda rival: rival.ms, default=None)


def _rival_to_ship(results: Results) -> RivalResult | None:
    """Return the fastest of the best rivals that are better than the routed detector (see `_dominates`)."""
    routed = results.routed
    if routed.ap50 is None or routed.ms is None:
        return None
    return _fastest_of_best(rival for rival in _comparable(results) if _dominates(rival, routed))


def _dominates(rival: RivalResult, routed: RoutedResult) -> bool:
    """Return True if the rival has no less AP50 (within `AP50_TOLERANCE`), takes no more time, and is clearly better in
    one of them: its time interval is below the routed time, or the interval of the difference (routed AP50 minus its
    AP50) is below 0."""
    if rival.ap50 < routed.ap50 - AP50_TOLERANCE or rival.ms > routed.ms:
        return False
    difference = rival.routed_minus_rival_AP50_interval
    return rival.ms_interval[1] < routed.ms or (difference is not None and difference[1] < 0)


def _relative_loss(rival: RivalResult, routed: RoutedResult) -> float:
    """Return AP50 lost plus time added by the rival, each as a share of the routed detector's. A gain counts as 0."""
    accuracy = 1 - rival.ap50 / routed.ap50 if routed.ap50 else 0.0
    return max(accuracy, 0.0) + max(rival.ms / routed.ms - 1, 0.0)

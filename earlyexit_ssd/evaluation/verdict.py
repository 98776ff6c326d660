"""The figures in plain words: are these exits worth shipping?

Each rule reads the metrics of `evaluate_exits` and says what it finds; add a rule by adding a function to
`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from earlyexit_ssd.evaluation.runtime import runtime_of
from earlyexit_ssd.routing.policies import foresees

MOVE_DEEPER_AP50 = 0.30
WORTH_IT_AP50 = 0.35
LARGEST_LOSS = 0.10
AP50_TOLERANCE = 0.005
"""Half a point of AP50 is less than a few hundred photos can tell apart: no sign of a mistake, no reason for exits."""

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict; with ``blocks``, a reason not to ship the exits."""

    line: str
    blocks: bool = False


@dataclass(frozen=True)
class Verdict:
    """``ship`` is True when no finding speaks against it; ``lines`` are the findings, one sentence each."""

    ship: bool
    lines: list[str]


Rule = Callable[[Metrics], list[Finding]]


def first_exit_detects(metrics: Metrics) -> list[Finding]:
    """The first exit with a branch: under 0.30 AP50 must move deeper, above 0.35 is worth it, between is borderline."""
    if len(metrics["exits"]) < 2:
        return [Finding("the model has no early exit: there is nothing to ship", blocks=True)]
    early = [one for one in metrics["exits"][:-1] if not one.get("empty")]
    if not early:
        return [Finding("the early exits are empty: only photos that seem to show nothing leave there")]
    first = early[0]
    name, ap50 = first["name"], first["AP50"]
    if ap50 is None:
        return [Finding(f"{name}: AP50 is undefined, since the photos show no object to find", blocks=True)]
    if ap50 < MOVE_DEEPER_AP50:
        return [Finding(f"{name}: AP50 {ap50:.3f} is under {MOVE_DEEPER_AP50:.2f}: move it deeper", blocks=True)]
    if ap50 > WORTH_IT_AP50:
        return [Finding(f"{name}: AP50 {ap50:.3f} is above {WORTH_IT_AP50:.2f}: worth it")]
    return [Finding(f"{name}: AP50 {ap50:.3f} is between {MOVE_DEEPER_AP50:.2f} and {WORTH_IT_AP50:.2f}: borderline")]


def exits_stay_below_full(metrics: Metrics) -> list[Finding]:
    """An early exit that beats the full path shows a mistake (a spoilt full path, exits mixed up), unless the paired
    interval of (full - exit) reaches above zero: then other photos might say otherwise, and it is no veto."""
    *early, full = metrics["exits"]
    if full["AP50"] is None:
        return []
    limit = full["AP50"] + AP50_TOLERANCE
    findings = []
    for one in early:
        if one["AP50"] is None or one["AP50"] <= limit:
            continue
        figures = f"{one['name']}: AP50 {one['AP50']:.3f} is above {full['name']}'s {full['AP50']:.3f}"
        if _within_noise(one):
            findings.append(Finding(f"{figures}, but not clearly: with other photos it might not be"))
        else:
            wrong = "something is wrong: was the full path trained to its end, and is it unchanged since?"
            unless = "If the exits have learnt from photos of a kind that it never saw, ship that exit alone"
            findings.append(Finding(f"{figures}: {wrong} {unless}", blocks=True))
    return findings


def exits_save_time(metrics: Metrics) -> list[Finding]:
    """Note the early exits that take as long as the whole detector without exits; no veto by itself."""
    plain = metrics["without_exits"]["ms"]
    return [
        Finding(
            f"{one['name']}: {one['ms']:.1f} ms, no less than the {plain:.1f} ms without exits:"
            " leaving there saves nothing"
        )
        for one in metrics["exits"][:-1]
        if one["ms"] >= plain
    ]


def routing_uses_exits(metrics: Metrics) -> list[Finding]:
    """Every photo at one exit means that the router decides nothing."""
    share = metrics["routed"]["exit_share"]
    only = [name for name, value in share.items() if value == 1.0]
    if not only or len(share) < 2:
        return []
    fix = "change the thresholds (ROUTING.THRESHOLDS), or calibrate for another target"
    empty = all(one.get("empty") for one in metrics["exits"][:-1])
    if only[0] == metrics["exits"][-1]["name"] and empty and not foresees(metrics["routed"].get("policy")):
        fix = "let tools/calibrate.py fit a policy that foresees empty frames (ROUTING.POLICY foreseen_emptiness)"
    return [Finding(f"every image leaves at {only[0]}: routing collapsed; {fix}", blocks=True)]


def routing_is_faster(metrics: Metrics) -> list[Finding]:
    """The routed detector must take less time than the same detector without exits."""
    speedup = metrics["routed"]["speedup"]
    if speedup is None:
        return []
    routed, plain = metrics["routed"]["ms"], metrics["without_exits"]["ms"]
    times = f"{routed:.1f} ms routed against {plain:.1f} ms without exits, {speedup:.2f}x"
    if speedup <= 1.0:
        return [Finding(f"no speed gain ({times}): do not ship exits", blocks=True)]
    low, high = metrics["without_exits"]["ms_interval"]
    if routed >= low:
        noise = f"{times}, inside the interval {low:.1f} to {high:.1f} ms of the latter"
        return [Finding(f"no clear speed gain ({noise}): do not ship exits", blocks=True)]
    return [Finding(f"routing is faster ({times})")]


def routing_keeps_accuracy(metrics: Metrics) -> list[Finding]:
    """The routed detector may lose a tenth of the full path's AP50, the bargain that this project is after."""
    full, routed = metrics["exits"][-1]["AP50"], metrics["routed"]["AP50"]
    if not full or routed is None:
        return []
    lost = 1 - routed / full
    figures = f"AP50 {routed:.3f} routed against {full:.3f}"
    if lost > LARGEST_LOSS:
        line = f"routing loses {lost:.0%} of the full path's AP50 ({figures}), more than {LARGEST_LOSS:.0%}"
        return [Finding(f"{line}: raise ROUTING.THRESHOLDS, or calibrate to lose less", blocks=True)]
    return [Finding(f"routing keeps the accuracy ({figures})")]


def no_static_net_is_better(metrics: Metrics) -> list[Finding]:
    """A rival that is at least as accurate and as fast, and clearly better in one of them, is what to ship."""
    routed, comparable = metrics["routed"], _comparable(metrics)
    if not comparable or routed["AP50"] is None or routed["ms"] is None:
        return []
    better = [one for one in comparable if _dominates(one, routed)]
    if better:
        most = max(one["AP50"] for one in better)
        best = min((one for one in better if one["AP50"] >= most - AP50_TOLERANCE), key=lambda one: one["ms"])
        return [Finding(f"ship the small net: {_comparison(best, routed)}", blocks=True)]
    nearest = min(comparable, key=lambda one: _shortfall(one, routed))
    return [Finding(f"no static net is better than routing; the nearest: {_comparison(nearest, routed)}")]


def rivals_were_evaluated(metrics: Metrics) -> list[Finding]:
    """Without rivals nobody knows whether a smaller net is the better choice; no veto, but said."""
    if metrics.get("rivals") or len(metrics["exits"]) < 2:
        return []
    return [Finding("no static net was evaluated beside it (EVAL.RIVALS): a smaller one may be the better choice")]


def full_path_is_worth_having(metrics: Metrics) -> list[Finding]:
    """A rival that beats the detector without exits too: then the exits are not what to look at first; no veto."""
    full, plain = metrics["exits"][-1], metrics["without_exits"]
    if full["AP50"] is None:
        return []
    more = [one for one in _comparable(metrics) if one["AP50"] > full["AP50"] + AP50_TOLERANCE]
    better = [one for one in more if one["ms_interval"][1] < plain["ms"]]
    if not better:
        return []
    best = max(better, key=lambda one: one["AP50"])
    against = f"AP50 {best['AP50']:.3f} against {full['AP50']:.3f}, in {best['ms']:.1f} ms against {plain['ms']:.1f}"
    line = f"{best['name']} has more AP50 than the detector without exits, in less time ({against})"
    return [Finding(f"{line}: look at it first")]


def rivals_share_the_runtime(metrics: Metrics) -> list[Finding]:
    """Milliseconds of two runtimes say nothing about two networks."""
    others = [one["name"] for one in metrics.get("rivals", []) if one["runtime"] != runtime_of(metrics)]
    if not others:
        return []
    line = f"{', '.join(others)}: timed in ONNX Runtime, the exits in eager PyTorch, so their ms are not compared"
    return [Finding(f"{line}; set EVAL.RUNTIME to onnxruntime")]


RULES: tuple[Rule, ...] = (
    first_exit_detects,
    exits_stay_below_full,
    exits_save_time,
    routing_uses_exits,
    routing_is_faster,
    routing_keeps_accuracy,
    rivals_were_evaluated,
    full_path_is_worth_having,
    no_static_net_is_better,
    rivals_share_the_runtime,
)


def agrees_with_full(metrics: Metrics) -> list[Finding]:
    """On photos that nobody labelled: how far routing says what the full path says, right or wrong."""
    routed = metrics["routed"]
    kept, lost, added = (routed[key] for key in ("true_positives", "false_negatives", "false_positives"))
    figures = f"routing keeps {kept} of the {kept + lost} objects that the full path finds and adds {added}"
    line = f"nobody labelled these photos: {figures}; how accurate either is they cannot say"
    return [Finding(line, blocks=True)]


def judge(metrics: Metrics, forced: bool = False, rules: Sequence[Rule] = RULES) -> Verdict:
    """Apply the rules to the metrics of `evaluate_exits`.

    Args:
        metrics: with the keys ``exits``, ``without_exits`` and ``routed``, and where there are rivals ``rivals``.
        forced: the run went on with --force past a gate that had failed; the verdict says so first.
        rules: the rules, in the order of their lines.
    """
    if not metrics.get("context", {}).get("labelled", True):
        rules = (agrees_with_full, routing_is_faster)  # the others speak of accuracy
    findings = [finding for rule in rules for finding in rule(metrics)]
    lines = [finding.line for finding in findings]
    if forced:
        lines.insert(0, "--force was used: a gate failed on the way to these figures, and the run went on")
    return Verdict(ship=not any(finding.blocks for finding in findings), lines=lines)


def _within_noise(one: Mapping[str, Any]) -> bool:
    """Whether the paired interval of (full - exit) reaches above zero."""
    below_full = one.get("AP50_below_full_interval")
    return bool(below_full and below_full[1] > 0)


def _comparable(metrics: Metrics) -> list[Metrics]:
    """The rivals that were timed in the exits' runtime and have an AP50."""
    runtime = runtime_of(metrics)
    return [one for one in metrics.get("rivals", []) if one["AP50"] is not None and one["runtime"] == runtime]


def _dominates(rival: Metrics, routed: Metrics) -> bool:
    """In neither figure worse (AP50 within the tolerance), and in one of them better by more than its interval."""
    if rival["AP50"] < routed["AP50"] - AP50_TOLERANCE or rival["ms"] > routed["ms"]:
        return False
    difference = rival["routed_minus_rival_AP50_interval"]
    return rival["ms_interval"][1] < routed["ms"] or (difference is not None and difference[1] < 0)


def _shortfall(rival: Metrics, routed: Metrics) -> float:
    """What the rival lacks, as shares of the routed detector's figures; 0 where it lacks nothing."""
    accuracy = 1 - rival["AP50"] / routed["AP50"] if routed["AP50"] else 0.0
    return max(accuracy, 0.0) + max(rival["ms"] / routed["ms"] - 1, 0.0)


def _comparison(rival: Metrics, routed: Metrics) -> str:
    return (
        f"{rival['name']} has AP50 {rival['AP50']:.3f} against {routed['AP50']:.3f} routed, in {rival['ms']:.1f} ms"
        f" against {routed['ms']:.1f} ({rival['AP50'] - routed['AP50']:+.3f} AP50,"
        f" {rival['ms'] / routed['ms'] - 1:+.0%} time)"
    )

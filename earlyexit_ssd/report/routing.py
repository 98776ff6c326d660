"""Policies at equal mean costs: a table, a page of text and a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from PIL import Image

from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.report.numbers import figure
from earlyexit_ssd.report.plot import PLAIN, draw_chart
from earlyexit_ssd.report.published_rules import published_rules_table
from earlyexit_ssd.report.reference_lines import LINES, reference_lines_table, with_interval

COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f", "#2c7a7b", "#c53030")


def write_routing(folder: Path, results: Mapping[str, Any]) -> None:
    """routing.json, routing.md and routing.png, each complete or not at all."""
    write_text(folder / "routing.md", routing_table(results) + "\n")
    write_image(folder / "routing.png", routing_chart(results))
    write_json(folder / "routing.json", results)


def routing_table(results: Mapping[str, Any]) -> str:
    """Per policy its AP50 at every budget and the share of the gap closed; coin and oracle of the best policy."""
    context = results["context"]
    unit = context["cost_model"]["unit"]
    policies = results["policies"]
    best = results["best"]
    budgets = [entry["budget"] for entry in policies[best]["budgets"]]
    lines = [
        f"AP50 on {', '.join(context['test'])} (n {context['images']}, seed {context['seed']}) with thresholds from "
        f"{', '.join(context['calib'])} (n {context['calib_photos']}); in brackets the mean cost on the test photos, "
        f"{unit}. By AP: pooled, of the best oracle's lead in AP instead of AP50. On calib: pooled there, of the best "
        "oracle's lead in AP50; it chooses the policy. ms: to score one photo, eager PyTorch.",
        "",
        _row(
            "policy",
            [
                *(f"budget {budget:.1f}" for budget in budgets),
                "gap closed",
                "pooled",
                "of best oracle",
                "by AP",
                "on calib",
                "ms",
            ],
        ),
        "| " + " | ".join(["---", *["---:"] * (len(budgets) + 6)]) + " |",
    ]
    for name in sorted(policies, key=lambda name: _sortable(policies[name]["calib_pooled_gap"]), reverse=True):
        entries = policies[name]["budgets"]
        last = [*_gap_cells(policies[name]), f"{results['scoring_ms'][name]:.2f}"]
        lines.append(_row(name, [*map(_cell, entries), *last]))
    if best in results.get("learnt_thresholds", {}):
        cells = [*map(_cell, results["learnt_thresholds"][best]), *["-"] * 5, ""]
        lines.append(_row(f"{best}, thresholds learnt with a soft exit", cells))
    for key, name in LINES.items():
        cells = [_cell(entry[key]) for entry in policies[best]["budgets"]]
        lines.append(_row(f"{name} at the cost of {best}", [*cells, *[""] * 6]))
    lines += ["", "| exit alone | cost | AP [95 %] | AP50 [95 %] |", "| --- | ---: | ---: | ---: |"]
    for entry in results["exits"]:
        figures = f"{with_interval(entry, 'AP')} | {with_interval(entry, 'AP50')}"
        lines.append(f"| {entry['name']} | {entry['cost']:.1f} | {figures} |")
    lines.append(f"| without exits | {context['cost_model']['plain']:.1f} | | |")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in results["overthinking"].items())
    lines += ["", f"Photos that an early exit gets wholly right and the full path does not: {shares}."]
    lines += ["", "Published rules on the same exits and photos:", "", published_rules_table(policies, best, unit)]
    lines += ["", "With 95 % intervals (bootstrap over photos):", "", reference_lines_table(policies, best)]
    lines += ["", *_throughput_lines(results["throughput"])]
    return "\n".join(lines)


def _sortable(gap: float | None) -> float:
    return float("-inf") if gap is None else gap


def _throughput_lines(speeds: list[Mapping[str, Any]]) -> list[str]:
    batch, threads = speeds[0]["batch"], speeds[0]["threads"]
    return [
        f"Batches of {batch} with exits mixed as at each budget, eager PyTorch with BatchNorm fused, {threads} "
        "thread(s); ideal: every photo as fast as in a batch that leaves together.",
        "",
        _row("photos/s", [f"budget {speed['budget']:.1f}" for speed in speeds]),
        "| " + " | ".join(["---", *["---:"] * len(speeds)]) + " |",
        _row("mixed", [f"{speed['mixed']:.1f}" for speed in speeds]),
        _row("share of ideal", [f"{100 * speed['share_of_ideal']:.0f} %" for speed in speeds]),
        _row("without exits", [f"{speed['plain']:.1f}" for speed in speeds]),
    ]


def routing_chart(results: Mapping[str, Any]) -> Image.Image:
    """AP50 against mean cost: policies, coin, oracle and each exit alone."""

    def draw(axes: Axes) -> None:
        policies = results["policies"]
        best = results["best"]
        for color, (name, found) in zip(COLORS * 3, policies.items(), strict=False):
            points = sorted((entry["cost"], entry["AP50"]) for entry in found["budgets"] if entry["AP50"] is not None)
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.2, label=name)
        for (line, name), style in zip(LINES.items(), (":", "--", "-."), strict=True):
            points = sorted(
                (entry[line]["cost"], entry[line]["AP50"])
                for entry in policies[best]["budgets"]
                if entry[line]["AP50"] is not None
            )
            axes.plot(*zip(*points, strict=True), color=PLAIN, linestyle=style, label=name)
        for entry in results["exits"]:
            if entry["AP50"] is not None:
                axes.plot(entry["cost"], entry["AP50"], color=PLAIN, marker="s", linestyle="")
                axes.annotate(entry["name"], (entry["cost"], entry["AP50"]), (5, -10), textcoords="offset points")
        plain = results["context"]["cost_model"]["plain"]
        axes.axvline(plain, color=PLAIN, linewidth=0.8)
        axes.set_xlabel(f"mean cost per photo, {results['context']['cost_model']['unit']} (line: without exits)")
        axes.set_ylabel("AP50")
        axes.legend(frameon=False, fontsize=8)

    return draw_chart(draw)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _gap_cells(found: Mapping[str, Any]) -> list[str]:
    """The mean over the budgets; all of them pooled, by either oracle, and by AP; and pooled on the calib photos."""
    pooled = [_pooled_cell(found[key]) for key in ("pooled_gap", "pooled_gap_of_best_oracle")]
    others = [_two_digits(found[key]) for key in ("pooled_gap_by_AP", "calib_pooled_gap")]
    return [_two_digits(found["gap_closed"]), *pooled, *others]


def _pooled_cell(pooled: Mapping[str, Any]) -> str:
    """``0.25 [0.10, 0.40]``; of few photos no draw may have a gap."""
    bounds = pooled["interval"]
    return _two_digits(pooled["value"]) + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(entry: Mapping[str, Any]) -> str:
    return f"{figure(entry['AP50'])} ({entry['cost']:.1f})"

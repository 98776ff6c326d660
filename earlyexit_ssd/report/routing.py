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

COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f", "#2c7a7b", "#c53030")


def write_routing(folder: Path, results: Mapping[str, Any]) -> None:
    """routing.json, routing.md and routing.png, each complete or not at all."""
    write_text(folder / "routing.md", routing_table(results) + "\n")
    write_image(folder / "routing.png", routing_chart(results))
    write_json(folder / "routing.json", results)


def best_policy(policies: Mapping[str, Any]) -> str:
    """The one that closes most of the gap."""
    return max(policies, key=lambda name: _gap(policies[name]))


def _gap(found: Mapping[str, Any]) -> float:
    return float("-inf") if found["gap_closed"] is None else found["gap_closed"]


def routing_table(results: Mapping[str, Any]) -> str:
    """Per policy its AP50 at every budget and the share of the gap closed; coin and oracle of the best policy."""
    context = results["context"]
    unit = context["cost_model"]["unit"]
    policies = results["policies"]
    best = best_policy(policies)
    budgets = [entry["budget"] for entry in policies[best]["budgets"]]
    lines = [
        f"AP50 on {', '.join(context['test'])} (n {context['images']}, seed {context['seed']}) with thresholds from "
        f"{', '.join(context['calib'])} (n {context['calib_photos']}); in brackets the mean cost on the test photos, "
        f"{unit}. ms: to score one photo, in eager PyTorch.",
        "",
        _row("policy", [f"budget {budget:.1f}" for budget in budgets], "gap closed | pooled | ms"),
        "| " + " | ".join(["---", *["---:"] * (len(budgets) + 3)]) + " |",
    ]
    for name in sorted(policies, key=lambda name: _gap(policies[name]), reverse=True):
        entries = policies[name]["budgets"]
        last = f"{_gap_cells(policies[name])} | {results['scoring_ms'][name]:.2f}"
        lines.append(_row(name, [_cell(entry) for entry in entries], last))
    if best in results.get("learnt_thresholds", {}):
        cells = [_cell(entry) for entry in results["learnt_thresholds"][best]]
        lines.append(_row(f"{best}, thresholds learnt with a soft exit", cells, "- | - |"))
    for line, gaps in (("coin", "0.00 | 0.00 |"), ("oracle", "1.00 | 1.00 |")):
        cells = [_cell(entry[line]) for entry in policies[best]["budgets"]]
        lines.append(_row(f"{line} at the cost of {best}", cells, gaps))
    lines += ["", "| exit alone | cost | AP | AP50 | 95 % interval |", "| --- | ---: | ---: | ---: | --- |"]
    for entry in results["exits"]:
        low, high = entry["AP50_interval"] or (float("nan"),) * 2
        figures = f"{entry['cost']:.1f} | {figure(entry['AP'])} | {figure(entry['AP50'])}"
        lines.append(f"| {entry['name']} | {figures} | {low:.3f} to {high:.3f} |")
    lines.append(f"| without exits | {context['cost_model']['plain']:.1f} | | | |")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in results["overthinking"].items())
    lines += ["", f"Photos that an early exit gets wholly right and the full path does not: {shares}."]
    lines += ["", "Published rules on the same exits and photos:", "", published_rules_table(policies, best, unit)]
    speed = results["throughput"]
    lines += [
        "",
        f"Batches of {speed['batch']} with exits mixed as at the middle budget, eager PyTorch with BatchNorm fused, "
        f"{speed['threads']} thread(s): {speed['mixed']:.1f} photos/s, "
        f"{100 * speed['share_of_ideal']:.0f} % of the sum of the photos' own work; "
        f"without exits {speed['plain']:.1f}.",
    ]
    return "\n".join(lines)


def routing_chart(results: Mapping[str, Any]) -> Image.Image:
    """AP50 against mean cost: policies, coin, oracle and each exit alone."""

    def draw(axes: Axes) -> None:
        policies = results["policies"]
        best = best_policy(policies)
        for color, (name, found) in zip(COLORS * 3, policies.items(), strict=False):
            points = sorted((entry["cost"], entry["AP50"]) for entry in found["budgets"] if entry["AP50"] is not None)
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.2, label=name)
        for line, style in (("coin", ":"), ("oracle", "--")):
            points = sorted(
                (entry[line]["cost"], entry[line]["AP50"])
                for entry in policies[best]["budgets"]
                if entry[line]["AP50"] is not None
            )
            axes.plot(*zip(*points, strict=True), color=PLAIN, linestyle=style, label=line)
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


def _row(name: str, cells: list[str], last: str) -> str:
    return f"| {name} | {' | '.join(cells)} | {last} |"


def _gap_cells(found: Mapping[str, Any]) -> str:
    """The mean over the budgets; and all budgets pooled, with the bootstrap interval."""
    if found["gap_closed"] is None:
        return "- | -"
    low, high = found["pooled_gap_interval"] or (float("nan"),) * 2  # no draw of a few photos may have a gap
    return f"{found['gap_closed']:.2f} | {found['pooled_gap']:.2f} [{low:.2f}, {high:.2f}]"


def _cell(entry: Mapping[str, Any]) -> str:
    return f"{figure(entry['AP50'])} ({entry['cost']:.1f})"

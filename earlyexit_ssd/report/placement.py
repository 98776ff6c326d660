"""The placement advisor's findings as a table and a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from PIL import Image

from earlyexit_ssd.evaluation.runtime import RUNTIME_TITLES
from earlyexit_ssd.report.plot import PLAIN, draw_chart

Plan = Mapping[str, Any]


def placement_report(plan: Plan) -> str:
    """Table of the layers, and in words which of them can give the wanted speed-up."""
    context, shares = plan["context"], list(plan["placements"][0]["speedups"])
    heads = [f"{float(share):.0%}" for share in shares]
    wanted = f"share for {plan['speedup']:g}x"
    lines = [
        f"one exit; ms of one image in {RUNTIME_TITLES[context['runtime']]}, {context['threads']} thread(s); "
        f"the detector without exits takes {plan['plain_ms']:.1f} ms",
        "speed-up if that share of the photos leaves there:",
        "",
        f"layer  MMAC     ms  {'  '.join(head.rjust(5) for head in heads)}  {wanted}   AP50",
    ]
    for row in plan["placements"]:
        speedups = "  ".join(f"{row['speedups'][share]:4.2f}x" for share in shares)
        share = row["share_for_speedup"]
        needed = ("never" if share is None else f"{share:.0%}").rjust(len(wanted))
        ap50 = "-" if row["AP50"] is None else f"{row['AP50']:.3f}"
        lines.append(f"{row['layer']:5d}  {row['mmacs']:4.0f}  {row['ms']:5.1f}  {speedups}  {needed}  {ap50:>5}")
    return "\n".join([*lines, "", _advice(plan)])


def _advice(plan: Plan) -> str:
    able = [str(row["layer"]) for row in plan["placements"] if row["share_for_speedup"] is not None]
    if not able:
        return f"no exit can reach {plan['speedup']:g}x, even if every photo leaves there: a smaller detector may"
    line = f"{plan['speedup']:g}x can be reached by exits behind layers {', '.join(able)}, if enough photos leave"
    proposal = plan["proposal"]
    if plan["full_AP50"] is None:
        return f"{line}; --probe-epochs 3 would say how well they detect"
    if proposal is None:
        return f"{line}; none is proposed, since none was found to detect"
    layers = proposal["layers"]
    names = [*(f"exit{layer}" for layer in layers), "full"]
    shares = ", ".join(f"{share:.0%} at {name}" for name, share in zip(names, proposal["shares"], strict=True))
    return (
        f"{line}\nproposed: EXITS.LAYERS {list(layers)}: AP50 {proposal['AP50']:.3f} of {plan['full_AP50']:.3f} "
        f"if chance chose who leaves ({shares}); short probes, so more can be expected of a full training"
    )


def placement_chart(plan: Plan) -> Image.Image:
    """Speed-up against layer, a line for each share of photos that leave."""
    return draw_chart(lambda axes: _draw_placements(axes, plan))


def _draw_placements(axes: Axes, plan: Plan) -> None:
    layers = [row["layer"] for row in plan["placements"]]
    for share in plan["placements"][0]["speedups"]:
        values = [row["speedups"][share] for row in plan["placements"]]
        axes.plot(layers, values, marker="o", label=f"{float(share):.0%} of the photos leave")
    axes.axhline(plan["speedup"], color=PLAIN, linestyle="--", linewidth=1, label="wanted")
    axes.axhline(1.0, color=PLAIN, linewidth=1)
    axes.set_xlabel("trunk layer behind which the exit leaves")
    axes.set_ylabel("speed-up against the detector without exits")
    axes.set_xticks(layers)
    axes.legend(frameon=False)

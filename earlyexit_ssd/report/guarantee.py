"""How often the promise of a certificate held, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_ssd.evaluation.resplits import Resplits


def guarantee_report(results: Mapping[str, Any]) -> str:
    """A line per epsilon, in Markdown."""
    context = results["context"]
    lines = [
        f"Policy {context['policy']}, bound {context['bound']}, loss against {context['reference']}: "
        f"{context['calibration_photos']} of {context['photos']} photos calibrate, the rest test, "
        f"{results['resplits'][0]['splits']} random splits, seed {context['seed']}.",
        "",
        "| epsilon | test loss above it | at most (delta, chance) | exits opened | speed-up | by the test answers |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in (Resplits(**entry) for entry in results["resplits"]):
        lines.append(
            f"| {one.epsilon:g} | {100 * one.exceeded:.1f} % | {100 * one.tolerance:.1f} % | {100 * one.opened:.0f} % "
            f"| {one.speedup:.2f} | {one.best_speedup:.2f} |"
        )
    return "\n".join(lines)

"""Everything that a table or a chart compares: exits, routed, without exits, and the static rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from earlyexit_ssd.evaluation.runtime import EAGER, ONNX_RUNTIME, RUNTIME_TITLES, runtime_of

Row = Mapping[str, Any]
SHORT_RUNTIMES = {EAGER: "eager", ONNX_RUNTIME: "ORT"}


def timing_title(metrics: Mapping[str, Any]) -> str:
    """Runtime, device and threads of the milliseconds."""
    context = metrics["context"]
    return f"{RUNTIME_TITLES[runtime_of(metrics)]} on {context['device']}, {context['threads']} thread(s)"


def exit_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """The exits with the ``share`` of the photos that leave there, then ``routed``."""
    routed = metrics["routed"]
    shares = routed["exit_share"]
    return [*({**row, "share": shares.get(row["name"])} for row in metrics["exits"]), {"name": "routed", **routed}]


def with_branches(rows: Sequence[Row]) -> list[Row]:
    """The rows without empty exits, which have no accuracy to draw."""
    return [row for row in rows if not row.get("empty")]


def static_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """``without exits``, which finds what the full path finds, then the rivals.

    Rows of another runtime than the exits' have its short name in ``other_runtime``.
    """
    full = {key: value for key, value in metrics["exits"][-1].items() if key not in ("layer", "confidence")}
    rows = [{**full, "name": "without exits", **metrics["without_exits"]}]
    for rival in metrics.get("rivals", []):
        other = rival["runtime"] != runtime_of(metrics)
        rows.append({**rival, "other_runtime": SHORT_RUNTIMES[rival["runtime"]] if other else None})
    return rows

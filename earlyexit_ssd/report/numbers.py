"""Numbers as the reports write them."""

from __future__ import annotations


def figure(value: float | None) -> str:
    """Three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"

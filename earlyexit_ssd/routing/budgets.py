"""Thresholds for a mean cost by shares of the photos, and the budgets that routers are compared at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from earlyexit_ssd.config import CLOSED


def even_budgets(first: float, full: float, count: int = 5) -> list[float]:
    """``count`` mean costs, evenly between that of the first exit and that of the full path alone, both excluded."""
    return np.linspace(first, full, count + 2)[1:-1].tolist()


def msdnet_shares(exits: int, q: float) -> np.ndarray:
    """Share of the photos for each exit, [exits], proportional to q^k for the k-th: the geometric shares of MSDNet's
    budgeted batch classification (Huang et al. 2018: z (1 - q)^(k - 1) q, so this q is their 1 - q); above
    1 more photos go deep.
    """
    shares = q ** np.arange(1, exits + 1, dtype=float)
    return shares / shares.sum()


def thresholds_for_shares(confidences: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """Thresholds [early exits] at which these shares of the photos leave: at each exit the most confident still there.

    Equal confidences leave together, so an exit may get more than its share and the next one less.

    MSDNet takes them on a validation set; DynamicDet (Lin et al. 2023, section 3.4) on the photos that it reports.

    Args:
        confidences: per early exit [n]; below 0 where a photo cannot leave.
        shares: [exits], the full path last, summing to 1.
    """
    left = np.arange(len(confidences[0]))
    thresholds = []
    for confidence, share in zip(confidences, shares, strict=False):
        may = int((confidence[left] >= 0).sum())
        leaving = min(may, round(share * len(confidence)))
        if leaving == 0:
            thresholds.append(CLOSED)
            continue
        order = left[np.argsort(-confidence[left], kind="stable")]
        last, following = confidence[order[leaving - 1]], confidence[order[leaving:may]]
        thresholds.append(float((last + following[0]) / 2) if len(following) and following[0] < last else float(last))
        left = left[confidence[left] < np.float32(thresholds[-1])]
    return np.array(thresholds, dtype=np.float32)

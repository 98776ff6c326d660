"""Photos of rare classes are shown more often: class-balanced sampling."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from earlyexit_ssd.data.dataset import DetectionDataset

logger = logging.getLogger(__name__)


def repeat_rare_classes(dataset: DetectionDataset, threshold: float, seed: int) -> DetectionDataset:
    """A training set with each photo r times (Gupta et al. 2019, "LVIS", appendix B.2).

    r = max over the photo's classes of max(1, sqrt(threshold / f)), f the share of the photos that show the class. The
    fraction of r is rounded up or down by chance. Every repetition is augmented in its own way.

    Args:
        threshold: classes on fewer than this share of the photos count as rare; 0 repeats none.
        seed: of the rounding.
    """
    if not threshold:
        return dataset
    factors = repeat_factors(dataset, threshold)
    counts = np.floor(factors + np.random.default_rng(seed).random(len(factors))).astype(int)
    logger.info("photos of rare classes are repeated: %d photos are shown %d times in all", len(counts), counts.sum())
    return dataset.repeated(counts.tolist())


def repeat_factors(dataset: DetectionDataset, threshold: float) -> np.ndarray:
    """r of every photo, float [len(dataset)], 1 or more; see :func:`repeat_rare_classes`."""
    shown = [{one.label for one in record.annotations if not one.ignore} for record in dataset.records]
    photos = Counter(label for labels in shown for label in labels)
    factor = {label: max(1.0, (threshold * len(shown) / count) ** 0.5) for label, count in photos.items()}
    return np.array([max((factor[label] for label in labels), default=1.0) for labels in shown])

"""Compact heads: find the classes of a trained head that compete with the wanted ones, on photos without labels.

In a head cut to background and the wanted classes, the softmax redistributes the probability of all other classes: a
sofa may be detected as a chair. Most of that probability belongs to a few competing classes. A compact head keeps these
and folds them into background, so that the scores stay almost the same. Rows are class indices, 0 is background.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.trunk import evaluating

logger = logging.getLogger(__name__)

LEAST_CUT_SCORE = 0.05
"""A default box counts if a head cut to background and the wanted classes gives a wanted class at least this score."""


def competing_rows(logits: Tensor, wanted: Sequence[int], tolerance: float) -> list[int]:
    """The fewest competing classes that preserve the wanted classes' scores, largest probability first.

    Unwanted classes are added by decreasing probability, summed over the default boxes, until
    :func:`score_difference` is at most ``tolerance``.

    Args:
        logits: whole head's logits [M, C], M > 0, at the default boxes that count (:func:`fires`).
        wanted: rows of the wanted classes, from 1 on.
        tolerance: largest mean difference of a score; 0 keeps every class.
    """
    probabilities = logits.double().softmax(-1)
    others = [row for row in range(1, logits.shape[1]) if row not in set(wanted)]
    masses = probabilities[:, others].sum(0)
    order = [others[index] for index in masses.sort(descending=True, stable=True).indices.tolist()]
    for count in range(len(order)):
        if score_difference(probabilities, wanted, order[:count]) <= tolerance:
            return order[:count]
    return order


def score_difference(probabilities: Tensor, wanted: Sequence[int], kept: Sequence[int]) -> float:
    """Mean rise of the wanted classes' scores when the head keeps only background and the rows ``wanted`` and ``kept``.

    All scores of a default box are divided by the probability of the classes that stay. Each box counts with the wanted
    class of the largest rise. ``probabilities`` are the softmax of the whole head, [M, C].
    """
    highest = probabilities[:, list(wanted)].amax(-1)
    staying = probabilities[:, [0, *wanted, *kept]].sum(-1)
    return (highest / staying - highest).mean().item()


def fires(logits: Tensor, wanted: Sequence[int]) -> Tensor:
    """Where a head cut to background and ``wanted`` would detect something: logits [..., C] to a bool mask [...]."""
    cut = logits[..., [0, *wanted]].softmax(-1)
    return cut[..., 1:].amax(-1) >= LEAST_CUT_SCORE


def find_competing_rows(detector: SSD, wanted: Sequence[int], photos: Iterable[Tensor], tolerance: float) -> list[int]:
    """:func:`competing_rows` of a detector's whole head on photos, [3, H, W] in [0, 1], of any sizes.

    Raises:
        EarlyExitError: no photo, or no default box that counts.
    """
    device, found, count = next(detector.parameters()).device, [], 0
    with evaluating(detector):
        for count, photo in enumerate(photos, start=1):  # noqa: B007
            batch, _ = detector.transform([photo.to(device)], None)
            logits = detector.head.classification_head(list(detector.backbone(batch.tensors).values()))
            found.append(logits[fires(logits, wanted)])  # the logits of all default boxes would fill the memory
    logits = torch.cat(found) if found else torch.empty(0)
    if not len(logits):
        raise EarlyExitError(
            f"MODEL.FOLD 'compact' looks for the classes that compete, but none of {count} photos (DATA.TRAIN) shows "
            f"what could be a wanted class (score {LEAST_CUT_SCORE}); take other photos, or MODEL.FOLD 'exact'"
        )
    rows = competing_rows(logits, wanted, tolerance)
    logger.info(
        "compact head: with %d competing classes a score differs by %.4f on average (%d default boxes of %d photos)",
        len(rows),
        score_difference(logits.double().softmax(-1), wanted, rows),
        len(logits),
        count,
    )
    return rows

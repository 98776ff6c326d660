"""Compact heads: which classes of a trained head compete with the wanted ones, found on photos without labels.

A head that is cut to background and the wanted classes gives them the probability of all others, and a sofa becomes a
chair. Few of the others take much of it. With these few folded into background, the scores are almost as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError

logger = logging.getLogger(__name__)

LEAST_CUT_SCORE = 0.05
"""A default box counts where a head cut to background and the wanted classes gives one of these at least this score."""


def competing_rows(logits: Tensor, wanted: Sequence[int], tolerance: float) -> list[int]:
    """The fewest rows that keep the wanted classes' scores, the one with the largest probability first.

    Unwanted rows are taken in the order of their summed probability over all default boxes, until
    :func:`score_difference` is at most ``tolerance``.

    Args:
        logits: whole head's [M, C] at the default boxes that count (:func:`fires`), background in column 0; M > 0.
        wanted: rows of the wanted classes, from 1 on.
        tolerance: largest mean difference of a score; 0 keeps every row.
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
    """By how much the wanted classes' scores rise when only the rows ``kept`` stay beside them and background.

    Each default box counts with the wanted class that rises most; the mean over the boxes is returned. All of a box's
    scores are divided by the probability of the rows that stay.

    Args:
        probabilities: of the whole head, [M, C], background in column 0.
        wanted, kept: rows, from 1 on.
    """
    highest = probabilities[:, list(wanted)].amax(-1)
    staying = probabilities[:, [0, *wanted, *kept]].sum(-1)
    return (highest / staying - highest).mean().item()


def fires(logits: Tensor, wanted: Sequence[int]) -> Tensor:
    """Where a head cut to background and the ``wanted`` rows would find something: [..., C] to a boolean mask [...]."""
    cut = logits[..., [0, *wanted]].softmax(-1)
    return cut[..., 1:].amax(-1) >= LEAST_CUT_SCORE


@torch.no_grad()
def find_competing_rows(detector: SSD, wanted: Sequence[int], photos: Iterable[Tensor], tolerance: float) -> list[int]:
    """:func:`competing_rows` of a detector's head on photos; they go through the network one by one.

    Args:
        detector: torchvision's, with its whole head.
        wanted: rows of the wanted classes, from 1 on.
        photos: [3, H, W] in [0, 1], any sizes.
        tolerance: see :func:`competing_rows`.

    Raises:
        EarlyExitError: no photo, or nothing in them looks like a wanted class.
    """
    was_training, device = detector.training, next(detector.parameters()).device
    detector.eval()
    found, count = [], 0
    for count, photo in enumerate(photos, start=1):  # noqa: B007
        batch, _ = detector.transform([photo.to(device)], None)
        logits = detector.head.classification_head(list(detector.backbone(batch.tensors).values()))
        found.append(logits[fires(logits, wanted)])  # the logits of all default boxes would fill the memory
    detector.train(was_training)
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

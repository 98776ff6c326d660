"""Change the classes of a trained head and keep its weights.

A *row* is a class index of the head, 0 for background; torchvision's ``num_columns`` is the number of rows. The
glossary of docs/design.md explains folded, compact and cut heads.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD, SSDScoringHead

from earlyexit_ssd.data.records import canonical  # not from `data`, which may be importing torchvision
from earlyexit_ssd.errors import EarlyExitError, suggest
from earlyexit_ssd.modeling.trunk import evaluating

logger = logging.getLogger(__name__)

LEAST_CUT_SCORE = 0.05
"""When competing classes are searched, a cut head detects at default boxes where a wanted class has this score."""


class FoldedClassificationHead(SSDScoringHead):
    """A trained classification head that keeps all its rows and folds the unwanted classes into background.

    The background logit becomes the log-sum-exp of the background's and the unwanted classes' logits, so the softmax
    gives every wanted class the same probability as before. Parameters keep their names.

    Args:
        rows: for each wanted class its row in ``head``, from 1 on.
        competing: names of the folded classes if the head is compact; empty otherwise.
    """

    def __init__(self, head: SSDScoringHead, rows: Sequence[int], competing: Sequence[str] = ()) -> None:
        super().__init__(head.module_list, head.num_columns)
        self.competing = tuple(competing)
        self.num_outputs = len(rows) + 1
        background_rows = [row for row in range(head.num_columns) if row not in set(rows)]
        self.register_buffer("wanted", torch.tensor(rows), persistent=False)
        self.register_buffer("background_rows", torch.tensor(background_rows), persistent=False)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Return logits [N, A, 1 + wanted classes] from the head's feature maps."""
        logits = super().forward(x)
        background = logits[..., self.background_rows].logsumexp(-1, keepdim=True)
        return torch.cat([background, logits[..., self.wanted]], -1)


def is_folded(head: nn.Module) -> bool:
    """Return whether a classification head folds classes into background."""
    return isinstance(head, FoldedClassificationHead)


def num_outputs(head: SSDScoringHead) -> int:
    """Return the number of logits per default box of a classification head, background included."""
    return head.num_outputs if is_folded(head) else head.num_columns


@dataclass(frozen=True)
class ClassChange:
    """The change from a checkpoint's classes to the wanted classes. ``str()`` describes it to the user.

    Attributes:
        wanted: names of the wanted classes.
        rows: for each wanted class its row in the checkpoint's head, from 1 on; None for a new class.
        unwanted: number of the checkpoint's other classes, folded or dropped ("N/A" does not count).
        competing: names of the competing classes of a compact head, largest probability first; None for other heads.
    """

    wanted: tuple[str, ...]
    rows: tuple[int | None, ...]
    unwanted: int
    competing: tuple[str, ...] | None = None

    def __str__(self) -> str:
        kept = [name for name, row in zip(self.wanted, self.rows, strict=True) if row is not None]
        new = [name for name in self.wanted if name not in kept]
        parts = [f"kept the weights of {', '.join(kept)}"]
        if self.competing is not None:
            compete = f"{len(self.competing)} of {self.unwanted} other classes compete and went into background"
            parts.append(compete + (f": {', '.join(self.competing)}" if self.competing else ""))
        elif self.unwanted:
            parts.append(f"{self.unwanted} other classes are no longer detected")
        if new:
            parts.append(f"new classes: {', '.join(new)}")
        return "; ".join(parts)


def plan_class_change(source: Sequence[str], wanted: Sequence[str]) -> ClassChange:
    """Find the wanted classes in ``source``, a checkpoint's classes in label order without background. Raise an
    EarlyExitError if the checkpoint has none of them."""
    labels = {canonical(name): label for label, name in enumerate(source, start=1)}
    rows = tuple(labels.get(canonical(name)) for name in wanted)
    if all(row is None for row in rows):
        fix = "train from ImageNet weights (MODEL.WEIGHTS_BACKBONE) or correct DATA.CLASSES"
        names = f"{', '.join(wanted)}{suggest(wanted[0], source)}"
        raise EarlyExitError(f"the checkpoint has none of the classes {names}; {fix}")
    unwanted = sum(name != "N/A" for name in source) - sum(row is not None for row in rows)
    return ClassChange(tuple(wanted), rows, unwanted)


def cut_head(head: FoldedClassificationHead) -> SSDScoringHead:
    """Return a copy with background and the wanted classes only; see `slice_rows`."""
    cut = SSDScoringHead(copy.deepcopy(head.module_list), head.num_columns)
    slice_rows(cut, head.wanted.tolist())
    return cut


@torch.no_grad()
def slice_rows(head: SSDScoringHead, rows: Sequence[int | None]) -> None:
    """Reduce ``head`` in place to background and the classes ``rows``; None is a new class with random weights.

    The softmax no longer includes the dropped classes, so scores rise a little where these had probability.
    """
    for index, block in enumerate(head.module_list):
        # SSD's predictors are convolutions; SSDLite's have a depthwise convolution before them
        parent, name = (head.module_list, index) if isinstance(block, nn.Conv2d) else (block, 1)
        old = parent[name]
        channels = old.out_channels // head.num_columns * (len(rows) + 1)
        parent[name] = new = nn.Conv2d(old.in_channels, channels, old.kernel_size, padding=old.padding)
        nn.init.normal_(new.weight, std=0.03)
        nn.init.zeros_(new.bias)
        copy_rows(new, old, head.num_columns, (0, *rows))
    head.num_columns = len(rows) + 1


@torch.no_grad()
def copy_rows(
    new: nn.Conv2d | FactorisedPredictor, old: nn.Conv2d, num_classes: int, rows: Sequence[int | None]
) -> None:
    """Copy the weights of class ``rows[i]`` of ``old`` to class ``i`` of ``new``; None copies nothing. ``num_classes``
    are the classes of ``old`` with background. Output channels are ordered [default box of the cell, class]."""
    if isinstance(new, FactorisedPredictor):
        whole = nn.Conv2d(new.in_channels, new.out_channels, 1).to(old.weight)
        copy_rows(whole, old, num_classes, rows)
        return new.approximate(whole)
    boxes = old.out_channels // num_classes
    weight, bias = old.weight.view(boxes, num_classes, -1), old.bias.view(boxes, num_classes)
    new_weight, new_bias = new.weight.view(boxes, -1, weight.shape[-1]), new.bias.view(boxes, -1)
    for target, row in enumerate(rows):
        if row is not None:
            new_weight[:, target], new_bias[:, target] = weight[:, row], bias[:, row]


class FactorisedPredictor(nn.Sequential):
    """A 1x1 convolution factorised into two, with ``rank`` channels between them."""

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__(nn.Conv2d(in_channels, rank, 1, bias=False), nn.Conv2d(rank, out_channels, 1))
        self.in_channels, self.out_channels = in_channels, out_channels

    @torch.no_grad()
    def approximate(self, convolution: nn.Conv2d) -> None:
        """Set the least-squares approximation of ``convolution``, from its largest singular values (Eckart and Young
        1936). It is exact if the rank is ``min(in_channels, out_channels)``."""
        narrow, wide = self
        left, values, right = torch.linalg.svd(convolution.weight.flatten(1), full_matrices=False)
        rank = min(narrow.out_channels, len(values))
        root = values[:rank].sqrt()
        narrow.weight.zero_()[:rank] = (root[:, None] * right[:rank])[..., None, None]
        wide.weight.zero_()[:, :rank] = (left[:, :rank] * root)[..., None, None]
        wide.bias.copy_(convolution.bias)


def factorise(head: SSDScoringHead, rank: int) -> None:
    """Replace each predictor by a `FactorisedPredictor` if that has fewer weights; rank 0 replaces none."""
    for block in head.module_list:
        old = block[1]
        if 0 < rank * (old.in_channels + old.out_channels) < old.in_channels * old.out_channels:
            block[1] = FactorisedPredictor(old.in_channels, old.out_channels, rank)
            block[1].approximate(old)


def competing_rows(logits: Tensor, wanted: Sequence[int], tolerance: float) -> list[int]:
    """Return the rows of the fewest competing classes that preserve the wanted classes' scores.

    Unwanted classes are added by decreasing probability, summed over the default boxes, until
    :func:`score_difference` is at most ``tolerance``.

    Args:
        logits: whole head's logits [M, C], M > 0, at the default boxes where a cut head detects (:func:`detects`).
        wanted: rows of the wanted classes, from 1 on.
        tolerance: largest mean difference of a score; 0 keeps every class.
    """
    probabilities = logits.double().softmax(-1)
    order = probabilities.sum(0).sort(descending=True, stable=True).indices.tolist()
    order = [row for row in order if row not in {0, *wanted}]
    counts = (n for n in range(len(order)) if score_difference(probabilities, wanted, order[:n]) <= tolerance)
    return order[: next(counts, len(order))]


def score_difference(probabilities: Tensor, wanted: Sequence[int], kept: Sequence[int]) -> float:
    """Return the mean rise of the wanted classes' scores when the head keeps only background, ``wanted`` and ``kept``.

    All scores of a default box are divided by the probability of the classes that stay. The mean is over the boxes, for
    the wanted class with the highest score in each box. ``probabilities`` are the softmax of the whole head, [M, C].
    """
    highest = probabilities[:, list(wanted)].amax(-1)
    staying = probabilities[:, [0, *wanted, *kept]].sum(-1)
    return (highest / staying - highest).mean().item()


def detects(logits: Tensor, wanted: Sequence[int]) -> Tensor:
    """Return where a head cut to background and ``wanted`` detects, a mask [...] for logits [..., C]."""
    cut = logits[..., [0, *wanted]].softmax(-1)
    return cut[..., 1:].amax(-1) >= LEAST_CUT_SCORE


def find_competing_rows(detector: SSD, wanted: Sequence[int], photos: Iterable[Tensor], tolerance: float) -> list[int]:
    """Return the :func:`competing_rows` of a detector's whole head on photos, [3, H, W] in [0, 1], of any sizes. Raise
    an EarlyExitError if there is no photo, or no default box where a cut head detects."""
    device, logits_of_photos = next(detector.parameters()).device, []
    with evaluating(detector):
        for photo in photos:
            batch, _ = detector.transform([photo.to(device)], None)
            logits = detector.head.classification_head(list(detector.backbone(batch.tensors).values()))
            logits_of_photos.append(logits[detects(logits, wanted)])  # those of all default boxes would fill the memory
    if not sum(map(len, logits_of_photos)):
        found = f"none of {len(logits_of_photos)} photos (DATA.TRAIN) shows what could be a wanted class"
        found += f" (score {LEAST_CUT_SCORE}); take other photos, or MODEL.FOLD 'exact'"
        raise EarlyExitError(f"MODEL.FOLD 'compact' looks for the classes that compete, but {found}")
    logits = torch.cat(logits_of_photos)
    rows = competing_rows(logits, wanted, tolerance)
    difference = score_difference(logits.double().softmax(-1), wanted, rows)
    boxes = f"{len(logits)} default boxes of {len(logits_of_photos)} photos"
    logger.info(
        "compact head: with %d competing classes a score differs by %.4f on average (%s)", len(rows), difference, boxes
    )
    return rows

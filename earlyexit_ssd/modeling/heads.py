"""Change the classes of a trained head and keep its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDScoringHead

from earlyexit_ssd.data import canonical
from earlyexit_ssd.errors import EarlyExitError, nearest


class FoldedClassificationHead(SSDScoringHead):
    """All rows of a trained classification head, the unwanted ones folded into background.

    The folded background logit is the log-sum-exp of the background's and the unwanted classes' logits, so that the
    softmax over the result gives every wanted class the very probability it had. Parameters keep their names.

    Args:
        head: torchvision's classification head.
        rows: for each wanted class its row in ``head``, 1-based as labels are (0 is background).
        competing: names of the others, where ``head`` has only those that compete with the wanted ones.
    """

    def __init__(self, head: SSDScoringHead, rows: Sequence[int], competing: Sequence[str] = ()) -> None:
        super().__init__(head.module_list, head.num_columns)
        self.competing = tuple(competing)
        self.num_outputs = len(rows) + 1
        others = [row for row in range(head.num_columns) if row not in set(rows)]
        self.register_buffer("wanted", torch.tensor(rows), persistent=False)
        self.register_buffer("others", torch.tensor(others), persistent=False)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Six maps to logits [N, A, 1 + wanted]."""
        logits = super().forward(x)
        background = logits[..., self.others].logsumexp(-1, keepdim=True)
        return torch.cat([background, logits[..., self.wanted]], -1)


def is_folded(head: nn.Module) -> bool:
    """Whether a classification head has rows of classes that it does not report."""
    return isinstance(head, FoldedClassificationHead)


def num_outputs(head: SSDScoringHead) -> int:
    """Logits per default box that a classification head gives, background included."""
    return head.num_outputs if is_folded(head) else head.num_columns


@dataclass(frozen=True)
class ClassChange:
    """What became of a checkpoint's classes.

    Attributes:
        wanted: names of the wanted classes.
        rows: for each wanted class its row in the checkpoint's head, 1-based; None where it starts afresh.
        folded: how many classes of the checkpoint went into background ("N/A" is none).
        competing: of a compact head, names of those that have a row there, the strongest first; None for other heads.
    """

    wanted: tuple[str, ...]
    rows: tuple[int | None, ...]
    folded: int
    competing: tuple[str, ...] | None = None

    def __str__(self) -> str:
        kept = [name for name, row in zip(self.wanted, self.rows, strict=True) if row is not None]
        new = [name for name, row in zip(self.wanted, self.rows, strict=True) if row is None]
        parts = [f"kept the weights of {', '.join(kept)}" if kept else "kept no class"]
        if self.competing is not None:
            names = f": {', '.join(self.competing)}" if self.competing else ""
            parts += [f"{len(self.competing)} of {self.folded} other classes compete and went into background{names}"]
        elif self.folded:
            parts += [f"{self.folded} other classes went into background"]
        parts += [f"start afresh: {', '.join(new)}"] if new else []
        return "; ".join(parts)


def plan_class_change(source: Sequence[str], wanted: Sequence[str]) -> ClassChange:
    """Find the wanted classes among those of a checkpoint (``source`` without background, in label order).

    Raises:
        EarlyExitError: not one of the wanted classes is there.
    """
    labels = {canonical(name): label for label, name in enumerate(source, start=1)}
    rows = tuple(labels.get(canonical(name)) for name in wanted)
    if all(row is None for row in rows):
        raise EarlyExitError(
            f"the checkpoint knows none of the classes {', '.join(wanted)}{nearest(wanted[0], source)}; "
            "train from ImageNet weights (MODEL.WEIGHTS_BACKBONE) or correct DATA.CLASSES"
        )
    kept = sum(row is not None for row in rows)
    named = sum(name != "N/A" for name in source)
    return ClassChange(tuple(wanted), rows, named - kept)


def cut_head(head: FoldedClassificationHead) -> SSDScoringHead:
    """A head of background and the wanted rows alone: cheaper, but the scores rise a little (see `slice_rows`)."""
    cut = SSDScoringHead(copy.deepcopy(head.module_list), head.num_columns)
    slice_rows(cut, head.wanted.tolist())
    return cut


@torch.no_grad()
def slice_rows(head: SSDScoringHead, rows: Sequence[int | None]) -> None:
    """Keep background and the wanted ``rows`` of ``head`` in place; new classes (None) start afresh.

    The background of a sliced head no longer holds the other classes, so scores rise a little where they stood.
    """
    columns = head.num_columns
    for index, block in enumerate(head.module_list):
        if isinstance(block, nn.Conv2d):  # SSD's predictors; SSDLite's have a depthwise convolution before them
            head.module_list[index] = _slice_convolution(block, columns, rows)
        else:
            block[1] = _slice_convolution(block[1], columns, rows)
    head.num_columns = len(rows) + 1


def _slice_convolution(old: nn.Conv2d, columns: int, rows: Sequence[int | None]) -> nn.Conv2d:
    new = nn.Conv2d(
        old.in_channels, old.out_channels // columns * (len(rows) + 1), old.kernel_size, padding=old.padding
    )
    nn.init.normal_(new.weight, std=0.03)
    nn.init.zeros_(new.bias)
    copy_rows(new, old, columns, (0, *rows))
    return new


@torch.no_grad()
def copy_rows(new: nn.Conv2d, old: nn.Conv2d, columns: int, rows: Sequence[int | None]) -> None:
    """Class ``i`` of ``new`` takes row ``rows[i]`` of the ``columns`` of ``old``; None leaves it as it is.

    Output channels of both convolutions are ordered [anchor, class].
    """
    anchors = old.out_channels // columns
    weight, bias = old.weight.view(anchors, columns, -1), old.bias.view(anchors, columns)
    new_weight, new_bias = new.weight.view(anchors, -1, weight.shape[-1]), new.bias.view(anchors, -1)
    for target, row in enumerate(rows):
        if row is not None:
            new_weight[:, target], new_bias[:, target] = weight[:, row], bias[:, row]


# Classification heads of many classes at a low cost: each predictor in two thin steps.


class FactorisedPredictor(nn.Sequential):
    """A 1x1 convolution as two: to ``rank`` channels, and from there to the outputs.

    Args:
        in_channels, out_channels: of the convolution that it stands for.
        rank: channels between the two.
    """

    def __init__(self, in_channels: int, out_channels: int, rank: int) -> None:
        super().__init__(nn.Conv2d(in_channels, rank, 1, bias=False), nn.Conv2d(rank, out_channels, 1))
        self.in_channels, self.out_channels = in_channels, out_channels

    @torch.no_grad()
    def approximate(self, convolution: nn.Conv2d) -> None:
        """Take the nearest weights of this rank in least squares, from the largest singular values (Eckart and Young
        1936); with a rank of ``min(in_channels, out_channels)`` both give the same outputs."""
        narrow, wide = self
        left, values, right = torch.linalg.svd(convolution.weight.flatten(1), full_matrices=False)
        rank = min(narrow.out_channels, len(values))
        root = values[:rank].sqrt()
        narrow.weight.zero_()[:rank] = (root[:, None] * right[:rank])[..., None, None]
        wide.weight.zero_()[:, :rank] = (left[:, :rank] * root)[..., None, None]
        wide.bias.copy_(convolution.bias)


def factorise(head: SSDScoringHead, rank: int) -> None:
    """Put a `FactorisedPredictor` in the place of each predictor of ``head`` that it makes cheaper."""
    for block in head.module_list:
        old = block[1]
        if rank * (old.in_channels + old.out_channels) < old.in_channels * old.out_channels:
            block[1] = FactorisedPredictor(old.in_channels, old.out_channels, rank)
            block[1].approximate(old)

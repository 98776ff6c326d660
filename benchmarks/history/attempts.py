"""The nine attempts of the history as settings of one training, and two functions that the package lacks: the random
assignment of default boxes to objects, and the confidence that is halved for missing objects.

The history gives the parts and figures of each attempt, but no constants. The constants here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from earlyexit_ssd.modeling.losses import Assignment

EXITS = ("exit8", "exit12", "full")
SURE = 0.5
"""Lowest foreground probability of a default box that the gate counts as an object."""
WANTED_SHARES = (0.4, 0.3, 0.3)
"""Target shares of the photos at each exit, for the distribution loss."""
SOFTNESS = 0.05
"""Width of the soft threshold in the distribution loss."""
ALL = 1e6
"""Negatives per positive that include every default box."""


@dataclass(frozen=True)
class Published:
    """Figures of an attempt in the history. Shares are percent of the photos, by exit."""

    shares: tuple[int, int, int]
    ms: float
    confidences: tuple[float, float, float]
    temperatures: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Detector:
    """Settings of the heads."""

    negatives: float = 1.0  # per positive, in the classification loss
    attention: bool = True  # whether the branches have squeeze-excitation
    cascade: bool = True  # whether a branch reads the features of the exit before it

    @property
    def name(self) -> str:
        """Name in tables and files."""
        parts = {"squeeze-excitation": self.attention, "cascade": self.cascade}
        return "light" + "".join(f" without {name}" for name, used in parts.items() if not used)


@dataclass(frozen=True)
class Attempt:
    """Settings of the routing of one attempt."""

    name: str  # number in the history
    threshold: float = 0.6  # of both early exits; the initial value if thresholds are learned
    learned_thresholds: bool = False  # whether thresholds are trained with `distribution_loss`
    temperatures: str = "fixed"  # ``fixed`` at 1, ``bounded`` to [0.5, 3], or ``free``
    minimum: int = 0  # number of objects that the gate expects in a photo; 0: no gate
    warm_up: int = 0  # number of epochs without the gate
    detector: Detector = Detector()
    published: Published | None = None

    def minimum_in(self, epoch: int) -> int:
        """Return ``minimum`` in ``epoch`` (from 1): 0 in the warm-up, a third of it in the next epoch."""
        if epoch <= self.warm_up:
            return 0
        return self.minimum // 3 if self.warm_up and epoch == self.warm_up + 1 else self.minimum


ATTEMPTS = (
    Attempt("1.1", detector=Detector(ALL), published=Published((0, 0, 100), 14.4, (0.003, 0.007, 0.019))),
    Attempt("1.2", 0.4, published=Published((100, 0, 0), 8.1, (0.478, 0.529, 0.634))),
    Attempt("1.3", minimum=2, published=Published((0, 0, 100), 19.2, (0.159, 0.516, 0.626))),
    Attempt(
        "1.4",
        0.4,
        temperatures="bounded",
        published=Published((100, 0, 0), 8.2, (0.476, 0.482, 0.593), (1.54, 1.62, 0.91)),
    ),
    Attempt("1.5", learned_thresholds=True, minimum=1, published=Published((0, 0, 100), 19.6, (0.485, 0.518, 0.556))),
    Attempt(
        "1.6",
        learned_thresholds=True,
        temperatures="bounded",
        minimum=1,
        published=Published((0, 0, 100), 21.1, (0.329, 0.722, 0.792), (1.24, 2.56, 0.65)),
    ),
    Attempt(
        "1.7",
        0.4,
        temperatures="free",
        published=Published((100, 0, 0), 5.8, (0.500, 0.626, 0.920), (24.56, 1.71, 0.59)),
    ),
    Attempt("1.8", learned_thresholds=True, minimum=12, published=Published((0, 0, 100), 14.5, (0.0, 0.0, 0.529))),
    Attempt(
        "1.9",
        0.4,
        temperatures="bounded",
        minimum=6,
        warm_up=3,
        published=Published((0, 0, 100), 14.6, (0.008, 0.008, 0.547), (1.17, 3.00, 0.94)),
    ),
)

LIGHT = tuple(Detector(3.0, attention, cascade) for attention in (True, False) for cascade in (True, False))
"""The package's detector with branches of kind ``light``, with and without attention and cascade."""
PLAIN = Attempt("plain")
"""The routing of `LIGHT`: the history's confidence and threshold only."""


def round_robin(
    targets: Sequence[dict[str, Tensor]], anchors: Tensor, orders: Sequence[Tensor], box_coder: BoxCoder
) -> Assignment:
    """Assign default boxes to objects in turns, wherever they are: box ``order[k]`` to object k modulo the objects.

    Args:
        targets: per image ``boxes`` [n, 4] xyxy in network pixels and ``labels`` [n] in 1..K.
        anchors: default boxes [A, 4] xyxy in network pixels.
        orders: per image the indices of the positive default boxes; empty in an image without objects.
    """
    labels = torch.zeros(len(targets), len(anchors), dtype=torch.int64)
    regression = torch.zeros(len(targets), len(anchors), 4)
    for image, (target, order) in enumerate(zip(targets, orders, strict=True)):
        if len(order):
            objects = torch.arange(len(order)) % len(target["boxes"])
            labels[image, order] = target["labels"][objects]
            regression[image, order] = box_coder.encode_single(target["boxes"][objects], anchors[order])
    return Assignment(labels, regression)


def mean_foreground(logits: Tensor) -> Tensor:
    """Return the history's confidence [N]: the mean foreground probability of logits [N, A, C] over the boxes."""
    return (1 - logits.softmax(-1)[..., 0]).mean(-1)


def gated_confidence(logits: Tensor, minimum: int) -> Tensor:
    """Return `mean_foreground` [N], halved for each object below ``minimum``. Default boxes with a foreground
    probability of at least `SURE` count as objects."""
    objects = (1 - logits.softmax(-1)[..., 0] >= SURE).sum(-1)
    return mean_foreground(logits) * 0.5 ** (minimum - objects).clamp(min=0)


def distribution_loss(confidences: Sequence[Tensor], thresholds: Tensor) -> Tensor:
    """Return the cross-entropy between `WANTED_SHARES` and the shares of the photos that leave at each exit, a scalar.

    A photo leaves with the probability sigmoid((confidence - threshold) / `SOFTNESS`), so ``thresholds`` [early exits]
    have a gradient. ``confidences``, [N] for each early exit, have none.
    """
    stays, shares = torch.ones_like(confidences[0]), []
    for confidence, threshold in zip(confidences, thresholds, strict=True):
        leaves = torch.sigmoid((confidence.detach() - threshold) / SOFTNESS)
        shares.append((stays * leaves).mean())
        stays = stays * (1 - leaves)
    shares = torch.stack([*shares, stays.mean()])
    return -(torch.tensor(WANTED_SHARES) * shares.clamp(min=1e-6).log()).sum()

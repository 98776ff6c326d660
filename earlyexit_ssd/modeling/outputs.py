"""What exits say, and what the model asks of a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from earlyexit_ssd.modeling.matching import Assignment

Head = dict[str, Tensor]
"""``{"cls_logits": [N, A, C], "bbox_regression": [N, A, 4]}`` of one exit."""


class Router(Protocol):
    """What the model asks of a router; :class:`earlyexit_ssd.routing.ExitRouter` is one."""

    def confidence(self, logits: Tensor, exit_index: int) -> Tensor:
        """[N, A, C] raw logits to one number per image, [N]."""

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """[N] bool: which images need no deeper exit."""

    def temperature_loss(self, logits: Tensor, assignment: Assignment, exit_index: int) -> Tensor | None:
        """[N, A, C] raw logits to a scalar that fits this exit's temperature, or None where it is fixed."""


@dataclass(frozen=True)
class ExitOutputs:
    """Raw outputs of all exits for a batch.

    Attributes:
        heads: shallow to deep, the full path last.
        anchors: per image [A, 4] xyxy in network pixels, the same for every exit.
        network_sizes, photo_sizes: per image (height, width) of the network input and of the photo.
    """

    heads: tuple[Head, ...]
    anchors: list[Tensor]
    network_sizes: list[tuple[int, int]]
    photo_sizes: list[tuple[int, int]]

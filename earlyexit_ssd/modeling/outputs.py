"""What exits say, what a router looks at, and what the model asks of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypedDict

import torch
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.modeling.losses import Assignment

Head = dict[str, Tensor]
"""``{"cls_logits": [N, A, C], "bbox_regression": [N, A, 4]}`` of one exit."""


@dataclass(frozen=True)
class ExitSignals:
    """What a router may look at when it decides on the images of a batch at one exit.

    Attributes:
        logits: raw class logits [N, A, C], background in column 0.
        tap: the exit's tap, pooled by :func:`pool_tap`, [N, 2 * channels]; None behind the full path.
        empty: the exit has no branch, so its logits say nothing.
    """

    logits: Tensor
    tap: Tensor | None = None
    empty: bool = False


def pool_tap(tap: Tensor) -> Tensor:
    """[N, channels, S, S] to each channel's mean and largest value over the cells, [N, 2 * channels]."""
    return torch.cat([tap.mean((-2, -1)), tap.amax((-2, -1))], dim=1)


class Router(Protocol):
    """What the model asks of a router; :class:`earlyexit_ssd.routing.ExitRouter` is one.

    Attributes:
        hybrid: images do not leave: they take the classes of the exit that is sure and the boxes of the full path.
    """

    hybrid: bool

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """One number per image, [N]."""

    def needs(self, exit_index: int) -> bool:
        """Whether the exit has to be scored; where nobody can leave, its head need not be computed."""

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """[N] bool: which images need no deeper exit."""

    def temperature_loss(self, logits: Tensor, assignment: Assignment, exit_index: int) -> Tensor | None:
        """[N, A, C] raw logits to a scalar that fits this exit's temperature, or None where it is fixed."""


class _NeededSettings(TypedDict):
    num_exits: Annotated[int, 0, 15]


class RouterSettings(_NeededSettings, total=False):
    """What ``ExitRouter.to_dict`` gives, as it stands in model files and certificates; the rest has defaults."""

    policy: str
    parameters: Any
    thresholds: list[Annotated[float, 0, CLOSED]]
    temperatures: list[Annotated[float, 0, 1000]]
    temperature_bounds: list[Annotated[float, 0, 1000]]
    hybrid: bool


@dataclass(frozen=True)
class ExitOutputs:
    """Raw outputs of all exits for a batch.

    Attributes:
        heads: shallow to deep, the full path last.
        taps: of the early exits, pooled by :func:`pool_tap`, [N, 2 * channels] each.
        anchors: per image [A, 4] xyxy in network pixels, the same for every exit.
        network_sizes, photo_sizes: per image (height, width) of the network input and of the photo.
        empty: per early exit, whether it has no branch.
    """

    heads: tuple[Head, ...]
    taps: tuple[Tensor, ...]
    anchors: list[Tensor]
    network_sizes: list[tuple[int, int]]
    photo_sizes: list[tuple[int, int]]
    empty: tuple[bool, ...]

    def on_full_boxes(self) -> ExitOutputs:
        """Every exit's classes on the boxes of the full path, as a hybrid router answers."""
        boxes = self.heads[-1]["bbox_regression"]
        return dataclasses.replace(self, heads=tuple({**head, "bbox_regression": boxes} for head in self.heads))

    def signals(self, exit_index: int) -> ExitSignals:
        """What a router sees at this exit."""
        logits = self.heads[exit_index]["cls_logits"]
        if exit_index == len(self.taps):
            return ExitSignals(logits)
        return ExitSignals(logits, self.taps[exit_index], self.empty[exit_index])

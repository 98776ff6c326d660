"""Outputs of the exits, inputs of a router, and the interface between model and router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypedDict

import torch
from torch import Tensor

from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.modeling.losses import Assignment

Head = dict[str, Tensor]  # outputs of one exit: ``{"cls_logits": [N, A, C], "bbox_regression": [N, A, 4]}``


@dataclass(frozen=True)
class ExitSignals:
    """Inputs of a router at one exit, for a batch of images.

    Attributes:
        logits: raw class logits [N, A, C], background first.
        tap: the exit's tap, pooled by :func:`pool_tap`, [N, 2 * channels]; None at the full path.
        empty: the exit has no branch, so its logits hold no information.
    """

    logits: Tensor
    tap: Tensor | None = None
    empty: bool = False


def pool_tap(tap: Tensor) -> Tensor:
    """Mean and maximum of each channel over the cells: [N, channels, H, W] to [N, 2 * channels]."""
    return torch.cat([tap.mean((-2, -1)), tap.amax((-2, -1))], dim=1)


class Router(Protocol):
    """Interface of a router; :class:`earlyexit_ssd.routing.ExitRouter` implements it."""

    hybrid: bool
    """Every image runs the whole trunk: classes come from the first confident exit, boxes from the full path."""

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Confidence of the exit in each image, [N]."""

    def needs(self, exit_index: int) -> bool:
        """Whether the confidence at the exit is needed; False for a closed exit, whose head is not computed."""

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """Which images leave at the exit, [N] bool."""

    def temperature_loss(self, logits: Tensor, assignment: Assignment, exit_index: int) -> Tensor | None:
        """Scalar loss that fits this exit's temperature to raw logits [N, A, C]; None if it is fixed."""


class _NeededSettings(TypedDict):
    num_exits: Annotated[int, 0, 15]


class RouterSettings(_NeededSettings, total=False):
    """Result of ``ExitRouter.to_dict``, stored in model files and certificates; missing keys have defaults."""

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
        taps: per early exit the tap, pooled by :func:`pool_tap`, [N, 2 * channels].
        anchors: per image [A, 4] xyxy in network pixels, the same for every exit.
        network_sizes, photo_sizes: per image (height, width) in pixels.
        empty: per early exit, whether it has no branch.
    """

    heads: tuple[Head, ...]
    taps: tuple[Tensor, ...]
    anchors: list[Tensor]
    network_sizes: list[tuple[int, int]]
    photo_sizes: list[tuple[int, int]]
    empty: tuple[bool, ...]

    def on_full_boxes(self) -> ExitOutputs:
        """A copy with the full path's boxes at every exit, as with a hybrid router."""
        boxes = self.heads[-1]["bbox_regression"]
        return dataclasses.replace(self, heads=tuple({**head, "bbox_regression": boxes} for head in self.heads))

    def signals(self, exit_index: int) -> ExitSignals:
        """The router's inputs at this exit."""
        logits = self.heads[exit_index]["cls_logits"]
        if exit_index == len(self.taps):
            return ExitSignals(logits)
        return ExitSignals(logits, self.taps[exit_index], self.empty[exit_index])

"""Outputs of the exits, and the interface between model and router."""

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
        empty: whether the exit has no branch, so its logits hold no information.
    """

    logits: Tensor
    tap: Tensor | None = None
    empty: bool = False


def pool_tap(tap: Tensor) -> Tensor:
    """Return mean and maximum of each channel, [N, 2 * channels] from a tap [N, channels, H, W]."""
    return torch.cat([tap.mean((-2, -1)), tap.amax((-2, -1))], dim=1)


class Router(Protocol):
    """Interface of a router; :class:`earlyexit_ssd.routing.ExitRouter` implements it."""

    hybrid: bool
    """True: every image runs the whole trunk. Classes come from the first confident exit, boxes from the full path."""

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        """Return the confidence of the exit in each image, [N]."""

    def needs(self, exit_index: int) -> bool:
        """Return False for a closed exit, whose head and confidence are not computed."""

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        """Return which images leave at the exit, [N] bool."""

    def temperature_loss(self, logits: Tensor, assignment: Assignment, exit_index: int) -> Tensor | None:
        """Return the scalar loss that fits this exit's temperature to raw logits [N, A, C]; None if it is fixed."""


class _RequiredSettings(TypedDict):
    num_exits: Annotated[int, 0, 15]


class RouterSettings(_RequiredSettings, total=False):
    """Result of ``ExitRouter.to_dict``, stored in model files and certificates. Missing keys have defaults."""

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
        taps: per early exit, the tap pooled by :func:`pool_tap`, [N, 2 * channels].
        anchors: per image, default boxes [A, 4] xyxy in network pixels, the same for every exit.
        network_sizes, photo_sizes: per image, (height, width) in pixels.
        empty: per early exit, whether it has no branch.
    """

    heads: tuple[Head, ...]
    taps: tuple[Tensor, ...]
    anchors: list[Tensor]
    network_sizes: list[tuple[int, int]]
    photo_sizes: list[tuple[int, int]]
    empty: tuple[bool, ...]

    def on_full_boxes(self) -> ExitOutputs:
        """Return a copy with the full path's boxes at every exit, as with a hybrid router."""
        boxes = self.heads[-1]["bbox_regression"]
        return dataclasses.replace(self, heads=tuple({**head, "bbox_regression": boxes} for head in self.heads))

    def signals(self, exit_index: int) -> ExitSignals:
        """Return the router's inputs at this exit."""
        logits = self.heads[exit_index]["cls_logits"]
        if exit_index == len(self.taps):
            return ExitSignals(logits)
        return ExitSignals(logits, self.taps[exit_index], self.empty[exit_index])

"""A pinhole camera: from metres in the room to pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

NEAR = 0.15  # metres in front of the camera where surfaces are cut off


@dataclass(frozen=True)
class Camera:
    """A square picture of ``image_size`` pixels taken from ``eye``.

    ``yaw`` 0 looks along +y and grows to the left, ``pitch`` looks down, ``roll`` tilts (radians);
    ``focal`` is in units of the picture's side.
    """

    eye: tuple[float, float, float]
    yaw: float
    pitch: float
    roll: float
    focal: float
    image_size: int

    @cached_property
    def axes(self) -> np.ndarray:
        """Unit vectors right, down and forward, float [3, 3], in the room's coordinates."""
        cosine, sine = math.cos(self.yaw), math.sin(self.yaw)
        level = np.array((-sine, cosine, 0.0))
        up = np.array((0.0, 0.0, 1.0))
        right = np.array((cosine, sine, 0.0))
        forward = math.cos(self.pitch) * level - math.sin(self.pitch) * up
        down = -math.sin(self.pitch) * level - math.cos(self.pitch) * up
        turned = math.cos(self.roll) * right + math.sin(self.roll) * down
        return np.stack([turned, math.cos(self.roll) * down - math.sin(self.roll) * right, forward])

    def view(self, points: np.ndarray) -> np.ndarray:
        """Room coordinates [N, 3] to camera coordinates [N, 3] (right, down, forward; metres)."""
        return (points - self.eye) @ self.axes.T

    def screen(self, viewed: np.ndarray) -> np.ndarray:
        """Camera coordinates [N, 3] with forward > 0 to pixels [N, 2]."""
        return viewed[:, :2] * (self.focal * self.image_size / viewed[:, 2:]) + self.image_size / 2

    def polygon(self, points: np.ndarray) -> list[tuple[float, float]]:
        """The outline in pixels of a flat polygon [N, 3], cut at the near plane; empty if all behind it."""
        viewed = self.view(points)
        if viewed[:, 2].min() < NEAR:
            viewed = _cut(viewed)
        return [(x, y) for x, y in self.screen(viewed).tolist()] if len(viewed) else []

    def floor_point(self, distance: float, column: float) -> tuple[float, float]:
        """Where on the floor (x, y) a thing stands ``distance`` metres ahead at ``column`` in [0, 1]."""
        cosine, sine = math.cos(self.yaw), math.sin(self.yaw)
        aside = (column - 0.5) / self.focal * distance
        return (
            self.eye[0] - sine * distance + cosine * aside,
            self.eye[1] + cosine * distance + sine * aside,
        )


def _cut(viewed: np.ndarray) -> np.ndarray:
    """Sutherland-Hodgman against forward >= NEAR."""
    kept = []
    for here, after in zip(viewed, np.roll(viewed, -1, axis=0), strict=True):
        if here[2] >= NEAR:
            kept.append(here)
        if (here[2] >= NEAR) != (after[2] >= NEAR):
            share = (NEAR - here[2]) / (after[2] - here[2])
            kept.append(here + share * (after - here))
    return np.array(kept).reshape(-1, 3)

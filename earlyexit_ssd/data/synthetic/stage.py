"""Furnish a room: where the camera, the chairs and everything else stand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.chairs import random_chair
from earlyexit_ssd.data.synthetic.furniture import ALONG_WALLS, FREE, TABLES, pick
from earlyexit_ssd.data.synthetic.room import Room, random_room
from earlyexit_ssd.data.synthetic.solids import Solid, place

CHAIR_HEIGHT = (0.12, 0.7)  # of a placed chair, in shares of the picture's
MIN_IN_FRAME = 0.72  # share of a chair's extent that lies inside the picture


@dataclass
class Thing:
    """A piece of furniture where it stands; ``outline`` is its footprint on the floor, float [4, 2]."""

    solids: list[Solid]
    outline: np.ndarray
    is_chair: bool


@dataclass
class Stage:
    """A room with a camera in it, and the furniture so far."""

    room: Room
    camera: Camera
    things: list[Thing] = field(default_factory=list)

    def add(
        self,
        solids: list[Solid],
        x: float,
        y: float,
        yaw: float,
        is_chair: bool = False,
        beside: Thing | None = None,
    ) -> Thing | None:
        """Stand furniture at (x, y) on the floor, turned by ``yaw``.

        Returns:
            The thing, or None if it would meet a wall, the camera, or a thing other than ``beside``.
        """
        vertices = np.concatenate([solid.vertices for solid in solids])
        low, high = vertices[:, :2].min(axis=0), vertices[:, :2].max(axis=0)
        corners = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
        cosine, sine = math.cos(yaw), math.sin(yaw)
        outline = corners @ np.array([(cosine, sine), (-sine, cosine)]) + (x, y)
        if not all(self.room.inside(a, b, 0.01) for a, b in outline.tolist()):
            return None
        if any(other is not beside and _overlap(outline, other.outline) for other in self.things):
            return None
        placed = place(solids, (x, y, 0.0), yaw)
        depth = self.camera.view(np.concatenate([solid.vertices for solid in placed]))[:, 2]
        if depth.min() < 0.4:
            return None
        thing = Thing(placed, outline, is_chair)
        self.things.append(thing)
        return thing


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Do two rectangles [4, 2] meet? Separating axes."""
    for rectangle in (first, second):
        for edge in (rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]):
            a, b = first @ edge, second @ edge
            if a.max() <= b.min() or b.max() <= a.min():
                return False
    return True


def _random_stage(generator: Generator, image_size: int) -> Stage:
    """An empty room seen from somewhere near its near wall."""
    room = random_room(generator)
    eye = (
        room.width * generator.uniform(0.2, 0.8),
        room.depth * generator.uniform(0.04, 0.3),
        generator.uniform(0.75, 1.75),
    )
    # Turn towards the middle of the far wall, more or less; high cameras look down more.
    aim = math.atan2(eye[0] - room.width / 2, 0.7 * room.depth) + generator.normal(0, 0.3)
    pitch = 0.1 + 0.2 * (eye[2] - 0.75) + generator.normal(0, 0.06)
    camera = Camera(eye, aim, pitch, generator.normal(0, 0.02), generator.uniform(0.75, 1.15), image_size)
    return Stage(room, camera)


def _in_frame(stage: Stage, thing: Thing) -> tuple[float, float]:
    """Height of the thing in shares of the picture, and the share of its extent that lies in the frame."""
    size = stage.camera.image_size
    pixels = stage.camera.screen(stage.camera.view(np.concatenate([solid.vertices for solid in thing.solids])))
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    cut = np.clip(high, 0, size) - np.clip(low, 0, size)
    return float(cut[1] / size), float(np.prod(cut) / np.prod(high - low))


def _add_chair(stage: Stage, generator: Generator, x: float, y: float, yaw: float, beside: Thing | None = None) -> bool:
    """Stand a chair at (x, y) if it fits there and comes out neither too small, too big nor too far aside."""
    thing = stage.add(random_chair(generator), x, y, yaw, is_chair=True, beside=beside)
    if thing is None:
        return False
    height, inside = _in_frame(stage, thing)
    if not CHAIR_HEIGHT[0] <= height <= CHAIR_HEIGHT[1] or inside < MIN_IN_FRAME:
        stage.things.pop()
        return False
    return True


def _free_chair(stage: Stage, generator: Generator) -> bool:
    """A chair somewhere on the floor, as high in the picture as drawn."""
    wanted = math.exp(generator.uniform(math.log(0.32), math.log(0.72)))
    x, y = stage.camera.floor_point(0.95 * stage.camera.focal / wanted, generator.uniform(0.06, 0.94))
    return _add_chair(stage, generator, x, y, generator.uniform(0, 2 * math.pi))


def _table_with_chairs(stage: Stage, generator: Generator, chairs: int) -> int:
    """A table, and up to ``chairs`` chairs that face it; the number that found a place."""
    x, y = stage.camera.floor_point(generator.uniform(1.7, 3.4), generator.uniform(0.25, 0.75))
    yaw = generator.uniform(0, 2 * math.pi)
    table = stage.add(pick(generator, TABLES), x, y, yaw)
    if table is None:
        return 0
    sides = generator.permutation(4)[:chairs]
    half = (
        np.linalg.norm(table.outline[1] - table.outline[0]) / 2,
        np.linalg.norm(table.outline[3] - table.outline[0]) / 2,
    )
    placed = 0
    for side in sides.tolist():
        # The sitter looks along -y of the chair, so a chair turned like the table stands on its +y side.
        turn = yaw + side * math.pi / 2 + generator.normal(0, 0.2)
        reach = half[1 - side % 2] + generator.uniform(0.08, 0.5)
        aside = generator.uniform(-0.3, 0.3) * half[side % 2]
        direction = yaw + side * math.pi / 2
        cx = x - math.sin(direction) * reach + math.cos(direction) * aside
        cy = y + math.cos(direction) * reach + math.sin(direction) * aside
        placed += _add_chair(stage, generator, cx, cy, turn, beside=table)
    return placed


def _along_wall(stage: Stage, generator: Generator) -> None:
    """Furniture with its back to the far, left or right wall."""
    side = int(generator.choice(3, p=(0.5, 0.25, 0.25)))
    solids = pick(generator, ALONG_WALLS)
    back = max(float(solid.vertices[:, 1].max()) for solid in solids) + 0.03
    share = generator.uniform(0.1, 0.9)
    room = stage.room
    if side == 0:
        stage.add(solids, share * room.width, room.depth - back, 0.0)
    elif side == 1:
        stage.add(solids, back, share * room.depth, math.pi / 2)
    else:
        stage.add(solids, room.width - back, share * room.depth, -math.pi / 2)


def compose(generator: Generator, image_size: int, chairs: int) -> Stage:
    """A furnished room with up to ``chairs`` chairs, at least one if ``chairs`` > 0 unless all tries fail."""
    stage = _random_stage(generator, image_size)
    placed = 0
    if generator.uniform() < 0.4:
        placed += _table_with_chairs(stage, generator, chairs)
    for _ in range(6 * chairs):
        if placed >= chairs:
            break
        placed += _free_chair(stage, generator)
    for _ in range(int(generator.integers(1, 5))):
        _along_wall(stage, generator)
    for _ in range(int(generator.integers(1, 5)) + (2 if chairs == 0 else 0)):
        x, y = stage.camera.floor_point(generator.uniform(1.0, 4.5), generator.uniform(0.0, 1.0))
        stage.add(pick(generator, FREE), x, y, generator.uniform(0, 2 * math.pi))
    return stage

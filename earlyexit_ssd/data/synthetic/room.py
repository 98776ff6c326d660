"""A rectangular room: floor, walls, ceiling, and what lies or hangs flat on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import ImageDraw

from earlyexit_ssd.data.synthetic.camera import Camera
from earlyexit_ssd.data.synthetic.materials import any_material, cloth, paint, shade, wood
from earlyexit_ssd.data.synthetic.solids import Colour


@dataclass(frozen=True)
class Room:
    """``width`` along x, ``depth`` along y, ``height`` along z, from the corner at the origin (metres)."""

    width: float
    depth: float
    height: float

    def wall(self, side: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Corner, unit direction, and length of wall 0 (far), 1 (left), 2 (right), 3 (near)."""
        corners = ((0, self.depth), (0, 0), (self.width, 0), (0, 0))
        along = ((1, 0), (0, 1), (0, 1), (1, 0))
        length = self.width if side in (0, 3) else self.depth
        return np.array((*corners[side], 0.0), float), np.array((*along[side], 0.0), float), length

    def inside(self, x: float, y: float, margin: float) -> bool:
        """Is the point on the floor at least ``margin`` metres from every wall?"""
        return margin <= x <= self.width - margin and margin <= y <= self.depth - margin


def random_room(generator: Generator) -> Room:
    """A small study to a large living room."""
    return Room(generator.uniform(3.0, 6.5), generator.uniform(3.6, 7.5), generator.uniform(2.35, 2.9))


def draw_room(
    draw: ImageDraw.ImageDraw, room: Room, camera: Camera, generator: Generator, scale: int, level: float
) -> None:
    """Paint the empty room; ``level`` is the brightness of its surfaces, ``scale`` as in painter.paint."""
    brush = _Brush(draw, camera, scale)
    _floor(brush, room, generator, level)
    colour = paint(generator)
    accent = paint(generator) if generator.uniform() < 0.3 else colour
    board = wood(generator) if generator.uniform() < 0.4 else shade(paint(generator), 0.95)
    papered = generator.uniform() < 0.22
    for side in range(4):
        tone = shade(accent if side == 0 else colour, level * generator.uniform(0.72, 1.0))
        brush.wall(room, side, (0.0, 1.0), (0.0, room.height), tone)
        if papered:
            bands, darker = int(generator.integers(8, 26)), shade(tone, generator.uniform(0.82, 0.95))
            for band in range(0, bands, 2):
                brush.wall(room, side, (band / bands, (band + 1) / bands), (0.0, room.height), darker)
        brush.wall(room, side, (0.0, 1.0), (0.0, 0.09), shade(board, level * 0.85))
        if side < 3:
            _hangings(brush, room, side, generator, level)
    top = np.array([(0, 0), (room.width, 0), (room.width, room.depth), (0, room.depth)], float)
    brush.fill(np.column_stack([top, np.full(4, room.height)]), shade((240, 240, 236), level * 0.95))


@dataclass(frozen=True)
class _Brush:
    draw: ImageDraw.ImageDraw
    camera: Camera
    scale: int

    def fill(self, points: np.ndarray, colour: Colour) -> None:
        """Fill a flat polygon [N, 3] of the room."""
        outline = self.camera.polygon(points)
        if len(outline) >= 3:
            scaled = [(x * self.scale, y * self.scale) for x, y in outline]
            self.draw.polygon(scaled, fill=tuple(min(255, int(channel)) for channel in colour))

    def wall(self, room: Room, side: int, across: tuple[float, float], up: tuple[float, float], colour: Colour) -> None:
        """Fill a rectangle on a wall: ``across`` in shares of its length, ``up`` in metres."""
        corner, along, length = room.wall(side)
        (left, right), (low, high) = across, up
        rows = [(left, low), (right, low), (right, high), (left, high)]
        self.fill(np.array([corner + along * (s * length) + (0, 0, z) for s, z in rows]), colour)

    def floor(self, low: tuple[float, float], high: tuple[float, float], colour: Colour) -> None:
        """Fill a rectangle of the floor."""
        (a, b), (c, d) = low, high
        self.fill(np.array([(a, b, 0), (c, b, 0), (c, d, 0), (a, d, 0)], float), colour)


def _floor(brush: _Brush, room: Room, generator: Generator, level: float) -> None:
    """Planks, tiles or carpet, and sometimes a rug."""
    kind = generator.uniform()
    base = shade(wood(generator) if kind < 0.5 else any_material(generator) if kind < 0.75 else paint(generator), level)
    brush.floor((0, 0), (room.width, room.depth), base)
    if kind < 0.5:
        count, along_x = int(generator.integers(10, 22)), generator.uniform() < 0.5
        extent = room.depth if along_x else room.width
        for i in range(count):
            low, high, tone = (
                i / count * extent,
                (i + 0.94) / count * extent,
                shade(base, generator.uniform(0.86, 1.12)),
            )
            if along_x:
                brush.floor((0, low), (room.width, high), tone)
            else:
                brush.floor((low, 0), (high, room.depth), tone)
    elif kind > 0.75:
        side, line = generator.uniform(0.3, 0.7), shade(base, generator.uniform(0.7, 0.88))
        for i in range(1, math.ceil(room.width / side)):
            brush.floor((i * side, 0), (i * side + 0.02, room.depth), line)
        for i in range(1, math.ceil(room.depth / side)):
            brush.floor((0, i * side), (room.width, i * side + 0.02), line)
    if generator.uniform() < 0.35:
        _rug(brush, room, generator, level)


def _rug(brush: _Brush, room: Room, generator: Generator, level: float) -> None:
    width, depth = generator.uniform(1.2, 2.4), generator.uniform(1.2, 2.6)
    x, y = generator.uniform(0.2, room.width - 1.2), generator.uniform(0.3 * room.depth, room.depth - 1.2)
    colour, second = shade(cloth(generator), level), shade(cloth(generator), level)
    if generator.uniform() < 0.3:
        angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        ring = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(28)])
        for share, tone in ((1.0, second), (0.86, colour)):
            brush.fill(ring * (width / 2 * share) + (x + width / 2, y + width / 2, 0), tone)
        return
    brush.floor((x, y), (x + width, y + depth), second)
    brush.floor((x + 0.1, y + 0.1), (x + width - 0.1, y + depth - 0.1), colour)
    if generator.uniform() < 0.5:
        bands = int(generator.integers(3, 7))
        for i in range(bands):
            low = y + 0.1 + (depth - 0.2) * (i + 0.3) / bands
            brush.floor((x + 0.1, low), (x + width - 0.1, low + (depth - 0.2) * 0.35 / bands), second)


def _hangings(brush: _Brush, room: Room, side: int, generator: Generator, level: float) -> None:
    """Up to three windows, doors and pictures, each in a stretch of wall of its own."""
    slots = int(generator.integers(1, 4))
    metre = 1 / room.wall(side)[2]
    for slot in range(slots):
        kind = generator.uniform()
        middle = (slot + generator.uniform(0.35, 0.65)) / slots
        if kind < 0.25:
            _window(brush, room, side, middle, metre, generator)
        elif kind < 0.4:
            tone = shade(wood(generator) if generator.uniform() < 0.5 else paint(generator), level * 0.9)
            brush.wall(room, side, (middle - 0.48 * metre, middle + 0.48 * metre), (0.0, 2.08), shade(tone, 0.7))
            brush.wall(room, side, (middle - 0.42 * metre, middle + 0.42 * metre), (0.0, 2.02), tone)
        elif kind < 0.8:
            half, low = generator.uniform(0.15, 0.5), generator.uniform(1.05, 1.5)
            high = low + generator.uniform(0.35, 0.8)
            brush.wall(
                room,
                side,
                (middle - half * metre, middle + half * metre),
                (low, high),
                any_material(generator),
            )
            inner, rim = half - 0.04, 0.04
            colours = [shade(cloth(generator), level) for _ in range(3)]
            brush.wall(
                room,
                side,
                (middle - inner * metre, middle + inner * metre),
                (low + rim, high - rim),
                colours[0],
            )
            split = low + rim + (high - low - 2 * rim) * generator.uniform(0.3, 0.6)
            brush.wall(room, side, (middle - inner * metre, middle + inner * metre), (low + rim, split), colours[1])
            brush.wall(
                room,
                side,
                (middle - 0.4 * inner * metre, middle + 0.1 * metre),
                (split - 0.1, split + 0.12),
                colours[2],
            )


def _window(brush: _Brush, room: Room, side: int, middle: float, metre: float, generator: Generator) -> None:
    half, low, high = generator.uniform(0.4, 0.8), generator.uniform(0.75, 1.0), generator.uniform(1.9, 2.2)
    brush.wall(
        room,
        side,
        (middle - (half + 0.06) * metre, middle + (half + 0.06) * metre),
        (low - 0.06, high + 0.06),
        (226, 225, 220),
    )
    sky = (generator.uniform(170, 235), generator.uniform(205, 240), generator.uniform(225, 255))
    panes = int(generator.integers(1, 4))
    for pane in range(panes):
        left = middle + (-half + 2 * half * pane / panes + 0.025) * metre
        right = middle + (-half + 2 * half * (pane + 1) / panes - 0.025) * metre
        brush.wall(room, side, (left, right), (low, high), sky)
        brush.wall(
            room,
            side,
            (left, right),
            (low, low + (high - low) * 0.3),
            shade((120, 150, 110), generator.uniform(0.8, 1.3)),
        )
    if generator.uniform() < 0.5:
        curtain = cloth(generator)
        for edge in (-half - 0.2, half - 0.1):
            brush.wall(
                room,
                side,
                (middle + edge * metre, middle + (edge + 0.3) * metre),
                (0.1, high + 0.15),
                curtain,
            )

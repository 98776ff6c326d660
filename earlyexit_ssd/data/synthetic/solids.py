"""Convex solids, of which every chair and every other piece of furniture is built. Metres, z up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

Colour = tuple[float, float, float]  # red, green, blue in [0, 255]
Point = Sequence[float]  # x, y, z


@dataclass(frozen=True)
class Topology:
    """How the vertices of a solid join into flat faces; shared by all solids of one kind."""

    faces: tuple[tuple[int, ...], ...]

    @cached_property
    def corners(self) -> np.ndarray:
        """Three vertices of each face, int [F, 3]; they span its plane."""
        return np.array([face[:3] for face in self.faces])


@dataclass(frozen=True)
class Solid:
    """A convex polyhedron of one colour.

    ``vertices`` is float [V, 3]. ``stripes`` > 1 paints each four-sided face in that many bands, every second
    one in ``stripe_colour``.
    """

    vertices: np.ndarray
    topology: Topology
    colour: Colour
    stripes: int = 0
    stripe_colour: Colour = (0.0, 0.0, 0.0)

    def striped(self, bands: int, colour: Colour) -> Solid:
        """The same solid with bands of a second colour."""
        return replace(self, stripes=bands, stripe_colour=colour)


BOX = Topology(((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)))
_BOX_CORNERS = np.array([(x, y, z) for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)])


@cache
def _prism(sides: int) -> Topology:
    ring = range(sides)
    walls = tuple((i, (i + 1) % sides, sides + (i + 1) % sides, sides + i) for i in ring)
    return Topology((tuple(ring), tuple(sides + i for i in ring), *walls))


@cache
def _ring(sides: int) -> np.ndarray:
    angles = (np.arange(sides) + 0.5) * (2 * math.pi / sides)
    # Circumscribed, so that a rod of four sides is as thick as its radius says.
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) / math.cos(math.pi / sides)


def box(
    centre: Point, size: Point, colour: Colour, lean: float = 0.0, taper: tuple[float, float] = (1.0, 1.0)
) -> Solid:
    """A box of ``size`` (x, y, z) around ``centre``.

    Args:
        lean: metres that the top is shifted along y (a back that leans, for instance).
        taper: factors of the top's extent along x and y.
    """
    vertices = _BOX_CORNERS * size
    if taper != (1.0, 1.0):
        vertices[4:, :2] *= taper
    vertices += centre
    vertices[4:, 1] += lean
    return Solid(vertices, BOX, colour)


def rod(
    start: Point,
    end: Point,
    radius: float,
    colour: Colour,
    end_radius: float | None = None,
    sides: int = 4,
) -> Solid:
    """A prism or frustum with ``sides`` walls from ``start`` to ``end``: legs, tubes, lamp shades."""
    ax, ay, az = (e - s for s, e in zip(start, end, strict=True))
    length = math.sqrt(ax * ax + ay * ay + az * az)
    ax, ay, az = ax / length, ay / length, az / length
    # Two directions across the axis; the first is horizontal unless the rod is upright.
    level = math.hypot(ax, ay)
    if level > 0.1:
        first = np.array((-ay / level, ax / level, 0.0))
        second = np.array((-az * ax / level, -az * ay / level, level))
    else:
        reach = math.hypot(ax, az)
        first = np.array((az / reach, 0.0, -ax / reach))
        second = np.array((-ax * ay / reach, reach, -az * ay / reach))
    ring = _ring(sides)
    across = ring[:, :1] * first + ring[:, 1:] * second
    vertices = np.concatenate([across * radius + start, across * (radius if end_radius is None else end_radius) + end])
    return Solid(vertices, _prism(sides), colour)


def cylinder(
    base: Point,
    radius: float,
    height: float,
    colour: Colour,
    top_radius: float | None = None,
    sides: int = 10,
) -> Solid:
    """An upright cylinder or cone frustum that stands on ``base``."""
    x, y, z = base
    return rod((x, y, z), (x, y, z + height), radius, colour, top_radius, sides)


def place(solids: list[Solid], position: Point, yaw: float) -> list[Solid]:
    """``solids`` turned by ``yaw`` radians about the vertical and moved to ``position`` (x, y, z)."""
    cosine, sine = math.cos(yaw), math.sin(yaw)
    turn = np.array([(cosine, sine, 0.0), (-sine, cosine, 0.0), (0.0, 0.0, 1.0)])
    vertices = np.concatenate([solid.vertices for solid in solids]) @ turn + position
    placed, first = [], 0
    for solid in solids:
        last = first + len(solid.vertices)
        placed.append(replace(solid, vertices=vertices[first:last]))
        first = last
    return placed

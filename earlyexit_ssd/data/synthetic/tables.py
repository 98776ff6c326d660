"""Tables with what stands on them, and stools. On z = 0 around x = y = 0."""

from __future__ import annotations

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.materials import (
    any_material,
    cardboard,
    cloth,
    metal,
    paint,
    wood,
)
from earlyexit_ssd.data.synthetic.solids import Colour, Solid, box, cylinder, rod


def _corner_legs(
    width: float, depth: float, height: float, radius: float, colour: Colour, sides: int = 4
) -> list[Solid]:
    x, y = width / 2 - 1.2 * radius, depth / 2 - 1.2 * radius
    return [
        rod((sx * x, sy * y, 0), (sx * x, sy * y, height), radius, colour, sides=sides)
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]


def _clutter(generator: Generator, width: float, depth: float, height: float) -> list[Solid]:
    """Small things on a table top: vase, books, screen, small lamp, box."""
    solids: list[Solid] = []
    for slot in range(int(generator.integers(0, 4))):
        x = width * (0.5 * ((slot + 0.5) / 1.5 - 1)) + generator.uniform(-0.04, 0.04)
        y = depth * generator.uniform(-0.25, 0.25)
        kind = generator.integers(5)
        if kind == 0:
            solids.append(
                cylinder((x, y, height), 0.04, generator.uniform(0.12, 0.3), any_material(generator), 0.06, 8)
            )
        elif kind == 1:
            solids.append(box((x, y, height + 0.03), (0.2, 0.15, 0.06), cloth(generator)))
        elif kind == 2 and width > 0.8:
            solids.append(box((x, y, height + 0.06), (0.16, 0.1, 0.12), metal(generator), taper=(0.4, 0.4)))
            solids.append(box((x, y, height + 0.28), (0.5, 0.04, 0.32), (25.0, 26.0, 30.0)))
        elif kind == 3:
            solids.append(cylinder((x, y, height), 0.02, 0.2, metal(generator), sides=6))
            solids.append(cylinder((x, y, height + 0.2), 0.13, 0.18, paint(generator), 0.07))
        else:
            solids.append(box((x, y, height + 0.09), (0.22, 0.2, 0.18), cardboard(generator)))
    return solids


def table(generator: Generator) -> list[Solid]:
    """A dining table or desk."""
    width, depth = generator.uniform(0.9, 1.8), generator.uniform(0.6, 0.95)
    height = generator.uniform(0.7, 0.78)
    colour = wood(generator) if generator.uniform() < 0.65 else any_material(generator)
    legs = colour if generator.uniform() < 0.5 else metal(generator)
    solids = _corner_legs(width, depth, height - 0.04, generator.uniform(0.02, 0.045), legs)
    solids.append(box((0, 0, height - 0.02), (width, depth, 0.04), colour))
    return solids + _clutter(generator, width, depth, height)


def round_table(generator: Generator) -> list[Solid]:
    """A round table on one foot."""
    radius, height, colour = (
        generator.uniform(0.3, 0.6),
        generator.uniform(0.5, 0.76),
        any_material(generator),
    )
    foot = metal(generator)
    solids = [
        cylinder((0, 0, 0), radius * 0.55, 0.03, foot),
        cylinder((0, 0, 0.03), 0.035, height - 0.06, foot, sides=8),
        cylinder((0, 0, height - 0.03), radius, 0.03, colour, sides=16),
    ]
    return solids + _clutter(generator, radius, radius, height)


def coffee_table(generator: Generator) -> list[Solid]:
    """A low table, half of them with a shelf."""
    width, depth, height = (
        generator.uniform(0.6, 1.1),
        generator.uniform(0.45, 0.65),
        generator.uniform(0.35, 0.48),
    )
    colour = any_material(generator)
    solids = _corner_legs(width, depth, height - 0.03, 0.025, colour)
    solids.append(box((0, 0, height - 0.015), (width, depth, 0.03), colour))
    if generator.uniform() < 0.5:
        solids.append(box((0, 0, 0.14), (width - 0.12, depth - 0.12, 0.025), colour))
    return solids


def stool(generator: Generator) -> list[Solid]:
    """A seat on legs without a back, low or at bar height: the nearest thing to a chair that is none."""
    height, radius = generator.uniform(0.4, 0.72), generator.uniform(0.15, 0.2)
    colour, legs = any_material(generator), wood(generator)
    splay = generator.uniform(0.0, 0.08)
    reach = 0.7 * radius
    solids = [
        rod(
            (sx * (reach + splay), sy * (reach + splay), 0),
            (sx * reach, sy * reach, height - 0.04),
            0.016,
            legs,
        )
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]
    if generator.uniform() < 0.6:
        return [*solids, cylinder((0, 0, height - 0.04), radius, 0.05, colour)]
    return [*solids, box((0, 0, height - 0.02), (2 * radius, 2 * radius, 0.05), colour)]

"""Floor lamps, cardboard boxes, plants, bins, pouffes and suitcases. On z = 0 around x = y = 0."""

from __future__ import annotations

import math

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.materials import (
    any_material,
    cardboard,
    cloth,
    leaf,
    metal,
    paint,
    plastic,
    shade,
)
from earlyexit_ssd.data.synthetic.solids import Solid, box, cylinder, rod


def floor_lamp(generator: Generator) -> list[Solid]:
    """A lamp on a tall pole."""
    height, colour = generator.uniform(1.2, 1.7), metal(generator)
    return [
        cylinder((0, 0, 0), generator.uniform(0.11, 0.16), 0.03, colour),
        cylinder((0, 0, 0.03), 0.013, height - 0.25, colour, sides=6),
        cylinder(
            (0, 0, height - 0.24),
            generator.uniform(0.16, 0.24),
            0.26,
            shade(paint(generator), 1.1),
            generator.uniform(0.08, 0.18),
        ),
    ]


def boxes(generator: Generator) -> list[Solid]:
    """One to three cardboard boxes on top of one another."""
    solids, base = [], 0.0
    for level in range(int(generator.integers(1, 4))):
        width, depth, height = (
            generator.uniform(low, high) * 0.88**level for low, high in ((0.35, 0.6), (0.3, 0.5), (0.25, 0.45))
        )
        shift = generator.uniform(-0.03, 0.03)
        carton = cardboard(generator)
        solids.append(box((shift, 0, base + height / 2), (width, depth, height), carton))
        solids.append(box((shift, 0, base + height + 0.003), (0.06, depth, 0.006), shade(carton, 1.2)))
        base += height + 0.006
    return solids


def plant(generator: Generator) -> list[Solid]:
    """A pot with leaves."""
    radius, pot, colour = generator.uniform(0.12, 0.2), generator.uniform(0.2, 0.4), leaf(generator)
    solids = [cylinder((0, 0, 0), radius * 0.75, pot, any_material(generator), radius)]
    reach, tall = generator.uniform(0.2, 0.45), generator.uniform(0.3, 0.9)
    for _ in range(int(generator.integers(7, 14))):
        angle, share = generator.uniform(0, 2 * math.pi), generator.uniform(0.3, 1.0)
        tip = (
            reach * math.cos(angle) * share,
            reach * math.sin(angle) * share,
            pot + tall * generator.uniform(0.35, 1.0),
        )
        solids.append(
            rod(
                (0, 0, pot),
                tip,
                0.012,
                shade(colour, generator.uniform(0.7, 1.25)),
                generator.uniform(0.03, 0.06),
                4,
            )
        )
    return solids


def bin_or_case(generator: Generator) -> list[Solid]:
    """A waste bin, a pouffe, or a suitcase."""
    kind = generator.integers(3)
    if kind == 0:
        return [cylinder((0, 0, 0), 0.12, generator.uniform(0.25, 0.4), plastic(generator), 0.15)]
    if kind == 1:
        return [
            cylinder(
                (0, 0, 0),
                generator.uniform(0.2, 0.3),
                generator.uniform(0.3, 0.42),
                cloth(generator),
                sides=12,
            )
        ]
    colour = plastic(generator)
    tall = generator.uniform(0.5, 0.7)
    handle = [rod((x, 0, tall), (x, 0, tall + 0.25), 0.01, (70.0, 70.0, 74.0)) for x in (-0.1, 0.1)]
    return [
        box((0, 0, tall / 2 + 0.03), (0.42, 0.24, tall - 0.06), colour),
        *handle,
        rod((-0.1, 0, tall + 0.25), (0.1, 0, tall + 0.25), 0.012, (40.0, 40.0, 42.0)),
    ]

"""Upholstered armchairs and office chairs.

Seat around x = y = 0, standing on z = 0, the sitter looking along -y.
"""

from __future__ import annotations

import math

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.materials import (
    cloth,
    metal,
    shade,
    wood,
)
from earlyexit_ssd.data.synthetic.solids import Colour, Solid, box, cylinder, rod


def _short_legs(width: float, depth: float, height: float, colour: Colour) -> list[Solid]:
    """Four legs under a base of ``width`` x ``depth``."""
    x, y = width / 2 - 0.06, depth / 2 - 0.06
    return [
        rod((sx * x, sy * y, 0.0), (sx * (x - 0.02), sy * (y - 0.02), height), 0.02, colour)
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]


def armchair(generator: Generator, wings: bool = False) -> list[Solid]:
    """An upholstered armchair for one; with ``wings``, one with a tall back and side pieces at the head."""
    width, depth = generator.uniform(0.68, 0.88), generator.uniform(0.65, 0.8)
    seat, arm = generator.uniform(0.38, 0.46), generator.uniform(0.55, 0.66)
    top = generator.uniform(1.0, 1.15) if wings else generator.uniform(0.76, 0.95)
    lift, thick, arm_width = (
        generator.uniform(0.06, 0.16),
        generator.uniform(0.12, 0.18),
        generator.uniform(0.1, 0.16),
    )
    colour, legs = cloth(generator), wood(generator)
    lean = generator.uniform(0.02, 0.12)
    solids = _short_legs(width, depth, lift, legs)
    inner = width - 2 * arm_width
    front = depth - thick
    solids.append(box((0, -thick / 2, (lift + seat - 0.1) / 2), (inner, front, seat - 0.1 - lift), colour))
    cushion = colour if generator.uniform() < 0.7 else cloth(generator)
    solids.append(
        box(
            (0, -thick / 2, seat - 0.04),
            (inner - 0.01, front, 0.12),
            shade(cushion, 1.06),
            taper=(0.97, 0.97),
        )
    )
    for side in (-1, 1):
        solids.append(
            box(
                (side * (width - arm_width) / 2, -thick / 2, (lift + arm) / 2),
                (arm_width, front, arm - lift),
                colour,
            )
        )
    y = (depth - thick) / 2
    solids.append(box((0, y, (lift + top) / 2), (width, thick, top - lift), colour, lean=lean, taper=(0.95, 0.8)))
    if wings:
        for side in (-1, 1):
            solids.append(
                box(
                    (side * (width - 0.09) / 2, y - thick / 2 - 0.1, (arm + top) / 2),
                    (0.07, 0.18, top - arm),
                    colour,
                    lean=lean / 2,
                    taper=(1.0, 0.7),
                )
            )
    return solids


def wing_chair(generator: Generator) -> list[Solid]:
    """An armchair with a tall back and wings."""
    return armchair(generator, wings=True)


def office_chair(generator: Generator) -> list[Solid]:
    """A swivel chair on a star base of five feet with castors."""
    width, depth, height = (
        generator.uniform(0.44, 0.52),
        generator.uniform(0.42, 0.5),
        generator.uniform(0.43, 0.54),
    )
    back, lean = generator.uniform(0.4, 0.7), generator.uniform(0.03, 0.12)
    frame, colour = metal(generator), cloth(generator) if generator.uniform() < 0.6 else (38.0, 39.0, 43.0)
    spread, turn = generator.uniform(0.26, 0.33), generator.uniform(0, 2 * math.pi)
    solids = []
    for i in range(5):
        x, y = spread * math.cos(turn + 0.4 * math.pi * i), spread * math.sin(turn + 0.4 * math.pi * i)
        solids.append(rod((0.03 * x, 0.03 * y, 0.13), (x, y, 0.08), 0.028, frame, 0.018))
        solids.append(box((x, y, 0.03), (0.05, 0.05, 0.06), (30.0, 30.0, 32.0)))
    solids.append(cylinder((0, 0, 0.14), 0.028, height - 0.2, shade(frame, 0.8), sides=6))
    solids.append(box((0, 0, height - 0.01), (width, depth, 0.09), colour, taper=(0.94, 0.94)))
    gap = generator.uniform(0.06, 0.16)
    y = depth / 2 + 0.01
    solids.append(box((0, y + 0.03, height + gap / 2), (0.07, 0.03, gap + 0.06), frame))
    solids.append(
        box(
            (0, y + 0.02, height + gap + (back - gap) / 2),
            (width * generator.uniform(0.8, 0.98), 0.06, back - gap),
            colour,
            lean=lean,
            taper=(generator.uniform(0.65, 0.98), 1.0),
        )
    )
    if generator.uniform() < 0.55:
        for side in (-1, 1):
            x = side * (width / 2 + 0.03)
            solids.append(rod((x, 0.05, height - 0.02), (x, 0.05, height + 0.2), 0.015, frame))
            solids.append(box((x, -0.02, height + 0.215), (0.06, 0.26, 0.03), (40.0, 40.0, 42.0)))
    return solids

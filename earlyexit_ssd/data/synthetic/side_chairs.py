"""Light chairs on legs: slats, panels, shells, folding and bar chairs.

Seat around x = y = 0, standing on z = 0, the sitter looking along -y.
"""

from __future__ import annotations

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.materials import (
    any_material,
    cloth,
    metal,
    plastic,
    shade,
    wood,
)
from earlyexit_ssd.data.synthetic.solids import Colour, Solid, box, cylinder, rod


def _legs(
    generator: Generator,
    width: float,
    depth: float,
    height: float,
    radius: float,
    colour: Colour,
    splay: float,
) -> list[Solid]:
    """Four legs under a seat of ``width`` x ``depth``, ``splay`` metres wider on the floor."""
    sides = 4 if generator.uniform() < 0.6 else 6
    x, y = width / 2 - radius, depth / 2 - radius
    legs = [
        rod(
            (sx * (x + splay), sy * (y + splay), 0.0),
            (sx * x, sy * y, height),
            radius * 0.8,
            colour,
            radius,
            sides,
        )
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]
    if generator.uniform() < 0.35:  # stretchers
        level, out = 0.35 * height, 0.65 * splay
        legs += [
            rod((sx * (x + out), -y - out, level), (sx * (x + out), y + out, level), radius * 0.6, colour)
            for sx in (-1, 1)
        ]
    return legs


def _seat(generator: Generator, width: float, depth: float, height: float, colour: Colour) -> list[Solid]:
    """A board whose upper side is at ``height``, in four of ten cases with a cushion."""
    thickness = generator.uniform(0.025, 0.06)
    solids = [box((0, 0, height - thickness / 2), (width, depth, thickness), colour)]
    if generator.uniform() < 0.4:
        soft = generator.uniform(0.03, 0.07)
        solids.append(
            box(
                (0, 0, height + soft / 2),
                (width * 0.94, depth * 0.94, soft),
                cloth(generator),
                taper=(0.92, 0.92),
            )
        )
    return solids


def slat_chair(generator: Generator) -> list[Solid]:
    """A dining chair whose back is two posts with upright slats or cross rails."""
    width, depth, height = (
        generator.uniform(0.38, 0.5),
        generator.uniform(0.38, 0.48),
        generator.uniform(0.42, 0.49),
    )
    back, lean, radius = (
        generator.uniform(0.38, 0.6),
        generator.uniform(0.02, 0.12),
        generator.uniform(0.016, 0.026),
    )
    colour = wood(generator) if generator.uniform() < 0.7 else any_material(generator)
    solids = _legs(generator, width, depth, height - 0.02, radius, colour, generator.uniform(0, 0.04))
    solids += _seat(generator, width, depth, height, colour)
    x, y, top = width / 2 - radius, depth / 2 - radius, height + back
    for side in (-x, x):
        solids.append(rod((side, y, height), (side, y + lean, top), radius, colour))
    rail = generator.uniform(0.04, 0.1)
    solids.append(box((0, y + lean, top), (width, 2 * radius, rail), colour))
    count = int(generator.integers(2, 5))
    if generator.uniform() < 0.55:
        for i in range(count):
            across = x * (2 * (i + 1) / (count + 1) - 1)
            solids.append(rod((across, y, height), (across, y + lean, top - rail / 2), 0.013, colour))
    else:
        for i in range(count - 1):
            share = (i + 0.6) / count
            solids.append(box((0, y + lean * share, height + back * share), (width - 2 * radius, 0.02, 0.05), colour))
    return solids


def panel_chair(generator: Generator) -> list[Solid]:
    """A chair with a closed back: board, plastic or upholstery, full height or on two posts."""
    width, depth, height = (
        generator.uniform(0.4, 0.52),
        generator.uniform(0.4, 0.5),
        generator.uniform(0.42, 0.49),
    )
    back, lean = generator.uniform(0.36, 0.58), generator.uniform(0.02, 0.14)
    colour = (wood, cloth, plastic)[generator.integers(3)](generator)
    legs = colour if generator.uniform() < 0.3 else (metal if generator.uniform() < 0.5 else wood)(generator)
    thickness = generator.uniform(0.02, 0.07)
    solids = _legs(
        generator,
        width,
        depth,
        height - 0.02,
        generator.uniform(0.011, 0.024),
        legs,
        generator.uniform(0, 0.08),
    )
    solids.append(box((0, 0, height), (width, depth, generator.uniform(0.03, 0.09)), colour))
    gap = generator.uniform(0.08, 0.2) if generator.uniform() < 0.45 else 0.03
    y = depth / 2 - thickness / 2
    if gap > 0.05:
        for side in (-0.3 * width, 0.3 * width):
            solids.append(rod((side, y, height), (side, y + lean * gap / back, height + gap + 0.02), 0.014, legs))
    panel = box(
        (0, y + lean * gap / back, height + (gap + back) / 2),
        (width * generator.uniform(0.88, 1.0), thickness, back - gap),
        colour,
        lean=lean * (1 - gap / back),
        taper=(generator.uniform(0.75, 1.05), 1.0),
    )
    if generator.uniform() < 0.2:
        panel = panel.striped(int(generator.integers(3, 8)), shade(colour, generator.uniform(0.5, 1.4)))
    return [*solids, panel]


def shell_chair(generator: Generator) -> list[Solid]:
    """A moulded shell, its back bent in three pieces, on splayed legs."""
    width, depth, height = (
        generator.uniform(0.42, 0.5),
        generator.uniform(0.4, 0.46),
        generator.uniform(0.42, 0.47),
    )
    colour, legs = plastic(generator), (wood if generator.uniform() < 0.6 else metal)(generator)
    back, lean = generator.uniform(0.34, 0.46), generator.uniform(0.06, 0.14)
    solids = _legs(generator, 0.6 * width, 0.6 * depth, height - 0.03, 0.015, legs, generator.uniform(0.08, 0.14))
    solids.append(box((0, 0, height), (width, depth, 0.04), colour, taper=(0.96, 0.96)))
    y = depth / 2
    third = width / 3
    solids.append(box((0, y, height + back / 2), (third * 1.1, 0.03, back), colour, lean=lean, taper=(0.9, 1.0)))
    for side in (-1, 1):
        solids.append(
            box(
                (side * third, y - 0.05, height + back / 2 - 0.02),
                (third, 0.04, back - 0.04),
                shade(colour, 0.94),
                lean=lean,
                taper=(0.75, 1.0),
            )
        )
    return solids


def folding_chair(generator: Generator) -> list[Solid]:
    """Crossed legs, a thin seat and a back between the longer pair of legs."""
    width, height, top = (
        generator.uniform(0.4, 0.46),
        generator.uniform(0.43, 0.47),
        generator.uniform(0.76, 0.9),
    )
    frame = (metal if generator.uniform() < 0.6 else wood)(generator)
    colour = frame if generator.uniform() < 0.35 else any_material(generator)
    solids = []
    for side in (-1, 1):
        x = side * width / 2
        solids.append(rod((x, -0.24, 0), (x, 0.24, top), 0.013, frame))
        solids.append(rod((x - side * 0.03, 0.24, 0), (x - side * 0.03, -0.18, height - 0.01), 0.013, frame))
    solids.append(box((0, -0.01, height + 0.015), (width - 0.05, 0.38, 0.025), colour))
    slope = 0.48 / top
    boards = int(generator.integers(1, 4))
    for i in range(boards):
        z = top - 0.07 - 0.11 * i if boards > 1 else top - 0.11
        solids.append(box((0, -0.24 + slope * z, z), (width - 0.02, 0.02, 0.08 if boards > 1 else 0.2), colour))
    solids.append(rod((-width / 2, 0.2, 0.06), (width / 2, 0.2, 0.06), 0.01, frame))
    return solids


def bar_chair(generator: Generator) -> list[Solid]:
    """A high stool with a low back."""
    height, radius = generator.uniform(0.56, 0.76), generator.uniform(0.17, 0.21)
    colour, legs = any_material(generator), (metal if generator.uniform() < 0.5 else wood)(generator)
    splay = generator.uniform(0.03, 0.09)
    solids = _legs(generator, 1.5 * radius, 1.5 * radius, height - 0.02, 0.016, legs, splay)
    if generator.uniform() < 0.5:
        solids.append(cylinder((0, 0, height - 0.02), radius, 0.06, colour))
    else:
        solids.append(box((0, 0, height + 0.01), (2 * radius, 2 * radius, 0.06), colour))
    back = generator.uniform(0.22, 0.36)
    for side in (-0.7 * radius, 0.7 * radius):
        solids.append(rod((side, 0.75 * radius, height + 0.04), (side, radius, height + back), 0.013, legs))
    solids.append(
        box(
            (0, radius, height + back - 0.04),
            (1.9 * radius, 0.035, generator.uniform(0.1, 0.18)),
            colour,
            lean=0.02,
        )
    )
    return solids

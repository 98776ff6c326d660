"""Sofas, beds, bookcases and cabinets. On z = 0 around x = y = 0, front along -y."""

from __future__ import annotations

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.materials import (
    cloth,
    paint,
    shade,
    wood,
)
from earlyexit_ssd.data.synthetic.solids import Solid, box


def sofa(generator: Generator) -> list[Solid]:
    """A sofa for two or three."""
    width, depth = generator.uniform(1.5, 2.2), generator.uniform(0.75, 0.95)
    seat, arm, top = (
        generator.uniform(0.38, 0.45),
        generator.uniform(0.52, 0.65),
        generator.uniform(0.72, 0.9),
    )
    colour, side, thick = cloth(generator), generator.uniform(0.12, 0.22), 0.2
    solids = [
        box((0, -thick / 2, seat / 2 - 0.03), (width - 2 * side, depth - thick, seat - 0.12), colour),
        box(
            (0, (depth - thick) / 2, top / 2 + 0.03),
            (width, thick, top - 0.06),
            colour,
            lean=0.05,
            taper=(1.0, 0.8),
        ),
    ]
    solids += [
        box((sx * (width - side) / 2, -thick / 2, arm / 2 + 0.03), (side, depth - thick, arm - 0.06), colour)
        for sx in (-1, 1)
    ]
    count = int(generator.integers(2, 4))
    inner = (width - 2 * side) / count
    cushions = shade(colour, generator.uniform(0.9, 1.15))
    for i in range(count):
        x = (i - (count - 1) / 2) * inner
        solids.append(
            box(
                (x, -thick / 2, seat - 0.02),
                (inner - 0.015, depth - thick, 0.1),
                cushions,
                taper=(0.97, 0.97),
            )
        )
    if generator.uniform() < 0.6:
        x = generator.uniform(-0.3, 0.3) * width
        solids.append(box((x, depth / 2 - thick - 0.12, seat + 0.22), (0.4, 0.1, 0.36), cloth(generator), lean=0.08))
    return solids


def bed(generator: Generator) -> list[Solid]:
    """A bed with headboard, pillows and a cover."""
    width, length = generator.uniform(0.9, 1.7), 2.0
    frame, cover = wood(generator), cloth(generator)
    solids = [
        box((0, 0, 0.16), (width, length, 0.26), frame),
        box((0, 0, 0.39), (width - 0.04, length - 0.04, 0.2), (225.0, 222.0, 214.0)),
        box((0, -0.25, 0.51), (width, length - 0.5, 0.04), cover),
        box((0, length / 2 + 0.03, 0.5), (width, 0.06, generator.uniform(0.8, 1.0)), frame),
    ]
    if generator.uniform() < 0.3:
        solids[2] = solids[2].striped(int(generator.integers(5, 12)), cloth(generator))
    pillows = 1 if width < 1.2 else 2
    for i in range(pillows):
        x = (i - (pillows - 1) / 2) * width / 2
        solids.append(box((x, 0.75, 0.55), (0.55, 0.36, 0.12), (235.0, 233.0, 228.0), taper=(0.8, 0.8)))
    return solids


def shelf(generator: Generator) -> list[Solid]:
    """A bookcase: back, sides, boards, and books in blocks."""
    width, depth, height = (
        generator.uniform(0.6, 1.2),
        generator.uniform(0.26, 0.36),
        generator.uniform(1.0, 2.1),
    )
    colour = wood(generator) if generator.uniform() < 0.6 else paint(generator)
    solids = [
        box((0, depth / 2 - 0.01, height / 2), (width, 0.02, height), shade(colour, 0.8)),
        *(box((sx * (width / 2 - 0.012), -0.01, height / 2), (0.024, depth - 0.02, height), colour) for sx in (-1, 1)),
    ]
    boards = int(generator.integers(3, 6))
    for i in range(boards + 1):
        z = 0.06 + (height - 0.08) * i / boards
        solids.append(box((0, -0.01, z), (width - 0.05, depth - 0.02, 0.024), colour))
        if i < boards and generator.uniform() < 0.8:
            tall = (height - 0.08) / boards * generator.uniform(0.5, 0.85)
            long = (width - 0.06) * generator.uniform(0.3, 0.98)
            x = generator.uniform(-0.5, 0.5) * (width - 0.06 - long)
            books = box((x, 0.0, z + 0.013 + tall / 2), (long, depth * 0.6, tall), cloth(generator))
            solids.append(books.striped(int(generator.integers(4, 12)), cloth(generator)))
    return solids


def cabinet(generator: Generator) -> list[Solid]:
    """A chest of drawers, wardrobe or TV stand."""
    width, depth, height = (
        generator.uniform(0.5, 1.3),
        generator.uniform(0.38, 0.5),
        generator.uniform(0.45, 1.1),
    )
    if generator.uniform() < 0.25:
        height = generator.uniform(1.6, 2.1)
    colour = wood(generator) if generator.uniform() < 0.6 else paint(generator)
    rows = max(1, round(height / 0.28)) if height < 1.5 else 1
    columns = 1 if width < 0.8 else 2
    solids = [box((0, 0.01, height / 2 + 0.02), (width, depth - 0.02, height - 0.04), colour)]
    high, wide = (height - 0.08) / rows, width / columns
    for row in range(rows):
        for column in range(columns):
            x, z = (column + 0.5) * wide - width / 2, 0.06 + (row + 0.5) * high
            solids.append(box((x, -depth / 2 + 0.01, z), (wide - 0.03, 0.02, high - 0.025), shade(colour, 1.08)))
            solids.append(box((x, -depth / 2 - 0.008, z), (0.1, 0.016, 0.018), (60.0, 58.0, 55.0)))
    if height < 0.7 and generator.uniform() < 0.6:
        solids.append(box((0, 0, height + 0.3), (min(width, 1.0) * 0.95, 0.05, 0.5), (22.0, 23.0, 27.0)))
    return solids

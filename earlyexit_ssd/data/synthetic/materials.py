"""Colours of wood, cloth, metal and paint."""

from __future__ import annotations

import colorsys

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.solids import Colour


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return (255.0 * red, 255.0 * green, 255.0 * blue)


def wood(generator: Generator) -> Colour:
    """Birch to wenge."""
    return _hsv(generator.uniform(0.05, 0.11), generator.uniform(0.25, 0.65), generator.uniform(0.22, 0.85))


def cloth(generator: Generator) -> Colour:
    """Any hue, more often muted than loud."""
    return _hsv(generator.uniform(), generator.beta(1.5, 2.0), generator.uniform(0.2, 0.9))


def metal(generator: Generator) -> Colour:
    """Black, steel or chrome, now and then brass."""
    if generator.uniform() < 0.12:
        return _hsv(0.12, 0.45, generator.uniform(0.5, 0.8))
    return _hsv(generator.uniform(0.5, 0.7), 0.06, generator.uniform(0.08, 0.85))


def plastic(generator: Generator) -> Colour:
    """White, black or a strong colour."""
    kind = generator.uniform()
    if kind < 0.3:
        return _hsv(0.1, 0.05, generator.uniform(0.8, 0.97))
    if kind < 0.5:
        return _hsv(0.6, 0.1, generator.uniform(0.08, 0.25))
    return _hsv(generator.uniform(), generator.uniform(0.4, 0.9), generator.uniform(0.4, 0.95))


def paint(generator: Generator) -> Colour:
    """Walls and ceilings: light, hardly saturated; one in six is dark or strong."""
    if generator.uniform() < 0.16:
        return _hsv(generator.uniform(), generator.uniform(0.2, 0.5), generator.uniform(0.35, 0.65))
    return _hsv(generator.uniform(), generator.uniform(0.0, 0.16), generator.uniform(0.66, 0.95))


def cardboard(generator: Generator) -> Colour:
    """Brown cardboard."""
    return _hsv(generator.uniform(0.07, 0.1), generator.uniform(0.35, 0.5), generator.uniform(0.55, 0.8))


def leaf(generator: Generator) -> Colour:
    """Greens of a pot plant."""
    return _hsv(generator.uniform(0.22, 0.4), generator.uniform(0.35, 0.8), generator.uniform(0.25, 0.65))


def any_material(generator: Generator) -> Colour:
    """Wood, cloth, metal or plastic."""
    return (wood, cloth, metal, plastic)[generator.integers(4)](generator)


def shade(colour: Colour, factor: float) -> Colour:
    """``colour`` times ``factor``, kept within [0, 255]."""
    red, green, blue = colour
    return (min(red * factor, 255.0), min(green * factor, 255.0), min(blue * factor, 255.0))

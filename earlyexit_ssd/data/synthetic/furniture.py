"""Which furniture stands where, chairs aside."""

from __future__ import annotations

from collections.abc import Callable

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.large_furniture import bed, cabinet, shelf, sofa
from earlyexit_ssd.data.synthetic.small_furniture import bin_or_case, boxes, floor_lamp, plant
from earlyexit_ssd.data.synthetic.solids import Solid
from earlyexit_ssd.data.synthetic.tables import coffee_table, round_table, stool, table

Builder = Callable[[Generator], list[Solid]]
# Builders that are named twice come twice as often. Sofas stand along walls only: from the side or from behind,
# anywhere in the room, one could not be told from an armchair.
FREE: tuple[Builder, ...] = (
    *(table, round_table, coffee_table, stool, stool),
    *(floor_lamp, boxes, plant, bin_or_case),
)
ALONG_WALLS: tuple[Builder, ...] = (
    *(shelf, shelf, cabinet, cabinet, sofa, bed),
    *(table, floor_lamp, plant, boxes),
)
TABLES: tuple[Builder, ...] = (table, round_table)


def pick(generator: Generator, builders: tuple[Builder, ...]) -> list[Solid]:
    """Furniture of a random kind among ``builders``."""
    return builders[generator.integers(len(builders))](generator)

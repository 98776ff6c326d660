"""Which chairs there are and how often.

A chair has what a stool or a table lacks: a back above the seat. Every builder returns solids in a frame of
their own: the seat around x = y = 0, standing on z = 0, the sitter looking along -y.
"""

from __future__ import annotations

from collections.abc import Callable

from numpy.random import Generator

from earlyexit_ssd.data.synthetic.armchairs import armchair, office_chair, wing_chair
from earlyexit_ssd.data.synthetic.side_chairs import (
    bar_chair,
    folding_chair,
    panel_chair,
    shell_chair,
    slat_chair,
)
from earlyexit_ssd.data.synthetic.solids import Solid

SHARES: dict[Callable[[Generator], list[Solid]], float] = {
    slat_chair: 0.24,
    panel_chair: 0.20,
    office_chair: 0.14,
    armchair: 0.12,
    shell_chair: 0.09,
    wing_chair: 0.08,
    folding_chair: 0.07,
    bar_chair: 0.06,
}


def random_chair(generator: Generator) -> list[Solid]:
    """A chair of a random kind."""
    kinds = list(SHARES)
    return kinds[generator.choice(len(kinds), p=list(SHARES.values()))](generator)

"""Random numbers that depend on nothing but the numbers they are named by."""

from __future__ import annotations

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """A seed in [0, 2**63) for each tuple of non-negative integers, such as (seed, epoch, index).

    NumPy promises that ``SeedSequence`` never changes, so a run resumed years later sees the same views.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

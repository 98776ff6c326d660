"""Checks of a model's arguments, with one-line errors: the argument, its value, and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

from earlyexit_ssd.errors import EarlyExitError


def is_number(value: object, whole: bool = False) -> bool:
    """Whether ``value`` is a finite number >= 0 (``whole``: an integer) and no bool."""
    kind = Integral if whole else Real
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < float("inf")


def numbers(name: str, values: object, whole: bool = False) -> tuple:
    """Check a sequence of numbers >= 0 (``whole``: integers) and return it as a tuple."""
    found = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(is_number(value, whole) for value in found):
        kind, example = ("whole numbers", "(8, 12)") if whole else ("numbers", "(0.5, 1.0)")
        raise EarlyExitError(f"{name} is {values!r:.60}, expected a sequence of {kind} from 0 on, such as {example}")
    return found

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
    found = values if isinstance(values, Iterable) else (None,)
    found = tuple(found)
    if not all(is_number(value, whole) for value in found):
        kind, example = ("whole numbers", "(8, 12)") if whole else ("numbers", "(0.5, 1.0)")
        raise EarlyExitError(f"{name} is {values!r:.60}, expected a sequence of {kind} from 0 on, such as {example}")
    return found


def whole_number(name: str, value: object) -> None:
    """Check for an integer >= 0."""
    if not is_number(value, whole=True):
        raise EarlyExitError(f"{name} is {value!r:.60}, expected a whole number from 0 on")


def check_exit_layers(layers: tuple[int, ...], last_layer: int) -> None:
    """Check for increasing trunk layers from 1 to ``last_layer - 1``."""
    if not layers or layers != tuple(sorted({layer for layer in layers if 1 <= layer < last_layer})):
        raise EarlyExitError(f"exit_layers {layers}: expected increasing trunk layers from 1 to {last_layer - 1}")


def one_for_each(name: str, values: tuple[float, ...], exits: int, highest: float, zero: bool = True) -> list[float]:
    """A list with one value per exit, from ``exits`` values or one for all, in [0, highest]; ``zero``: allow 0."""
    fits = all((value >= 0 if zero else value > 0) and value <= highest for value in values)
    if len(values) not in (1, exits) or not fits:
        interval = f"{'[' if zero else '('}0, {highest}]"
        raise EarlyExitError(
            f"{name} {list(values)}: expected one number in {interval}, or one for each of {exits} exits"
        )
    return list(values) * (exits // len(values))


def check_class_names(classes: tuple[str, ...], num_outputs: int) -> None:
    """Check for one name per output except background."""
    if len(classes) != num_outputs - 1:
        raise EarlyExitError(
            f"{len(classes)} class names for a head with {num_outputs} outputs, one of them background"
        )

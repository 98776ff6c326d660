"""Checks of what a model is built with, one line each: the argument, what came, and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

from earlyexit_ssd.errors import EarlyExitError


def is_number(value: object, whole: bool = False) -> bool:
    """Whether it is a finite number from 0 on, ``whole`` an integer; a truth value is none."""
    kind = Integral if whole else Real
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < float("inf")


def numbers(name: str, values: object, whole: bool = False) -> tuple:
    """The sequence ``values`` of numbers from 0 on as a tuple; ``whole`` takes integers alone."""
    found = values if isinstance(values, Iterable) else (None,)
    found = tuple(found)
    if not all(is_number(value, whole) for value in found):
        kind, example = ("whole numbers", "(8, 12)") if whole else ("numbers", "(0.5, 1.0)")
        raise EarlyExitError(f"{name} is {values!r:.60}, expected a sequence of {kind} from 0 on, such as {example}")
    return found


def whole_number(name: str, value: object) -> None:
    """An integer from 0 on."""
    if not is_number(value, whole=True):
        raise EarlyExitError(f"{name} is {value!r:.60}, expected a whole number from 0 on")


def check_exit_layers(layers: tuple[int, ...], last_layer: int) -> None:
    """Exits leave behind increasing trunk layers, the last one excepted."""
    if not layers or layers != tuple(sorted({layer for layer in layers if 1 <= layer < last_layer})):
        raise EarlyExitError(f"exit_layers {layers}: expected increasing trunk layers from 1 to {last_layer - 1}")


def one_for_each(name: str, values: tuple[float, ...], exits: int, highest: float, zero: bool = True) -> list[float]:
    """One value for each exit, from as many in [0, highest], or from one for all; without ``zero`` above 0."""
    fits = all((value >= 0 if zero else value > 0) and value <= highest for value in values)
    if len(values) not in (1, exits) or not fits:
        interval = f"{'[' if zero else '('}0, {highest}]"
        raise EarlyExitError(
            f"{name} {list(values)}: expected one number in {interval}, or one for each of {exits} exits"
        )
    return list(values) * (exits // len(values))


def check_class_names(classes: tuple[str, ...], num_outputs: int) -> None:
    """There is a name for every output but background."""
    if len(classes) != num_outputs - 1:
        raise EarlyExitError(
            f"{len(classes)} class names for a head with {num_outputs} outputs, one of them background"
        )

"""Errors that a user can act on: one line with the file, the record, the value, what was expected and the fix."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

LONGEST = 299  # characters of a message
_START, _END = 170, 124  # what stays of one that is too long: the file and the record, and the fix


class EarlyExitError(ValueError):
    """Base of every error that the package raises for bad input; its message is one line under 300 characters."""

    def __str__(self) -> str:
        # not when it is made: torch.export traces the line that raises
        return one_line(super().__str__())


class ConfigError(EarlyExitError):
    """A configuration that cannot run."""


class DataError(EarlyExitError):
    """A data set, a record or an image that cannot be used."""


class CannotWrite(EarlyExitError):
    """A file that could not be written: a full disk, a quota, a folder that is read-only."""


class GateFailed(EarlyExitError):
    """A phase's detector does not do what the next phase needs; ``advice`` says what to do now, a line each."""

    def __init__(self, message: str, advice: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.advice = list(advice)


class Interrupted(Exception):
    """A signal stopped the training; everything is saved."""


def one_line(message: str) -> str:
    """``message`` without line breaks and control characters; where it is too long, without the front of long words
    (paths) and then without its middle."""
    lines = message.splitlines()
    if any(line.startswith("Original Traceback") for line in lines):  # a loader's worker: the error is the last line
        lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
    text = " ".join(filter(None, map(str.strip, lines)))
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    if len(text) > LONGEST:
        text = re.sub(r"\S{61,}", lambda word: f"...{word[0][-57:]}", text)
    return text if len(text) <= LONGEST else f"{text[:_START]} ... {text[-_END:]}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring = 4, 12, 12, 6, 80


def shown(value: Any, longest: int = 100) -> str:
    """``repr`` in at most ``longest`` characters and in no time, however large, deep or tangled ``value`` is."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # such as a whole number with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the valid name that is closest to ``name``, or an empty string."""
    by_lower_case = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower()[:100], by_lower_case, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower_case[matches[0]]}'?)" if matches else ""


def import_package(name: str) -> ModuleType:
    """Import an optional package; an EarlyExitError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EarlyExitError(f"the package {name} is missing ({error}): pip install {name}") from None


P, R = ParamSpec("P"), TypeVar("R")


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate ``function`` so that a misspelt keyword raises ``TypeError`` with the name that was probably meant."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        require_known(function, kwargs, names)
        return function(*args, **kwargs)

    return checked


def require_known(function: Callable, given: Iterable[str], names: list[str]) -> None:
    """A TypeError with the nearest name if the keywords ``given`` to ``function`` are not some of ``names``."""
    for name in given:
        if name not in names:
            hint = nearest(name, names) or f"; it takes {', '.join(names)}"
            raise TypeError(f"{function.__qualname__} got an unknown keyword argument '{name}'{hint}")

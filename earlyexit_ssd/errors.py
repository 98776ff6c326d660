"""Errors that a user can act on: one line with the file, the record, the value, what was expected and the fix."""

import difflib
import functools
import importlib
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

MAX_LENGTH = 299  # characters of a message
_START, _END = 170, 124  # characters kept of a longer message: its start has the file and record, its end the fix


class EarlyExitError(ValueError):
    """Base of every error that the package raises for bad input. Its message is one line under 300 characters."""

    def __str__(self) -> str:
        # not in __init__, because torch.export traces it
        return one_line(super().__str__())


class ConfigError(EarlyExitError):
    """The configuration has an unknown key or an impossible value."""


class DataError(EarlyExitError):
    """A data set, a record or an image cannot be used."""


class CannotWrite(EarlyExitError):
    """A file cannot be written: the disk is full, a quota is used up, or the folder is read-only."""


class GateFailed(EarlyExitError):
    """A phase of the training missed the figures of its gate. ``advice`` has lines that tell the user what to try."""

    def __init__(self, message: str, advice: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.advice = list(advice)


class Interrupted(Exception):
    """A signal stopped the training after its state was saved."""


def one_line(message: str) -> str:
    """Return ``message`` in one line of at most `MAX_LENGTH` characters. Control characters are escaped. Too long a
    message loses the front of long words (paths), and then its middle."""
    lines = message.splitlines()
    if any(line.startswith("Original Traceback") for line in lines):  # from a DataLoader worker
        lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
    text = " ".join(filter(None, map(str.strip, lines)))
    if not text.isprintable():
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    if len(text) > MAX_LENGTH:
        text = re.sub(r"\S{61,}", lambda word: f"...{word[0][-57:]}", text)
    return text if len(text) <= MAX_LENGTH else f"{text[:_START]} ... {text[-_END:]}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring = 4, 12, 12, 6, 80


def shown(value: Any, max_length: int = 100) -> str:
    """Return ``repr(value)`` in at most ``max_length`` characters. Large, deep and recursive values are fast too."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # for example an int with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the valid name that is most similar to ``name``, or an empty string."""
    by_lower_case = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower()[:100], by_lower_case, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower_case[matches[0]]}'?)" if matches else ""


def import_package(name: str) -> ModuleType:
    """Import an optional package. Raise EarlyExitError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EarlyExitError(f"the package {name} is missing ({error}): pip install {name}") from None


P, R = ParamSpec("P"), TypeVar("R")


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate ``function`` so that an unknown keyword raises ``TypeError`` with the most similar valid keyword."""
    valid = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(function, kwargs, valid)
        return function(*args, **kwargs)

    return checked


def check_keywords(function: Callable, keywords: Iterable[str], valid: list[str]) -> None:
    """Raise ``TypeError`` if a keyword argument of ``function`` is not in ``valid``."""
    for name in keywords:
        if name not in valid:
            hint = suggest(name, valid) or f"; it takes {', '.join(valid)}"
            raise TypeError(f"{function.__qualname__} got an unknown keyword argument '{name}'{hint}")

"""Errors that a user can act on: one line with the file, the record, the value, what was expected and the fix."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

LONGEST = 299
"""Characters of a message at most."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


class EarlyExitError(ValueError):
    """Base of every error that the package raises for bad input: one line under 300 characters."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class ConfigError(EarlyExitError):
    """A configuration that cannot run."""


class DataError(EarlyExitError):
    """A data set, a record or an image that cannot be used."""


def one_line(text: str) -> str:
    """``text`` without line breaks, with what no console shows escaped and no longer than ``LONGEST``.

    Where it is too long, paths lose their front and then the line its middle: a message has the file's name at its
    front and the cure at its end.
    """
    if "\nOriginal Traceback" in text:  # from a loader's worker: the traceback, and last the message itself
        text = text.strip().splitlines()[-1].partition("Error: ")[2]
    text = re.sub(r"\s*[\r\n\t\v\f]\s*", " ", text).strip()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > LONGEST:
        text = re.sub(r"\S{61,}", lambda word: f"...{word[0][-57:]}", text)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2 - 2]} ... {text[-(LONGEST // 2 - 2) :]}"


def shown(value: object) -> str:
    """``repr(value)``, shortened, for a message: what a file holds may be long or deep."""
    return _SHORT.repr(value)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the valid name that is closest to ``name``, or an empty string."""
    by_lower_case = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower_case[matches[0]]}'?)" if matches else ""

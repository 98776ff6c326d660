"""Errors that a user can act on: one line with the file, the record, the value, what was expected and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EarlyExitError(ValueError):
    """Base of every error that the package raises for bad input."""


class ConfigError(EarlyExitError):
    """A configuration that cannot run."""


class DataError(EarlyExitError):
    """A data set, a record or an image that cannot be used."""


class CannotWrite(EarlyExitError):
    """A file that could not be written: a full disk, a quota, a folder that is read-only."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the valid name that is closest to ``name``, or an empty string."""
    by_lower_case = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower_case[matches[0]]}'?)" if matches else ""

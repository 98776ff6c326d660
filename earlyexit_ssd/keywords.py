"""Unknown keyword arguments are errors that name the nearest valid one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from earlyexit_ssd.errors import nearest

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

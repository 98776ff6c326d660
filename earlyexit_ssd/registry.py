"""Registries of extensions: policies, branches, detectors, data formats, metrics and data sets by name."""

from typing import TypeVar

from earlyexit_ssd.errors import EarlyExitError, shown, suggest

T = TypeVar("T")


class UnknownName(EarlyExitError):
    """A name that no imported module registers."""


class Registry(dict[str, T]):
    """Name -> registered object. ``kind`` is the noun for such an object in errors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str, value: T) -> None:
        """Add an object. Raise EarlyExitError if ``name`` is no string or is registered already."""
        if not isinstance(name, str):
            fix = 'write the name into the brackets of the decorator: ("name")'
            raise EarlyExitError(f"a {self.kind} is registered under {shown(name)}, expected a name; {fix}")
        if name in self:
            raise EarlyExitError(f"{self.kind} '{name}' is registered already; choose another name")
        self[name] = value

    def find(self, name: object) -> T:
        """Return the object of ``name``. Raise UnknownName with the nearest name if there is none."""
        if not isinstance(name, str) or name not in self:
            names = f"{', '.join(self)}, or a name that an imported module registers"
            raise UnknownName(f"{self.kind} is {name!r:.60}, expected one of {names}{suggest(str(name), self)}")
        return self[name]

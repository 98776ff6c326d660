"""Read JSON and YAML files that may be damaged or hostile: bounded in size and depth, and checked against types.

Expected types are dataclasses, ``TypedDict``, ``tuple[int, ...]``, ``float | None``, ``Literal``, and
``Annotated[float, 0, 1]`` for a number with its lower and upper bound.
"""

import dataclasses
import functools
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

try:
    import yaml
except ImportError:  # an installation without PyTorch reads JSON only
    yaml = None

from earlyexit_ssd.errors import EarlyExitError, shown, suggest

T = TypeVar("T")

MAX_DEPTH = 32
MAX_VALUES = 2_000_000
MAX_YAML_VALUES, MAX_YAML_CHARACTERS = 100_000, 2**18  # lower, because PyYAML is slow and aliases multiply values


def require_bounded(value: Any, max_values: int = MAX_VALUES) -> None:
    """Raise ValueError if nested dicts and lists are deeper than `MAX_DEPTH`, or hold too many values or too large an
    integer. Levels are checked one after another, so a structure that contains itself stops at `MAX_DEPTH`."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        for item in level:
            if isinstance(item, int) and item.bit_length() > 64:
                raise ValueError("a whole number of more than 64 bits")
        level = list(islice(chain.from_iterable(map(_children, level)), max_values + 1))
        count += len(level)
        if count > max_values:
            raise ValueError(f"more than {max_values} values")
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _children(value: Any) -> Iterable[Any]:
    value = value.value if yaml is not None and isinstance(value, yaml.CollectionNode) else value
    if isinstance(value, Mapping):
        return chain(value, value.values())
    return value if isinstance(value, (list, tuple, set)) else ()


def read_json(path: str | os.PathLike[str], what: str, fix: str, error: type[EarlyExitError] = EarlyExitError) -> Any:
    """Return the content of a JSON file. Raise ``error`` if the file is missing, not a regular file, not JSON or too
    large, repeats a key, or holds NaN. Messages have ``what`` (the kind of file, such as "certificate") and ``fix``.
    """
    return _read(path, what, fix, error, _parse_json, "JSON")


def read_yaml(path: str | os.PathLike[str], what: str, fix: str, error: type[EarlyExitError] = EarlyExitError) -> Any:
    """Return the content of a YAML file (:func:`parse_yaml`). Arguments and errors are those of :func:`read_json`."""
    return _read(path, what, fix, error, parse_yaml, "valid YAML")


def _read(
    path: Any, what: str, fix: str, error: type[EarlyExitError], parse: Callable[[str], Any], format_name: str
) -> Any:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such {what}; {fix}") from None
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{path}: cannot be read as a {what} ({reason}); {fix}") from None
    try:
        return parse(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not {format_name} ({cause}); {fix}") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file. A pipe or a device raises OSError, because reading it might never end. A path with a NUL
    character raises ValueError."""
    path = Path(path)
    path.stat()
    if not path.is_file():
        raise OSError(0, "not a regular file")
    return path.read_bytes()


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        mapping: dict = {}
        for key, value in pairs:
            if key in mapping:
                raise ValueError(f"the key {shown(key)} is given twice")
            mapping[key] = value
        return mapping

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    require_bounded(value)
    return value


if yaml is not None:

    class _PlainLoader(yaml.SafeLoader):
        """Load YAML's plain types. Dates stay text. Other tags and repeated keys are errors."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
        yaml_constructors = {  # noqa: RUF012
            tag: constructor
            for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
        }

        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                    if key.value in seen:
                        problem = f"the key {shown(key.value)} is given twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
            return node

    # YAML 1.1 reads 1e-3 and 1.5e3 as text
    _PlainLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
    )


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text: dicts, lists, str, int, float, bool and None. Raise a one-line ValueError if the
    text is not YAML, is too large or too deep, repeats a key, or has a tag of another type."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text)} characters, expected at most {MAX_YAML_CHARACTERS}")
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        require_bounded(node, MAX_YAML_VALUES)  # counts an alias at each use, before the values are built
        value = None if node is None else loader.construct_document(node)
        require_bounded(value, MAX_YAML_VALUES)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML's constructors raise many types
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return value


def build(cls: type[T], values: Any, name: str = "") -> T:
    """Build the dataclass or ``TypedDict`` ``cls`` from ``values``, a dict that was read from a file. ``name`` is the
    dict's name in messages. Raise EarlyExitError if a key is missing, a value has another type, or a key is not a field
    of the dataclass. A ``TypedDict`` keeps unknown keys."""
    _require(isinstance(values, Mapping), name or cls.__name__, values, "keys and values")
    _require(all(isinstance(key, str) for key in values), name or cls.__name__, values, "keys that are text")
    hints, place, prefix = _hints(cls), f"{name}: " if name else "", f"{name}." if name else ""
    if is_typeddict(cls):
        required = cls.__required_keys__
    else:
        for key in (key for key in values if key not in hints):
            raise EarlyExitError(f"{place}the key {shown(key)} is unknown{suggest(key, hints)}")
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    for key in sorted(required - values.keys()):
        raise EarlyExitError(f"{place}the key '{key}' is missing")
    return cls(**{key: typed(hints.get(key, Any), value, f"{prefix}{key}") for key, value in values.items()})


def check_fields(instance: Any) -> None:
    """Convert the fields of a dataclass with :func:`typed`. Call this function in ``__post_init__``."""
    for key, expected in _hints(type(instance)).items():
        object.__setattr__(instance, key, typed(expected, getattr(instance, key), key))


def typed(expected: Any, value: Any, name: str) -> Any:
    """Return ``value`` if it has the type ``expected``, with dicts and lists converted to dataclasses and tuples. Raise
    EarlyExitError with ``name``, the value and the expected type otherwise."""
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any or (dataclasses.is_dataclass(expected) and isinstance(value, expected)):
        return value
    if is_typeddict(expected) or dataclasses.is_dataclass(expected):
        return build(expected, value, name)
    if origin is Annotated:
        number = typed(arguments[0], value, name)
        _require(arguments[1] <= number <= arguments[2], name, value, f"{arguments[1]} to {arguments[2]}")
        return number
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        dicts = (member for member in members if isinstance(value, dict) and get_origin(member) is dict)
        return typed(next(dicts, members[0]), value, name)  # other values must have the first member's type
    if origin is Literal:
        _require(isinstance(value, str) and value in arguments, name, value, f"one of {', '.join(arguments)}")
        return value
    if origin in (tuple, list):
        _require(isinstance(value, tuple | list), name, value, "a list")
        return origin(typed(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        has_text_keys = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        _require(has_text_keys, name, value, "keys that are text, and values")
        return {key: typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    accepted, description = _SCALARS[expected]
    fits = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
    _require(fits and (expected is not float or math.isfinite(value)), name, value, description)
    return value.item() if hasattr(value, "item") else value  # numpy's scalars would make a model file unreadable


_SCALARS: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "text"),
}


def _require(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise EarlyExitError(f"{name} is {shown(value)}, expected {expected}")


@functools.cache
def _hints(cls: Any) -> dict[str, type]:
    return get_type_hints(cls, include_extras=True)

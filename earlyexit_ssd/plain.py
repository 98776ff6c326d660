"""Plain data that anybody may have written: JSON and YAML files, bounded in size and depth, and checked by type.

A type says what is expected: dataclasses and ``TypedDict``, ``tuple[int, ...]``, ``float | None``, ``Literal``, and
``Annotated[float, 0, 1]`` for a number with its least and its largest value.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

try:
    import yaml
except ImportError:  # where only the runtime is installed; JSON is read all the same
    yaml = None

from earlyexit_ssd.errors import EarlyExitError, nearest, shown

T = TypeVar("T")

DEEPEST = 32
MOST_VALUES = 2_000_000
MOST_YAML_VALUES, MOST_YAML_BYTES = 100_000, 2**18  # YAML is read slowly, and an alias repeats what it stands for


def require_bounded(value: Any, most: int = MOST_VALUES) -> None:
    """A ValueError if nested dicts and lists are deeper than `DEEPEST`, or hold more than ``most`` values or an integer
    of more than 64 bits. They are looked at level by level; what refers to itself has no end."""
    level, count = [value], 0
    for _ in range(DEEPEST):
        for item in level:
            if isinstance(item, int) and item.bit_length() > 64:
                raise ValueError("a whole number of more than 64 bits")
        level = list(islice(chain.from_iterable(map(_children, level)), most + 1))
        count += len(level)
        if count > most:
            raise ValueError(f"more than {most} values")
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def _children(value: Any) -> Iterable[Any]:
    value = value.value if yaml is not None and isinstance(value, yaml.CollectionNode) else value
    if isinstance(value, Mapping):
        return chain(value, value.values())
    return value if isinstance(value, (list, tuple, set)) else ()


def read_json(path: str | os.PathLike[str], what: str, fix: str, error: type[EarlyExitError] = EarlyExitError) -> Any:
    """The content of a JSON file; no key twice, no NaN. ``what`` the file is to be, and the ``fix``, are for messages.
    An EarlyExitError (of the class ``error``) if there is no such regular file, or it is not JSON."""
    return _read(path, what, fix, error, _parse_json, "JSON")


def read_yaml(path: str | os.PathLike[str], what: str, fix: str, error: type[EarlyExitError] = EarlyExitError) -> Any:
    """The content of a YAML file, see :func:`parse_yaml`; else as :func:`read_json`."""
    return _read(path, what, fix, error, parse_yaml, "valid YAML")


def _read(path: Any, what: str, fix: str, error: type[EarlyExitError], parse: Callable[[str], Any], kind: str) -> Any:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: no such {what}; {fix}") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: cannot be read as a {what} ({reason}); {fix}") from None
    try:
        return parse(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not {kind} ({problem}); {fix}") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Of a regular file, else an OSError: a pipe or a device might never end. A ValueError: the path holds a NUL."""
    path = Path(path)
    path.stat()
    if not path.is_file():
        raise OSError(0, "it is no regular file")
    return path.read_bytes()


def _parse_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        found: dict = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} is given twice")
            found[key] = value
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    require_bounded(value)
    return value


if yaml is not None:

    class _PlainLoader(yaml.SafeLoader):
        """YAML's plain types; a date is text, other tags are refused, and no key is given twice."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
        yaml_constructors = {  # noqa: RUF012
            tag: make
            for tag, make in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
        }

        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                    if key.value in seen:
                        found = f"the key {shown(key.value)} is given twice"
                        raise yaml.constructor.ConstructorError(None, None, found, key.start_mark)
                    seen.add(key.value)
            return node


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dicts, lists, text, numbers, truth values and None. A ValueError (one line) if it is
    not YAML, is too large or too deep, gives a key twice, or has a tag of something else."""
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"{len(text)} characters, at most {MOST_YAML_BYTES} are read")
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        require_bounded(node, MOST_YAML_VALUES)  # aliases counted as often as they are used, before they are followed
        value = None if node is None else loader.construct_document(node)
        require_bounded(value, MOST_YAML_VALUES)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML's makers of numbers and the like raise whatever comes
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return value


def build(kind: type[T], values: Any, name: str = "") -> T:
    """A dataclass, or a dict as a ``TypedDict`` says, of the values that a file has under their names. An
    EarlyExitError if a key is unknown or missing, or a value is not what its type says."""
    _require(isinstance(values, Mapping), name or kind.__name__, values, "keys and values")
    _require(all(isinstance(key, str) for key in values), name or kind.__name__, values, "keys that are text")
    hints, inside = _hints(kind), f"{name}." if name else ""
    if is_typeddict(kind):  # keys beside its own are somebody else's
        place, above, unknown, needed = "", inside, [], kind.__required_keys__
    else:
        place, above, unknown = f"{name}: " if name else "", "", [key for key in values if key not in hints]
        missing = dataclasses.MISSING
        needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is missing}
    for key in unknown:
        raise EarlyExitError(f"{place}the key {shown(key)} is unknown{nearest(key, hints)}")
    for key in sorted(needed - values.keys()):
        raise EarlyExitError(f"{place}the key '{above}{key}' is missing")
    return kind(**{key: typed(hints.get(key, Any), value, f"{inside}{key}") for key, value in values.items()})


def check_fields(instance: Any) -> None:
    """Of a dataclass, in its ``__post_init__``: lists become the tuples that they stand for, and a field that is not of
    its type is an EarlyExitError."""
    for key, kind in _hints(type(instance)).items():
        object.__setattr__(instance, key, typed(kind, getattr(instance, key), key))


def typed(kind: Any, value: Any, name: str) -> Any:
    """``value`` if it is what the type ``kind`` says, lists as tuples where that says so; else an EarlyExitError with
    ``name``, the value and what was expected."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (dataclasses.is_dataclass(kind) and isinstance(value, kind)):
        return value
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return build(kind, value, name)
    if origin is Annotated:
        number = typed(arguments[0], value, name)
        _require(arguments[1] <= number <= arguments[2], name, value, f"{arguments[1]} to {arguments[2]}")
        return number
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [one for one in arguments if one is not type(None)]
        mappings = [one for one in kinds if get_origin(one) is dict and isinstance(value, dict)]
        return typed((mappings or kinds)[0], value, name)
    if origin is Literal:
        _require(isinstance(value, str) and value in arguments, name, value, f"one of {', '.join(arguments)}")
        return value
    if origin in (tuple, list):
        _require(isinstance(value, tuple | list), name, value, "a list")
        return origin(typed(arguments[0], item, f"{name}[{place}]") for place, item in enumerate(value))
    if origin is dict:
        texts = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        _require(texts, name, value, "keys that are text, and values")
        return {key: typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    wanted, text = _SCALARS[kind]
    fits = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
    _require(fits and (kind is not float or math.isfinite(value)), name, value, text)
    return value


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
def _hints(kind: Any) -> dict[str, type]:
    return get_type_hints(kind, include_extras=True)

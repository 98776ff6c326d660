"""Load a YAML configuration over defaults.yaml, and check every key, type and value.

The loader of fvcore's `CfgNode` is not used: it expands every YAML alias, refuses a whole number where the default is a
float, and converts text such as "3" to a number.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config.check import check_config
from earlyexit_ssd.errors import ConfigError, shown, suggest
from earlyexit_ssd.plain import parse_yaml, read_yaml

DEFAULTS = Path(__file__).with_name("defaults.yaml")
_BASE_KEY = "_BASE_"
_MAX_BASES = 20
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


def get_cfg() -> CfgNode:
    """Return a copy of the default configuration."""
    return _defaults().clone()


@functools.cache
def _defaults() -> CfgNode:
    return _as_node(parse_yaml(DEFAULTS.read_text(encoding="utf-8")))


def _as_node(value: Any) -> Any:
    if isinstance(value, Mapping):
        return CfgNode({key: _as_node(item) for key, item in value.items()})
    return _as_tuple(value) if isinstance(value, list) else value


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the defaults, overridden by the ``_BASE_`` files of ``path``, then by ``path``, then by ``overrides``. The
    result is frozen: to change a value, load it again with other ``overrides``.

    Args:
        path: a YAML file.
        overrides: alternating keys and values, such as ``["EXITS.LAYERS", "(6, 12)", "SEED", "3"]``.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.
    """
    cfg = get_cfg()
    path = None if path is None else Path(path)
    chain = _read_chain(path) if path else []
    for source, tree in chain:
        _merge(cfg, tree, str(source))
    if len(overrides) % 2:
        hint = "; write a space, not =" if "=" in str(overrides[-1]) else ""
        last = shown(overrides[-1])
        raise ConfigError(f"command line: expected KEY VALUE pairs, the last key {last} has no value{hint}")
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        tree = _parse(str(text))  # a caller in Python may pass numbers
        for part in reversed(str(key).split(".")):
            tree = {part: tree}
        _merge(cfg, tree, "command line")
    if cfg.OUTPUT_DIR == "auto":
        cfg.OUTPUT_DIR = f"output/{path.stem if path else 'defaults'}"
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)  # a literal ~ would be made as a folder
    try:
        check_config(cfg)
    except ConfigError as error:
        key = str(error).split(" ")[0]
        files = [source for source, tree in chain if _has(tree, key)]
        source = "command line" if key in map(str, overrides[::2]) else [path or "the configuration", *files][-1]
        raise ConfigError(f"{source}: {error}") from None
    cfg.freeze()
    return cfg


def _read_chain(path: Path, above: tuple[str, ...] = ()) -> list[tuple[Path, dict]]:
    """Return the ``_BASE_`` files of ``path`` and ``path`` with their keys, lowest priority first. ``above`` are the
    files whose base is ``path``."""
    if above and os.path.realpath(path) in above:
        raise ConfigError(f"{path}: circular {_BASE_KEY}; remove it")
    if len(above) == _MAX_BASES:
        raise ConfigError(f"{path}: a chain of more than {_MAX_BASES} {_BASE_KEY} files; merge some of them")
    tree = read_yaml(path, "configuration file", "look in configs/ for examples", ConfigError)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected KEY: value lines, got a {type(tree).__name__}")
    base = tree.pop(_BASE_KEY, None)
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str) or "\0" in base:
        raise ConfigError(f"{path}: {_BASE_KEY} is {shown(base)}, expected the name of a YAML file")
    return [*_read_chain(path.parent / base, (*above, os.path.realpath(path))), (path, tree)]


def _has(tree: Any, key: str) -> bool:
    """Return whether nested dicts have a key such as ``EXITS.LAYERS``."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _merge(node: CfgNode, tree: Mapping, source: str, above: str = "") -> None:
    for key, value in tree.items():
        if key not in node:
            hint = suggest(str(key), node) or f"; {above.rstrip('.') or 'the top level'} has {', '.join(node)}"
            raise ConfigError(f"{source}: unknown key {above}{key}{hint}")
        if isinstance(node[key], CfgNode) and isinstance(value, Mapping):
            _merge(node[key], value, source, f"{above}{key}.")
        else:
            node[key] = _convert(value, node[key], f"{above}{key}", source)


def _convert(value: Any, default: Any, key: str, source: str) -> Any:
    """Convert ``value`` to the type of ``default`` if that loses nothing. Raise ConfigError otherwise."""
    if isinstance(default, str) and isinstance(value, bool):
        value = "on" if value else "off"  # YAML 1.1 reads these words as bool
    elif isinstance(default, tuple):
        value = _as_tuple(value)
    accepted = int | float if isinstance(default, float) else type(default)
    if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
        if isinstance(default, CfgNode):
            expected = f"keys below it ({', '.join(default)})"
        else:
            expected = f"{_TYPE_NAMES[type(default)]} (default {default!r})"
        raise ConfigError(f"{source}: {key} expects {expected}, got {shown(value)}")
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in _text_in(value)):  # invalid in a path
        raise ConfigError(f"{source}: {key} has {shown(value)}, expected text without control characters")
    return float(value) if isinstance(default, float) else value


def _text_in(value: Any) -> str:
    if isinstance(value, tuple):
        return "".join(map(_text_in, value))
    return value if isinstance(value, str) else ""


def _as_tuple(value: Any) -> Any:
    """Convert a list to a tuple, with inner lists, and a text or a number to a tuple with one element."""
    if isinstance(value, list | tuple):
        return tuple(_as_tuple(item) if isinstance(item, list | tuple) else item for item in value)
    return (value,) if isinstance(value, str | int | float) else value


def _parse(text: str) -> Any:
    """Parse a value of the command line: YAML such as ``8``, ``true`` or ``[8, 12]``, or a tuple such as ``(8, 12)``.
    Anything else is text."""
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1]}]"
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    if "#" in text and text[0] not in "'\"" and (value is None or isinstance(value, str)):
        return text  # such as a path; it is no comment
    return "" if value is None else value

"""Read a YAML configuration over defaults.yaml; every key and every type is checked before anything runs.

The tree is fvcore's `CfgNode`. Its own loader is not used: it follows every YAML alias, takes no whole number for 0.5
and reads a text such as "3" as a number.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config.check import check_config
from earlyexit_ssd.errors import ConfigError, nearest, shown
from earlyexit_ssd.plain import parse_yaml, read_yaml

DEFAULTS = Path(__file__).with_name("defaults.yaml")
_BASE_KEY = "_BASE_"
_LONGEST_CHAIN = 20
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults."""
    return _defaults().clone()


@functools.cache
def _defaults() -> CfgNode:
    return _as_node(parse_yaml(DEFAULTS.read_text(encoding="utf-8")))


def _as_node(value: Any) -> Any:
    if isinstance(value, Mapping):
        return CfgNode({key: _as_node(one) for key, one in value.items()})
    return _as_tuple(value) if isinstance(value, list) else value


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, overlaid with the chain of ``_BASE_`` of the YAML file ``path``, the file, and ``KEY VALUE`` pairs.

    Args:
        overrides: alternating keys and values, ``["EXITS.LAYERS", "(6, 12)", "SEED", "3"]``.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value; the message names the source and the fix.
    """
    cfg = get_cfg()
    path = None if path is None else Path(path)
    for source, tree in _read_chain(path) if path else []:
        _merge(cfg, tree, str(source))
    if len(overrides) % 2:
        raise ConfigError(f"command line: expected KEY VALUE pairs, the last key {shown(overrides[-1])} has no value")
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        tree = _parse(str(text))  # from Python they may be values
        for part in reversed(str(key).split(".")):
            tree = {part: tree}
        _merge(cfg, tree, "command line")
    if cfg.OUTPUT_DIR == "auto":
        cfg.OUTPUT_DIR = f"output/{path.stem if path else 'defaults'}"
    try:
        check_config(cfg)
    except ConfigError as error:
        overridden = str(error).split(" ")[0] in map(str, overrides[::2])
        source = "command line" if overridden else path or "the configuration"
        raise ConfigError(f"{source}: {error}") from None
    cfg.freeze()
    return cfg


def _read_chain(path: Path, above: tuple[str, ...] = ()) -> list[tuple[Path, dict]]:
    """The file and those underneath it, the lowest first, each with its keys; ``above`` are those that led here."""
    if above and os.path.realpath(path) in above:  # the first may be no path at all
        raise ConfigError(f"{path}: {_BASE_KEY} goes in a circle; remove one of them")
    if len(above) == _LONGEST_CHAIN:
        raise ConfigError(f"{path}: {_BASE_KEY} leads through more than {_LONGEST_CHAIN} files; put them together")
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


def _merge(node: CfgNode, tree: Mapping, source: str, above: str = "") -> None:
    for key, value in tree.items():
        if key not in node:
            hint = nearest(str(key), node) or f"; {above.rstrip('.') or 'the top level'} has {', '.join(node)}"
            raise ConfigError(f"{source}: unknown key {above}{key}{hint}")
        if isinstance(node[key], CfgNode) and isinstance(value, Mapping):
            _merge(node[key], value, source, f"{above}{key}.")
        else:
            node[key] = _convert(value, node[key], f"{above}{key}", source)


def _convert(value: Any, default: Any, key: str, source: str) -> Any:
    """``value`` in the type of ``default``; only lossless conversions are made."""
    if isinstance(default, str) and isinstance(value, bool):
        value = "on" if value else "off"  # YAML 1.1 reads these words as true and false
    elif isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # it reads 1e-3 as text
            value = float(value)
    elif isinstance(default, tuple):
        value = _as_tuple(value)
    wanted = int | float if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        keys = isinstance(default, CfgNode)
        kind = f"keys below it ({', '.join(default)})" if keys else f"{_KINDS[type(default)]} (default {default!r})"
        raise ConfigError(f"{source}: {key} expects {kind}, got {shown(value)}")
    if any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in _text_in(value)):  # no path could hold it
        raise ConfigError(f"{source}: {key} has {shown(value)}, expected text without control characters")
    return float(value) if isinstance(default, float) else value


def _text_in(value: Any) -> str:
    if isinstance(value, tuple):
        return "".join(map(_text_in, value))
    return value if isinstance(value, str) else ""


def _as_tuple(value: Any) -> Any:
    """A list becomes a tuple, inner lists too; a single text or number becomes a tuple of one."""
    if isinstance(value, list | tuple):
        return tuple(_as_tuple(item) if isinstance(item, list | tuple) else item for item in value)
    return (value,) if isinstance(value, str | int | float) else value


def _parse(text: str) -> Any:
    """``8``, ``0.5``, ``true``, ``[8, 12]`` or ``(8, 12)`` as what they look like, anything else as text."""
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1].rstrip().rstrip(',')}]"
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return "" if value is None else value

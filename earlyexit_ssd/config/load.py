"""Read a YAML configuration over the defaults; every key and every type is checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.config.check import check_config
from earlyexit_ssd.config.defaults import get_cfg
from earlyexit_ssd.errors import ConfigError, nearest, shown
from earlyexit_ssd.plain import parse_yaml, read_yaml

_BASE_KEY = "_BASE_"
_LONGEST_CHAIN = 20


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, overlaid with the file's ``_BASE_`` chain, the file, and ``KEY VALUE`` overrides.

    Args:
        path: YAML file; ``_BASE_`` in it names another one, relative to it. None takes the defaults alone.
        overrides: alternating keys and values, ``["EXITS.LAYERS", "(6, 12)", "SEED", "3"]``.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value; the message names the source and the fix.
    """
    cfg = get_cfg()
    if path is not None:
        path = Path(path)
        for source, tree in reversed(_read_chain(path)):
            _merge(cfg, tree, (), str(source))
    _merge_overrides(cfg, overrides)
    if cfg.OUTPUT_DIR == "auto":
        cfg.OUTPUT_DIR = f"output/{path.stem if path else 'defaults'}"
    try:
        check_config(cfg)
    except ConfigError as error:
        on_command_line = str(error).split(" ")[0] in map(str, overrides[::2])
        source = "command line" if on_command_line else path or "the configuration"
        raise ConfigError(f"{source}: {error}") from None
    cfg.freeze()
    return cfg


def _read_chain(path: Path) -> list[tuple[Path, dict]]:
    """The file and those underneath it, each with its keys."""
    chain: list[tuple[Path, dict]] = []
    seen: set[str] = set()
    while len(chain) < _LONGEST_CHAIN:
        tree = read_yaml(path, "configuration file", "look in configs/ for examples", ConfigError)
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected KEY: value lines, got a {type(tree).__name__}")
        seen.add(os.path.realpath(path))
        base = tree.pop(_BASE_KEY, None)
        chain.append((path, tree))
        if base is None:
            return chain
        if not isinstance(base, str) or "\0" in base:
            raise ConfigError(f"{path}: {_BASE_KEY} is {shown(base)}, expected the name of a YAML file")
        path = path.parent / base
        if os.path.realpath(path) in seen:
            raise ConfigError(f"{path}: {_BASE_KEY} goes in a circle; remove one of them")
    raise ConfigError(f"{path}: {_BASE_KEY} leads through more than {_LONGEST_CHAIN} files; put them together")


def _merge(node: CfgNode, tree: dict, prefix: tuple[str, ...], source: str) -> None:
    for key, value in tree.items():
        if isinstance(node.get(key), CfgNode) and isinstance(value, dict):
            _merge(node[key], value, (*prefix, key), source)
        else:
            _set(node, str(key), value, prefix, source)


def _set(node: CfgNode, key: str, value: Any, prefix: tuple[str, ...], source: str) -> None:
    full_key = ".".join((*prefix, key))
    _require_known(node, key, prefix, source)
    node[key] = _convert(value, node[key], full_key, source)


def _require_known(node: CfgNode, key: str, prefix: tuple[str, ...], source: str) -> None:
    if key not in node:
        hint = nearest(key, node) or f"; {'.'.join(prefix) or 'the top level'} has {', '.join(node)}"
        raise ConfigError(f"{source}: unknown key {'.'.join((*prefix, key))}{hint}")


def _convert(value: Any, default: Any, key: str, source: str) -> Any:
    """``value`` in the type of ``default``; only lossless conversions are made."""
    if isinstance(default, str) and isinstance(value, bool):
        value = "on" if value else "off"  # YAML 1.1 reads these words as true and false
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        value = _number_from_text(value)
        fits = isinstance(value, (int, float))
    elif isinstance(default, tuple):
        value = _as_tuple(value)
        fits = isinstance(value, tuple)
    else:
        fits = isinstance(value, type(default))
    if not fits:
        raise ConfigError(f"{source}: {key} expects {_describe(default)}, got {shown(value)}")
    _require_plain_text(value, key, source)
    return float(value) if isinstance(default, float) else value


def _require_plain_text(value: Any, key: str, source: str) -> None:
    """No text inside has a control character or half a sign: no path, name or file could hold it."""
    if isinstance(value, tuple):
        for item in value:
            _require_plain_text(item, key, source)
    elif isinstance(value, str) and any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in value):
        raise ConfigError(f"{source}: {key} has {shown(value)}, expected text without control characters")


def _number_from_text(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _as_tuple(value: Any) -> Any:
    """A list becomes a tuple, inner lists too; a single text or number becomes a tuple of one."""
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuple(item) if isinstance(item, (list, tuple)) else item for item in value)
    return (value,) if isinstance(value, (str, int, float)) else value


def _describe(default: Any) -> str:
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
    if isinstance(default, CfgNode):
        return f"keys below it ({', '.join(default)})"
    return f"{kind[type(default)]} (default {default!r})"


def _merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    if len(overrides) % 2:
        raise ConfigError(f"command line: expected KEY VALUE pairs, the last key {shown(overrides[-1])} has no value")
    for full_key, text in zip(overrides[::2], overrides[1::2], strict=True):
        full_key, text = str(full_key), str(text)  # from Python they may be values
        *parents, key = full_key.split(".")
        node = cfg
        for depth, parent in enumerate(parents):
            _require_known(node, parent, tuple(parents[:depth]), "command line")
            node = node[parent]
            if not isinstance(node, CfgNode):
                value_key = ".".join(parents[: depth + 1])
                raise ConfigError(f"command line: unknown key {full_key}: {value_key} is a value, no key is below it")
        _set(node, key, _parse(text), tuple(parents), "command line")


def _parse(text: str) -> Any:
    """``8``, ``0.5``, ``true``, ``[8, 12]`` or ``(8, 12)`` as what they look like, anything else as text."""
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1].rstrip().rstrip(',')}]"
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    return "" if value is None else value

"""Find a detector's state dict in what other programs save: training scripts, wrappers, averages of weights."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from earlyexit_ssd.errors import EarlyExitError

logger = logging.getLogger(__name__)

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that DataParallel, AveragedModel, torch.compile and the like put into keys, anywhere."""

USUAL = ("", "model", "state_dict", "model_state_dict")
"""Where the weights that were trained stand, if a file holds several."""

DEPTH = 4
_ROOT = re.compile(r"(?:^|\.)(?=backbone\.features\.0\.)")
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg)(?:$|[._])|averag|shadow|teacher", re.IGNORECASE)


def find_detector(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of an SSDLite, with or without exits, under torchvision's names.

    It may lie under other keys (``{"model": ..., "epoch": ...}``), and its keys may share a prefix and hold those of
    wrappers, in any nesting. Of trained weights and their average the trained ones are taken. What lies outside the
    detector (an optimizer, a loss, ``n_averaged``) is left out.

    Raises:
        EarlyExitError: there is none, or there are several and none has the usual name.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for place, mapping in _mappings(content):
        for prefix, state in _detectors(mapping, path).items():
            found[".".join(filter(None, (place, prefix)))] = state
    if not found:
        keys = ", ".join(str(key)[:40] for key in list(content)[:3]) or "none"
        raise EarlyExitError(
            f"{path}: expected a state dict of tensors of an SSDLite with a MobileNetV3-Large "
            f"(backbone.features.0.0.0.weight, ...), got keys {keys}"
        )
    names = [name for name in found if not _AVERAGE.search(name)] or list(found)
    names = [name for name in names if name in USUAL] or names
    if len(names) > 1:
        raise EarlyExitError(
            f"{path}: holds several detectors ({', '.join(names)[:120]}); save the one that is meant alone"
        )
    others = sorted(set(found) - set(names))
    if others:
        logger.warning("%s: the weights of '%s' are taken, not those of %s", path, names[0], ", ".join(others))
    return found[names[0]]


def _mappings(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict in ``content`` with the keys that lead there; none twice, since pickles may hold circles."""
    level, seen = [("", content)], set()
    for _ in range(DEPTH):
        following = []
        for place, mapping in level:
            if id(mapping) in seen:
                continue
            seen.add(id(mapping))
            yield place, mapping
            following += [
                (f"{place}.{key}" if place else key, value)
                for key, value in mapping.items()
                if isinstance(key, str) and isinstance(value, Mapping)
            ]
        level = following


def _detectors(mapping: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """The detectors among the tensors of one dict, by the prefix of their keys without its last dot."""
    tensors: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
            if name in tensors:
                raise EarlyExitError(f"{path}: {key:.80} is there with and without a wrapper's prefix; save one")
            tensors[name] = value
    prefixes = sorted({name[: match.end()] for name in tensors if (match := _ROOT.search(name))}, key=len)
    states: dict[str, dict[str, Tensor]] = {prefix.rstrip("."): {} for prefix in prefixes}
    for name, value in tensors.items():
        own = [prefix for prefix in prefixes if name.startswith(prefix)]
        if own and name.rpartition(".")[2] != "n_averaged":
            states[own[-1].rstrip(".")][name.removeprefix(own[-1])] = value
    return states


def outputs_of(state: Mapping[str, Tensor], boxes_per_cell: int = 6) -> int:
    """Outputs per default box of a detector's head, background included; 0 where it cannot be told."""
    last = state.get("head.classification_head.module_list.0.1.bias")
    return 0 if last is None else len(last) // boxes_per_cell


def exit_names_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the exits whose branches are in a state dict, shallow to deep."""
    names = {match[1] for key in state if (match := re.match(r"branches\.(exit\d{1,3})\.", key))}
    return tuple(sorted(names, key=lambda name: int(name[4:])))


def has_reduced_tail(state: Mapping[str, Tensor], width: float) -> bool:
    """The last trunk layer has 480 channels in the reduced tail and 960 in the full one, times the width."""
    last = state.get("backbone.features.1.3.0.weight")
    return last is None or last.shape[0] < 720 * width

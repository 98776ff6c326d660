"""Model files: weights, the architecture that rebuilds the model, and what was measured; read with weights_only."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any, TypedDict

from torch import nn

from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.files import write_torch
from earlyexit_ssd.modeling.architecture import Architecture
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.foreign import exit_names_of, find_detector, has_reduced_tail, outputs_of
from earlyexit_ssd.modeling.fused import is_fused
from earlyexit_ssd.modeling.outputs import RouterSettings
from earlyexit_ssd.modeling.retrofit import load_every_key, read_weights
from earlyexit_ssd.plain import typed

FORMAT = "earlyexit_ssd/1"

Describe = Callable[[int, tuple[str, ...]], Architecture]
"""Outputs of a foreign checkpoint's head (background included) and the names of its exits to its description."""


class ModelInfo(TypedDict, total=False):
    """What the package reads of a model file's ``info``; more may be there.

    router: settings of an ``ExitRouter``, None where the exits are not trained; forced: a gate was passed by force.
    """

    router: RouterSettings | None
    forced: bool


def save_model(
    path: str | os.PathLike[str],
    model: EarlyExitSSDLite,
    architecture: Architecture | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Write the model without its router; ``info`` holds plain types (phase, forced, the router's settings).

    Without an ``architecture`` the model is asked for its own.

    Raises:
        EarlyExitError: the model was fused for inference or changed since it was built, or the architecture is another
            one's.
    """
    if is_fused(model):
        raise EarlyExitError(f"{path}: a model fused for inference cannot be saved; save the one that it was made of")
    if architecture is None:
        try:
            architecture = Architecture.of(model)
        except EarlyExitError as error:
            raise EarlyExitError(f"{path}: {error}") from None
    ours, described = (
        (tuple(one.classes), tuple(one.exit_layers)[: model.num_early_exits]) for one in (model, architecture)
    )
    if ours != described:
        raise EarlyExitError(f"{path}: the architecture says {described}, the model is {ours}; give its own")
    state = {key: value.cpu() for key, value in model.state_dict().items() if not key.startswith("router.")}
    content = {"format": FORMAT, "architecture": architecture.to_dict(), "model": state, "info": info or {}}
    write_torch(path, content)


def load_model(
    path: str | os.PathLike[str], describe: Describe | None = None
) -> tuple[EarlyExitSSDLite, Architecture, dict[str, Any]]:
    """Read what :func:`save_model` wrote: the model in eval mode on the CPU, its architecture and its info.

    The model has no router and the default losses; ``ExitRouter(**info["router"])`` makes the router it was saved with.
    With ``describe`` a checkpoint of another program is taken too (:func:`find_detector`), such as one of torchvision's
    reference training; its info says whether it has ``exits``, which start untrained otherwise, and the
    ``temperatures`` that were trained with them.

    Raises:
        EarlyExitError: the file is no model of this project or does not fit its own description.
    """
    if not os.path.isfile(path):
        raise EarlyExitError(f"{path}: no such file of weights; train one with tools/train_net.py")
    content = read_weights(path)
    found = content.get("format")
    if not isinstance(found, str) or found != FORMAT:
        if describe is not None and "format" not in content:
            return _load_foreign(path, content, describe)
        raise EarlyExitError(
            f"{path}: expected a model of format {FORMAT}, got {shown(found)}; a torchvision checkpoint "
            "goes into MODEL.WEIGHTS of a training, or through EarlyExitSSDLite.from_pretrained(path).save(new_path)"
        )
    lacking = [key for key in ("architecture", "model", "info") if not isinstance(content.get(key), dict)]
    if lacking:
        raise EarlyExitError(f"{path}: the file lacks '{lacking[0]}'; write it anew with save_model")
    try:
        info = typed(ModelInfo, content["info"], "info")
        architecture = Architecture.from_dict(content["architecture"])
        model = architecture.build()
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}; write it anew with save_model") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise EarlyExitError(f"{path}: its architecture cannot be built ({error}); write it anew") from None
    load_every_key(model, content["model"], path)
    return model.eval(), architecture, info


def _load_foreign(
    path: str | os.PathLike[str], content: dict[str, Any], describe: Describe
) -> tuple[EarlyExitSSDLite, Architecture, dict[str, Any]]:
    state = find_detector(content, path)
    outputs, exits = outputs_of(state), exit_names_of(state)
    if outputs < 2:
        raise EarlyExitError(f"{path}: no SSDLite head of six default boxes a cell; expected torchvision's")
    try:
        described = describe(outputs, exits)
        architecture = dataclasses.replace(described, reduced_tail=has_reduced_tail(state, described.width))
        model = architecture.build()
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}") from None
    wanted = tuple(name for name, empty in zip(model.exit_names, model.empty, strict=False) if not empty)
    if exits and exits != wanted:
        raise EarlyExitError(
            f"{path}: its exits are {', '.join(exits)}, described are {', '.join(wanted) or 'none'}; set EXITS.LAYERS "
            f"(in Python exit_layers) to {[int(name[4:]) for name in exits]}"
        )
    temperatures = state.get("router.temperatures")
    own = {key: value for key, value in state.items() if not key.startswith("router.")}
    if exits:
        load_every_key(model, own, path)
    else:
        state = model.state_dict()
        load_every_key(model, {**{key: state[key] for key in state if key.startswith("branches.")}, **own}, path)
        model.inherit()
    info = {"exits": bool(exits), "temperatures": None if temperatures is None else temperatures.tolist()}
    return model.eval(), architecture, info


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer of the network, its input size and post-processing; how it is routed does
    not count."""
    settings = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
    values = [tuple(model.transform.fixed_size), *(getattr(model, name) for name in settings)]
    digest = hashlib.sha256(repr(values).encode())
    for name, value in model.state_dict().items():
        if not name.startswith("router."):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Model files: weights, the architecture that rebuilds the model, and what was measured; read with weights_only."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from torch import nn

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_torch
from earlyexit_ssd.modeling.architecture import Architecture
from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.fused import is_fused
from earlyexit_ssd.modeling.retrofit import load_every_key, read_weights

FORMAT = "earlyexit_ssd/1"


def save_model(
    path: str | os.PathLike[str],
    model: EarlyExitSSDLite,
    architecture: Architecture,
    info: dict[str, Any] | None = None,
) -> None:
    """Write the model without its router; ``info`` holds plain types (phase, forced, the router's settings).

    Raises:
        EarlyExitError: the model was fused for inference, or the architecture is another one's.
    """
    if is_fused(model):
        raise EarlyExitError(f"{path}: a model fused for inference cannot be saved; save the one that it was made of")
    ours, described = (
        (tuple(one.classes), tuple(one.exit_layers)[: model.num_early_exits]) for one in (model, architecture)
    )
    if ours != described:
        raise EarlyExitError(f"{path}: the architecture says {described}, the model is {ours}; give its own")
    state = {key: value.cpu() for key, value in model.state_dict().items() if not key.startswith("router.")}
    content = {"format": FORMAT, "architecture": architecture.to_dict(), "model": state, "info": info or {}}
    write_torch(path, content)


def load_model(path: str | os.PathLike[str]) -> tuple[EarlyExitSSDLite, Architecture, dict[str, Any]]:
    """Read what :func:`save_model` wrote: the model in eval mode on the CPU, its architecture and its info.

    The model has no router and the default losses; ``ExitRouter(**info["router"])`` makes the router it was saved with.

    Raises:
        EarlyExitError: the file is no model of this project or does not fit its own description.
    """
    if not os.path.isfile(path):
        raise EarlyExitError(f"{path}: no such file of weights; train one with tools/train_net.py")
    content = read_weights(path)
    if content.get("format") != FORMAT:
        raise EarlyExitError(
            f"{path}: expected a model of format {FORMAT}, got {content.get('format')!r}; "
            "a torchvision checkpoint goes into MODEL.WEIGHTS of a training configuration"
        )
    lacking = [key for key in ("architecture", "model", "info") if not isinstance(content.get(key), dict)]
    if lacking:
        raise EarlyExitError(f"{path}: the file lacks '{lacking[0]}'; write it anew with save_model")
    try:
        architecture = Architecture.from_dict(content["architecture"])
        model = architecture.build()
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise EarlyExitError(f"{path}: its architecture cannot be built ({error}); write it anew") from None
    load_every_key(model, content["model"], path)
    return model.eval(), architecture, content["info"]


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

"""Take a trained torchvision SSDLite, from torchvision's weights or a file, and change its classes if asked."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import EarlyExitError, nearest, shown
from earlyexit_ssd.modeling.architecture import Architecture
from earlyexit_ssd.modeling.folding import (
    ClassChange,
    FoldedClassificationHead,
    plan_class_change,
    slice_rows,
)
from earlyexit_ssd.modeling.foreign import find_detector, has_reduced_tail
from earlyexit_ssd.plain import require_bounded

COCO_CLASSES = tuple(SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"][1:])
"""torchvision's names of the labels 1..90; "N/A" where COCO skips a number."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def retrofit(
    architecture: Architecture,
    weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights,
    source_classes: Sequence[str] | None = None,
    fold: str = "exact",
) -> tuple[SSD, Architecture, ClassChange | None]:
    """A trained torchvision detector with the wanted classes, every key of the checkpoint used.

    Args:
        architecture: the wanted model; its ``classes`` are the wanted ones.
        weights: a path, or a member of torchvision's ``SSDLite320_MobileNet_V3_Large_Weights`` or its name. A path
            may also be a model of this project; its branches are left out.
        source_classes: names of the checkpoint's labels 1..K; None where they are the wanted ones. A model of this
            project knows its own.
        fold: ``exact`` (fold unwanted classes, same scores as before) or ``rows`` (drop them, a smaller head).

    Returns:
        the detector, the architecture it has now, and what became of the classes (None if nothing changed).

    Raises:
        EarlyExitError: unreadable weights, weights of other shapes, or classes that the checkpoint cannot give.
    """
    state, own = load_full_path(weights)
    source = own.classes if own else tuple(source_classes or architecture.classes)
    architecture = dataclasses.replace(architecture, reduced_tail=has_reduced_tail(state, architecture.width))
    head_outputs, folded_rows = (own.head_outputs, own.folded_rows) if own else (0, ())
    original = dataclasses.replace(architecture, classes=source, head_outputs=head_outputs, folded_rows=folded_rows)
    detector = original.build_detector()
    load_every_key(detector, state, weights)
    if source == architecture.classes:
        return detector, original, None
    if folded_rows:
        raise EarlyExitError(
            f"{weights}: its classes ({', '.join(source)}) were folded before; start from the checkpoint it came from"
        )
    change = plan_class_change(source, architecture.classes)
    head = detector.head
    if fold == "exact":
        if None in change.rows:
            raise EarlyExitError(f"MODEL.FOLD 'exact' cannot add classes ({change}); set MODEL.FOLD to 'rows'")
        head.classification_head = FoldedClassificationHead(head.classification_head, change.rows)
        changed = dataclasses.replace(architecture, head_outputs=len(source) + 1, folded_rows=change.rows)
        return detector, changed, change
    slice_rows(head.classification_head, change.rows)
    return detector, dataclasses.replace(architecture, head_outputs=0, folded_rows=()), change


def torchvision_name(weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights) -> str | None:
    """The name among torchvision's weights, without the enum's; None where ``weights`` is a path."""
    name = str(weights).removeprefix(f"{SSDLite320_MobileNet_V3_Large_Weights.__name__}.")
    return name if name in SSDLite320_MobileNet_V3_Large_Weights.__members__ else None


def load_full_path(
    weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights,
) -> tuple[dict[str, Tensor], Architecture | None]:
    """State dict of a detector without exits, and its description where the file is a model of this project.

    A name of torchvision's weights is downloaded by torchvision.
    """
    name = torchvision_name(weights)
    if name:
        try:
            return SSDLite320_MobileNet_V3_Large_Weights[name].get_state_dict(progress=True, check_hash=True), None
        except (URLError, OSError) as error:
            raise EarlyExitError(
                f"torchvision's weights {weights} could not be downloaded ({error}); "
                "download them elsewhere and set MODEL.WEIGHTS to the file's path"
            ) from None
    require_weights(weights)
    content = read_weights(weights)
    state = find_detector(content, weights)
    require_state(state, weights)
    full_path = {key: value for key, value in state.items() if not key.startswith(("branches.", "router."))}
    if not isinstance(content.get("architecture"), dict):
        return full_path, None
    try:
        return full_path, Architecture.of_full_path(content["architecture"])
    except EarlyExitError as error:
        raise EarlyExitError(f"{weights}: {error}") from None


def require_weights(weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights) -> None:
    """Check that ``weights`` is a file, or a name of torchvision's weights; nothing is read.

    Raises:
        EarlyExitError: it is neither; the message has the nearest name.
    """
    if torchvision_name(weights) is None and not Path(weights).is_file():
        names = SSDLite320_MobileNet_V3_Large_Weights.__members__
        hint = nearest(str(weights), names) or f"; torchvision's own are {', '.join(names)}"
        raise EarlyExitError(f"weights {weights}: no such file{hint}")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file of tensors and plain types; nothing in it is executed.

    ``argparse.Namespace`` is plain too: torchvision's reference training stores its arguments in one.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file raises anything; nothing of it may be unpickled otherwise
        held = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        fix = "save model.state_dict() alone" if held else "fetch or train it again"
        raise EarlyExitError(
            f"{path}: not a file of weights that can be read safely ({type(error).__name__}"
            f"{f', it holds {held[1]}' if held else ''}); expected what torch.save writes, tensors and plain types "
            f"only: {fix}"
        ) from None
    if not isinstance(content, dict):
        raise EarlyExitError(
            f"{path}: expected a dict of weights, got a {type(content).__name__}; save model.state_dict()"
        )
    try:
        require_bounded(content)
    except ValueError as error:
        raise EarlyExitError(f"{path}: {error}, no file of weights has that; save model.state_dict()") from None
    return content


def require_state(state: object, source: str | os.PathLike[str]) -> None:
    """Check that it is a state dict: names and ordinary tensors.

    Raises:
        EarlyExitError: a key that is no text, a value that is no tensor, or one that is sparse, quantised, complex or
            without data.
    """
    fix = "save model.state_dict()"
    if not isinstance(state, dict) or not state:
        raise EarlyExitError(f"{source}: expected a state dict of tensors, got {shown(state)}; {fix}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise EarlyExitError(
                f"{source}: expected names and tensors, got {shown(key, 50)}: {type(value).__name__}; {fix}"
            )
        dense = value.layout == torch.strided and value.device.type != "meta" and not value.is_nested
        if not dense or value.is_quantized or value.is_complex():
            kind = f"{value.layout} {value.dtype} on {value.device}"
            raise EarlyExitError(f"{source}: {key} is {kind}, expected an ordinary tensor of numbers; {fix}")


def load_every_key(module: torch.nn.Module, state: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load strictly; the first difference is named in one line, NaN too."""
    require_state(state, source)
    expected = module.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in state]
    problems += [f"has {key}, which the model lacks" for key in state if key not in expected]
    problems += [
        f"{key} is {list(state[key].shape)}, the model has {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        branches = all("branches." in problem for problem in problems)
        check = (
            "EXITS (in Python copy, depth, channels, head_rank)"
            if branches
            else "MODEL.WIDTH, MODEL.WEIGHTS_CLASSES and the number of classes"
        )
        raise EarlyExitError(
            f"{source} does not fit the model: {problems[0]} ({len(problems)} differences); check {check}"
        )
    for key, value in expected.items():
        given = state[key]
        if given.dtype not in (_FLOATS if value.is_floating_point() else _INTEGERS):
            raise EarlyExitError(f"{source}: {key} is {given.dtype}, the model has {value.dtype}; save it anew")
        if not given.float().isfinite().all():
            raise EarlyExitError(f"{source}: {key} has NaN or infinity, its training went wrong; take other weights")
    module.load_state_dict(state)

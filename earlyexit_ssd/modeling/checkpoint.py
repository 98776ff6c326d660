"""Model files: the weights, the architecture that rebuilds the model, and results of the training."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torchvision.models._api import Weights, WeightsEnum
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from earlyexit_ssd.errors import EarlyExitError, shown, suggest
from earlyexit_ssd.files import sha256, write_torch
from earlyexit_ssd.modeling.detector import POST_PROCESSING, EarlyExitDetector
from earlyexit_ssd.modeling.outputs import RouterSettings
from earlyexit_ssd.modeling.retrofit import (
    Architecture,
    Content,
    exit_names_of,
    find_detector,
    has_reduced_tail,
    load_every_key,
    outputs_of,
    read_weights,
)
from earlyexit_ssd.plain import read_json, typed
from earlyexit_ssd.registry import UnknownName

FORMAT = "earlyexit_ssd/1"

Describe = Callable[[int, tuple[str, ...]], Architecture]
"""Function from a checkpoint's outputs per default box, background included, and its exit names to its architecture."""


class ModelInfo(TypedDict, total=False):
    """The entries of a model file's ``info`` that the package reads. A file may have others."""

    router: RouterSettings | None  # None if the exits are not trained
    phase: str  # the last phase of the training: "baseline", "exits" or "joint"
    forced: bool  # training continued after a failed gate
    exits: bool  # another program's checkpoint: it has exits
    temperatures: list[float] | None  # another program's checkpoint: its temperatures


def save_model(
    path: str | os.PathLike[str],
    model: EarlyExitDetector,
    architecture: Architecture | None = None,
    info: ModelInfo | None = None,
) -> None:
    """Write a model file: the model without its router, the architecture (default: `Architecture.of`) and ``info``.
    Raise an EarlyExitError if the model is fused, was changed since it was built, or does not fit the architecture."""
    if model.fused:
        raise EarlyExitError(f"{path}: a model fused for inference cannot be saved; save the model before fusing")
    try:
        architecture = architecture or Architecture.of(model)
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}") from None
    own, described = (model.classes, model.exit_layers[:-1]), (architecture.classes, architecture.exit_layers)
    if own != described:
        raise EarlyExitError(f"{path}: the architecture has {described}, the model {own}; pass Architecture.of(model)")
    state = {key: value.cpu() for key, value in model.state_dict().items() if not key.startswith("router.")}
    content = {"format": FORMAT, "architecture": architecture.to_dict(), "model": state, "info": info or {}}
    write_torch(path, content)


def load_model(
    path: str | os.PathLike[str], describe: Describe | None = None
) -> tuple[EarlyExitDetector, Architecture, ModelInfo]:
    """Read a model file. Return the model in eval mode on the CPU, its architecture and its info.

    ``ExitRouter(**info["router"])`` creates the saved router. With ``describe``, checkpoints that `find_detector`
    accepts are read too. If they have no exits, those of the model are untrained.

    Raises:
        EarlyExitError: the file is no model of this project, or does not fit its own description.
    """
    if not os.path.isfile(path):
        fix = "train one (earlyexit train), or name another (--weights)"
        raise EarlyExitError(f"{path}: no such file of weights; {fix}")
    content = read_weights(path)
    file_format = content.get("format")
    if not isinstance(file_format, str) or file_format != FORMAT:
        if describe is not None and "format" not in content:
            return _load_foreign(path, content, describe)
        fix = "for a torchvision checkpoint set MODEL.WEIGHTS of a training, or call"
        fix += " EarlyExitSSDLite.from_pretrained(path).save(new_path)"
        raise EarlyExitError(f"{path}: expected a model of format {FORMAT}, got {shown(file_format)}; {fix}")
    for key in ("architecture", "model", "info"):
        if not isinstance(content.get(key), dict):
            raise EarlyExitError(f"{path}: the file lacks '{key}'; write it again")
    try:
        info = typed(ModelInfo, content["info"], "info")
        architecture = Architecture.from_dict(content["architecture"])
        model = architecture.build()
    except EarlyExitError as error:
        unknown = isinstance(error, UnknownName)
        fix = "import that module (docs/extending.md)" if unknown else "write it again"
        raise EarlyExitError(f"{path}: {error}; {fix}, or train its exits again (MODEL.WEIGHTS)") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise EarlyExitError(f"{path}: its architecture cannot be built ({error}); write it again") from None
    load_every_key(model, content["model"], path)
    return model.eval(), architecture, info


def _load_foreign(
    path: str | os.PathLike[str], content: Content, describe: Describe
) -> tuple[EarlyExitDetector, Architecture, ModelInfo]:
    state = find_detector(content, path)
    outputs, exits = outputs_of(state), exit_names_of(state)
    if outputs < 2:
        raise EarlyExitError(f"{path}: no head with 2 or more outputs per default box; expected torchvision's")
    try:
        described = describe(outputs, exits)
        architecture = dataclasses.replace(described, reduced_tail=has_reduced_tail(state, described.width))
        model = architecture.build()
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}") from None
    expected = tuple(early_exit.name for early_exit in model.exits if not early_exit.empty)
    if exits and exits != expected:
        fix = f"set EXITS.LAYERS (in Python exit_layers) to {[int(name[4:]) for name in exits]}"
        names = f"{', '.join(exits)}, expected {', '.join(expected) or 'none'}"
        raise EarlyExitError(f"{path}: its exits are {names}; {fix}")
    temperatures = state.get("router.temperatures")
    weights = {key: value for key, value in state.items() if not key.startswith("router.")}
    if exits:
        load_every_key(model, weights, path)
    else:
        untrained = {key: value for key, value in model.state_dict().items() if key.startswith("branches.")}
        load_every_key(model, weights | untrained, path)
        model.inherit()
    info = {"exits": bool(exits), "temperatures": None if temperatures is None else temperatures.tolist()}
    return model.eval(), architecture, info


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all that determines the outputs: the network's parameters, buffers (such as the classes of
    a folded head), input size, trained size, empty exits and post-processing, without the router."""
    values = [tuple(model.transform.fixed_size), *(getattr(model, name) for name in POST_PROCESSING)]
    values += [size] if (size := getattr(model.anchor_generator, "trained_size", 0)) else []
    # exits without weights; the trunk layer of a glance is not in its name
    values += [(exit.layer, exit.pixels) for exit in model.exits if exit.empty]
    digest = hashlib.sha256(repr(values).encode())
    for name, value in {**model.state_dict(), **dict(model.named_buffers())}.items():
        if not name.startswith("router."):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# Model files in half precision, for weights shipped with the project.


def half_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a state dict with floating-point tensors rounded to fp16. Raise an EarlyExitError for a value
    that is not finite in fp16.

    Tensors of one type are views into one buffer, since ``torch.save`` adds 200 bytes per buffer. A BatchNorm variance
    below fp16's smallest number (6e-8) becomes 0, which hardly changes the output, since BatchNorm adds 1e-3 to it.
    """
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    views = dict.fromkeys(state)
    for dtype in {value.dtype: None for value in half.values()}:
        group = {name: value.detach().cpu() for name, value in half.items() if value.dtype == dtype}
        buffer = torch.cat([value.flatten() for value in group.values()])
        parts = buffer.split([value.numel() for value in group.values()])
        for (name, value), part in zip(group.items(), parts, strict=True):
            if not part.isfinite().all():
                raise EarlyExitError(f"{name} has a value above fp16's largest (65504), or NaN; train the model again")
            views[name] = part.view(value.shape)
    return views


def half_file(content: Content) -> bytes:
    """Return the bytes of a model file in half precision. Equal ``content`` (of `read_weights`) gives equal bytes."""
    buffer = io.BytesIO()  # with a path, torch.save would write the path's name into the file
    torch.save({**content, "model": half_state(content["model"])}, buffer)
    return buffer.getvalue()


# Weights shipped with the package, as an enum in torchvision's style.

FOLDER = Path(__file__).resolve().parents[1] / "weights"
"""Folder of ``NAME.pth`` (model file) and ``NAME.json`` (description); tools/export_weights.py writes both."""


class ShippedWeights(WeightsEnum):
    """Base class of :data:`EarlyExitSSDLite_Weights`.

    ``meta`` has ``categories`` (by label, background first), ``exits``, ``num_params``, ``min_size``, ``recipe``,
    ``sha256``, ``bytes``, ``_file_size`` (MiB, as torchvision counts), ``_metrics`` (test split -> exit or "routed"
    -> figure -> value) and ``_docs``.
    """

    @property
    def path(self) -> Path:
        """Path of the model file."""
        return FOLDER / f"{self.name.lower()}.pth"

    def check(self) -> None:
        """Raise an EarlyExitError if the file is missing, or if its SHA-256 differs (damaged, or a Git LFS pointer)."""
        fix = "install the package again, or `git checkout` the file"
        if not self.path.is_file():
            raise EarlyExitError(f"{self.path}: the weights {self.name.lower()} are missing; {fix}")
        digest = sha256(self.path)
        if digest != self.meta["sha256"]:
            actual = f"{self.path.stat().st_size} bytes with sha256 {digest[:8]}"
            expected = f"expected {self.meta['bytes']} with {self.meta['sha256'][:8]}"
            raise EarlyExitError(f"{self.path}: damaged ({actual}, {expected}); {fix}")

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the state dict of the model with its exits, in fp16. torchvision's download arguments are ignored."""
        self.check()
        return read_weights(self.path)["model"]


def read_description(path: Path) -> Weights:
    """Read the ``Weights`` value of an enum member from the JSON file that tools/export_weights.py writes."""
    fix = "install the package again"
    entry = read_json(path, "description of weights", fix)
    try:
        classes = entry["classes"]
        meta = {key: entry[key] for key in ("exits", "num_params", "recipe", "sha256", "bytes")} | {
            "categories": ["__background__", *classes],
            "min_size": (1, 1),
            "_file_size": round(entry["bytes"] / 2**20, 3),
            "_metrics": {name: split["exits"] for name, split in entry["metrics"].items()},
            "_docs": f"SSDLite320 MobileNetV3-Large with early exits for {', '.join(classes)}; weights in fp16.",
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise EarlyExitError(f"{path}: not a description of weights ({type(error).__name__}: {error}); {fix}") from None
    return Weights(path.with_suffix(".pth").as_uri(), SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.transforms, meta)


EarlyExitSSDLite_Weights = ShippedWeights(
    "EarlyExitSSDLite_Weights",
    {path.stem.upper(): read_description(path) for path in sorted(FOLDER.glob("*.json"))},
    module=__name__,
)
"""One member per description in :data:`FOLDER`, such as ``CHAIR``."""


def find_weights(name: str | os.PathLike[str] | ShippedWeights) -> ShippedWeights | None:
    """Return the member called ``name`` in any case, with or without the enum's name as prefix; None without one."""
    enum = EarlyExitSSDLite_Weights
    return enum.__members__.get(str(name).removeprefix(f"{enum.__name__}.").upper())


def weights_path(name_or_path: str | os.PathLike[str] | ShippedWeights) -> Path:
    """Return the path of the shipped weights called ``name_or_path``, or of that file. Raise an EarlyExitError if there
    is neither, or if the shipped file is damaged."""
    if member := find_weights(name_or_path):
        member.check()
        return member.path
    if not Path(name_or_path).is_file():
        names = [name.lower() for name in EarlyExitSSDLite_Weights.__members__]
        hint = f"({', '.join(names)}){suggest(str(name_or_path), names)}"
        raise EarlyExitError(f"weights '{name_or_path}': no such file, and not one of the shipped weights {hint}")
    return Path(name_or_path)

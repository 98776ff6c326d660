"""Start from a trained detector: read its weights from any file, describe its architecture, change its classes."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.models.detection.ssd import SSD, SSDScoringHead

from earlyexit_ssd.config.check import FOLDS, LARGEST_SIDE, MAX_WIDTH
from earlyexit_ssd.errors import EarlyExitError, nearest, shown
from earlyexit_ssd.modeling.branches import Exit, describe_exits, exit_keyword_names, exit_keywords, takes_exits
from earlyexit_ssd.modeling.detector import EarlyExitDetector, detector_class
from earlyexit_ssd.modeling.heads import (
    ClassChange,
    FoldedClassificationHead,
    cut_head,
    find_competing_rows,
    is_folded,
    plan_class_change,
    slice_rows,
)
from earlyexit_ssd.modeling.trunk import PixelBoxes, grids_of
from earlyexit_ssd.modeling.validate import LEAST_SCORE
from earlyexit_ssd.plain import build, check_fields, require_bounded

logger = logging.getLogger(__name__)

Content = Mapping[str, Any]  # content of a weight file: tensors and plain types, in dicts and lists

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components that DataParallel, AveragedModel, torch.compile and others insert anywhere into the keys."""

USUAL = ("", "model", "state_dict", "model_state_dict")
"""Keys of the trained weights, preferred if a file holds several state dicts."""

MAX_NESTING = 4  # levels of nested dicts that are searched for a state dict, the outermost included
_ROOT = re.compile(r"(?:^|\.)(?=backbone\.features\.0\.)")  # ends the prefix that stands before torchvision's first key
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg)(?:$|[._])|averag|shadow|teacher", re.IGNORECASE)
"""Names of moving averages of the weights."""


def find_detector(content: Content, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Find the state dict of an SSDLite, with or without exits, and return it under torchvision's names.

    It may be nested (``{"model": ..., "epoch": ...}``), and its keys may share a prefix and contain `WRAPPERS`. Trained
    weights come before their moving average. Entries outside the detector are ignored.

    Raises:
        EarlyExitError: no detector, or several of which none has a usual name.
    """
    places = {id(mapping): (place, mapping) for place, mapping in _mappings(content)}  # one may be there twice
    found = {}
    for place, mapping in places.values():
        found |= _detectors(mapping, place, path)
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


def _mappings(content: Content, place: str = "", levels: int = MAX_NESTING) -> Iterator[tuple[str, Content]]:
    """Every nested dict of ``content`` with its dotted path."""
    yield place, content
    for key, value in content.items():
        if levels > 1 and isinstance(key, str) and isinstance(value, Mapping):
            yield from _mappings(value, f"{place}.{key}" if place else key, levels - 1)


def _detectors(mapping: Content, place: str, path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Dotted path with the key prefix -> state dict, of the detectors among the tensors of the dict at ``place``."""
    tensors: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if isinstance(key, str) and isinstance(value, Tensor) and not key.endswith("n_averaged"):
            name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
            if name in tensors:
                raise EarlyExitError(f"{path}: {key:.80} is there with and without a wrapper's prefix; save one")
            tensors[name] = value
    states: dict[str, dict[str, Tensor]] = {}
    prefixes = {name[: match.end()] for name in tensors if (match := _ROOT.search(name))}
    for prefix in sorted(prefixes, key=len, reverse=True):  # a name belongs to its longest prefix
        names = [name for name in tensors if name.startswith(prefix)]
        states[f"{place}.{prefix}".strip(".")] = {name.removeprefix(prefix): tensors.pop(name) for name in names}
    return states


def outputs_of(state: Mapping[str, Tensor]) -> int:
    """Outputs per default box of a detector's head, background included; 0 if the head is not in ``state``."""
    first = "head.classification_head.module_list.0"  # the predictor of the first map
    if f"{first}.1.bias" in state:  # SSDLite: a depthwise convolution, then the predictor, with 6 boxes per cell
        return len(state[f"{first}.1.bias"]) // 6
    return len(state[f"{first}.bias"]) // 4 if f"{first}.bias" in state else 0  # SSD: 4 boxes per cell


def exit_names_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the exits whose branches are in a state dict, shallow to deep."""
    names = {match[1] for key in state if (match := re.match(r"branches\.(exit\d{1,3})\.", key))}
    return tuple(sorted(names, key=lambda name: int(name[4:])))


def has_reduced_tail(state: Mapping[str, Tensor], width: float) -> bool:
    """Whether the last trunk layer has 480 channels (reduced tail) rather than 960, times the width."""
    last = state.get("backbone.features.1.3.0.weight")
    return last is None or last.shape[0] < 720 * width


# The description from which a model is rebuilt, stored beside its weights in the same file.

RowIndex = Annotated[int, 0, 100_000]
Share = Annotated[float, 0, 1]
Count = Annotated[int, 1, 2**31]


@takes_exits
@dataclass(frozen=True)
class Architecture:
    """All settings that determine the shapes and the post-processing of a detector with early exits.

    Instead of ``exits`` (shallow to deep) it accepts the keywords of `describe_exits`. A field of a wrong type or out
    of its range is an EarlyExitError.

    Attributes:
        classes: names of the labels 1..K.
        detector: torchvision's name of the detector without exits.
        image_size: side of the network input, pixels.
        trained_size: side of the input that the weights were trained at, pixels; 0: ``image_size``. If it differs from
            ``image_size``, default boxes keep their size in pixels (`PixelBoxes`).
        width, reduced_tail: shape of the trunk, see :func:`build_ssdlite`.
        head_outputs: outputs per default box of a folded head, before folding; 0 if the head is not folded.
        folded_rows: class indices of ``classes`` in a folded head; empty if the head is not folded.
        competing: names of the classes that a compact head folds, largest probability first; empty for other heads.
        folded_branches: whether the branches' heads are folded like the full path's. Otherwise they have only
            background and ``classes``.
        score_thresh: lowest score of a detection, one number or per class name.
    """

    classes: tuple[str, ...]
    detector: str = "ssdlite320_mobilenet_v3_large"
    image_size: Annotated[int, 1, LARGEST_SIDE] = 320
    width: Annotated[float, 0.01, MAX_WIDTH] = 1.0
    reduced_tail: bool = True
    head_outputs: RowIndex = 0
    folded_rows: tuple[RowIndex, ...] = ()
    competing: tuple[str, ...] = ()
    exits: tuple[Exit, ...] = field(default_factory=describe_exits)
    folded_branches: bool = False
    score_thresh: Share | dict[str, Share] = 0.001
    nms_thresh: Share = 0.55
    detections_per_img: Count = 300
    topk_candidates: Count = 300
    trained_size: Annotated[int, 0, LARGEST_SIDE] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        detector_class(self.detector)
        if not self.classes:
            raise EarlyExitError("classes is empty, expected at least one name")
        rows, classes = self.folded_rows, len(self.classes)
        fits = len(rows) == len(set(rows)) == classes and all(1 <= row < self.head_outputs for row in rows)
        if bool(self.head_outputs) != bool(rows) or (rows and not fits):
            raise EarlyExitError(
                f"folded_rows is {shown(rows)} of {self.head_outputs} head_outputs, expected a row from 1 on for each "
                f"of {classes} classes, or none"
            )
        if self.competing and len(self.competing) != self.head_outputs - 1 - classes:
            raise EarlyExitError(
                f"competing has {len(self.competing)} names, expected one for each of {self.head_outputs} head_outputs "
                f"but background and {classes} classes, or none"
            )
        if self.folded_branches and not rows:
            raise EarlyExitError("folded_branches is true without folded_rows, expected false: no head is folded")

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return tuple(one.layer for one in self.exits)

    def to_dict(self) -> dict:
        """A dict of plain types, for JSON and for files read with ``weights_only=True``."""
        values = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        values |= exit_keywords(values.pop("exits"))
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Architecture:
        """The inverse of :meth:`to_dict`; unknown keys and wrong types are errors."""
        values = dict(values)
        # Older versions wrote these two. Their branches without copied layers (no "copy", or 0) had attention, and a
        # cascade joined several branches. Both kinds of layers are gone; files whose branches lack them are read.
        attention, cascade = values.pop("attention", None), values.pop("cascade", False)
        keywords = {key: values.pop(key) for key in exit_keyword_names() if key in values}
        copied = keywords.get("copy", [0.0])
        has_attention = attention is not None and isinstance(copied, (list, tuple)) and not all(copied)
        exits = () if has_attention else describe_exits(**keywords)
        if has_attention or (cascade and sum(not one.empty for one in exits) > 1):
            raise EarlyExitError(
                "its branches have layers that this version does not support (attention, or a cascade from exit to "
                "exit): train the exits again from its full path (MODEL.WEIGHTS, minutes)"
            )
        return build(cls, {**values, "exits": exits})

    @classmethod
    def of(cls, model: EarlyExitDetector) -> Architecture:
        """The description of a model in its current state. An EarlyExitError if layers, default boxes or normalisation
        were changed, so that no description rebuilds it."""
        head, state = model.head.classification_head, model.state_dict()
        names = ("classes", "exits", "width", "score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
        settings = {name: getattr(model, name) for name in names}
        if is_folded(head):
            branches = [part.head.classification_head for part in model.branches.values() if hasattr(part, "head")]
            settings |= {"head_outputs": head.num_columns, "folded_rows": head.wanted.tolist()}
            folded = bool(head.competing) or any(map(is_folded, branches))
            settings |= {"competing": head.competing, "folded_branches": folded}
        architecture = cls(
            detector=model.detector_name,
            image_size=model.transform.fixed_size[0],
            trained_size=getattr(model.anchor_generator, "trained_size", 0),
            reduced_tail=has_reduced_tail(state, model.width),
            **settings,
        )
        with torch.random.fork_rng(devices=[]):
            expected = _described_parts(architecture.build())
        found = _described_parts(model)
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise EarlyExitError(
                    f"the model is not as it was built: {name:.80} is {found.get(name)!s:.60}, expected "
                    f"{expected.get(name)!s:.60}; a file of it could not be read again: save its state_dict() instead"
                )
        return architecture

    @classmethod
    def of_full_path(cls, values: dict) -> Architecture:
        """As :meth:`from_dict` with the default exits instead of those in ``values``, which may be too old to read."""
        exit_keys = {"attention", "cascade", *exit_keyword_names()}
        return cls.from_dict({key: value for key, value in values.items() if key not in exit_keys})

    def build_detector(self) -> SSD:
        """The torchvision detector without exits, untrained."""
        cuts = self.score_thresh  # torchvision's detector has one threshold for all classes
        lowest = min(cuts.get(name, LEAST_SCORE) for name in self.classes) if isinstance(cuts, Mapping) else cuts
        detector = detector_class(self.detector).build_plain(
            num_classes=self.head_outputs or len(self.classes) + 1,
            image_size=self.image_size,
            width=self.width,
            reduced_tail=self.reduced_tail,
            score_thresh=lowest,
            nms_thresh=self.nms_thresh,
            detections_per_img=self.detections_per_img,
            topk_candidates=self.topk_candidates,
        )
        if self.folded_rows:
            head = detector.head
            head.classification_head = FoldedClassificationHead(
                head.classification_head, self.folded_rows, self.competing
            )
        if self.trained_size not in (0, self.image_size):
            grids = grids_of(detector.backbone, self.trained_size)
            detector.anchor_generator = PixelBoxes(detector.anchor_generator, grids, self.trained_size, self.image_size)
        return detector

    def add_exits(self, detector: SSD) -> EarlyExitDetector:
        if self.folded_branches:  # build the branches with all classes of the full path's head, then fold both
            whole = detector.head.classification_head
            detector.head.classification_head = SSDScoringHead(whole.module_list, whole.num_columns)
        classes = None if self.folded_branches else self.classes
        model = detector_class(self.detector)(detector, exits=self.exits, classes=classes)
        if self.folded_branches:
            fold_model(model, self.classes, self.folded_rows, self.competing)
        model.score_thresh = self.score_thresh
        return model

    def build(self) -> EarlyExitDetector:
        return self.add_exits(self.build_detector())


def fold_model(
    model: EarlyExitDetector, classes: Sequence[str], rows: Sequence[int], competing: Sequence[str] = ()
) -> None:
    """Fold all classes except ``classes``, whose class indices are ``rows``, into background, in the heads of the full
    path and of the branches. ``competing``: names of the folded classes if the head is compact."""
    for part in (model, *model.branches.values()):
        if hasattr(part, "head"):
            part.head.classification_head = FoldedClassificationHead(part.head.classification_head, rows, competing)
        else:
            part.num_classes = len(classes) + 1
    model.classes = tuple(classes)


def _described_parts(model: EarlyExitDetector) -> dict[str, object]:
    """Name -> value of everything that a description determines: shapes, normalisation and default boxes."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith("router.")}
    normalisation = {name: list(getattr(model.transform, name)) for name in ("image_mean", "image_std", "fixed_size")}
    return {**shapes, **normalisation, "anchor_generator": repr(model.anchor_generator)}


# Load a trained torchvision SSDLite, from torchvision's weights or a file, and change its classes.

COCO_CLASSES = tuple(SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"][1:])
"""torchvision's names of the labels 1..90; "N/A" where COCO skips a number."""


def retrofit(
    architecture: Architecture,
    weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights,
    source_classes: Sequence[str] | None = None,
    fold: str = "exact",
    photos: Iterable[Tensor] | None = None,
    tolerance: float = 0.0015,
) -> tuple[SSD, Architecture, ClassChange | None]:
    """Load a trained torchvision detector and change its classes; every key of the checkpoint is used.

    Args:
        architecture: the wanted model; its ``classes`` are the wanted ones.
        weights: a member of torchvision's weight enum, its name, or a path. The branches of a model file of this
            project are ignored.
        source_classes: names of the checkpoint's labels 1..K; None if they are the wanted ones. A model file of this
            project contains its own.
        fold: what happens to the unwanted classes. ``exact``: fold all of them; scores stay the same. ``compact``: fold
            the competing ones and drop the others; a smaller head, scores stay almost the same. ``rows``: a cut head,
            with background and the wanted classes only.
        photos: for ``compact``: photos to find the competing classes on, [3, H, W] in [0, 1]; read only if needed.
        tolerance: for ``compact``, see :func:`earlyexit_ssd.modeling.heads.competing_rows`.

    Returns:
        the detector, its architecture, and the change of its classes (None if they are the checkpoint's).

    Raises:
        EarlyExitError: unreadable weights, wrong shapes, a class that the checkpoint lacks, an unknown ``fold``, or no
            photos for ``compact``.
    """
    if fold not in FOLDS:
        names, hint = ", ".join(FOLDS), nearest(str(fold), FOLDS)
        raise EarlyExitError(f"fold (MODEL.FOLD) is {shown(fold)}, expected one of {names}{hint}")
    state, described = load_full_path(weights, detector_class(architecture.detector).plain_weights)
    source = described.classes if described else tuple(source_classes or architecture.classes)
    # `loaded` describes the file as it is; `architecture` describes the wanted model, whose head is not folded yet.
    unfolded = {"head_outputs": 0, "folded_rows": (), "competing": (), "folded_branches": False}
    reduced_tail = has_reduced_tail(state, architecture.width)
    architecture = dataclasses.replace(architecture, reduced_tail=reduced_tail, **unfolded)
    folds = {name: getattr(described, name) for name in ("head_outputs", "folded_rows", "competing") if described}
    loaded = dataclasses.replace(
        architecture, classes=source, **folds, folded_branches=bool(described and described.competing)
    )
    detector = loaded.build_detector()
    load_every_key(detector, state, weights)
    if source == architecture.classes:
        return detector, loaded, None
    if loaded.folded_rows:
        raise EarlyExitError(
            f"{weights}: its classes ({', '.join(source)}) were folded before; start from the checkpoint it came from"
        )
    change = plan_class_change(source, architecture.classes)
    head, rows, competing = detector.head, change.rows, ()
    if fold != "rows" and None in rows:
        raise EarlyExitError(f"MODEL.FOLD '{fold}' cannot add classes ({change}); set MODEL.FOLD to 'rows'")
    if fold == "compact" and change.unwanted:
        if photos is None:
            raise EarlyExitError("MODEL.FOLD 'compact' finds the classes that compete on photos; give retrofit photos")
        others = find_competing_rows(detector, rows, photos, tolerance)
        competing = tuple(source[row - 1] for row in others)
        change = dataclasses.replace(change, competing=competing)
        slice_rows(head.classification_head, (*rows, *others))
        rows = tuple(range(1, len(rows) + 1))  # the sliced head has them first
    if fold == "rows" or (fold == "compact" and change.unwanted and not competing):  # nothing to fold
        slice_rows(head.classification_head, rows)
        return detector, architecture, change
    head.classification_head = FoldedClassificationHead(head.classification_head, rows, competing)
    folds = {"head_outputs": head.classification_head.num_columns, "folded_rows": rows, "competing": competing}
    return detector, dataclasses.replace(architecture, **folds, folded_branches=bool(competing)), change


def torchvision_name(
    weights: str | os.PathLike[str] | WeightsEnum, kind: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> str | None:
    """Member name (without the enum's) in torchvision's weight enum ``kind``; None for a path."""
    name = str(weights).removeprefix(f"{kind.__name__}.")
    return name if name in kind.__members__ else None


def load_full_path(
    weights: str | os.PathLike[str] | WeightsEnum, kind: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> tuple[dict[str, Tensor], Architecture | None]:
    """State dict of a detector without exits, and its description if the file is a model of this project."""
    name = torchvision_name(weights, kind)
    if name:
        try:
            return kind[name].get_state_dict(progress=True, check_hash=True), None
        except OSError as error:
            raise EarlyExitError(
                f"torchvision's weights {weights} could not be downloaded ({error}); "
                "download them elsewhere and set MODEL.WEIGHTS to the file's path"
            ) from None
    require_weights(weights, kind)
    content = read_weights(weights)
    state = find_detector(content, weights)
    full_path = {key: value for key, value in state.items() if not key.startswith(("branches.", "router."))}
    if not isinstance(content.get("architecture"), dict):
        return full_path, None
    try:
        return full_path, Architecture.of_full_path(content["architecture"])
    except EarlyExitError as error:
        raise EarlyExitError(f"{weights}: {error}") from None


def require_weights(
    weights: str | os.PathLike[str] | WeightsEnum, kind: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> None:
    """An EarlyExitError with the nearest name if ``weights`` is neither a file nor a member of the enum ``kind``."""
    if torchvision_name(weights, kind) is None and not Path(weights).is_file():
        names = kind.__members__
        hint = nearest(str(weights), names) or f"; torchvision's own are {', '.join(names)}"
        raise EarlyExitError(f"weights {weights}: no such file{hint}")


def read_weights(path: str | os.PathLike[str]) -> Content:
    """Read a file of tensors and plain types; no code in it is executed."""
    try:  # torchvision's reference training stores its arguments in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise any exception; no unsafe unpickling instead
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


def load_every_key(module: torch.nn.Module, state: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load strictly. An EarlyExitError names the first missing or unexpected key, wrong shape or type, NaN, or value
    that is no dense tensor of numbers."""
    fix = "save model.state_dict()"
    if not isinstance(state, dict) or not state:
        raise EarlyExitError(f"{source}: expected a state dict of tensors, got {shown(state)}; {fix}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise EarlyExitError(f"{source}: expected names and tensors, got {shown(key, 50)}: {kind}; {fix}")
        dense = value.layout == torch.strided and value.device.type != "meta" and not value.is_nested
        if not dense or value.is_quantized or value.is_complex():
            kind = f"{value.layout} {value.dtype} on {value.device}"
            raise EarlyExitError(f"{source}: {key} is {kind}, expected an ordinary tensor of numbers; {fix}")
    expected = module.state_dict()
    problems = {key: f"lacks {key}" for key in expected if key not in state}
    problems |= {key: f"has {key}, which the model lacks" for key in state if key not in expected}
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            problems[key] = f"{key} is {list(state[key].shape)}, the model has {list(value.shape)}"
    if problems:
        check = "MODEL.WIDTH, MODEL.WEIGHTS_CLASSES and the number of classes"
        if all(key.startswith("branches.") for key in problems):
            check = "EXITS (in Python copy, depth, channels, head_rank)"
        first = next(iter(problems.values()))
        raise EarlyExitError(f"{source} does not fit the model: {first} ({len(problems)} differences); check {check}")
    for key, value in expected.items():
        given = state[key]
        if given.is_floating_point() != value.is_floating_point() or given.dtype == torch.bool:
            raise EarlyExitError(f"{source}: {key} is {given.dtype}, the model has {value.dtype}; save it anew")
        if not given.float().isfinite().all():
            raise EarlyExitError(f"{source}: {key} has NaN or infinity, its training went wrong; take other weights")
    module.load_state_dict(state)


def resize_detector(model: EarlyExitDetector, architecture: Architecture, size: int, *, cut: bool = False) -> SSD:
    """The full path at an input of ``size`` x ``size`` pixels, in eval mode, on the model's device. Default boxes keep
    their size in pixels (`PixelBoxes`). With ``cut`` a folded head keeps only background and the model's classes."""
    trained_size = architecture.trained_size or architecture.image_size
    detector = dataclasses.replace(architecture, image_size=size, trained_size=trained_size).build_detector()
    state = {key: value for key, value in model.state_dict().items() if key.startswith(("backbone.", "head."))}
    detector.load_state_dict(state)
    if cut:
        detector.head.classification_head = cut_head(detector.head.classification_head)
    return detector.to(next(model.parameters()).device).eval()

"""Load the weights of a trained detector, describe its architecture, and change its classes."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.models.detection.ssd import SSD, SSDScoringHead

from earlyexit_ssd.config.check import FOLD_CHOICES, LARGEST_SIDE, MAX_WIDTH
from earlyexit_ssd.errors import EarlyExitError, shown, suggest
from earlyexit_ssd.modeling import heads
from earlyexit_ssd.modeling.branches import Exit, describe_exits, exit_keyword_names, exit_keywords, takes_exits
from earlyexit_ssd.modeling.detector import DETECTORS, POST_PROCESSING, EarlyExitDetector
from earlyexit_ssd.modeling.trunk import PixelBoxes, grids_of
from earlyexit_ssd.modeling.validate import LEAST_SCORE
from earlyexit_ssd.plain import build, check_fields, require_bounded

logger = logging.getLogger(__name__)

Content = Mapping[str, Any]  # content of a weight file: tensors and plain types, in dicts and lists

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components that DataParallel, AveragedModel, torch.compile and others insert into keys, at any position."""

USUAL_KEYS = ("", "model", "state_dict", "model_state_dict")
"""State dicts under these keys are preferred if a file has several."""

MAX_NESTING = 4  # levels of nested dicts that are searched for a state dict, the outermost included
_PREFIX_END = re.compile(r"(?:^|[./])(?=backbone\.features\.0\.)")  # a prefix ends where torchvision's key begins
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg)(?:$|[._])|averag|shadow|teacher", re.IGNORECASE)
"""Names of moving averages of the weights."""


def find_detector(content: Content, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Find the state dict of a torchvision detector, with or without exits, and return it under torchvision's names.

    It may be nested (``{"model": ..., "epoch": ...}``), and its keys may share a prefix and contain `WRAPPERS`. Trained
    weights are preferred to their moving average. Other entries are ignored.

    Raises:
        EarlyExitError: no detector, or several and none under `USUAL_KEYS`.
    """
    tensors: dict[str, Tensor] = {}  # "/" joins the names of nested dicts
    seen = set()

    def collect(mapping: Content, name: str, levels: int) -> None:
        seen.add(id(mapping))
        for key, value in mapping.items():
            if not isinstance(key, str) or key.endswith("n_averaged"):
                continue
            if isinstance(value, Mapping) and levels > 1 and id(value) not in seen:  # a dict may occur twice
                collect(value, f"{name}{key}/", levels - 1)
            elif isinstance(value, Tensor):
                unwrapped = name + ".".join(part for part in key.split(".") if part not in WRAPPERS)
                if unwrapped in tensors:
                    raise EarlyExitError(f"{path}: has {key:.80} with and without a wrapper's prefix; save only one")
                tensors[unwrapped] = value

    collect(content, "", MAX_NESTING)
    detectors: dict[str, dict[str, Tensor]] = {}
    prefixes = {key[: match.end()] for key in tensors if (match := _PREFIX_END.search(key))}
    for prefix in sorted(prefixes, key=len, reverse=True):  # a key belongs to its longest prefix
        # a "/" after the prefix: the key is in a dict inside the detector's dict
        keys = [key for key in tensors if key.startswith(prefix) and "/" not in key.removeprefix(prefix)]
        name = prefix.strip("./").replace("/", ".")
        detectors[name] = {key.removeprefix(prefix): tensors.pop(key) for key in keys}
    if not detectors:
        keys = ", ".join(str(key)[:40] for key in list(content)[:3]) or "none"
        expected = "torchvision's SSDLite or SSD300 (keys such as backbone.features.0.0.0.weight)"
        raise EarlyExitError(f"{path}: expected a state dict of tensors of {expected}, got keys {keys}")
    names = [name for name in detectors if not _AVERAGE.search(name)] or list(detectors)
    names = [name for name in names if name in USUAL_KEYS] or names
    if len(names) > 1:
        raise EarlyExitError(f"{path}: has several detectors ({', '.join(names)[:120]}); save only one of them")
    others = sorted(set(detectors) - set(names))
    if others:
        logger.warning("%s: loads the weights '%s' and ignores %s", path, names[0], ", ".join(others))
    return detectors[names[0]]


def outputs_of(state: Mapping[str, Tensor]) -> int:
    """Return the outputs per default box of a detector's head, background included; 0 if ``state`` has no head."""
    first = "head.classification_head.module_list.0"  # the predictor of the first map
    if f"{first}.1.bias" in state:  # SSDLite: a depthwise convolution, then the predictor, with 6 boxes per cell
        return state[f"{first}.1.bias"].numel() // 6
    return state[f"{first}.bias"].numel() // 4 if f"{first}.bias" in state else 0  # SSD: 4 boxes per cell


def exit_names_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the exits whose branches are in a state dict, shallow to deep."""
    names = {match[1] for key in state if (match := re.match(r"branches\.(exit\d{1,3})\.", key))}
    return tuple(sorted(names, key=lambda name: int(name[4:])))


def has_reduced_tail(state: Mapping[str, Tensor], width: float) -> bool:
    """Return whether the last trunk layer has 480 * width channels (reduced tail), not 960 * width."""
    last = state.get("backbone.features.1.3.0.weight")
    return last is None or last.shape[0] < 720 * width


# The description from which a model is rebuilt, stored beside its weights in the same file.

OLD_KEYS = ("attention", "cascade")
HeadOutput = Annotated[int, 0, 100_000]  # number or index of a head's outputs per default box
Share = Annotated[float, 0, 1]
Count = Annotated[int, 1, 2**31]


UNFOLDED = {"head_outputs": 0, "folded_rows": (), "competing": (), "folded_branches": False}
"""Fields of an `Architecture` whose head has one output for background and one for each class."""


@takes_exits
@dataclass(frozen=True)
class Architecture:
    """All settings that determine the shapes and the post-processing of a detector with early exits.

    Instead of ``exits`` (shallow to deep) it accepts the keywords of `describe_exits`.

    Attributes:
        classes: names of the labels 1..K.
        detector: torchvision's name of the detector without exits.
        image_size: side of the network input, pixels.
        trained_size: side in training; 0 means ``image_size``. If it differs, default boxes are `PixelBoxes`.
        width, reduced_tail: shape of the trunk, see :func:`build_ssdlite`.
        head_outputs: outputs per default box of a folded head, before folding; 0 if the head is not folded.
        folded_rows: class indices in a folded head of ``classes``, which are not folded; empty for other heads.
        competing: names of the classes that a compact head folds, largest probability first; empty for other heads.
        folded_branches: whether the branches' heads are folded like the full path's. Otherwise they have only
            background and ``classes``.
        score_thresh: lowest score of a detection, or class name -> lowest score.

    Raises:
        EarlyExitError: a field of a wrong type or outside its range, or fields that contradict each other.
    """

    classes: tuple[str, ...]
    detector: str = "ssdlite320_mobilenet_v3_large"
    image_size: Annotated[int, 1, LARGEST_SIDE] = 320
    width: Annotated[float, 0.01, MAX_WIDTH] = 1.0
    reduced_tail: bool = True
    head_outputs: HeadOutput = 0
    folded_rows: tuple[HeadOutput, ...] = ()
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
        DETECTORS.find(self.detector)
        if not self.classes:
            raise EarlyExitError("classes is empty, expected at least one name")
        rows, classes = self.folded_rows, len(self.classes)
        fits = len(rows) == len(set(rows)) == classes and all(1 <= row < self.head_outputs for row in rows)
        if (rows or self.head_outputs) and not fits:
            expected = f"a different row from 1 to head_outputs - 1 for each of {classes} classes, or () and 0"
            given = f"folded_rows is {shown(rows)} with head_outputs {self.head_outputs}"
            raise EarlyExitError(f"{given}, expected {expected}")
        if self.competing and len(self.competing) != self.head_outputs - 1 - classes:
            expected = f"one for each of {self.head_outputs} head_outputs except background and the {classes} classes"
            raise EarlyExitError(f"competing has {len(self.competing)} names, expected none, or {expected}")
        if self.folded_branches and not rows:
            raise EarlyExitError("folded_branches is true without folded_rows, expected false: no head is folded")

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return tuple(early_exit.layer for early_exit in self.exits)

    def to_dict(self) -> dict:
        """Return the settings as plain types, for JSON and for files that are read with ``weights_only=True``."""
        values = dict(vars(self))
        values |= exit_keywords(values.pop("exits"))
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Architecture:
        """Build the architecture from the result of :meth:`to_dict`. Raise an EarlyExitError for unknown keys and wrong
        types. Keys of layers that older versions had are ignored: weights of such layers do not load."""
        values = {key: value for key, value in values.items() if key not in OLD_KEYS}
        keywords = {key: values.pop(key) for key in exit_keyword_names() if key in values}
        return build(cls, {**values, "exits": describe_exits(**keywords)})

    @classmethod
    def of(cls, model: EarlyExitDetector) -> Architecture:
        """Describe a model in its current state. Raise an EarlyExitError if its layers, default boxes or normalisation
        were replaced, since no description rebuilds it then."""
        head, state = model.head.classification_head, model.state_dict()
        settings = {name: getattr(model, name) for name in ("classes", "exits", "width", *POST_PROCESSING)}
        if heads.is_folded(head):
            branches = [part.head.classification_head for part in model.branches.values() if hasattr(part, "head")]
            settings |= {"head_outputs": head.num_columns, "folded_rows": head.wanted.tolist()}
            settings["competing"] = head.competing
            # as in `retrofit`, also without branches
            settings["folded_branches"] = bool(head.competing) or any(map(heads.is_folded, branches))
        architecture = cls(
            detector=model.detector_name,
            image_size=model.transform.fixed_size[0],
            trained_size=getattr(model.anchor_generator, "trained_size", 0),
            reduced_tail=has_reduced_tail(state, model.width),
            **settings,
        )
        with torch.random.fork_rng(devices=[]):  # `build` draws random weights
            rebuilt = _described_parts(architecture.build())
        present = _described_parts(model)
        for name in {**rebuilt, **present}:
            if rebuilt.get(name) != present.get(name):
                difference = f"{name:.80} is {present.get(name)!s:.60}, expected {rebuilt.get(name)!s:.60}"
                fix = "a model file cannot rebuild it: save its state_dict() instead"
                raise EarlyExitError(f"the model is not as it was built: {difference}; {fix}")
        return architecture

    def build_detector(self) -> SSD:
        """Build the torchvision detector without exits, untrained."""
        settings = {name: getattr(self, name) for name in ("image_size", "width", "reduced_tail", *POST_PROCESSING)}
        if isinstance(self.score_thresh, Mapping):  # torchvision's detector has one threshold for all classes
            settings["score_thresh"] = min(self.score_thresh.get(name, LEAST_SCORE) for name in self.classes)
        num_classes = self.head_outputs or len(self.classes) + 1
        detector = DETECTORS.find(self.detector).build_plain(num_classes=num_classes, **settings)
        if self.folded_rows:
            whole = detector.head.classification_head
            detector.head.classification_head = heads.FoldedClassificationHead(whole, self.folded_rows, self.competing)
        if self.trained_size not in (0, self.image_size):
            grids = grids_of(detector.backbone, self.trained_size)
            detector.anchor_generator = PixelBoxes(detector.anchor_generator, grids, self.trained_size, self.image_size)
        return detector

    def add_exits(self, detector: SSD) -> EarlyExitDetector:
        """Add the exits to a detector of `build_detector`."""
        detector_class = DETECTORS.find(self.detector)
        if self.folded_branches:  # build the branches with all classes of the full path's head, then fold both
            whole = detector.head.classification_head
            detector.head.classification_head = SSDScoringHead(whole.module_list, whole.num_columns)
            model = detector_class(detector, exits=self.exits)
            for part in (model, *model.branches.values()):
                if hasattr(part, "head"):
                    whole, rows = part.head.classification_head, self.folded_rows
                    part.head.classification_head = heads.FoldedClassificationHead(whole, rows, self.competing)
                else:  # an empty exit
                    part.num_classes = len(self.classes) + 1
            model.classes = self.classes
        else:
            model = detector_class(detector, exits=self.exits, classes=self.classes)
        model.score_thresh = self.score_thresh
        return model

    def build(self) -> EarlyExitDetector:
        """Build the detector with its exits, untrained."""
        return self.add_exits(self.build_detector())


def _described_parts(model: EarlyExitDetector) -> dict[str, object]:
    """Return everything that a description determines, by name: shapes, normalisation and default boxes."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith("router.")}
    normalisation = {name: list(getattr(model.transform, name)) for name in ("image_mean", "image_std", "fixed_size")}
    return {**shapes, **normalisation, "anchor_generator": repr(model.anchor_generator)}


# Load a trained torchvision detector, from torchvision's weights or a file, and change its classes.


def retrofit(
    architecture: Architecture,
    weights: str | os.PathLike[str] | SSDLite320_MobileNet_V3_Large_Weights,
    source_classes: Sequence[str] | None = None,
    fold: str = "exact",
    photos: Iterable[Tensor] | None = None,
    tolerance: float = 0.0015,
) -> tuple[SSD, Architecture, heads.ClassChange | None]:
    """Load a trained torchvision detector and change its classes. Every key of the checkpoint's full path is used.

    Args:
        architecture: the wanted model, with the wanted ``classes``.
        weights: a member of torchvision's weight enum, its name, or a path. The branches of a model file are ignored.
        source_classes: names of the checkpoint's labels 1..K; None if they are the wanted classes. Ignored for a model
            file, which has its own names.
        fold: what happens to the unwanted classes. ``exact``: all are folded; scores stay the same. ``compact``: the
            competing classes are folded and the others dropped; the head is smaller, and scores stay almost the same.
            ``rows``: the head is cut to background and the wanted classes.
        photos: for ``compact``: photos [3, H, W] in [0, 1] on which the competing classes are found.
        tolerance: for ``compact``, see :func:`earlyexit_ssd.modeling.heads.competing_rows`.

    Returns:
        the detector, its architecture, and the change of its classes (None if they do not change).

    Raises:
        EarlyExitError: unreadable weights, wrong shapes, a class that the checkpoint lacks, an unknown ``fold``, or no
            photos for ``compact``.
    """
    if fold not in FOLD_CHOICES:
        names, hint = ", ".join(FOLD_CHOICES), suggest(str(fold), FOLD_CHOICES)
        raise EarlyExitError(f"fold (MODEL.FOLD) is {shown(fold)}, expected one of {names}{hint}")
    state, stored = load_full_path(weights, DETECTORS.find(architecture.detector).plain_weights)
    source = stored.classes if stored else tuple(source_classes or architecture.classes)
    # `loaded` describes the file as it is; `architecture` describes the wanted model, whose head is not folded yet.
    reduced_tail = has_reduced_tail(state, architecture.width)
    trained_size = stored.trained_size if stored else architecture.trained_size
    architecture = dataclasses.replace(architecture, reduced_tail=reduced_tail, trained_size=trained_size, **UNFOLDED)
    stored_folds = {name: getattr(stored, name) for name in ("head_outputs", "folded_rows", "competing") if stored}
    folded_branches = bool(stored_folds.get("competing"))  # the branches of a compact head are folded too
    loaded = dataclasses.replace(architecture, classes=source, **stored_folds, folded_branches=folded_branches)
    detector = loaded.build_detector()
    load_every_key(detector, state, weights)
    if source == architecture.classes:
        return detector, loaded, None
    if loaded.folded_rows:
        fix = "start from the checkpoint it came from"
        raise EarlyExitError(f"{weights}: its classes ({', '.join(source)}) were folded before; {fix}")
    change = heads.plan_class_change(source, architecture.classes)
    head, rows, competing = detector.head, change.rows, ()
    if fold != "rows" and None in rows:
        raise EarlyExitError(f"MODEL.FOLD 'exact' or 'compact' cannot add classes ({change}); set MODEL.FOLD to 'rows'")
    if fold == "compact" and change.unwanted:
        if photos is None:
            raise EarlyExitError("MODEL.FOLD 'compact' needs photos to find competing classes; pass photos to retrofit")
        others = heads.find_competing_rows(detector, rows, photos, tolerance)
        competing = tuple(source[row - 1] for row in others)
        change = dataclasses.replace(change, competing=competing)
        heads.slice_rows(head.classification_head, (*rows, *others))
        rows = tuple(range(1, len(rows) + 1))  # the sliced head has them first
    if fold == "rows" or (fold == "compact" and change.unwanted and not competing):  # nothing to fold
        heads.slice_rows(head.classification_head, rows)
        return detector, architecture, change
    head.classification_head = heads.FoldedClassificationHead(head.classification_head, rows, competing)
    folds = {"head_outputs": head.classification_head.num_columns, "folded_rows": rows, "competing": competing}
    return detector, dataclasses.replace(architecture, **folds, folded_branches=bool(competing)), change


def torchvision_name(
    weights: str | os.PathLike[str] | WeightsEnum, enum: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> str | None:
    """Return the name of a member of torchvision's weight enum, without the enum's name; None if it is a path."""
    name = str(weights).removeprefix(f"{enum.__name__}.")
    return name if name in enum.__members__ else None


def load_full_path(
    weights: str | os.PathLike[str] | WeightsEnum, enum: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> tuple[dict[str, Tensor], Architecture | None]:
    """Return the state dict of a detector without its exits, and its description if it is a model file of this
    project. ``weights`` is a member of torchvision's ``enum``, its name, or a path."""
    name = torchvision_name(weights, enum)
    if name:
        try:
            return enum[name].get_state_dict(progress=True, check_hash=True), None
        except OSError as error:
            fix = "download them elsewhere and set MODEL.WEIGHTS to the file's path"
            raise EarlyExitError(f"torchvision's weights {weights} could not be downloaded ({error}); {fix}") from None
    require_weights(weights, enum)
    content = read_weights(weights)
    state = find_detector(content, weights)
    full_path = {key: value for key, value in state.items() if not key.startswith(("branches.", "router."))}
    stored = content.get("architecture")
    if not isinstance(stored, dict):
        return full_path, None
    try:  # with the default exits, since the stored ones may be too old to build
        without_exits = {key: value for key, value in stored.items() if key not in exit_keyword_names()}
        return full_path, Architecture.from_dict(without_exits)
    except EarlyExitError as error:
        raise EarlyExitError(f"{weights}: {error}") from None


def require_weights(
    weights: str | os.PathLike[str] | WeightsEnum, enum: type[WeightsEnum] = SSDLite320_MobileNet_V3_Large_Weights
) -> None:
    """Raise an EarlyExitError with the nearest name if ``weights`` is neither a file nor a member of ``enum``."""
    if torchvision_name(weights, enum) is None and not Path(weights).is_file():
        names = enum.__members__
        hint = suggest(str(weights), names) or f"; torchvision's weights are {', '.join(names) or 'none'}"
        raise EarlyExitError(f"weights {weights}: no such file{hint}")


def read_weights(path: str | os.PathLike[str]) -> Content:
    """Read a file of tensors and plain types. No code in it is executed. Raises an EarlyExitError for other files."""
    try:  # torchvision's reference training stores its arguments in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise any exception
        refused = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        fix = "save model.state_dict() alone" if refused else "name a checkpoint or model.pth, or download it again"
        reason = type(error).__name__ + (f", it contains {refused[1]}" if refused else "")
        expected = f"expected a file of torch.save with only tensors and plain types: {fix}"
        raise EarlyExitError(f"{path}: not a file of weights that can be read safely ({reason}); {expected}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise EarlyExitError(f"{path}: expected a dict of weights, got a {kind}; save model.state_dict()")
    try:
        require_bounded(content)
    except ValueError as error:
        raise EarlyExitError(f"{path}: {error}, not a file of weights; save model.state_dict()") from None
    return content


def load_every_key(module: torch.nn.Module, state: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load a state dict strictly. Raises an EarlyExitError that names the first missing or unexpected key, wrong shape
    or type, NaN, or value that is not a dense tensor of real numbers."""
    fix = "save model.state_dict()"
    if not isinstance(state, dict) or not state:
        raise EarlyExitError(f"{source}: expected a state dict of tensors, got {shown(state)}; {fix}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            entry = f"{shown(key, 50)}: {type(value).__name__}"
            raise EarlyExitError(f"{source}: expected names and tensors, got {entry}; {fix}")
        dense = value.layout == torch.strided and value.device.type != "meta" and not value.is_nested
        if not dense or value.is_quantized or value.is_complex():
            tensor = f"{value.layout} {value.dtype} on {value.device}"
            raise EarlyExitError(f"{source}: {key} is {tensor}, expected a dense tensor of real numbers; {fix}")
    expected = module.state_dict()
    problems = {key: f"lacks {key}" for key in expected if key not in state}
    problems |= {key: f"has {key}, which the model lacks" for key in state if key not in expected}
    for key, value in expected.items():
        if key in state and state[key].shape != value.shape:
            problems[key] = f"{key} is {list(state[key].shape)}, the model has {list(value.shape)}"
    if problems:
        check = "MODEL.WIDTH, MODEL.WEIGHTS_CLASSES and the number of classes"
        outputs, expected_outputs = outputs_of(state), outputs_of(expected)
        if 0 != outputs != expected_outputs and all(key.startswith("head.classification_head.") for key in problems):
            names = f"list the {outputs - 1} of the checkpoint in"
            if outputs == 91:  # COCO's
                names = "set coco as"
            check = f"the classes: {names} MODEL.WEIGHTS_CLASSES"
            check += f" (the model has {expected_outputs - 1})"
        if all(key.startswith("branches.") for key in problems):
            check = "EXITS (in Python copy, depth, channels, head_rank), or train the exits again from its full path"
        first = next(iter(problems.values()))
        raise EarlyExitError(f"{source} does not fit the model: {first} ({len(problems)} differences); check {check}")
    for key, value in expected.items():
        loaded = state[key]
        if loaded.is_floating_point() != value.is_floating_point() or loaded.dtype == torch.bool:
            raise EarlyExitError(f"{source}: {key} is {loaded.dtype}, expected {value.dtype}; convert and save it")
        if key.endswith("running_var") and (loaded < 0).any():
            raise EarlyExitError(f"{source}: {key} has a negative variance; use other weights")
        if not loaded.float().isfinite().all():
            raise EarlyExitError(f"{source}: {key} has NaN or infinity, so its training failed; use other weights")
    module.load_state_dict(state)


def resize_detector(model: EarlyExitDetector, architecture: Architecture, size: int, *, cut: bool = False) -> SSD:
    """Return a copy of the full path for inputs of ``size`` x ``size`` pixels, in eval mode, on the model's device.
    Default boxes keep their size in pixels (`PixelBoxes`). ``cut`` cuts a folded head to the model's classes."""
    trained_size = architecture.trained_size or architecture.image_size
    detector = dataclasses.replace(architecture, image_size=size, trained_size=trained_size).build_detector()
    state = {key: value for key, value in model.state_dict().items() if key.startswith(("backbone.", "head."))}
    detector.load_state_dict(state)
    if cut:
        detector.head.classification_head = heads.cut_head(detector.head.classification_head)
    return detector.to(next(model.parameters()).device).eval()

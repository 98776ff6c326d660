"""Values that cannot work are refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from earlyexit_ssd.errors import ConfigError, nearest, shown

PHASES = ("baseline", "exits", "joint")
CLOSED = 2.0
"""A threshold that no confidence reaches."""

C4_LAYER = 13
"""Its expansion is the full path's first map."""

PHASE_SECTIONS = {"baseline": "BASELINE", "exits": "EXITS_PHASE", "joint": "JOINT"}
LAST_LAYER = 16
TAIL_BLOCKS = 2
LARGEST_SIDE, MOST_WIDTH, MOST_CHANNELS = 4096, 4, 4096
RIVAL_FORMATS = ("yolox", "boxes")
LOSS_CHOICES = {
    "classification": ("mined", "focal"),
    "supervision": ("labels", "teacher"),
    "teacher": ("none", "full", "next"),
}

_CHOICES = {
    "DATA.ON_BAD": ("repair", "refuse", "skip"),
    "DATA.AUGMENTATION": ("ssdlite", "ssd", "flip", "none"),
    "MODEL.FOLD": ("exact", "rows"),
    "MODEL.WEIGHTS_CLASSES": ("", "coco"),
    "BASELINE.GATE.REFERENCE_CLASSES": ("", "coco"),
    **{f"LOSS.{key.upper()}": choices for key, choices in LOSS_CHOICES.items()},
    "JOINT.TEACHER": LOSS_CHOICES["teacher"],
    "CALIBRATION.REFERENCE": ("full", "labels"),
    "CALIBRATION.BOUND": ("hoeffding_bentkus", "betting"),
    "CALIBRATION.COST": ("auto", "ms", "mmacs"),
    "EXITS_PHASE.CACHE_DTYPE": ("float16", "float32"),
    "ENGINE.AMP": ("off", "bf16", "fp16"),
    "BASELINE.OPTIMIZER": ("sgd", "adamw"),
    "EXITS_PHASE.OPTIMIZER": ("sgd", "adamw"),
    "JOINT.OPTIMIZER": ("sgd", "adamw"),
    "EVAL.RUNTIME": ("eager", "onnxruntime"),
}
_UNIT_INTERVAL = (
    "MODEL.SCORE_THRESH", "MODEL.NMS_THRESH", "EVAL.SCORE", "EVAL.IOU", "EVAL.PICTURE_SCORE",
    "DATA.REPEAT_THRESHOLD", "LOSS.FOCAL_ALPHA", "EXITS.COPY", "BASELINE.GATE.AP50", "BASELINE.GATE.PRECISION",
    "BASELINE.GATE.RECALL", "BASELINE.GATE.RELATIVE", "EXITS_PHASE.GATE.FIRST_EXIT_AP50",
    "EXITS_PHASE.GATE.FIRST_EXIT_SHARE", "EXITS_PHASE.GATE.DEEPEST_SHARE",
    "JOINT.GATE.MAX_AP50_DROP", *(f"{phase}.{key}" for phase in PHASE_SECTIONS.values() for key in ("WARMUP", "EMA")),
)  # fmt: skip
_POSITIVE = (
    "MODEL.WIDTH", "MODEL.DETECTIONS_PER_IMG", "MODEL.TOPK_CANDIDATES", "DATA.SYNTHETIC.SIZES",
    "LOSS.NEG_TO_POS_RATIO", "ROUTING.TEMPERATURES", "ROUTING.TEMPERATURE_BOUNDS",
    "EXITS_PHASE.CACHE_VIEWS", "EXITS_PHASE.CACHE_GIB", "ENGINE.CHECKPOINT_PERIOD", "ENGINE.LOG_PERIOD",
    "ENGINE.CURVE_PHOTOS",
    "EVAL.BATCH_SIZE", "EVAL.TIMING_RUNS", "EVAL.TIMING_THREADS", "JOINT.FULL_PATH_LR_FACTOR",
    *(f"{phase}.{key}" for phase in PHASE_SECTIONS.values() for key in ("BATCH_SIZE", "LR")),
)  # fmt: skip
_NOT_NEGATIVE = (
    "SEED", "THREADS", "CALIBRATION.TRAIN_PHOTOS", "EXITS.HEAD_RANK", "EXITS.CHANNELS", "DATA.LIMIT",
    "DATA.WORKERS", "LOSS.MIN_NEGATIVES", "ENGINE.CURVE_PERIOD",
    "LOSS.FOCAL_GAMMA",
    "LOSS.EXIT_WEIGHTS", "JOINT.EXIT_WEIGHTS", "LOSS.FULL_WEIGHT", "LOSS.DISTILLATION_WEIGHT",
    "LOSS.DISTILLATION_BOX_WEIGHT", "EVAL.PICTURES", "DATA.SYNTHETIC.SEED",
    *(f"{phase}.{key}" for phase in PHASE_SECTIONS.values() for key in ("EPOCHS", "WEIGHT_DECAY", "CLIP_GRADIENT")),
)  # fmt: skip
_AT_MOST = {
    "THREADS": 1024, "DATA.WORKERS": 256, "EVAL.TIMING_THREADS": 1024, "MODEL.WIDTH": MOST_WIDTH,
    "EXITS.CHANNELS": MOST_CHANNELS, "EXITS.HEAD_RANK": MOST_CHANNELS, "MODEL.DETECTIONS_PER_IMG": 2**31,
    "MODEL.TOPK_CANDIDATES": 2**31, "EVAL.BATCH_SIZE": 2**20, "DATA.SYNTHETIC.SIZES": 2**31,
    **{f"{phase}.BATCH_SIZE": 2**20 for phase in PHASE_SECTIONS.values()},
}  # fmt: skip


def check_config(cfg: CfgNode) -> None:
    """Raise :class:`ConfigError` for the first impossible value."""
    for key, choices in _CHOICES.items():
        value = _get(cfg, key)
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{key} is {shown(value)}, expected one of {listed}{nearest(str(value), choices)}")
    for key, value in _values(cfg, _UNIT_INTERVAL):
        _require(0 <= value <= 1, key, value, "a number in [0, 1]")
    for key, value in _values(cfg, _POSITIVE):
        _require(value > 0 and math.isfinite(value), key, value, "a number above 0")
    for key, value in _values(cfg, _NOT_NEGATIVE):
        _require(value >= 0 and math.isfinite(value), key, value, "a number of at least 0")
    for key, most in _AT_MOST.items():
        for _, value in _values(cfg, (key,)):
            _require(value <= most, key, value, f"at most {most}")
    for key, value in _values(cfg, ("SEED", "DATA.SYNTHETIC.SEED")):
        _require(value < 2**63, key, value, "a number below 2^63")
    for key, value in _values(cfg, ("MODEL.IMAGE_SIZE", "DATA.SYNTHETIC.IMAGE_SIZE")):
        _require(64 <= value <= LARGEST_SIDE, key, value, f"64 to {LARGEST_SIDE} pixels")
    _check_exits(cfg)
    _check_routing(cfg)
    _check_phases(cfg)
    _check_data(cfg)
    _check_rivals(cfg)


def _check_exits(cfg: CfgNode) -> None:
    layers = cfg.EXITS.LAYERS
    _require(len(layers) > 0, "EXITS.LAYERS", layers, "at least one layer, such as [8, 12]")
    for layer in layers:
        inside = _is_whole(layer) and 1 <= layer < LAST_LAYER
        _require(inside, "EXITS.LAYERS", layer, f"trunk layers 1 to {LAST_LAYER - 1}")
    _require(list(layers) == sorted(set(layers)), "EXITS.LAYERS", layers, "increasing layers, each once")
    for layer in cfg.EXITS.EMPTY:
        _require(layer in layers, "EXITS.EMPTY", layer, f"some of EXITS.LAYERS {list(layers)}")
    kinds = cfg.EXITS.BRANCH
    _require(len(kinds) in (1, len(layers)), "EXITS.BRANCH", kinds, f"one kind, or one for each of {len(layers)} exits")
    for key in ("EXITS.COPY", "EXITS.DEPTH", "LOSS.EXIT_WEIGHTS", "ROUTING.THRESHOLDS", "ROUTING.TEMPERATURES"):
        value = _get(cfg, key)
        _require(len(value) in (1, len(layers)), key, value, f"one number, or one for each of {len(layers)} exits")
    weights = cfg.JOINT.EXIT_WEIGHTS
    _require(len(weights) in (0, 1, len(layers)), "JOINT.EXIT_WEIGHTS", weights, f"none, one, or {len(layers)} numbers")
    for value in cfg.EXITS.COPY:
        _require(value > 0, "EXITS.COPY", value, "a share above 0, at most 1")
    for value in cfg.EXITS.DEPTH:
        inside = _is_whole(value) and 0 <= value <= TAIL_BLOCKS
        _require(inside, "EXITS.DEPTH", value, f"0 to {TAIL_BLOCKS} blocks")


def _check_routing(cfg: CfgNode) -> None:
    bounds = cfg.ROUTING.TEMPERATURE_BOUNDS
    ordered = len(bounds) == 2 and bounds[0] < bounds[1]
    _require(ordered, "ROUTING.TEMPERATURE_BOUNDS", bounds, "[low, high] with low below high, such as [0.5, 3.0]")
    both = cfg.ROUTING.HYBRID and bool(cfg.ROUTING.CERTIFICATE)
    _require(not both, "ROUTING.HYBRID", True, "false with ROUTING.CERTIFICATE, which speaks of photos that leave")
    for _, value in _values(cfg, ("ROUTING.THRESHOLDS",)):
        inside = 0 <= value <= 1 or value == CLOSED
        _require(inside, "ROUTING.THRESHOLDS", value, f"a number in [0, 1], or {CLOSED:g} to close an exit")
    for value in cfg.ROUTING.TEMPERATURES:
        _require(bounds[0] <= value <= bounds[1], "ROUTING.TEMPERATURES", value, f"a number inside {bounds}")


def _check_phases(cfg: CfgNode) -> None:
    for phase in cfg.PHASES:
        if phase not in PHASES:
            listed = ", ".join(PHASES)
            raise ConfigError(f"PHASES has {shown(phase)}, expected some of {listed}{nearest(str(phase), PHASES)}")
    _require(len(cfg.PHASES) > 0, "PHASES", cfg.PHASES, f"some of {PHASES}")
    ordered = sorted(set(cfg.PHASES), key=PHASES.index)
    _require(list(cfg.PHASES) == ordered, "PHASES", cfg.PHASES, f"each phase once, in the order {PHASES}")
    _require("joint" not in cfg.PHASES or "exits" in cfg.PHASES, "PHASES", cfg.PHASES, "exits before joint")
    relative = cfg.BASELINE.GATE.RELATIVE
    # Untrained, MODEL.WEIGHTS would be held against themselves and pass whatever they are worth.
    reference = cfg.BASELINE.GATE.REFERENCE or (cfg.MODEL.WEIGHTS and cfg.BASELINE.EPOCHS)
    _require(not relative or reference, "BASELINE.GATE.RELATIVE", relative, "0 without BASELINE.GATE.REFERENCE")
    _require(
        cfg.LOSS.SUPERVISION == "labels" or cfg.LOSS.TEACHER != "none",
        "LOSS.TEACHER", cfg.LOSS.TEACHER, "'full' or 'next' with LOSS.SUPERVISION 'teacher'",
    )  # fmt: skip
    _require(
        "joint" not in cfg.PHASES or cfg.LOSS.SUPERVISION == "labels" or cfg.JOINT.TEACHER != "none",
        "JOINT.TEACHER", cfg.JOINT.TEACHER, "'full' or 'next' with LOSS.SUPERVISION 'teacher'",
    )  # fmt: skip
    for section in PHASE_SECTIONS.values():
        size = cfg[section].BATCH_SIZE
        _require(size >= 2, f"{section}.BATCH_SIZE", size, "2 or more: BatchNorm cannot normalise a single image")
        _require(cfg[section].EMA < 1, f"{section}.EMA", cfg[section].EMA, "a decay below 1")


def _check_data(cfg: CfgNode) -> None:
    for key in ("DATA.TRAIN", "DATA.CALIB", "DATA.TEST"):
        _require(len(_get(cfg, key)) > 0, key, _get(cfg, key), "at least one data set name")
        for name in _get(cfg, key):
            _require(isinstance(name, str), key, name, "the name of a data set")
        _require_unique(key, _get(cfg, key))
    for name in cfg.DATA.CLASSES:
        _require(isinstance(name, str), "DATA.CLASSES", name, "names of classes, in quotes where YAML reads no text")
    _require_unique("DATA.CLASSES", cfg.DATA.CLASSES)
    shared = set(cfg.DATA.TRAIN) & (set(cfg.DATA.CALIB) | set(cfg.DATA.TEST)) | set(cfg.DATA.CALIB) & set(cfg.DATA.TEST)
    _require(not shared, "DATA", sorted(shared), "TRAIN, CALIB and TEST without a data set in common")
    share = cfg.DATA.NEGATIVE_SHARE
    _require(share == -1 or 0 <= share < 1, "DATA.NEGATIVE_SHARE", share, "-1, or a share in [0, 1)")
    sizes = cfg.DATA.SYNTHETIC.SIZES
    whole = len(sizes) == 3 and all(_is_whole(size) for size in sizes)
    _require(whole, "DATA.SYNTHETIC.SIZES", sizes, "three whole numbers: train, calib, test")


def _check_rivals(cfg: CfgNode) -> None:
    for size in cfg.EVAL.RIVALS.SIZES:
        inside = _is_whole(size) and 64 <= size <= LARGEST_SIDE
        _require(inside, "EVAL.RIVALS.SIZES", size, f"whole numbers from 64 to {LARGEST_SIDE} pixels")
    for key in ("FULL_PATHS", "SINGLE_EXITS"):
        for path in cfg.EVAL.RIVALS[key]:
            _require(isinstance(path, str), f"EVAL.RIVALS.{key}", path, "paths of model files")
    for entry in cfg.EVAL.RIVALS.ONNX:
        kind, colon, path = str(entry).partition(":")
        _require(bool(colon and path), "EVAL.RIVALS.ONNX", entry, "format:path, such as yolox:nano.onnx")
        _require(kind in RIVAL_FORMATS, "EVAL.RIVALS.ONNX", entry, f"one of the formats {', '.join(RIVAL_FORMATS)}")


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {shown(value)}, expected {expected}")


def _require_unique(key: str, names: tuple[str, ...]) -> None:
    lower = [name.lower() for name in names]
    for name in names:
        _require(lower.count(name.lower()) == 1, key, name, "each name once")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _get(cfg: CfgNode, key: str) -> object:
    value = cfg
    for part in key.split("."):
        value = value[part]
    return value


def _values(cfg: CfgNode, keys: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for key in keys:
        value = _get(cfg, key)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise ConfigError(f"{key} is {shown(item)}, expected a number")
            yield key, item

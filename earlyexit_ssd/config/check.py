"""Tables of rules for the values of a configuration, and their check."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from earlyexit_ssd.errors import ConfigError, shown, suggest

PHASES = ("baseline", "exits", "joint")
CLOSED = 2.0  # a threshold that no confidence reaches
C4_LAYER = 13  # the expansion of this layer is the first feature map of the full path's head
PHASE_SECTIONS = {"baseline": "BASELINE", "exits": "EXITS_PHASE", "joint": "JOINT", "fine_tuning": "FINE_TUNING"}
SSDLITE, LAST_LAYER = "ssdlite320_mobilenet_v3_large", 16  # the last layer of its trunk
TAIL_BLOCKS = 2  # residual blocks after `C4_LAYER`: layers 14 and 15
SMALLEST_SIDE, LARGEST_SIDE, MAX_WIDTH, MAX_CHANNELS = 64, 4096, 4, 4096
FOLD_CHOICES = ("exact", "compact", "rows")
RIVAL_FORMATS = ("yolox", "boxes", "nanodet", "picodet")
LOSS_CHOICES = {
    "classification": ("mined", "focal"),
    "supervision": ("labels", "teacher"),
    "teacher": ("none", "full", "next"),
}

CHOICES = {
    "PHASES": PHASES,
    "DATA.ON_BAD": ("repair", "refuse", "skip"),
    "DATA.AUGMENTATION": ("ssdlite", "ssd", "flip", "none"),
    "MODEL.FOLD": FOLD_CHOICES,
    **{f"LOSS.{key.upper()}": choices for key, choices in LOSS_CHOICES.items()},
    "JOINT.TEACHER": LOSS_CHOICES["teacher"],
    "CALIBRATION.TARGET": ("", "ap_drop", "risk", "speedup"),
    "CALIBRATION.REFERENCE": ("full", "labels"),
    "CALIBRATION.BOUND": ("hoeffding_bentkus", "betting"),
    "CALIBRATION.COST": ("auto", "ms", "mmacs"),
    "EXITS_PHASE.CACHE_DTYPE": ("float16", "float32"),
    "ENGINE.AMP": ("off", "bf16", "fp16"),
    **{f"{phase}.OPTIMIZER": ("sgd", "adamw") for phase in PHASE_SECTIONS.values()},
    "EVAL.RUNTIME": ("eager", "onnxruntime", "openvino"),
}


def _of_phases(keys: str) -> str:
    """``"EMA"`` -> ``"BASELINE.EMA EXITS_PHASE.EMA JOINT.EMA FINE_TUNING.EMA"``."""
    return " ".join(f"{phase}.{key}" for phase in PHASE_SECTIONS.values() for key in keys.split())


def _is_text(value: object, *_: object) -> bool:
    return isinstance(value, str)


def _number(holds: Callable[[float], bool]) -> Callable[..., bool]:
    def test(value: object, *_: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and holds(value)

    return test


def _whole(low: int, high: int) -> Callable[..., bool]:
    return lambda value, *_: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_layer(layer: object, cfg: CfgNode) -> bool:
    # the layers of other detectors are checked when their class is known, see `check_exits`
    return _whole(1, LAST_LAYER - 1 if cfg.MODEL.NAME == SSDLITE else 999)(layer)


def _has_supervision(teacher: str, cfg: CfgNode) -> bool:
    return cfg.LOSS.SUPERVISION == "labels" or teacher != "none"


Rule = tuple[str, str, Callable[[Any, Any, CfgNode], bool]]
"""Keys, the expected value as text, and a test: a function of (value, all values of the key, configuration). In the
text, {exits}, {layers} and {bounds} are replaced by those of the configuration."""

_SETS = "DATA.TRAIN DATA.CALIB DATA.TEST"
_TEACHER = "'full' or 'next' with LOSS.SUPERVISION 'teacher'"
_SIDE = f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels"

# fmt: off
_OF_EACH_VALUE: Sequence[Rule] = (  # applied to every element of a list
    ("MODEL.SCORE_THRESH MODEL.NMS_THRESH EVAL.SCORE EVAL.PICTURE_SCORE DATA.REPEAT_THRESHOLD EXITS.COPY "
     "LOSS.FOCAL_ALPHA BASELINE.GATE.AP50 BASELINE.GATE.PRECISION BASELINE.GATE.RECALL BASELINE.GATE.RELATIVE "
     "EXITS_PHASE.GATE.FIRST_EXIT_AP50 EXITS_PHASE.GATE.FIRST_EXIT_SHARE EXITS_PHASE.GATE.DEEPEST_SHARE "
     "JOINT.GATE.MAX_AP50_DROP MODEL.COMPACT_TOLERANCE " + _of_phases("WARMUP EMA"),
     "a number in [0, 1]", _number(lambda value: 0 <= value <= 1)),
    ("EVAL.IOU", "a number in (0, 1]", _number(lambda value: 0 < value <= 1)),
    ("MODEL.WIDTH MODEL.DETECTIONS_PER_IMG MODEL.TOPK_CANDIDATES DATA.SYNTHETIC.SIZES LOSS.NEG_TO_POS_RATIO "
     "ROUTING.TEMPERATURES ROUTING.TEMPERATURE_BOUNDS EXITS_PHASE.CACHE_VIEWS EXITS_PHASE.CACHE_GIB "
     "ENGINE.CHECKPOINT_PERIOD ENGINE.LOG_PERIOD ENGINE.CURVE_PHOTOS EVAL.BATCH_SIZE EVAL.TIMING_RUNS "
     "EVAL.TIMING_THREADS JOINT.FULL_PATH_LR_FACTOR CALIBRATION.VALUE CALIBRATION.DELTA " + _of_phases("BATCH_SIZE LR"),
     "a number above 0", _number(lambda value: value > 0)),
    ("SEED THREADS CALIBRATION.TRAIN_PHOTOS EXITS.HEAD_RANK EXITS.CHANNELS DATA.LIMIT DATA.WORKERS LOSS.MIN_NEGATIVES "
     "ENGINE.CURVE_PERIOD LOSS.FOCAL_GAMMA LOSS.EXIT_WEIGHTS JOINT.EXIT_WEIGHTS LOSS.FULL_WEIGHT EVAL.PICTURES "
     "LOSS.DISTILLATION_WEIGHT LOSS.DISTILLATION_BOX_WEIGHT FINE_TUNING.DISTILLATION_WEIGHT DATA.SYNTHETIC.SEED "
     + _of_phases("EPOCHS WEIGHT_DECAY CLIP_GRADIENT"),
     "a number of at least 0", _number(lambda value: value >= 0)),
    *((keys, f"at most {limit}", lambda value, *_, limit=limit: value <= limit) for keys, limit in (
        ("THREADS EVAL.TIMING_THREADS", 1024), ("DATA.WORKERS", 256), ("MODEL.WIDTH", MAX_WIDTH),
        ("EXITS.CHANNELS EXITS.HEAD_RANK", MAX_CHANNELS), ("EVAL.BATCH_SIZE " + _of_phases("BATCH_SIZE"), 2**20),
        ("MODEL.DETECTIONS_PER_IMG MODEL.TOPK_CANDIDATES DATA.SYNTHETIC.SIZES", 2**31),
    )),
    ("SEED DATA.SYNTHETIC.SEED", "a number below 2^63", lambda value, *_: value < 2**63),
    (_of_phases("BATCH_SIZE"), "2 or more: BatchNorm cannot normalise a single image", lambda value, *_: value >= 2),
    ("CALIBRATION.DELTA", "a probability below 1", lambda value, *_: value < 1),
    ("CALIBRATION.VALUE", "a number above 1 with CALIBRATION.TARGET 'speedup', such as 1.4",
     lambda value, _, cfg: value > 1 or cfg.CALIBRATION.TARGET != "speedup"),
    ("CALIBRATION.FOLDS", "0, or 2 to 1000 folds", lambda value, *_: value == 0 or 2 <= value <= 1000),
    (_of_phases("EMA"), "a decay below 1", lambda value, *_: value < 1),
    ("MODEL.IMAGE_SIZE DATA.SYNTHETIC.IMAGE_SIZE", _SIDE, _whole(SMALLEST_SIDE, LARGEST_SIDE)),
    ("BASELINE.SIZES JOINT.SIZES", f"whole numbers from 32 to {LARGEST_SIDE} pixels", _whole(32, LARGEST_SIDE)),
    ("EVAL.RIVALS.SIZES", f"whole numbers from {_SIDE}", _whole(SMALLEST_SIDE, LARGEST_SIDE)),
    ("EXITS.LAYERS", f"trunk layers 1 to {LAST_LAYER - 1} (SSDLite)", lambda layer, _, cfg: _is_layer(layer, cfg)),
    ("EXITS.GLANCES", f"pairs of pixels (32 to {LARGEST_SIDE}) and a trunk layer, such as [[128, 12]]",
     lambda value, _, cfg: isinstance(value, tuple) and len(value) == 2 and _whole(32, LARGEST_SIDE)(value[0])
     and _is_layer(value[1], cfg)),
    ("EXITS.EMPTY", "some of EXITS.LAYERS {layers}", lambda value, _, cfg: value in cfg.EXITS.LAYERS),
    ("EXITS.COPY", "a share above 0, at most 1", lambda value, *_: value > 0),
    ("EXITS.DEPTH", f"0 to {TAIL_BLOCKS} blocks", _whole(0, TAIL_BLOCKS)),
    ("ROUTING.THRESHOLDS", f"a number in [0, 1], or {CLOSED:g} to close an exit",
     _number(lambda value: 0 <= value <= 1 or value == CLOSED)),
    ("DATA.NEGATIVE_SHARE", "-1, or a share in [0, 1)", lambda value, *_: value == -1 or 0 <= value < 1),
    ("DATA.SYNTHETIC.SIZES", "three whole numbers: train, calib, test", _whole(1, 2**31)),
    (_SETS, "the name of a data set", _is_text),
    ("MODEL.WEIGHTS_CLASSES BASELINE.GATE.REFERENCE_CLASSES", "'', 'coco', or names of classes, such as 'cat, dog'",
     lambda value, *_: value in ("", "coco") or "," in value),
    ("DATA.CLASSES", "names of classes, in quotes if YAML reads another type", _is_text),
    (f"DATA.CLASSES {_SETS}", "each name once",
     lambda value, names, _: [name.lower() for name in names].count(value.lower()) == 1),
    (_SETS, "TRAIN, CALIB and TEST without a data set in common",
     lambda value, _, cfg: sum(value in cfg.DATA[key] for key in ("TRAIN", "CALIB", "TEST")) == 1),
    ("EVAL.RIVALS.FULL_PATHS EVAL.RIVALS.SINGLE_EXITS", "paths of model files", _is_text),
    ("EVAL.RIVALS.ONNX", "format:path, such as yolox:nano.onnx", lambda value, *_: bool(str(value).partition(":")[2])),
    ("EVAL.RIVALS.ONNX", f"one of the formats {', '.join(RIVAL_FORMATS)}",
     lambda value, *_: str(value).partition(":")[0] in RIVAL_FORMATS),
)
_OF_THE_WHOLE: Sequence[Rule] = (
    ("OUTPUT_DIR", "the folder of the results", lambda folder, *_: bool(folder.strip())),
    ("EXITS.LAYERS", "at least one layer, such as [8, 12], or EXITS.GLANCES",
     lambda layers, _, cfg: len(layers) + len(cfg.EXITS.GLANCES) > 0),
    ("EXITS.GLANCES", "glances of increasing pixels",
     lambda glances, *_: [glance[0] for glance in glances] == sorted({glance[0] for glance in glances})),
    ("EXITS.LAYERS", "increasing layers, each once", lambda layers, *_: list(layers) == sorted(set(layers))),
    ("EXITS.COPY EXITS.DEPTH EXITS.BRANCH", "one value, or one for each of EXITS.LAYERS {layers}",
     lambda values, _, cfg: len(values) in (1, len(cfg.EXITS.LAYERS))),
    ("LOSS.EXIT_WEIGHTS ROUTING.THRESHOLDS ROUTING.TEMPERATURES",
     "one number, or one for each of {exits} exits", lambda values, _, cfg: len(values) in (1, num_exits(cfg))),
    ("JOINT.EXIT_WEIGHTS", "none, one, or {exits} numbers",
     lambda values, _, cfg: len(values) in (0, 1, num_exits(cfg))),
    ("ROUTING.TEMPERATURE_BOUNDS", "[low, high] with low below high, such as [0.5, 3.0]",
     lambda bounds, *_: len(bounds) == 2 and bounds[0] < bounds[1]),
    ("ROUTING.TEMPERATURES", "numbers inside {bounds}", lambda values, _, cfg:
     cfg.ROUTING.TEMPERATURE_BOUNDS[0] <= min(values) <= max(values) <= cfg.ROUTING.TEMPERATURE_BOUNDS[1]),
    ("ROUTING.HYBRID", "false with ROUTING.CERTIFICATE, which is for photos that leave early",
     lambda hybrid, _, cfg: not (hybrid and cfg.ROUTING.CERTIFICATE)),
    ("CALIBRATION.TARGET", "'' with ROUTING.HYBRID, where no photo leaves early",
     lambda target, _, cfg: not (target and cfg.ROUTING.HYBRID)),
    ("PHASES", f"some of {PHASES}", lambda phases, *_: len(phases) > 0),
    ("PHASES", f"each phase once, in the order {PHASES}",
     lambda phases, *_: list(phases) == sorted(set(phases), key=PHASES.index)),
    ("PHASES", "baseline first, unless MODEL.WEIGHTS is a trained detector",
     lambda phases, _, cfg: "baseline" in phases or bool(cfg.MODEL.WEIGHTS)),
    ("PHASES", "exits before joint", lambda phases, *_: "joint" not in phases or "exits" in phases),
    # without a training, MODEL.WEIGHTS would be compared with themselves and always pass
    ("BASELINE.GATE.RELATIVE", "0 without BASELINE.GATE.REFERENCE", lambda share, _, cfg:
     not share or cfg.BASELINE.GATE.REFERENCE or (cfg.MODEL.WEIGHTS and cfg.BASELINE.EPOCHS)),
    ("LOSS.TEACHER", _TEACHER, lambda teacher, _, cfg: _has_supervision(teacher, cfg)),
    ("JOINT.TEACHER", _TEACHER,
     lambda teacher, _, cfg: "joint" not in cfg.PHASES or _has_supervision(teacher, cfg)),
    (_SETS, "at least one data set name", lambda names, *_: len(names) > 0),
    ("DATA.SYNTHETIC.SIZES", "three whole numbers: train, calib, test", lambda sizes, *_: len(sizes) == 3),
)
# fmt: on


def num_exits(cfg: CfgNode) -> int:
    """Return the number of early exits of the configuration, with the glances."""
    return len(cfg.EXITS.GLANCES) + len(cfg.EXITS.LAYERS)


def check_config(cfg: CfgNode) -> None:
    """Raise :class:`ConfigError` at the first impossible value."""
    for key, choices in CHOICES.items():
        values = functools.reduce(CfgNode.get, key.split("."), cfg)
        for value in values if isinstance(values, tuple) else (values,):
            if value not in choices:
                listed = ", ".join(map(repr, choices))
                raise ConfigError(f"{key} is {shown(value)}, expected one of {listed}{suggest(str(value), choices)}")
    context = {"exits": num_exits(cfg), "layers": list(cfg.EXITS.LAYERS), "bounds": cfg.ROUTING.TEMPERATURE_BOUNDS}
    for rules in (_OF_EACH_VALUE, _OF_THE_WHOLE):
        for key, expected, holds in ((key, *rule) for keys, *rule in rules for key in keys.split()):
            values = functools.reduce(CfgNode.get, key.split("."), cfg)
            for value in values if rules is _OF_EACH_VALUE and isinstance(values, tuple) else (values,):
                if not holds(value, values, cfg):
                    raise ConfigError(f"{key} is {shown(value)}, expected {expected.format(**context)}")

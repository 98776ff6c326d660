"""Build objects from the configuration: device, model, losses, router and evaluation settings."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models._api import WeightsEnum

from earlyexit_ssd.calibration.certificate import load_certificate, parse_certificate
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.config.check import num_exits
from earlyexit_ssd.console import progress
from earlyexit_ssd.data.dataset import DetectionDataset, build_loader, class_names, load_dataset
from earlyexit_ssd.data.records import limit_photos
from earlyexit_ssd.engine.processes import failing_together, is_main, process_group, rank, world_size
from earlyexit_ssd.errors import ConfigError, EarlyExitError, suggest
from earlyexit_ssd.evaluation.cost import EAGER
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.files import locks_folder
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, EarlyExitSSDLite, Exit, LossSettings, describe_exits
from earlyexit_ssd.modeling.checkpoint import ModelInfo, find_weights, load_model, weights_path
from earlyexit_ssd.modeling.detector import DETECTORS
from earlyexit_ssd.modeling.heads import plan_class_change
from earlyexit_ssd.modeling.retrofit import retrofit, torchvision_name
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Job = Callable[Concatenate[CfgNode, P], R]

COMPACT_PHOTOS = 300  # number of training photos on which MODEL.FOLD compact finds the competing classes


def takes_over(cfg: CfgNode) -> bool:
    """Return whether the full path is the checkpoint of MODEL.WEIGHTS, unchanged by a baseline phase."""
    return bool(cfg.MODEL.WEIGHTS) and not ("baseline" in cfg.PHASES and cfg.BASELINE.EPOCHS)


def evaluation_device(cfg: CfgNode) -> torch.device:
    """Return the device for evaluations: DEVICE, or the CPU if DEVICE is ``auto`` and EVAL.RUNTIME is not ``eager``.
    See `build_device` for threads and errors."""
    return _device(cfg, "cpu" if cfg.DEVICE == "auto" and cfg.EVAL.RUNTIME != EAGER else cfg.DEVICE)


def shares_processes(folder: str) -> Callable[[Job[P, R]], Job[P, R]]:
    """Return a decorator for a job that all processes of torchrun call together. ``folder`` is the name of the job's
    parameter for a folder, which the first process locks. An error in one process ends all processes."""

    def decorate(job: Job[P, R]) -> Job[P, R]:
        locking_job = locks_folder(folder)(job)

        @functools.wraps(job)
        def shared(cfg: CfgNode, *args: P.args, **kwargs: P.kwargs) -> R:
            with process_group(evaluation_device(cfg)), failing_together():
                return (locking_job if is_main() else job)(cfg, *args, **kwargs)

        return shared

    return decorate


def build_device(cfg: CfgNode) -> torch.device:
    """Return the device of DEVICE, under torchrun with CUDA this process's GPU. Set PyTorch's threads to THREADS.
    Raise ConfigError if the device is not available, or for ENGINE.AMP ``fp16`` without CUDA."""
    device = _device(cfg, cfg.DEVICE)
    if cfg.ENGINE.AMP == "fp16" and device.type != "cuda":
        raise ConfigError(f"ENGINE.AMP 'fp16' needs CUDA, but DEVICE is {device}; use bf16 or off")
    return device


def _device(cfg: CfgNode, name: str) -> torch.device:
    if cfg.THREADS:
        torch.set_num_threads(cfg.THREADS)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # an error on the device "meta", which has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"DEVICE {cfg.DEVICE!r} is not available here ({reason}); use auto") from None
    return device


def build_exits(cfg: CfgNode) -> tuple[Exit, ...]:
    """Return the exits of the EXITS section. Raise ConfigError for an invalid value, such as an unknown branch."""
    section = {key.lower(): value for key, value in cfg.EXITS.items()}
    try:
        return describe_exits(section.pop("layers"), **section)
    except EarlyExitError as error:
        raise ConfigError(f"EXITS: {error}") from None


def build_architecture(cfg: CfgNode, classes: tuple[str, ...]) -> Architecture:
    """Return the architecture of the configured model for these classes."""
    return Architecture(
        classes=classes,
        detector=cfg.MODEL.NAME,
        image_size=cfg.MODEL.IMAGE_SIZE,
        width=cfg.MODEL.WIDTH,
        reduced_tail=not cfg.MODEL.WEIGHTS_BACKBONE,  # torchvision's ImageNet weights have a full tail
        exits=build_exits(cfg),
        score_thresh=cfg.MODEL.SCORE_THRESH,
        nms_thresh=cfg.MODEL.NMS_THRESH,
        detections_per_img=cfg.MODEL.DETECTIONS_PER_IMG,
        topk_candidates=cfg.MODEL.TOPK_CANDIDATES,
    )


def build_model(cfg: CfgNode, classes: tuple[str, ...]) -> tuple[EarlyExitSSDLite, Architecture]:
    """Build a model and its architecture. MODEL.WEIGHTS has the weights of the full path. If it is empty,
    MODEL.WEIGHTS_BACKBONE has those of the trunk, or is empty too. All other weights are initialised by the model."""
    architecture = build_architecture(cfg, classes)
    if cfg.MODEL.WEIGHTS:
        source = source_classes(cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_CLASSES, cfg.MODEL.NAME)
        photos, tolerance = photos_for_compact_head(cfg, classes), cfg.MODEL.COMPACT_TOLERANCE
        detector, architecture, change = retrofit(
            architecture, cfg.MODEL.WEIGHTS, source, cfg.MODEL.FOLD, photos, tolerance
        )
        logger.info("%s: %s", cfg.MODEL.WEIGHTS, change or "every class and weight kept")
    elif cfg.MODEL.WEIGHTS_BACKBONE:
        detector = _imagenet_detector(cfg, architecture)
    else:
        detector = architecture.build_detector()
    model = architecture.add_exits(detector)
    model.losses = build_losses(cfg)
    return model, architecture


def photos_for_compact_head(cfg: CfgNode, classes: tuple[str, ...]) -> Iterator[Tensor]:
    """Yield a seeded sample of the photos of DATA.TRAIN, [3, H, W] in [0, 1], not augmented."""
    dataset = load_dataset(with_classes(cfg, classes), cfg.DATA.TRAIN, train=True, labels="optional")
    dataset = dataset.subset(limit_photos(dataset.records, COMPACT_PHOTOS, cfg.SEED))
    dataset.transforms = None
    loader = build_loader(dataset, 1, cfg.DATA.WORKERS, False, cfg.SEED)
    for images, _ in progress(loader, "competing classes"):
        yield images[0]


def weights_file(weights: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the file of shipped weights from their name, or ``weights`` unchanged if it is a path. A text without a
    suffix is taken for a name. Raise EarlyExitError if no shipped weights have this name."""
    return weights_path(weights) if find_weights(weights) or not Path(weights).suffix else weights


def open_model(
    cfg: CfgNode, weights: str | os.PathLike[str], need_exits: bool = True
) -> tuple[EarlyExitSSDLite, Architecture, ModelInfo]:
    """Return a trained model in eval mode on the CPU, its architecture and its info.

    ``weights`` is a model file of this project, the name of shipped weights, or a checkpoint of torchvision's reference
    training. A checkpoint must fit the configuration: MODEL, EXITS, and DATA.CLASSES in the order of the labels. If its
    head has COCO's 91 outputs, classes that are not in DATA.CLASSES are folded into background. If it has no exits and
    EXITS has only empty ones, which need no training, the model is that of `build_model`. If temperatures were trained
    with the checkpoint, they are in ``info["router"]``.

    Raises:
        EarlyExitError: unusable weights, weights that do not fit the configuration, or a checkpoint without exits if
            ``need_exits`` is set and EXITS has a branch.
    """
    only_empty = not set(cfg.EXITS.LAYERS) - set(cfg.EXITS.EMPTY)

    def describe(outputs: int, exits: tuple[str, ...]) -> Architecture:
        """Return the architecture of a checkpoint with these outputs per default box and these exits."""
        if need_exits and not exits and not only_empty:
            raise ConfigError("the detector has no exits; add them: earlyexit train or optimize with MODEL.WEIGHTS")
        classes = class_names(cfg)
        architecture = build_architecture(cfg, classes)
        if not exits:
            architecture = dataclasses.replace(architecture, exits=())
        if outputs == len(classes) + 1:
            return architecture
        if outputs != len(COCO_CLASSES) + 1:
            head = f"its head has {outputs} outputs, for {outputs - 1} classes and background"
            fix = "list all of them in DATA.CLASSES, in the order of the labels"
            raise ConfigError(f"{head}, but the configuration has {len(classes)} classes; {fix}")
        change = plan_class_change(COCO_CLASSES, classes)
        if None in change.rows:
            others = f"DATA.CLASSES has others ({change})"
            raise ConfigError(f"its head has COCO's classes, but {others}; correct DATA.CLASSES")
        logger.info("%s: COCO's classes, %s", weights, change)
        return dataclasses.replace(architecture, head_outputs=outputs, folded_rows=change.rows, folded_branches=True)

    path = weights_file(weights)
    model, architecture, info = load_model(path, describe)
    if need_exits and info.get("exits") is False:
        source = cfg.MODEL.WEIGHTS_CLASSES or ("coco" if architecture.folded_rows else "")
        cfg = with_values(cfg, {"MODEL.WEIGHTS": os.fspath(path), "MODEL.WEIGHTS_CLASSES": source})
        model, architecture = build_model(cfg, architecture.classes)
        return model.eval(), architecture, {"taken_over": True}
    if info.get("temperatures"):
        info = {**info, "router": {"num_exits": model.num_early_exits, "temperatures": info["temperatures"]}}
    return model, architecture, info


def source_classes(weights: str, classes: str, detector: str) -> tuple[str, ...] | None:
    """Return the names of the checkpoint's labels: COCO's for torchvision's own weights of ``detector``, or if
    ``classes`` is "coco"; otherwise the names in ``classes``. None: it has the classes of the configuration."""
    if classes == "coco" or torchvision_name(weights, DETECTORS.find(detector).plain_weights):
        return COCO_CLASSES
    return tuple(name.strip() for name in classes.split(",")) if classes else None


def backbone_weights(cfg: CfgNode) -> WeightsEnum:
    """Return the ImageNet weights that MODEL.WEIGHTS_BACKBONE names. Raise ConfigError for an unknown name."""
    members, name = DETECTORS.find(cfg.MODEL.NAME).backbone_weights.__members__, cfg.MODEL.WEIGHTS_BACKBONE
    if name not in members:
        expected = f"one of {', '.join(members)}{suggest(name, members)}" if members else "'' with this MODEL.NAME"
        raise ConfigError(f"MODEL.WEIGHTS_BACKBONE is {name!r}, expected {expected}")
    return members[name]


def _imagenet_detector(cfg: CfgNode, architecture: Architecture):
    weights = backbone_weights(cfg)
    if cfg.MODEL.WIDTH != 1.0:
        raise ConfigError(f"MODEL.WIDTH is {cfg.MODEL.WIDTH}, but ImageNet weights of the trunk need 1.0")
    try:
        return DETECTORS.find(architecture.detector).build_plain(
            num_classes=len(architecture.classes) + 1,
            image_size=architecture.image_size,
            reduced_tail=False,
            weights_backbone=weights,
        )
    except OSError as error:
        fix = "set MODEL.WEIGHTS to a file, or MODEL.WEIGHTS_BACKBONE to '' to train from scratch"
        raise EarlyExitError(f"ImageNet weights {weights.name} could not be downloaded ({error}); {fix}") from None


def build_losses(cfg: CfgNode) -> LossSettings:
    """Return the loss settings of the LOSS section, whose keys are the fields of `LossSettings` in capitals."""
    return LossSettings(**{key.lower(): value for key, value in cfg.LOSS.items()})


def build_router(cfg: CfgNode, stored: Mapping[str, Any] | None = None, learn: bool = False) -> ExitRouter:
    """Return the router of the ROUTING section, with trainable temperatures if ``learn`` is set.

    The number of exits and the temperatures of ``stored``, the router in a model's info, have priority. Raise
    ConfigError if the policy is unknown, or if the number of thresholds does not fit the number of exits.
    """
    routing, stored = cfg.ROUTING, stored or {}
    exits, thresholds = stored.get("num_exits", num_exits(cfg)), len(routing.THRESHOLDS)
    if not exits:
        return ExitRouter(0)
    require_policy(cfg)
    if thresholds not in (1, exits):
        fix = "one number for all or one for each, or use the configuration that these weights were trained with"
        numbers = f"{thresholds} numbers, but the model has {exits} early exits"
        raise ConfigError(f"ROUTING.THRESHOLDS has {numbers}; give {fix}")
    return ExitRouter(
        exits,
        policy=routing.POLICY,
        hybrid=routing.HYBRID,
        thresholds=routing.THRESHOLDS,
        temperatures=stored.get("temperatures", routing.TEMPERATURES),
        temperature_bounds=routing.TEMPERATURE_BOUNDS,
        learn_temperatures=learn,
    )


def open_thresholds(opened: Sequence[bool]) -> list[float]:
    """Return thresholds at which exactly the exits in ``opened`` are open."""
    return [0.0 if is_open else CLOSED for is_open in opened]


def require_policy(cfg: CfgNode) -> None:
    """Raise a ConfigError with the nearest name if ROUTING.POLICY is not the name of a policy."""
    try:
        POLICIES.find(cfg.ROUTING.POLICY)
    except EarlyExitError as error:
        raise ConfigError(f"ROUTING.POLICY: {error}") from None


def open_router(cfg: CfgNode, model: EarlyExitSSDLite, info: ModelInfo, weights: str | os.PathLike[str]) -> ExitRouter:
    """Return the router of the first of these: ROUTING.CERTIFICATE, the certificate in ``info``, the ROUTING section.
    ``model`` and ``info`` are from the file ``weights``. Errors: see `Certificate.router_for`, `build_router`."""
    if cfg.ROUTING.CERTIFICATE:
        return load_certificate(cfg.ROUTING.CERTIFICATE).router_for(model)
    if info.get("certificate"):
        logger.info("%s is calibrated: its certificate is used instead of the ROUTING section", weights)
        return parse_certificate(info["certificate"], weights).router_for(model)
    return build_router(cfg, {"num_exits": model.num_early_exits, **(info.get("router") or {})})


def trained_temperatures(cfg: CfgNode, info: dict, exits: int) -> list[float]:
    """Return the temperatures [exits] that were fitted in training, from the ``info`` of a model's file, or those of
    ROUTING. A calibrated model may have other temperatures in its router, fitted on calibration photos."""
    temperatures = (info.get("router") or {}).get("temperatures", cfg.ROUTING.TEMPERATURES)
    temperatures = info.get("trained_temperatures", temperatures)
    bounds = cfg.ROUTING.TEMPERATURE_BOUNDS
    # the router repeats a single temperature for all exits, and checks the bounds
    return ExitRouter(exits, temperatures=temperatures, temperature_bounds=bounds).temperatures.tolist()


def evaluation_loader(cfg: CfgNode, dataset: DetectionDataset) -> DataLoader:
    """Return a loader of the photos in their order, not augmented. Under torchrun a process gets its share."""
    return build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, False, cfg.SEED, rank(), world_size())


def build_evaluation(cfg: CfgNode) -> EvaluationSettings:
    """Return the evaluation settings of the EVAL section."""
    return EvaluationSettings(
        score=cfg.EVAL.SCORE,
        iou=cfg.EVAL.IOU,
        runs=cfg.EVAL.TIMING_RUNS,
        threads=cfg.EVAL.TIMING_THREADS,
        runtime=cfg.EVAL.RUNTIME,
        seed=cfg.SEED,
    )


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """Return a copy of the configuration with ``values`` (dotted key -> value), which are not checked."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(getattr, sections, cfg)[name] = value
    cfg.freeze()
    return cfg


def with_classes(cfg: CfgNode, classes: tuple[str, ...]) -> CfgNode:
    return with_values(cfg, {"DATA.CLASSES": tuple(classes)})

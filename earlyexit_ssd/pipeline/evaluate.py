"""Evaluate a trained model on a split: certificate, rivals, figures, table and pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import nn
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.calibration import DriftMonitor
from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.data import DetectionDataset, build_loader, load_dataset, to_coco
from earlyexit_ssd.data.dataset import photo_hashes
from earlyexit_ssd.drift import WINDOW
from earlyexit_ssd.engine.processes import is_main, rank, world_size
from earlyexit_ssd.errors import ConfigError, EarlyExitError, import_package
from earlyexit_ssd.evaluation.cost import EAGER, PlainPath, count_mmacs, example_input
from earlyexit_ssd.evaluation.evaluate import (
    CUT_HEAD,
    ONNX,
    PLAIN,
    SINGLE_EXIT,
    Rival,
    WantedClasses,
    evaluate_exits,
    exits_alone,
)
from earlyexit_ssd.evaluation.matches import photo_list
from earlyexit_ssd.evaluation.onnx import OnnxDetector, count_onnx_mmacs
from earlyexit_ssd.evaluation.outputs import Collected, collect
from earlyexit_ssd.evaluation.results import Context, DriftResult, Results
from earlyexit_ssd.files import sha256
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, PathToExit, load_model
from earlyexit_ssd.modeling.heads import is_folded
from earlyexit_ssd.modeling.retrofit import resize_detector
from earlyexit_ssd.pipeline.build import (
    build_architecture,
    build_evaluation,
    evaluation_device,
    file_of,
    open_model,
    open_router,
    shares_processes,
    takes_over,
    with_classes,
)
from earlyexit_ssd.pipeline.reports import write_evaluation_page
from earlyexit_ssd.report.pictures import Example, choose_examples, detection_grid
from earlyexit_ssd.report.tables import write_results
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


def check_certificate(
    cfg: CfgNode, certificate: Certificate, dataset: DetectionDataset, source: str | os.PathLike[str]
) -> None:
    """Warn if the certificate of the file ``source`` speaks of another EVAL.SCORE or EVAL.IOU. An EarlyExitError if it
    was calibrated on one of these photos, or bounds a risk, which holds at its own score and IoU only."""
    certificate.require_unseen(photo_hashes(dataset))
    target = certificate.target
    if (target.score, target.iou) == (cfg.EVAL.SCORE, cfg.EVAL.IOU):
        return
    text = (
        f"{source}: the certificate speaks of score {target.score:g} and IoU {target.iou:g}, "
        f"EVAL has {cfg.EVAL.SCORE:g} and {cfg.EVAL.IOU:g}"
    )
    if target.kind == "risk":
        raise ConfigError(f"{text}; set EVAL.SCORE and EVAL.IOU to the certificate's, or calibrate again")
    logger.warning(text)


def drift_of(certificate: Certificate, collected: Collected, chosen: list[int]) -> DriftResult:
    """Whether the photos look like those of calibration, all at once where they are few; warnings are logged too.
    ``chosen`` is the exit of every photo, in the order of ``collected``."""
    monitor = DriftMonitor(certificate.drift, min(WINDOW, max(1, len(chosen))))
    confidences = [float(collected.confidences[exit_index][photo]) for photo, exit_index in enumerate(chosen)]
    warnings, status = monitor.update(chosen, confidences), monitor.status()
    return DriftResult(monitor.window, warnings, status["shares"], status["calibration_shares"])


# The rivals that EVAL.RIVALS asks for: plain nets, single exits, exported detectors.

SHARES = (0.8, 0.7, 0.6)  # sides of the smaller plain nets, as shares of the model's own
SMALLEST_SIDE = 64


def check_rivals(cfg: CfgNode, device: torch.device) -> None:
    """What is cheap to find out before hours of training: files and packages that are missing. An EarlyExitError if one
    is missing, or the runtime does not run on the device."""
    rivals, runtime = cfg.EVAL.RIVALS, cfg.EVAL.RUNTIME
    if runtime != EAGER and device.type != "cpu":
        raise ConfigError(f"EVAL.RUNTIME {runtime} measures the CPU, DEVICE is {device}; set it to cpu")
    files = [(key, path) for key in ("FULL_PATHS", "SINGLE_EXITS") for path in rivals[key]]
    files += [("ONNX", entry.partition(":")[2]) for entry in rivals.ONNX]
    for key, path in files if rivals.ENABLED else ():
        if not Path(path).is_file():
            raise ConfigError(f"EVAL.RIVALS.{key} has {path}: no such file")
    if runtime != EAGER or (rivals.ENABLED and rivals.ONNX):
        import_package("onnx")
        import_package("onnxruntime" if runtime == EAGER else runtime)


def build_rivals(cfg: CfgNode, model: EarlyExitSSDLite, architecture: Architecture) -> list[Rival]:
    """Every rival that is no part of the evaluated model, ready to be evaluated on its classes and its device; exported
    ones stay on the CPU. An EarlyExitError for a file that is no such detector, or that has none of the classes."""
    rivals, wanted, own_size = cfg.EVAL.RIVALS, architecture.classes, architecture.image_size
    built: list[Rival] = []
    if not rivals.ENABLED:
        return built

    def add(
        name: str,
        kind: str,
        detector: SSD,
        network: nn.Module,
        known: Sequence[str] = wanted,
        source: str | None = None,
    ) -> None:
        example = example_input(detector)
        found = WantedClasses(detector, known, wanted, source or name).to(example.device)
        built.append(Rival(name, kind, network, example, count_mmacs(network, example), found, source))

    device = next(model.parameters()).device
    asked = rivals.SIZES or (smaller_sizes(own_size) if model.any_size else ())
    sizes = [size for size in dict.fromkeys(asked) if size != own_size]
    for size in sizes:
        detector = resize_detector(model, architecture, size)
        add(f"plain {size}", PLAIN, detector, PlainPath(detector))
    for size in (own_size, *sizes) if is_folded(model.head.classification_head) else ():
        detector = resize_detector(model, architecture, size, cut=True)
        add(f"plain {size}, cut head", CUT_HEAD, detector, PlainPath(detector))
    for path in rivals.FULL_PATHS:  # at their own size, their branches left out
        other, described, _ = load_model(path)
        size, detector = described.image_size, resize_detector(other.to(device), described, described.image_size)
        add(f"plain {size}, {_short(path)}", PLAIN, detector, PlainPath(detector), other.classes, path)
    for path in rivals.SINGLE_EXITS:
        other = _single_exit(path).to(device)
        name = f"{other.exit_names[0]} alone, {_short(path)}"
        add(name, SINGLE_EXIT, other, PathToExit(other, 0), other.classes, path)
    return built + onnx_rivals(cfg, wanted)


def smaller_sizes(size: int) -> tuple[int, ...]:
    """Sides of 0.8, 0.7 and 0.6 of ``size`` to the nearest multiple of 32, of 16 where ``size`` is under 256."""
    step = 32 if size >= 256 else 16
    sides = dict.fromkeys(round(share * size / step) * step for share in SHARES)
    return tuple(side for side in sides if SMALLEST_SIDE <= side < size)


def _single_exit(path: str) -> EarlyExitSSDLite:
    """A model with one exit; with a router that lets every photo leave, nothing behind it runs."""
    model, _, _ = load_model(path)
    if model.num_early_exits != 1:
        found = ", ".join(model.exit_names[:-1])
        raise EarlyExitError(
            f"{path}: EVAL.RIVALS.SINGLE_EXITS takes models with one early exit, it has {found};"
            " train that exit alone (EXITS.LAYERS)"
        )
    model.router = ExitRouter(1, thresholds=0.0)
    return model


def onnx_rivals(cfg: CfgNode, wanted: tuple[str, ...]) -> list[Rival]:
    rivals = []
    for entry in cfg.EVAL.RIVALS.ONNX:
        file_format, _, path = entry.partition(":")
        detector = OnnxDetector(path, file_format, cfg.EVAL.TIMING_THREADS)
        network = detector.network
        example = torch.rand(network.input_shape, generator=torch.Generator().manual_seed(0))
        found = WantedClasses(detector, detector.classes, wanted, path)
        found([torch.zeros(3, 64, 64)])  # outputs of another format are found before hours of evaluation
        rivals.append(Rival(Path(path).stem, ONNX, network, example, count_onnx_mmacs(detector.content), found, path))
    return rivals


def _short(path: str) -> str:
    """A file's name, or its folder's where all files of a run are called alike."""
    return Path(path).stem if Path(path).stem != "model" else Path(path).resolve().parent.name


@shares_processes("out_dir")
def evaluate_model(
    cfg: CfgNode, weights: str | os.PathLike[str], out_dir: str | os.PathLike[str], compare: bool = True
) -> Results | None:
    """Evaluate on DATA.TEST and write metrics.json, table, photos.csv, charts, pictures and report.html to ``out_dir``.

    Args:
        cfg: its DATA, EVAL and ROUTING sections, DEVICE and SEED are used; the classes are those of the weights.
        weights: a model of this project, or a checkpoint that ``cfg`` describes, see `open_model`.
        out_dir: folder of results.
        compare: warn where ``cfg`` describes another model than ``weights`` hold.

    Returns:
        what is in metrics.json; None on processes other than the first, which compute their share of the photos.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    device = evaluation_device(cfg)
    check_rivals(cfg, device)
    weights = file_of(weights)
    model, architecture, info = open_model(cfg, weights)
    if compare:
        _warn_of_differences(cfg, architecture)
    cfg = with_classes(cfg, architecture.classes)
    dataset = load_dataset(cfg, cfg.DATA.TEST, labels="optional")
    loader = build_loader(dataset, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, False, cfg.SEED, rank(), world_size())
    router = open_router(cfg, model, info, weights).to(device)
    model = model.to(device)
    if certificate := router.certificate:
        check_certificate(cfg, certificate, dataset, cfg.ROUTING.CERTIFICATE or weights)
    if not dataset.labelled:
        logger.warning("nobody labelled %s: agreement with the full path is measured, no AP", " + ".join(cfg.DATA.TEST))
    rivals = build_rivals(cfg, model, architecture) if dataset.labelled else []  # AP judges them
    collected = collect(model, loader, router)
    if cfg.EVAL.RIVALS.ENABLED and dataset.labelled and not router.hybrid:  # a hybrid has the full path's boxes
        rivals = [*exits_alone(model, collected), *rivals]
    rivals = [replace(rival, detector=rival.detections(loader)) for rival in rivals]
    if not is_main():  # waits at the end, so that the first one measures milliseconds undisturbed
        return None
    evaluation = evaluate_exits(
        model,
        collected,
        to_coco(dataset),
        router,
        build_evaluation(cfg),
        Context(
            splits=list(cfg.DATA.TEST),
            forced=info.get("forced", False),
            taken_over=info.get("taken_over", takes_over(cfg)),
            labelled=dataset.labelled,
            weights_sha256=sha256(weights),
        ),
        rivals,
        certificate,
    )
    results, chosen = evaluation.results, evaluation.chosen.tolist()
    if certificate is not None:
        results = replace(results, drift=drift_of(certificate, collected, chosen))
    photos = photo_list(evaluation.counts, collected, evaluation.chosen, model.exit_names, dataset.path_of)
    picture = _detection_picture(cfg, model, dataset, collected, chosen) if cfg.EVAL.PICTURES else None
    pictures = {"detections": picture} if picture else {}
    write_results(Path(out_dir), results, pictures, photos)
    write_evaluation_page(Path(out_dir), cfg, weights, model, router, dataset, collected, evaluation, results)
    return results


def _warn_of_differences(cfg: CfgNode, architecture: Architecture) -> None:
    """The weights know how they were built; a configuration that says otherwise is not followed, so it is named."""
    wanted = build_architecture(cfg, tuple(cfg.DATA.CLASSES) or architecture.classes).to_dict()
    own = architecture.to_dict()
    made_of_weights = ("reduced_tail", "head_outputs", "folded_rows", "folded_branches", "competing")
    text = "%s: the configuration says %r, the weights were made with %r and keep it"
    for name in wanted | own:
        if name not in made_of_weights and wanted.get(name) != own.get(name):
            logger.warning(text, name, wanted.get(name), own.get(name))


def _detection_picture(
    cfg: CfgNode, model: EarlyExitSSDLite, dataset: DetectionDataset, collected: Collected, chosen: list[int]
) -> Image.Image:
    """Some photos with what every exit finds in them; ``chosen`` is the exit that each photo takes."""
    empty = [not record.has_targets for record in dataset.records]
    examples = []
    for index in choose_examples(chosen, empty, cfg.EVAL.PICTURES, cfg.SEED):
        image, target = dataset[index]
        found = [detections[target["image_id"]] for detections in collected.detections]
        examples.append(Example(image, target, found, chosen[index]))
    return detection_grid(examples, model.exit_names, model.classes, cfg.EVAL.PICTURE_SCORE)

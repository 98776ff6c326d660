"""Evaluate a trained model on the TEST split, compare it with rivals, and write the report page."""

import itertools
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.calibration import DriftMonitor
from earlyexit_ssd.calibration.certificate import Certificate
from earlyexit_ssd.config import CLOSED, PHASE_SECTIONS, get_cfg
from earlyexit_ssd.data import DetectionDataset, load_dataset, to_coco
from earlyexit_ssd.data.dataset import photo_hashes
from earlyexit_ssd.data.duplicates import blocks_of
from earlyexit_ssd.drift import WINDOW, DriftRecord
from earlyexit_ssd.engine import read_log
from earlyexit_ssd.engine.processes import is_main
from earlyexit_ssd.errors import ConfigError, EarlyExitError, import_package
from earlyexit_ssd.evaluation.cost import EAGER, ONNX_RUNTIME, PlainPath, count_mmacs, example_input, mmacs_to_exit
from earlyexit_ssd.evaluation.evaluate import Evaluation, Kind, Rival, WantedClasses, evaluate_exits, exits_alone
from earlyexit_ssd.evaluation.matches import ExitMatches, photo_list
from earlyexit_ssd.evaluation.onnx import OnnxDetector, count_onnx_mmacs
from earlyexit_ssd.evaluation.outputs import Collected, collect
from earlyexit_ssd.evaluation.results import Context, DriftResult, Results
from earlyexit_ssd.files import sha256
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, PathToExit, load_model
from earlyexit_ssd.modeling.heads import is_folded
from earlyexit_ssd.modeling.retrofit import resize_detector
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.plain import read_json
from earlyexit_ssd.report.page import Section, evaluation_page, never_failing, training_section, write_page
from earlyexit_ssd.report.page_photos import Attention, OpenCosts, PagePhotos, attention_pictures, by_gain
from earlyexit_ssd.report.pictures import Example, choose_examples, detection_grid
from earlyexit_ssd.report.tables import write_results
from earlyexit_ssd.routing import ExitRouter

logger = logging.getLogger(__name__)


def require_usable_certificate(
    cfg: CfgNode, certificate: Certificate, dataset: DetectionDataset, source: str | os.PathLike[str]
) -> None:
    """Check that a certificate from the file ``source`` fits the photos and settings of an evaluation.

    Raise EarlyExitError if the model was calibrated on one of the photos. An EVAL.SCORE or EVAL.IOU other than the
    certificate's is a warning, or a ConfigError if the certificate bounds a risk. Another EVAL.RUNTIME is a warning if
    the certificate is for a speed-up in milliseconds.
    """
    certificate.require_unseen(photo_hashes(dataset))
    target = certificate.target
    runtime = (certificate.cost_model.measured or {}).get("runtime", cfg.EVAL.RUNTIME)
    if target.kind == "speedup" and runtime != cfg.EVAL.RUNTIME:
        text = "%s: the certificate's speed-up is in %s, but EVAL.RUNTIME is %s; set it to %s to compare them"
        logger.warning(text, source, runtime, cfg.EVAL.RUNTIME, runtime)
    if (target.score, target.iou) == (cfg.EVAL.SCORE, cfg.EVAL.IOU):
        return
    text = (
        f"{source}: the certificate holds for score {target.score:g} and IoU {target.iou:g}, "
        f"but EVAL has {cfg.EVAL.SCORE:g} and {cfg.EVAL.IOU:g}"
    )
    if target.kind == "risk":
        raise ConfigError(f"{text}; set EVAL.SCORE and EVAL.IOU to the certificate's values, or calibrate again")
    logger.warning(text)


def drift_of(certificate: Certificate, collected: Collected, chosen: list[int]) -> DriftResult:
    """Compare exits and confidences with those of the calibration photos, in windows of at most `WINDOW` photos. If the
    certificate has a block length, compare the first photo of each block instead, in one window. Warnings are logged
    too. ``chosen`` is the exit of each photo, in the order of ``collected``.
    """
    confidences = [float(collected.confidences[exit_index][photo]) for photo, exit_index in enumerate(chosen)]
    if certificate.target.block:
        record = DriftRecord(certificate.drift, certificate.target.block)
        for decision in zip(chosen, confidences, strict=True):
            record.add(*decision)
        drift = record.drift()
        if drift.drifted:
            logger.warning(drift.text)
        return DriftResult(drift.photos, [drift.text] * drift.drifted, drift.shares, drift.calibration_shares)
    monitor = DriftMonitor(certificate.drift, min(WINDOW, max(1, len(chosen))))
    warnings, status = monitor.update(chosen, confidences), monitor.status()
    return DriftResult(monitor.window, warnings, status["shares"], status["calibration_shares"])


# Rivals of EVAL.RIVALS: plain detectors, single exits and exported detectors.

SIZE_SHARES = (0.8, 0.7, 0.6)  # input side of a smaller plain detector / the model's
SMALLEST_SIZE = 64  # input side in pixels


def check_rivals(cfg: CfgNode, device: torch.device) -> None:
    """Raise EarlyExitError if a file or package for the evaluation is missing, or if EVAL.RUNTIME does not run on the
    device. A training calls it before its first phase, so these errors do not come after hours."""
    rivals, runtime = cfg.EVAL.RIVALS, cfg.EVAL.RUNTIME
    if runtime != EAGER and device.type != "cpu":
        raise ConfigError(f"EVAL.RUNTIME {runtime} measures the CPU, but DEVICE is {device}; set DEVICE to cpu")
    files = [(key, path) for key in ("FULL_PATHS", "SINGLE_EXITS") for path in rivals[key]]
    files += [("ONNX", entry.partition(":")[2]) for entry in rivals.ONNX]
    for key, path in files if rivals.ENABLED else ():
        if not Path(path).is_file():
            raise ConfigError(f"EVAL.RIVALS.{key} has {path}: no such file; check the path, or remove it")
    packages = set() if runtime == EAGER else {"onnx", runtime}
    if rivals.ENABLED and rivals.ONNX:  # they run in ONNX Runtime only
        packages |= {"onnx", ONNX_RUNTIME}
    for package in sorted(packages):
        import_package(package)


def build_rivals(cfg: CfgNode, model: EarlyExitSSDLite, architecture: Architecture) -> list[Rival]:
    """Return the rivals of EVAL.RIVALS, which detect the model's classes. They are on the model's device, those from
    ONNX files on the CPU. Raise EarlyExitError if a file has no detector of its kind, or none of these classes."""
    rivals, wanted, own_size = cfg.EVAL.RIVALS, architecture.classes, architecture.image_size
    built: list[Rival] = []
    if not rivals.ENABLED:
        return built

    def add(name: str, kind: Kind, detector: SSD, classes: Sequence[str] = wanted, source: str | None = None) -> None:
        network = PathToExit(detector, 0) if kind == "single_exit" else PlainPath(detector)
        example = example_input(detector)
        filtered = WantedClasses(detector, classes, wanted, source or name).to(example.device)
        built.append(Rival(name, kind, network, example, count_mmacs(network, example), filtered, source))

    device = next(model.parameters()).device
    sizes = rivals.SIZES or (smaller_sizes(own_size) if model.any_size else ())
    sizes = [size for size in dict.fromkeys(sizes) if size != own_size]
    for size in sizes:
        add(f"plain {size}", "plain", resize_detector(model, architecture, size))
    # only a folded head has rows of unwanted classes that can be cut
    for size in (own_size, *sizes) if is_folded(model.head.classification_head) else ():
        add(f"plain {size}, cut head", "cut_head", resize_detector(model, architecture, size, cut=True))
    for path in rivals.FULL_PATHS:
        other, other_architecture, _ = load_model(path)
        size = other_architecture.image_size
        detector = resize_detector(other.to(device), other_architecture, size)  # the same size, without branches
        add(f"plain {size}, {_short(path)}", "plain", detector, other.classes, path)
    for path in rivals.SINGLE_EXITS:
        other = _single_exit(path).to(device)
        add(f"{other.exit_names[0]} alone, {_short(path)}", "single_exit", other, other.classes, path)
    return built + onnx_rivals(cfg, wanted)


def smaller_sizes(size: int) -> tuple[int, ...]:
    """Return 0.8, 0.7 and 0.6 times ``size``, rounded to multiples of 32, or of 16 for a ``size`` under 256 pixels."""
    step = 32 if size >= 256 else 16
    sides = dict.fromkeys(round(share * size / step) * step for share in SIZE_SHARES)
    return tuple(side for side in sides if SMALLEST_SIZE <= side < size)


def _single_exit(path: str) -> EarlyExitSSDLite:
    """Load a model with one early exit at which every photo leaves."""
    model, _, _ = load_model(path)
    if model.empty != (False,):
        exits = ", ".join(model.exit_names[:-1]) or "none"
        expected = "EVAL.RIVALS.SINGLE_EXITS takes models with one early exit and its branch"
        fix = "train a model with one exit (EXITS.LAYERS)"
        raise EarlyExitError(f"{path}: {expected}, but it has {exits}; {fix}")
    model.router = ExitRouter(1, thresholds=0.0)
    return model


def onnx_rivals(cfg: CfgNode, wanted: tuple[str, ...]) -> list[Rival]:
    """Return the detectors of EVAL.RIVALS.ONNX, which detect the classes ``wanted``."""
    rivals = []
    for entry in cfg.EVAL.RIVALS.ONNX:
        file_format, _, path = entry.partition(":")
        detector = OnnxDetector(path, file_format, cfg.EVAL.TIMING_THREADS)
        network = detector.network
        example = torch.rand(network.input_shape, generator=torch.Generator().manual_seed(0))
        filtered = WantedClasses(detector, detector.classes, wanted, path)
        filtered([torch.zeros(3, 64, 64)])  # raises if the outputs have another format, before hours of evaluation
        mmacs = count_onnx_mmacs(detector.content, path)
        rivals.append(Rival(Path(path).stem, "onnx", network, example, mmacs, filtered, path))
    return rivals


def _short(path: str) -> str:
    """Return the name of a file without its suffix, or the folder's name for a ``model.pth``."""
    return Path(path).stem if Path(path).stem != "model" else Path(path).resolve().parent.name


@build.shares_processes("out_dir")
def evaluate_model(
    cfg: CfgNode,
    weights: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    compare: bool = True,
    block: int | None = None,
) -> Results | None:
    """Evaluate on DATA.TEST and write metrics.json, table, photos.csv, charts, pictures and report.html to ``out_dir``.

    Args:
        cfg: configuration; its DATA.CLASSES are replaced by the classes of the weights.
        weights: a model of this project, or a checkpoint that ``cfg`` describes, see `open_model`.
        compare: whether to warn if the model of ``weights`` differs from that in ``cfg``.
        block: number of consecutive photos of a folder that the bootstrap draws together; None: the certificate's.

    Returns:
        The content of metrics.json as `Results`, a dataclass of `evaluation.results`; None on processes other than the
        first, which only compute their share of the photos.

    Raises:
        EarlyExitError: unusable weights, data or settings.
    """
    device = build.evaluation_device(cfg)
    check_rivals(cfg, device)
    weights = build.weights_file(weights)
    model, architecture, info = build.open_model(cfg, weights)
    if compare:
        _warn_of_differences(cfg, architecture)
    cfg = build.with_classes(cfg, architecture.classes)
    dataset = load_dataset(cfg, cfg.DATA.TEST, labels="optional")
    loader = build.evaluation_loader(cfg, dataset)
    router = build.open_router(cfg, model, info, weights).to(device)
    model = model.to(device)
    if certificate := router.certificate:
        require_usable_certificate(cfg, certificate, dataset, cfg.ROUTING.CERTIFICATE or weights)
    if not dataset.labelled:
        logger.warning("%s: no labels, so agreement with the full path replaces AP", " + ".join(cfg.DATA.TEST))
    rivals = build_rivals(cfg, model, architecture) if dataset.labelled else []  # they are compared by AP
    collected = collect(model, loader, router)
    if cfg.EVAL.RIVALS.ENABLED and dataset.labelled and not router.hybrid:  # a hybrid exit needs the full path's boxes
        rivals = [*exits_alone(model, collected), *rivals]
    rivals = [replace(rival, detector=rival.detections(loader)) for rival in rivals]  # all processes detect
    if not is_main():  # the decorator makes this process wait, so that the first one measures times undisturbed
        return None
    context = Context(
        splits=list(cfg.DATA.TEST),
        forced=info.get("forced", False),
        taken_over=info.get("taken_over", build.takes_over(cfg)),
        untrained=info.get("phase") == "baseline" and not all(model.empty),
        labelled=dataset.labelled,
        weights_sha256=sha256(weights),
    )
    settings, ground_truth = build.build_evaluation(cfg), to_coco(dataset)
    blocks = blocks_of(dataset, block or (certificate.target.block if certificate else None))
    evaluation = evaluate_exits(model, collected, ground_truth, router, settings, context, rivals, certificate, blocks)
    results, chosen = evaluation.results, evaluation.chosen.tolist()
    if certificate is not None:
        results = replace(results, drift=drift_of(certificate, collected, chosen))
    photos = photo_list(evaluation.counts, collected, evaluation.chosen, model.exit_names, dataset.path_of)
    pictures = {}
    if cfg.EVAL.PICTURES:
        pictures["detections"] = _detection_picture(cfg, model, dataset, collected, chosen)
    write_results(Path(out_dir), results, pictures, photos)
    with never_failing(Path(out_dir) / PAGE):
        parts = _page_photos(model, router, dataset, collected, replace(evaluation, results=results))
        training, _ = read_training(Path(out_dir), cfg.ROUTING.TEMPERATURE_BOUNDS)
        calibration = f"calibration/{PAGE}"
        page = evaluation_page(
            results,
            photos=parts,
            sections=(training,) if training else (),
            command=calibrate_command(sys.argv, weights),
            links={"the calibration": calibration} if (Path(out_dir) / calibration).is_file() else {},
        )
        write_page(Path(out_dir) / PAGE, page)
    return results


def _warn_of_differences(cfg: CfgNode, architecture: Architecture) -> None:
    """Warn of each setting of the configuration that differs from the weights. The setting of the weights is used."""
    configured = build.build_architecture(cfg, tuple(cfg.DATA.CLASSES) or architecture.classes).to_dict()
    used = architecture.to_dict()
    # not in cfg
    from_weights = ("reduced_tail", "head_outputs", "folded_rows", "folded_branches", "competing", "trained_size")
    text = "%s: the configuration has %r, but the weights were made with %r, which is used"
    for name in configured | used:
        if name not in from_weights and configured.get(name) != used.get(name):
            logger.warning(text, name, configured.get(name), used.get(name))


def _detection_picture(
    cfg: CfgNode, model: EarlyExitSSDLite, dataset: DetectionDataset, collected: Collected, chosen: list[int]
) -> Image.Image:
    """Draw some photos with the detections of every exit. ``chosen`` is the exit that each photo takes."""
    empty = [not record.has_targets for record in dataset.records]
    examples = []
    for index in choose_examples(chosen, empty, cfg.EVAL.PICTURES, cfg.SEED):
        image, target = dataset[index]
        detections = [of_exit[target["image_id"]] for of_exit in collected.detections]
        examples.append(Example(image, target, detections, chosen[index]))
    return detection_grid(examples, model.exit_names, model.classes, cfg.EVAL.PICTURE_SCORE)


# The report page. Before it, the results are written, so an error in the page must not end the job (`never_failing`).

PAGE = "report.html"
ATTENTION_PHOTOS = 6  # number of photos with attention maps, the first of the gallery
MAX_OPEN_SETS = 8  # if there are more sets of open exits, operations are counted for the evaluated set only


def _page_photos(
    model: EarlyExitSSDLite, router: ExitRouter, dataset: DetectionDataset, collected: Collected, evaluation: Evaluation
) -> PagePhotos:
    results, order = evaluation.results, np.argsort(collected.image_ids, kind="stable")
    return PagePhotos(
        ground_truth=evaluation.ground_truth,
        matches=evaluation.matches,
        exit_names=model.exit_names,
        confidences=np.array([values.numpy()[order] for values in collected.confidences[:-1]]),
        thresholds=router.thresholds.tolist(),
        costs=_open_costs(model, router, results),
        plain_mmacs=results.without_exits.mmacs,
        plain_ms=results.without_exits.ms,
        score=results.context.score,
        labelled=results.context.labelled,
        attention=attention_of(model, dataset, evaluation.matches, results.context.score),
    )


def read_training(folder: Path, bounds: Sequence[float]) -> tuple[Section | None, list[dict[str, Any]]]:
    """Return the page section of a training's logs and gates, and the gates; None and [] if ``folder`` has neither.
    ``bounds`` are the bounds of a temperature."""
    files = [path for name in PHASE_SECTIONS if (path := folder / name / "gate.json").is_file()]
    gates = [read_json(path, "gate of a phase", "delete it") for path in files]
    logs = {name: read_log(folder / name) for name in PHASE_SECTIONS}
    return (training_section(logs, gates, bounds) if gates or any(logs.values()) else None), gates


def _open_costs(model: EarlyExitSSDLite, router: ExitRouter, results: Results) -> list[OpenCosts]:
    """Return MMACs and ms of the exits for the evaluated set of open exits, and MMACs only for all other sets, because
    these were not timed."""
    evaluated = tuple(threshold < CLOSED for threshold in router.thresholds.tolist())
    costs = [OpenCosts(evaluated, [row.mmacs for row in results.exits], [row.ms for row in results.exits])]
    others = [opened for opened in itertools.product((True, False), repeat=len(evaluated)) if opened != evaluated]
    for opened in others if len(others) < MAX_OPEN_SETS else ():
        values = {**router.to_dict(), "thresholds": build.open_thresholds(opened)}
        other_router = ExitRouter(**values).to(router.thresholds.device)
        costs.append(OpenCosts(opened, mmacs_to_exit(model, other_router)))
    return costs


def attention_of(
    model: EarlyExitSSDLite, dataset: DetectionDataset, matches: ExitMatches, score: float
) -> tuple[Attention, ...]:
    """Return the attention maps of the first photos of the gallery."""
    rows = {record.image_id: row for row, record in enumerate(dataset.records)}
    photos = by_gain(matches, score)[:ATTENTION_PHOTOS].tolist()
    return attention_pictures(model, [(photo, dataset[rows[matches.image_ids[photo]]][0]) for photo in photos])


def calibrate_command(arguments: Sequence[str], weights: Any) -> str:
    """Return a command that calibrates ``weights``, with ``{target}`` in place of ``--ap-drop`` and the like.
    Configuration file and keys are those of ``arguments``, a command line. Without ``--config`` it is empty."""
    if "--config" not in arguments[:-1]:
        return ""
    config = arguments[list(arguments).index("--config") + 1]
    tree = get_cfg()
    pairs = [pair for pair in itertools.pairwise(arguments) if pair[0].partition(".")[0] in tree]
    keys = [text for pair in pairs if pair[0] != "ROUTING.CERTIFICATE" for text in pair]
    words = ["earlyexit", "calibrate", "--config", config, "--weights", str(weights), "--out", "calibrated"]
    return f"{shlex.join(words)} {{target}} {shlex.join(keys)}".strip()

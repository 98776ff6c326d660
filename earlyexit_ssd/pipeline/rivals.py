"""The rivals that EVAL.RIVALS asks for: plain nets, single exits, exported detectors."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torchvision.models.detection.ssd import SSD

from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input
from earlyexit_ssd.evaluation.onnx_cost import count_onnx_mmacs
from earlyexit_ssd.evaluation.onnx_detector import OnnxDetector
from earlyexit_ssd.evaluation.rivals import CUT_HEAD, ONNX, PLAIN, SINGLE_EXIT, Rival
from earlyexit_ssd.evaluation.runtime import EAGER, deploy_package
from earlyexit_ssd.evaluation.wanted_classes import WantedClasses
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, PathToExit, load_model
from earlyexit_ssd.modeling.folding import is_folded
from earlyexit_ssd.modeling.resized import resize_detector
from earlyexit_ssd.routing import ExitRouter

SHARES = (0.8, 0.7, 0.6)
"""Sides of the smaller plain nets, as shares of the model's own."""
SMALLEST_SIDE = 64


def check_rivals(cfg: CfgNode, device: torch.device) -> None:
    """What is cheap to find out before hours of training: files and packages that are missing.

    Raises:
        EarlyExitError: one is missing, or the runtime does not run on the device.
    """
    rivals = cfg.EVAL.RIVALS
    if cfg.EVAL.RUNTIME != EAGER:
        deploy_package("onnx")
        if device.type != "cpu":
            raise ConfigError(f"EVAL.RUNTIME {cfg.EVAL.RUNTIME} measures the CPU, DEVICE is {device}; set it to cpu")
    files = [(key, path) for key in ("FULL_PATHS", "SINGLE_EXITS") for path in rivals[key]]
    files += [("ONNX", entry.partition(":")[2]) for entry in rivals.ONNX]
    for key, path in files if rivals.ENABLED else ():
        if not Path(path).is_file():
            raise ConfigError(f"EVAL.RIVALS.{key} has {path}: no such file")
    if cfg.EVAL.RUNTIME != EAGER or (rivals.ENABLED and rivals.ONNX):
        for name in ("onnx", "onnxruntime"):
            deploy_package(name)


def build_rivals(
    cfg: CfgNode, model: EarlyExitSSDLite, architecture: Architecture, device: torch.device
) -> list[Rival]:
    """Every rival that is no part of the evaluated model, ready to be evaluated on its classes.

    Args:
        cfg: its EVAL section is used.
        model, architecture: the evaluated one.
        device: where PyTorch's networks run; exported ones stay on the CPU.

    Raises:
        EarlyExitError: a file that is no such detector, or one that knows none of the classes.
    """
    rivals = cfg.EVAL.RIVALS
    if not rivals.ENABLED:
        return []
    classes, own_size = architecture.classes, architecture.image_size
    sizes = [size for size in dict.fromkeys(rivals.SIZES or smaller_sizes(own_size)) if size != own_size]
    model = model.to(device)
    plain = {f"plain {size}": resize_detector(model, architecture, size) for size in sizes}
    cut_sizes = (own_size, *sizes) if is_folded(model.head.classification_head) else ()
    cut = {f"plain {size}, cut head": resize_detector(model, architecture, size, cut=True) for size in cut_sizes}
    return [
        *(_plain(name, detector, classes, classes, None) for name, detector in plain.items()),
        *(_plain(name, detector, classes, classes, None, CUT_HEAD) for name, detector in cut.items()),
        *(_full_path(path, classes, device) for path in rivals.FULL_PATHS),
        *(_single_exit(path, classes, device) for path in rivals.SINGLE_EXITS),
        *(_onnx(entry, classes, cfg.EVAL.TIMING_THREADS) for entry in rivals.ONNX),
    ]


def smaller_sizes(size: int) -> tuple[int, ...]:
    """Sides of 0.8, 0.7 and 0.6 of ``size`` to the nearest multiple of 32, of 16 where ``size`` is under 256."""
    step = 32 if size >= 256 else 16
    sides = dict.fromkeys(round(share * size / step) * step for share in SHARES)
    return tuple(side for side in sides if SMALLEST_SIDE <= side < size)


def _plain(
    name: str, detector: SSD, classes: tuple[str, ...], wanted: tuple[str, ...], source: str | None, kind: str = PLAIN
) -> Rival:
    network, example = PlainPath(detector), example_input(detector)
    found = WantedClasses(detector, classes, wanted, name).to(example.device)
    return Rival(name, kind, network, example, count_mmacs(network, example), found, source)


def _full_path(path: str, wanted: tuple[str, ...], device: torch.device) -> Rival:
    """A model's full path at its own size, its branches left out."""
    model, architecture, _ = load_model(path)
    size = architecture.image_size
    detector = resize_detector(model.to(device), architecture, size)
    return _plain(f"plain {size}, {_short(path)}", detector, architecture.classes, wanted, path)


def _single_exit(path: str, classes: tuple[str, ...], device: torch.device) -> Rival:
    """A model's only exit: with a router that lets every photo leave, nothing behind it runs."""
    model, architecture, _ = load_model(path)
    if model.num_early_exits != 1:
        found = ", ".join(model.exit_names[:-1])
        raise EarlyExitError(
            f"{path}: EVAL.RIVALS.SINGLE_EXITS takes models with one early exit, it has {found};"
            " train that exit alone (EXITS.LAYERS)"
        )
    model = model.to(device)
    model.router = ExitRouter(1, thresholds=0.0).to(device)
    name = f"{model.exit_names[0]} alone, {_short(path)}"
    network, example = PathToExit(model, 0), example_input(model)
    found = WantedClasses(model, architecture.classes, classes, path).to(device)
    return Rival(name, SINGLE_EXIT, network, example, count_mmacs(network, example), found, path)


def _onnx(entry: str, classes: tuple[str, ...], threads: int) -> Rival:
    file_format, _, path = entry.partition(":")
    detector = OnnxDetector(path, file_format, threads)
    example = torch.rand(detector.network.input_shape, generator=torch.Generator().manual_seed(0))
    found = WantedClasses(detector, detector.classes, classes, path)
    found([torch.zeros(3, 64, 64)])  # outputs of another format are found before hours of evaluation
    return Rival(Path(path).stem, ONNX, detector.network, example, count_onnx_mmacs(detector.content), found, path)


def _short(path: str) -> str:
    """A file's name, or its folder's where all files of a run are called alike."""
    return Path(path).stem if Path(path).stem != "model" else Path(path).resolve().parent.name

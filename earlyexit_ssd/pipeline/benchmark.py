"""Detectors in PyTorch, and exported ones of other kinds, for `earlyexit_ssd.deploy.benchmark`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from earlyexit_ssd.data.images import as_tensor
from earlyexit_ssd.deploy.benchmark import Detect
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.onnx import FORMATS, OnnxDetector
from earlyexit_ssd.pipeline.export import open_any


@dataclass(frozen=True)
class TorchModel:
    """A model file, a checkpoint of torchvision's or shipped weights, in eager PyTorch, routed as it is.

    Attributes:
        compiled: its full path alone, network and head with ``torch.compile``.
    """

    path: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """The file's."""
        return Path(self.path).name

    @property
    def runtime(self) -> str:
        """Of the two."""
        return "torch.compile" if self.compiled else "eager PyTorch"

    def open(self, threads: int, score: float) -> Detect:
        """See `Contestant`."""
        torch.set_num_threads(threads)
        model = open_any(self.path, router=not self.compiled).eval()
        model.score_thresh = score
        if self.compiled:
            model.trunk_maps = torch.compile(model.trunk_maps)
            model.head.compile()

        @torch.inference_mode()
        def detect(photos: list[np.ndarray]) -> list[int | None]:
            full = model.num_early_exits
            exits = [int(found.get("exit_index", full)) for found in model([as_tensor(photo) for photo in photos])]
            return [None if index == full else index for index in exits]

        return detect


@dataclass(frozen=True)
class Rival:
    """Somebody else's ONNX file of a format of `FORMATS`; its resizing and its suppression run in PyTorch."""

    file_format: str
    path: str
    runtime: str = "ONNX Runtime"

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise EarlyExitError(
                f"{self.path}: format {shown(self.file_format)}: expected one of compile, {', '.join(FORMATS)}"
            )

    @property
    def name(self) -> str:
        """The file's."""
        return Path(self.path).name

    def open(self, threads: int, score: float) -> Detect:
        """See `Contestant`; the format has a least score of its own."""
        torch.set_num_threads(threads)
        detector = OnnxDetector(self.path, self.file_format, threads)

        @torch.inference_mode()
        def detect(photos: list[np.ndarray]) -> list[int | None]:
            return [None for _ in detector(list(map(as_tensor, photos)))]

        return detect

"""Detectors in PyTorch, and ONNX files of other projects, with the interface of exported ones."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from earlyexit_ssd.calibration import load_certificate
from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy.benchmark import Contestant, Detect
from earlyexit_ssd.deploy.predictor import Detections
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.onnx import FORMATS, OnnxDetector
from earlyexit_ssd.files import sha256
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import build_router, open_model
from earlyexit_ssd.pipeline.export import open_any
from earlyexit_ssd.report.pictures import Example, detection_grid

logger = logging.getLogger(__name__)


class TorchPredictor:
    """``predictor(photo)`` is the photo's `Detections`, as those of `earlyexit_ssd.deploy.Predictor`.

    Attributes:
        model: in eval mode on the CPU; classes: names of the labels 1..K; exit_names: shallow to deep, ``full`` last.
    """

    def __init__(self, model: EarlyExitSSDLite) -> None:
        self.model = model.eval()
        self.classes, self.exit_names = tuple(model.classes), tuple(model.exit_names)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Detections:
        """Detect in a photo, uint8 [H, W, 3] RGB; without a router the full path answers, with confidence None."""
        start = time.perf_counter()
        (found,) = self.model([as_tensor(image)])
        order = found["scores"].argsort(descending=True)
        boxes, labels, scores = (found[key][order].numpy() for key in ("boxes", "labels", "scores"))
        index = int(found.get("exit_index", self.model.num_early_exits))
        confidence = float(found.get("exit_confidence", math.nan))
        return Detections.of(self, (boxes, labels, scores), index, confidence, start)

    def warm_up(self) -> None:
        """Run a blank photo: the first call is slower than the others."""
        self(np.zeros((320, 320, 3), np.uint8))

    @torch.inference_mode()
    def side_by_side(self, image: np.ndarray, found: Detections, score: float) -> Image.Image:
        """What every exit sees in a photo from ``score`` on, the exit taken (that of ``found``) framed."""
        pixels = as_tensor(image)
        outputs = self.model.exit_outputs([pixels])
        seen = [self.model.detections(outputs, index)[0] for index in range(len(self.exit_names))]
        routed = None if self.model.router is None else found.exit_index
        return detection_grid([Example(pixels, None, seen, routed)], self.exit_names, self.classes, score)

    def note_calibration_photos(self, photos: Iterable[str | os.PathLike[str]]) -> None:
        """Say which photos calibrated the model's routing: what it does on them flatters."""
        certificate = getattr(self.model.router, "certificate", None)
        try:
            if certificate is not None:
                certificate.require_unseen((photo, sha256(photo)) for photo in photos if Path(photo).is_file())
        except EarlyExitError as error:
            logger.warning("%s", error)


def open_torch_predictor(weights: str | os.PathLike[str], cfg: CfgNode | None = None) -> TorchPredictor:
    """Shipped weights or a file, with its own routing or with that of a configuration; warm. An EarlyExitError for
    unusable weights, or a certificate that is not theirs."""
    if cfg is None:
        model = EarlyExitSSDLite.from_pretrained(weights)
    else:
        model, _, info = open_model(cfg, weights)
        if cfg.ROUTING.CERTIFICATE:
            model.router = load_certificate(cfg.ROUTING.CERTIFICATE).router_for(model)
        else:
            model.router = build_router(cfg, {"num_exits": model.num_early_exits, **(info.get("router") or {})})
    predictor = TorchPredictor(model)
    predictor.warm_up()
    return predictor


@dataclass(frozen=True)
class TorchModel(Contestant):
    """A model file, a checkpoint of torchvision's or shipped weights, in eager PyTorch, routed as it is."""

    compiled: bool = False  # its full path alone, network and head with ``torch.compile``

    @property
    def runtime(self) -> str:
        return "torch.compile" if self.compiled else "eager PyTorch"

    def open(self, threads: int, score: float) -> Detect:
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
class Rival(Contestant):
    """Somebody else's ONNX file of a format of `FORMATS`; its resizing and its suppression run in PyTorch."""

    file_format: str
    runtime: ClassVar[str] = "ONNX Runtime"

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            raise EarlyExitError(
                f"{self.path}: format {shown(self.file_format)}: expected one of compile, {', '.join(FORMATS)}"
            )

    def open(self, threads: int, score: float) -> Detect:
        """See `Contestant`; the format has a least score of its own."""
        torch.set_num_threads(threads)
        detector = OnnxDetector(self.path, self.file_format, threads)

        @torch.inference_mode()
        def detect(photos: list[np.ndarray]) -> list[int | None]:
            return [None for _ in detector(list(map(as_tensor, photos)))]

        return detect

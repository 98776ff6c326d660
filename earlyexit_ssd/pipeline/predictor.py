"""PyTorch models and ONNX files of other projects, with the interface of exported detectors."""

import hashlib
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

from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy.benchmark import Contestant, Detect
from earlyexit_ssd.deploy.predictor import Detections
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.onnx import FORMATS, OnnxDetector
from earlyexit_ssd.files import sha256
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.pipeline.build import open_model, open_router
from earlyexit_ssd.pipeline.export import open_any
from earlyexit_ssd.report.pictures import Example, detection_grid

logger = logging.getLogger(__name__)


class TorchPredictor:
    """Detects like `earlyexit_ssd.deploy.Predictor`, with a PyTorch model on the CPU."""

    def __init__(self, model: EarlyExitSSDLite) -> None:
        self.model = model.eval()
        self.classes, self.exit_names = tuple(model.classes), tuple(model.exit_names)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Detections:
        """Return the detections in a photo, uint8 [H, W, 3] RGB, by decreasing score. Without a router they are from
        the full path, and the exit's confidence is None."""
        start = time.perf_counter()
        (detections,) = self.model([as_tensor(image)])
        order = detections["scores"].argsort(descending=True)
        boxes, labels, scores = (detections[key][order].numpy() for key in ("boxes", "labels", "scores"))
        index = int(detections.get("exit_index", self.model.num_early_exits))
        confidence = float(detections.get("exit_confidence", math.nan))
        return Detections.of(self, (boxes, labels, scores), index, confidence, start)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of the routing, which identifies the detector."""
        routing = getattr(self.model.router, "to_dict", lambda: None)()
        return hashlib.sha256(f"{weights_hash(self.model)} {routing}".encode()).hexdigest()

    def warm_up(self) -> None:
        """Run the model once on a black photo, because the first call is slower than later calls."""
        self(np.zeros((320, 320, 3), np.uint8))

    @torch.inference_mode()
    def side_by_side(self, image: np.ndarray, found: Detections, score: float) -> Image.Image:
        """Draw the detections of every exit with a score of at least ``score``, side by side. If the model has a
        router, the exit of ``found``, the photo's routed detections, has a frame."""
        pixels = as_tensor(image)
        outputs, router = self.model.exit_outputs([pixels]), self.model.router
        outputs = outputs.on_full_boxes() if router is not None and router.hybrid else outputs
        by_exit = [self.model.detections(outputs, index)[0] for index in range(len(self.exit_names))]
        routed = None if router is None else found.exit_index
        return detection_grid([Example(pixels, None, by_exit, routed)], self.exit_names, self.classes, score)

    def note_calibration_photos(self, photos: Iterable[str | os.PathLike[str]]) -> None:
        """Warn if the model's routing was calibrated on some of the photos, since figures on these are too good."""
        certificate = getattr(self.model.router, "certificate", None)
        try:
            if certificate is not None:
                certificate.require_unseen((photo, sha256(photo)) for photo in photos if Path(photo).is_file())
        except EarlyExitError as error:
            logger.warning("%s", error)


def open_torch_predictor(weights: str | os.PathLike[str], cfg: CfgNode | None = None) -> TorchPredictor:
    """Open shipped weights or a model file, and run the model once to warm it up.

    Args:
        cfg: configuration of the routing; None: the routing in the file.

    Raises:
        EarlyExitError: the weights are unusable, or the certificate is for other weights.
    """
    if cfg is None:
        model = EarlyExitSSDLite.from_pretrained(weights)
    else:
        model, _, info = open_model(cfg, weights, need_exits=False)
        if model.num_early_exits:
            model.router = open_router(cfg, model, {**info, "certificate": None}, weights)
    predictor = TorchPredictor(model)
    predictor.warm_up()
    return predictor


@dataclass(frozen=True)
class TorchModel(Contestant):
    """A model file, a checkpoint of torchvision or shipped weights, run in PyTorch with the model's own routing."""

    compiled: bool = False  # run the full path alone instead, with trunk and head compiled by ``torch.compile``

    @property
    def runtime(self) -> str:
        return "torch.compile" if self.compiled else "eager PyTorch"

    def open(self, threads: int, score: float) -> Detect:
        torch.set_num_threads(threads)
        model = open_any(self.path, router=not self.compiled).eval()
        model.score_thresh = score
        if self.compiled:
            model.full_maps = torch.compile(model.full_maps)
            model.head.compile()

        @torch.inference_mode()
        def detect(photos: list[np.ndarray]) -> list[int | None]:
            full = model.num_early_exits
            exits = [int(each.get("exit_index", full)) for each in model([as_tensor(photo) for photo in photos])]
            return [None if index == full else index for index in exits]

        return detect


@dataclass(frozen=True)
class RivalFile(Contestant):
    """An ONNX file of another project, in one of `FORMATS`. Its resizing and its NMS run in PyTorch."""

    file_format: str
    runtime: ClassVar[str] = "ONNX Runtime"

    def __post_init__(self) -> None:
        if self.file_format not in FORMATS:
            expected = f"expected one of compile, {', '.join(FORMATS)}"
            raise EarlyExitError(f"{self.path}: format {shown(self.file_format)}: {expected}")

    def open(self, threads: int, score: float) -> Detect:
        """Open the file, see `Contestant`. ``score`` is ignored, since the format has its own minimum score."""
        torch.set_num_threads(threads)
        detector = OnnxDetector(self.path, self.file_format, threads)

        @torch.inference_mode()
        def detect(photos: list[np.ndarray]) -> list[int | None]:
            return [None for _ in detector(list(map(as_tensor, photos)))]

        return detect

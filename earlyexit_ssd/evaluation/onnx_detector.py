"""An exported detector with torchvision's interface."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from earlyexit_ssd.config import LARGEST_SIDE
from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.onnx_formats import FORMATS, Found
from earlyexit_ssd.evaluation.runtime import OnnxNetwork
from earlyexit_ssd.plain import read_bytes


class OnnxDetector(nn.Module):
    """``detector(photos)`` is one dict per photo: ``boxes`` [n, 4] xyxy in its pixels, ``scores``, ``labels`` 1..K.

    Args:
        path: an ONNX file for one photo.
        file_format: a name of `FORMATS`.
        threads: of ONNX Runtime.

    Attributes:
        network: the graph alone.
        classes: the K names: those in the file's metadata under ``classes``, separated by commas, or the format's.

    Raises:
        EarlyExitError: the file cannot be read or run.
    """

    def __init__(self, path: str | os.PathLike[str], file_format: str, threads: int = 1) -> None:
        super().__init__()
        if file_format not in FORMATS:
            raise EarlyExitError(f"format {shown(file_format)}: expected one of {', '.join(FORMATS)}")
        try:
            content = read_bytes(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EarlyExitError(f"{path}: cannot be read as an ONNX file ({reason})") from None
        self.path, self.content, self.format = path, content, FORMATS[file_format]
        self.network = OnnxNetwork(content, threads, str(path), Path(path).parent)
        shape = self.network.input_shape
        if shape[:-2] not in ((3,), (1, 3)) or max(shape) > LARGEST_SIDE:
            raise EarlyExitError(
                f"{path}: expected an input [1, 3, height, width], it is {list(shape)}; a batch is one photo, and "
                f"sides are {LARGEST_SIDE} pixels at most"
            )
        named = self.network.metadata.get("classes", "")
        self.classes = tuple(name.strip() for name in named.split(",")) if named else self.format.classes

    def forward(self, photos: list[Tensor]) -> list[Found]:
        """Detections in photos [3, H, W] RGB in [0, 1]."""
        return [self._detect(photo) for photo in photos]

    def _detect(self, photo: Tensor) -> Found:
        size = self.network.input_shape[-2:]
        x, scales = self.format.prepare(photo.cpu(), size)
        try:
            found = self.format.decode(self.network(x.reshape(self.network.input_shape)), size, len(self.classes))
        except EarlyExitError as error:
            raise EarlyExitError(f"{self.path}: {error}; its metadata may name its classes") from None
        if not all(found[key].isfinite().all() for key in ("boxes", "scores")):
            raise EarlyExitError(f"{self.path}: its boxes or scores are not finite; export it anew")
        height, width = photo.shape[-2:]
        boxes = found["boxes"] / torch.tensor([*scales, *scales])
        limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        return found | {"boxes": boxes.clamp(min=0).minimum(limits)}

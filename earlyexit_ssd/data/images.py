"""Photos as the model takes them; how they are read is in `earlyexit_ssd.images`, which needs no PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.images import PHOTO_SUFFIXES, read_header, read_image

__all__ = ["PHOTO_SUFFIXES", "as_tensor", "read_header", "read_image"]


def as_tensor(image: np.ndarray) -> Tensor:
    """A photo as the model takes it: float32 [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels.to(torch.float32).div_(255)

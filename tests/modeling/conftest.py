"""Small models: 64 px, a quarter of the width, built once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite

SMALL = {"classes": ("chair", "table"), "image_size": 96, "width": 0.25, "channels": 16, "depth": (1,)}


def small_model(**changes: object) -> EarlyExitSSDLite:
    torch.manual_seed(0)
    return Architecture(**{**SMALL, **changes}).build()


@pytest.fixture
def model() -> EarlyExitSSDLite:
    return small_model()


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((96, 96), (80, 120), (50, 60))]


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    """Two objects, none, one."""
    return [
        {"boxes": torch.tensor([[5.0, 5, 50, 60], [30, 20, 90, 90]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[10.0, 10, 40, 45]]), "labels": torch.tensor([2])},
    ]

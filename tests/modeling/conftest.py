"""Small models of 96 px and a quarter of the width."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite

SMALL = {"classes": ("chair", "table"), "image_size": 96, "width": 0.25, "channels": 16, "depth": (1,)}

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
"""Assert that nested dicts and sequences of tensors are equal, bit for bit."""


def small_model(**changes: object) -> EarlyExitSSDLite:
    torch.manual_seed(0)
    return Architecture(**{**SMALL, **changes}).build()


def model_with_varied_scores(**changes: object) -> EarlyExitSSDLite:
    """Return a model in eval mode. With torchvision's initial weights all scores would be 1 / classes."""
    model = small_model(**changes).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model.inherit()
    return model


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


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

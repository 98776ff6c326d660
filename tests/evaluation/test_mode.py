"""A model is left as it was found."""

import pytest
import torch
from torch import nn

from earlyexit_ssd.evaluation.mode import evaluating


def test_every_flag_comes_back():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
    model.train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, False, True]


def test_also_after_an_error():
    model = nn.Dropout()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training
    assert torch.is_grad_enabled()

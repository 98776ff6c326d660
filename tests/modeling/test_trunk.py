"""The backbone in segments, small copies of images, and eval mode."""

import contextlib
from itertools import pairwise

import pytest
import torch
from torch import nn

from earlyexit_ssd.modeling.trunk import evaluating, ssdlite_trunk
from tests.modeling.conftest import assert_equal, small_model


@pytest.mark.parametrize("layers", [(8,), (8, 12), (12, 14), (1, 6, 13, 15)])
def test_segments_compute_the_backbone_s_maps(layers):
    backbone = small_model().backbone.eval()
    trunk, x = ssdlite_trunk(backbone), torch.rand(2, 3, 96, 96)
    tap, finest = x, None
    for start, end in pairwise([0, *(trunk.ends[layer] for layer in layers), len(trunk.steps)]):
        tap, finest = trunk.run(tap, start, end, finest)
    assert_equal(trunk.feature_maps(tap, finest), list(backbone(x).values()))


def test_tap_is_the_output_of_that_layer():
    backbone = small_model().backbone.eval()
    trunk, x = ssdlite_trunk(backbone), torch.rand(1, 3, 96, 96)
    expected = x
    for layer in list(backbone.features[0])[:9]:
        expected = layer(expected)
    assert torch.equal(trunk.run(x, 0, trunk.ends[8])[0], expected)
    # Layer 14 is after C4, which is split in two.
    for layer in [*list(backbone.features[0])[9:], *list(backbone.features[1])[:2]]:
        expected = layer(expected)
    assert torch.equal(trunk.run(x, 0, trunk.ends[14])[0], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_restores_every_flag(fails):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout()).train()
    model[0].eval()
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        if fails:
            raise RuntimeError
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()

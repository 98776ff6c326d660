"""The backbone in segments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from earlyexit_ssd.modeling.trunk import SegmentedTrunk, TrunkState, evaluating, small_copy
from tests.modeling.conftest import small_model


@pytest.mark.parametrize("layers", [(8,), (8, 12), (12, 14), (1, 6, 13, 15)])
def test_segments_give_the_backbone_s_own_maps(layers):
    backbone = small_model().backbone.eval()
    trunk, x = SegmentedTrunk(backbone, layers), torch.rand(2, 3, 96, 96)
    state = TrunkState(x)
    for segment in range(len(layers) + 1):
        state = trunk.run(state, segment)
    for found, expected in zip(trunk.feature_maps(state), backbone(x).values(), strict=True):
        assert torch.equal(found, expected)


def test_tap_is_the_output_of_that_layer():
    backbone = small_model().backbone.eval()
    x = torch.rand(1, 3, 96, 96)
    expected = x
    for layer in list(backbone.features[0])[:9]:
        expected = layer(expected)
    assert torch.equal(SegmentedTrunk(backbone, (8,)).run(TrunkState(x), 0).x, expected)
    # Layer 14 is behind C4, which is split in two.
    for layer in [*list(backbone.features[0])[9:], *list(backbone.features[1])[:2]]:
        expected = layer(expected)
    assert torch.equal(SegmentedTrunk(backbone, (14,)).run(TrunkState(x), 0).x, expected)


def test_selected_images_go_on_alone():
    state = TrunkState(torch.arange(3.0).reshape(3, 1, 1, 1), torch.arange(3.0).reshape(3, 1, 1, 1) * 2)
    kept = state.select(torch.tensor([True, False, True]))
    assert kept.x.flatten().tolist() == [0, 2]
    assert kept.finest.flatten().tolist() == [0, 4]


def test_features_of_a_layer_are_those_of_the_segment_that_ends_there():
    backbone = small_model().backbone.eval()
    x = torch.rand(1, 3, 64, 64)
    for layer in (8, 14):
        trunk = SegmentedTrunk(backbone, (layer,))
        assert torch.equal(trunk.features(x, layer), trunk.run(TrunkState(x), 0).x)


def test_a_small_copy_has_means_over_whole_cells():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert small_copy(x, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert torch.equal(small_copy(x, 4), x)
    assert small_copy(torch.full((2, 3, 10, 10), 0.25), 4).equal(torch.full((2, 3, 4, 4), 0.25))


@pytest.mark.parametrize(
    ("side", "pixels", "times"), [(320, 128, 2), (320, 96, 3), (288, 128, 2), (320, 192, 1), (317, 128, 2)]
)
def test_a_small_copy_is_interpolated_then_averaged(side, pixels, times):
    x = torch.rand(2, 3, side, side)
    larger = F.interpolate(x, (times * pixels, times * pixels), mode="bilinear", align_corners=False)
    assert torch.allclose(small_copy(x, pixels), F.avg_pool2d(larger, times), atol=5e-5)  # places are rounded


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

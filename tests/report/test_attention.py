"""Maps of where an exit looks."""

from __future__ import annotations

import pytest
import torch

from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.report.attention import CHANNELS, GRADIENTS, attention_maps, attention_pictures


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    exits = {"exit_layers": (4, 8, 12), "branch": ("light", "copied", "copied"), "empty": (12,)}
    return Architecture(classes=("cat",), image_size=96, width=0.25, channels=16, depth=(1,), **exits).build().eval()


def test_every_exit_with_a_head_has_a_map(model):
    maps = attention_maps(model, torch.rand(3, 60, 80))
    assert {name: method for name, (method, _) in maps.items()} == {
        "exit4": CHANNELS, "exit8": GRADIENTS, "full": GRADIENTS,
    }  # fmt: skip
    for _, values in maps.values():
        assert values.dim() == 2 and values.min() >= 0 and values.max() == pytest.approx(1.0, abs=1e-5)
    assert all(one.grad is None for one in model.parameters())


def test_channel_attention_weights_the_tap(model):
    image = torch.rand(3, 96, 96)
    branch, taps = model.branches["exit4"], []
    hook = branch.attention.register_forward_hook(lambda _, inputs, output: taps.append(output))
    values = attention_maps(model, image)["exit4"][1]
    hook.remove()
    expected = taps[-1][0].detach().abs().mean(0)
    torch.testing.assert_close(values, expected / expected.max())


def test_pictures_have_the_shape_of_the_photo(model):
    (first, *_), photo = attention_pictures(model, [(7, torch.rand(3, 200, 480))]), torch.rand(3, 10, 10)
    assert first.photo == 7 and first.picture.size == (240, 100)
    assert len(attention_pictures(model, [(0, photo), (1, photo)])) == 6

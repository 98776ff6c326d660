import copy

import pytest
import torch
from torch import nn

from earlyexit_ssd import ExitRouter, fuse_for_inference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, save_model

from .conftest import SMALL, small_model


@pytest.fixture
def trained():
    """BatchNorm statistics that matter."""
    model = small_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def test_every_exit_says_the_same(trained, images):
    before = copy.deepcopy(trained.state_dict())
    fused = fuse_for_inference(trained.train())
    assert not fused.training and not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        outputs, expected = fused.exit_outputs(images), trained.eval().exit_outputs(images)
    assert len(outputs.heads) == 3
    for head, other in zip(outputs.heads, expected.heads, strict=True):
        for key, values in head.items():
            assert torch.allclose(values, other[key], atol=1e-4), key
    assert all(value.equal(before[key]) for key, value in trained.state_dict().items())


def test_the_router_goes_along(trained, images):
    trained.router = ExitRouter(2, thresholds=[0.0, 1.0])
    fused = fuse_for_inference(trained)
    assert [int(found["exit_index"]) for found in fused(images)] == [0, 0, 0]
    assert fused.router is not trained.router


def test_what_is_fused_is_not_saved(trained, tmp_path):
    with pytest.raises(EarlyExitError, match="fused for inference cannot be saved"):
        save_model(tmp_path / "model.pth", fuse_for_inference(trained), None)
    assert not list(tmp_path.iterdir())


def test_synchronised_normalisation_is_fused_too(trained, images):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trained))
    fused = fuse_for_inference(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
    with torch.inference_mode():
        found, expected = fused.exit_outputs(images), fuse_for_inference(trained).exit_outputs(images)
    assert torch.allclose(found.heads[-1]["cls_logits"], expected.heads[-1]["cls_logits"], atol=1e-4)


def test_a_model_with_other_normalisation_is_saved(trained, tmp_path):
    save_model(tmp_path / "model.pth", nn.SyncBatchNorm.convert_sync_batchnorm(trained), Architecture(**SMALL))
    assert (tmp_path / "model.pth").is_file()

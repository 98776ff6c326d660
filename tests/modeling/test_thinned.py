"""Copies of the full path's layers: the same function where nothing is left out."""

import pytest
import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.thinned import CopiedShortCut, ThinnedBlock
from tests.modeling.conftest import small_model


@pytest.fixture
def backbone():
    """With statistics and scales that differ from channel to channel."""
    backbone = small_model().backbone.eval()
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return backbone


@pytest.mark.parametrize("layer", [2, 4, 7, 11])
def test_a_whole_copy_is_the_block(backbone, layer):
    block = list(backbone.features[0][layer].block)
    copied = ThinnedBlock(block, 1.0)
    copied.inherit(block)
    x = torch.rand(2, block[0][0].in_channels, 8, 8)
    assert torch.equal(copied.eval()(x), backbone.features[0][layer].block(x))


def test_channels_that_reach_nothing_go_first(backbone):
    """Half of the expansion is cut off at the projection: the other half, kept, is the whole block."""
    block = list(backbone.features[0][7].block)
    channels = block[-1][0].in_channels
    used = torch.randperm(channels, generator=torch.Generator().manual_seed(1))[: channels // 2].sort().values
    with torch.no_grad():
        unused = torch.ones(channels, dtype=torch.bool)
        unused[used] = False
        block[-1][0].weight[:, unused] = 0.0
    copied = ThinnedBlock(block, (channels // 2 // 8) * 8 / channels)
    kept = copied.inherit(block)
    assert set(kept.tolist()) <= set(used.tolist())
    assert copied.expanded_channels == len(kept) == channels // 2 // 8 * 8


def test_attention_and_norms_follow_their_channels(backbone):
    """A channel that is kept has the same value before the projection's attention as in the block."""
    block = list(backbone.features[0][11].block)
    copied = ThinnedBlock(block, 0.5).eval()
    kept = copied.inherit(block)
    x = torch.rand(1, block[0][0].in_channels, 6, 6)
    assert torch.allclose(copied[1](copied[0](x)), block[1](block[0](x))[:, kept], atol=1e-6)
    assert torch.equal(copied[2].fc2.weight, block[2].fc2.weight[kept])
    assert torch.equal(copied[2].fc1.weight, block[2].fc1.weight[:, kept])


def test_exit_before_c4_starts_as_the_full_path(backbone):
    model = small_model(exit_layers=(12,), copy=(1.0,), channels=0, depth=(2,)).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    model.inherit()
    early, full = model.exit_outputs([torch.rand(3, 96, 96)]).heads
    assert torch.equal(early["cls_logits"], full["cls_logits"])
    assert torch.equal(early["bbox_regression"], full["bbox_regression"])


@pytest.mark.parametrize(("layer", "blocks"), [(1, 5), (4, 3), (6, 3), (8, 2), (12, 1), (13, 0), (15, 0)])
def test_residual_layers_are_left_out(backbone, layer, blocks):
    short_cut = CopiedShortCut(backbone, layer, 0.5)
    assert len(short_cut.before) + (short_cut.c4 is not None) == blocks
    # half of C4's expansion, 168 channels at this width, as a multiple of 8; also where nothing is copied
    assert short_cut.first_channels == 80


def test_copies_learn_on_their_own(backbone):
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    short_cut = CopiedShortCut(backbone, 8, 0.5)
    short_cut.inherit(backbone)
    assert all(parameter.requires_grad for parameter in short_cut.parameters())
    short_cut.c4[0][0].weight.data.zero_()
    assert backbone.features[0][-1][0].weight.abs().sum() > 0


def test_behind_c4_a_branch_runs_what_the_trunk_has_not_run():
    model = small_model(exit_layers=(12, 13, 14, 15), channels=0, copy=(0.5,), depth=(2,)).train()
    assert [len(branch.tail.blocks) for branch in model.branches.values()] == [2, 2, 1, 0]
    images = [torch.rand(3, 96, 96)] * 2
    targets = [{"boxes": torch.tensor([[5.0, 5, 50, 60]]), "labels": torch.tensor([1])}] * 2
    sum(model(images, targets).values()).backward()
    for branch in model.branches.values():
        assert all(parameter.grad is not None for parameter in branch.parameters())


def test_older_models_with_channels_behind_c4_keep_their_blocks():
    model = small_model(exit_layers=(14, 15), channels=16, depth=(2,))
    assert [len(branch.tail.blocks) for branch in model.branches.values()] == [2, 2]


@pytest.mark.parametrize("channels", [0, 16])
def test_a_model_with_copies_comes_back_from_its_description(channels):
    model = small_model(exit_layers=(6, 12), copy=(0.5,), channels=channels)
    again = small_model(exit_layers=(6, 12), copy=(0.5,), channels=channels)
    again.load_state_dict(model.state_dict())
    image = [torch.rand(3, 96, 96)]
    for mine, theirs in zip(
        again.eval().exit_outputs(image).heads, model.eval().exit_outputs(image).heads, strict=True
    ):
        assert torch.equal(mine["cls_logits"], theirs["cls_logits"])


def test_shares_are_one_for_each_exit():
    model = small_model(exit_layers=(8, 12), copy=(0.5, 1.0))
    widths = [branch.copied.c4.expanded_channels for branch in model.branches.values()]
    assert widths[0] < widths[1] == model.backbone.features[0][-1][0].out_channels
    for wrong in ((0.5, 0.5, 0.5), (1.5,), (0.0,)):
        with pytest.raises(EarlyExitError, match="copy .*: expected one number in"):
            small_model(exit_layers=(8, 12), copy=wrong)

import pytest
import torch

from earlyexit_ssd.modeling.folding import FoldedClassificationHead
from earlyexit_ssd.modeling.tail import Tail, inherit_head
from tests.modeling.conftest import small_model


def test_fed_with_the_full_path_s_map_it_gives_the_full_path_s_maps():
    model = small_model().eval()
    tail = Tail(model.backbone, depth=2).eval()
    expansion, rest = model.backbone.features
    projected = rest[0](expansion(torch.rand(2, 3, 96, 96)))
    expected, x = [], projected
    for layer in rest[1:]:
        x = layer(x)
    for block in (None, *model.backbone.extra):
        x = x if block is None else block(x)
        expected.append(x)
    _, maps = tail(projected)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
    assert tail.in_channels == projected.shape[1]
    assert tail.out_channels == [one.shape[1] for one in maps]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_weights_are_copies_that_can_be_fetched_again(depth):
    model = small_model()
    tail = Tail(model.backbone, depth)
    assert len(tail.blocks) == depth
    last_block = model.backbone.features[1][2]
    with torch.no_grad():
        for parameter in last_block.parameters():
            parameter.add_(1.0)
    if depth:
        assert not torch.equal(next(tail.blocks[-1].parameters()), next(last_block.parameters()))
    tail.inherit(model.backbone)
    if depth:
        pairs = zip(tail.blocks[-1].parameters(), last_block.parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(parameter.requires_grad for parameter in tail.parameters())


def test_depth_has_an_end():
    with pytest.raises(ValueError, match="depth 3: a branch's tail has 0 to 2 residual blocks"):
        Tail(small_model().backbone, 3)


def test_head_takes_the_wanted_rows():
    model, wide = small_model(), small_model(classes=tuple("abcd"))
    wide.head.classification_head = FoldedClassificationHead(wide.head.classification_head, (4, 2))
    mine = model.branches["exit8"].head
    first = mine.classification_head.module_list[0][1].weight.clone()
    inherit_head(mine, wide.head)
    old = wide.head.classification_head.module_list[1][1].weight.view(6, 5, -1)
    new = mine.classification_head.module_list[1][1].weight.view(6, 3, -1)
    assert torch.equal(new, old[:, [0, 4, 2]])
    assert torch.equal(mine.classification_head.module_list[0][1].weight, first)
    for one, other in zip(
        mine.regression_head.module_list[1:].parameters(),
        wide.head.regression_head.module_list[1:].parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_model_s_branches_follow_its_full_path():
    model = small_model()
    with torch.no_grad():
        for parameter in model.backbone.features[1].parameters():
            parameter.mul_(2.0)
    model.inherit()
    for branch in model.branches.values():
        assert torch.equal(branch.tail.last[0].weight, model.backbone.features[1][-1][0].weight)

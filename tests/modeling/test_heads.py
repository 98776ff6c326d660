"""Heads: folded, cut and factorised."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.heads import (
    FactorisedPredictor,
    FoldedClassificationHead,
    cut_head,
    factorise,
    num_outputs,
    plan_class_change,
    slice_rows,
)
from earlyexit_ssd.modeling.trunk import norm_layer
from tests.modeling.conftest import small_model

SOURCE = ("person", "N/A", "chair", "couch")


def make_head():
    return SSDLiteClassificationHead([8, 4], [2, 3], 5, norm_layer).eval()


MAPS = [torch.randn(2, 8, 3, 3), torch.randn(2, 4, 1, 1)]


def test_folded_probabilities_are_the_ones_of_before():
    head = make_head()
    before = head(MAPS).softmax(-1)
    folded = FoldedClassificationHead(head, [3, 1])
    after = folded(MAPS).softmax(-1)
    assert num_outputs(folded) == 3
    assert torch.allclose(after[..., 1:], before[..., [3, 1]], atol=1e-6)
    assert torch.allclose(after[..., 0], before[..., [0, 2, 4]].sum(-1), atol=1e-6)


def test_folded_head_keeps_the_names():
    head = make_head()
    assert list(FoldedClassificationHead(head, [3]).state_dict()) == list(head.state_dict())


def test_a_folded_head_is_cut_and_left_alone():
    folded = FoldedClassificationHead(make_head(), [3, 1])
    before = {key: value.clone() for key, value in folded.state_dict().items()}
    whole = super(FoldedClassificationHead, folded).forward(MAPS)
    cut = cut_head(folded)
    assert num_outputs(cut) == 3
    assert torch.allclose(cut(MAPS), whole[..., [0, 3, 1]], atol=1e-6)
    assert all(value.equal(before[key]) for key, value in folded.state_dict().items())


def test_sliced_rows_are_the_ones_of_before():
    head = make_head()
    before = head(MAPS)
    slice_rows(head, plan_class_change(SOURCE, ("couch", "person")).rows)
    assert torch.allclose(head(MAPS), before[..., [0, 4, 1]], atol=1e-6)
    assert num_outputs(head) == 3


def test_new_class_starts_afresh():
    head = make_head()
    before = head(MAPS)
    change = plan_class_change(SOURCE, ("chair", "lamp"))
    slice_rows(head, change.rows)
    after = head(MAPS)
    assert torch.allclose(after[..., :2], before[..., [0, 3]], atol=1e-6)
    assert head.module_list[0][1].bias.view(2, 3)[:, 2].tolist() == [0, 0]
    assert str(change) == ("kept the weights of chair; 2 other classes are no longer detected; new classes: lamp")


def test_no_class_in_common():
    with pytest.raises(EarlyExitError, match="has none of the classes chairs \\(did you mean 'chair'\\?\\)"):
        plan_class_change(SOURCE, ("chairs",))


# In two thin steps.


def convolution(weight, bias):
    """A 1x1 convolution with these weights."""
    weight = torch.tensor(weight)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    with torch.no_grad():
        layer.weight.copy_(weight[..., None, None])
        layer.bias.copy_(torch.tensor(bias))
    return layer


def test_of_a_diagonal_the_largest_values_stay():
    predictor = FactorisedPredictor(3, 3, rank=2)
    predictor.approximate(convolution([[3.0, 0, 0], [0, 1, 0], [0, 0, 2]], [0.5, -1.0, 7.0]))
    found = predictor(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(found, torch.tensor([3.5, -1.0, 9.0]), atol=1e-6)


def test_a_matrix_of_that_rank_is_kept():
    torch.manual_seed(0)
    weight = torch.rand(8, 2) @ torch.rand(2, 5)
    layer, predictor = convolution(weight.tolist(), [0.1] * 8), FactorisedPredictor(5, 8, rank=2)
    predictor.approximate(layer)
    x = torch.rand(2, 5, 3, 3)
    assert torch.allclose(predictor(x), layer(x), atol=1e-5)


def test_more_rank_than_the_matrix_has_is_harmless():
    layer, predictor = convolution([[1.0, 2.0]], [3.0]), FactorisedPredictor(2, 1, rank=4)
    predictor.approximate(layer)
    assert predictor(torch.ones(1, 2, 1, 1)).item() == pytest.approx(6.0)


def test_only_predictors_that_get_cheaper_are_factorised():
    model = small_model(classes=tuple("abcdefghijklmnopqrst"))
    head = model.branches["exit8"].head.classification_head
    before = [block[1] for block in head.module_list]
    factorise(head, 8)
    for block, old in zip(head.module_list, before, strict=True):
        cheaper = 8 * (old.in_channels + old.out_channels) < old.in_channels * old.out_channels
        assert isinstance(block[1], FactorisedPredictor) == cheaper
    assert any(isinstance(block[1], FactorisedPredictor) for block in head.module_list)


def test_a_branch_s_predictors_start_from_the_full_path_s():
    classes = tuple("abcdefghijklmnopqrst")
    model = small_model(classes=classes, head_rank=1000)
    assert not any(isinstance(module, FactorisedPredictor) for module in model.modules())
    model = small_model(classes=classes, head_rank=8)
    mine = model.branches["exit8"].head.classification_head.module_list[1][1]
    theirs = model.head.classification_head.module_list[1][1]
    assert isinstance(mine, FactorisedPredictor)
    product = mine[1].weight.flatten(1) @ mine[0].weight.flatten(1)
    whole = theirs.weight.flatten(1)
    lost = torch.linalg.svdvals(whole)[8:].square().sum()
    assert torch.isclose((product - whole).square().sum(), lost, rtol=1e-3)
    assert torch.equal(mine[1].bias, theirs.bias)


def test_outputs_keep_their_shape():
    model = small_model(classes=tuple("abcdefghijklmnopqrst"), head_rank=8).eval()
    outputs = model.exit_outputs([torch.rand(3, 96, 96)])
    assert len({tuple(head["cls_logits"].shape) for head in outputs.heads}) == 1

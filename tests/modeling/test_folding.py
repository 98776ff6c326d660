import pytest
import torch
from torchvision.models.detection.ssdlite import SSDLiteClassificationHead

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.folding import (
    FoldedClassificationHead,
    cut_head,
    num_outputs,
    plan_class_change,
    slice_rows,
)
from earlyexit_ssd.modeling.ssdlite import norm_layer

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
    assert str(change) == ("kept the weights of chair; 2 other classes went into background; start afresh: lamp")


def test_no_class_in_common():
    with pytest.raises(EarlyExitError, match="knows none of the classes chairs \\(did you mean 'chair'\\?\\)"):
        plan_class_change(SOURCE, ("chairs",))

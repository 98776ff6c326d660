import pytest
import torch

from earlyexit_ssd.modeling import PathToExit
from earlyexit_ssd.modeling.paths import AllOutputs
from earlyexit_ssd.routing import ExitRouter


def test_path_gives_the_exit_s_outputs(model, images):
    model.eval()
    batch, _ = model.transform(images)
    for index, head in enumerate(model.exit_outputs(images).heads):
        logits, boxes = PathToExit(model, index)(batch.tensors)
        assert torch.equal(logits, head["cls_logits"])
        assert torch.equal(boxes, head["bbox_regression"])


def test_no_such_exit(model):
    with pytest.raises(ValueError, match="exits 0 to 2"):
        PathToExit(model, 3)


def test_all_outputs_are_those_of_every_exit_on_the_way(model, images):
    model.eval()
    batch, _ = model.transform(images)
    found, router = model.exit_outputs(images), ExitRouter(2, policy="entropy", temperatures=(1.0, 2.0))
    outputs = AllOutputs(PathToExit(model, 2, router))(batch.tensors)
    expected = [tensor for head in found.heads for tensor in head.values()]
    expected += [router.confidence(found.signals(index), index) for index in (0, 1)]
    assert len(outputs) == 8
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))


def test_hybrid_path_ends_with_the_boxes_of_the_full_path(model, images):
    model.eval()
    batch, _ = model.transform(images)
    found = model.exit_outputs(images)
    for index in range(3):
        logits, boxes = PathToExit(model, index, ExitRouter(2, hybrid=True))(batch.tensors)
        assert torch.equal(logits, found.heads[index]["cls_logits"])
        assert torch.equal(boxes, found.heads[-1]["bbox_regression"])

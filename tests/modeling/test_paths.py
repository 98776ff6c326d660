import pytest
import torch

from earlyexit_ssd.modeling import PathToExit


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

"""One pass for all exits."""

import pytest
import torch
from torch import nn

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.collect import collect, collect_detections
from earlyexit_ssd.modeling.outputs import ExitOutputs


class TwoExits(nn.Module):
    """The value of a photo is its score; exit 1 scores half of it."""

    exit_names = ("exit8", "full")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.passes = 0

    def exit_outputs(self, images):
        assert not self.training
        self.passes += 1
        values = torch.stack([image.mean() for image in images]) * self.weight
        heads = ({"cls_logits": values / 2}, {"cls_logits": values})
        return ExitOutputs(heads, (values[:, None],), [], [], [], (False,))

    def detections(self, outputs, index):
        return [
            {"boxes": torch.zeros(1, 4), "scores": value[None], "labels": torch.ones(1, dtype=torch.int64)}
            for value in outputs.heads[index]["cls_logits"]
        ]

    def forward(self, images):
        return self.detections(self.exit_outputs(images), 1)


class Identity:
    hybrid = False

    def confidence(self, signals, index):
        return signals.logits + index


def batches(*ids):
    def sample(image_id):
        return torch.full((3, 4, 4), image_id / 10), {"image_id": image_id}

    return [tuple(map(list, zip(*map(sample, batch), strict=True))) for batch in ids]


def test_every_exit_of_every_photo_in_the_loaders_order():
    model = TwoExits().train()
    collected = collect(model, batches((5, 2), (4,)), Identity())
    assert collected.image_ids == [5, 2, 4]
    assert model.passes == 2
    assert [found["scores"].item() for found in collected.detections[0].values()] == pytest.approx([0.25, 0.1, 0.2])
    assert collected.detections[1][4]["scores"].item() == pytest.approx(0.4)
    assert collected.confidences[0].tolist() == pytest.approx([0.25, 0.1, 0.2])
    assert collected.confidences[1].tolist() == pytest.approx([1.5, 1.2, 1.4])
    assert not collected.detections[0][5]["scores"].requires_grad
    assert model.training


def test_without_router_no_confidences():
    assert collect(TwoExits(), batches((1,))).confidences == []


def test_no_photos():
    collected = collect(TwoExits(), [], Identity())
    assert collected.image_ids == []
    assert [one.shape for one in collected.confidences] == [(0,), (0,)]


def test_any_detector():
    assert collect_detections(TwoExits(), batches((3,), (1,)))[3]["scores"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("run", [collect, collect_detections])
def test_an_id_twice_is_refused(run):
    with pytest.raises(DataError, match="image id 2 comes twice"):
        run(TwoExits(), batches((1, 2), (2,)))

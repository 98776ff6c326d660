import torch
from torchvision.models.detection._utils import BoxCoder, SSDMatcher

from earlyexit_ssd.modeling.matching import assign

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [50, 50, 60, 60], [0, 12, 4, 16]])


def run(boxes, labels):
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": torch.tensor(labels, dtype=torch.int64)}
    return assign([target], [ANCHORS], SSDMatcher(0.5), BoxCoder((10.0, 10.0, 5.0, 5.0)))


def test_iou_decides_not_the_order():
    # IoU with the anchors: 1, 0.5, 0, 0: the first two belong to the object.
    result = run([[0, 0, 10, 10]], [3])
    assert result.labels.tolist() == [[3, 3, 0, 0]]
    assert torch.equal(result.regression[0, 0], torch.zeros(4))


def test_every_object_gets_its_best_anchor_however_poor():
    # A small object whose best IoU is 4 x 4 of 100 pixels.
    assert run([[54, 54, 58, 58]], [2]).labels.tolist() == [[0, 0, 2, 0]]


def test_regression_by_hand():
    # Anchor [0, 0, 10, 20] for the object [0, 0, 10, 10]: centre moves by -5 of 20 (x10), height shrinks by half (x5).
    regression = run([[0, 0, 10, 10]], [1]).regression[0, 1]
    assert torch.allclose(regression, torch.tensor([0.0, -2.5, 0.0, 5 * torch.log(torch.tensor(0.5))]))


def test_photo_without_objects_is_background():
    result = run([], [])
    assert result.labels.tolist() == [[0, 0, 0, 0]]
    assert not result.foreground.any()

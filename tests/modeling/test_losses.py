"""The losses of one exit."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.ops import box_iou

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.losses import (
    Assignment,
    LossSettings,
    assign,
    detection_losses,
    distillation_loss,
    mined_negatives,
)
from tests.modeling.conftest import small_model

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [50, 50, 60, 60], [0, 12, 4, 16]])


def assign_to_anchors(boxes, labels):
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": torch.tensor(labels, dtype=torch.int64)}
    return assign([target], [ANCHORS], SSDMatcher(0.5), BoxCoder((10.0, 10.0, 5.0, 5.0)))


def test_object_gets_every_anchor_with_an_iou_of_half():
    # The IoUs with the anchors are 1, 0.5, 0, 0.
    result = assign_to_anchors([[0, 0, 10, 10]], [3])
    assert result.labels.tolist() == [[3, 3, 0, 0]]
    assert torch.equal(result.regression[0, 0], torch.zeros(4))


def test_every_object_gets_its_best_anchor():
    # The best IoU of the small object is 0.16.
    assert assign_to_anchors([[54, 54, 58, 58]], [2]).labels.tolist() == [[0, 0, 2, 0]]


def test_regression_by_hand():
    # Anchor [0, 0, 10, 20], object [0, 0, 10, 10]: the centre moves by -5 of 20 (x 10), the height halves (x 5).
    regression = assign_to_anchors([[0, 0, 10, 10]], [1]).regression[0, 1]
    assert torch.allclose(regression, torch.tensor([0.0, -2.5, 0.0, 5 * torch.log(torch.tensor(0.5))]))


def test_photo_without_objects_is_background():
    result = assign_to_anchors([], [])
    assert result.labels.tolist() == [[0, 0, 0, 0]]
    assert not result.foreground.any()


# Losses.

LOG2 = math.log(2)


def head(logits: list, boxes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    logits = torch.tensor(logits, dtype=torch.float32)
    boxes = torch.zeros(*logits.shape[:2], 4) if boxes is None else boxes
    return {"cls_logits": logits, "bbox_regression": boxes}


def assignment(labels: list, regression: torch.Tensor | None = None) -> Assignment:
    labels = torch.tensor(labels)
    return Assignment(labels, torch.zeros(*labels.shape, 4) if regression is None else regression)


def test_hard_negatives_have_the_largest_loss():
    loss = torch.tensor([[9.0, 1, 5, 3, 4], [2, 8, 6, 7, 1]])
    foreground = torch.tensor([[True, False, False, False, False], [False] * 5])
    assert mined_negatives(loss, foreground, 2, 1).tolist() == [
        [False, False, True, False, True],
        [False, True, False, False, False],
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 12), st.integers(0, 2**31))
@example(9, 0.0, 0, 0)  # neither positives nor a minimum
def test_count_of_negatives(boxes, share, minimum, seed):
    generator = torch.Generator().manual_seed(seed)
    foreground = torch.rand(2, boxes, generator=generator) < share
    negatives = mined_negatives(torch.rand(2, boxes, generator=generator), foreground, 3, minimum)
    positives = foreground.sum(1)
    wanted = torch.minimum((3 * positives).clamp(min=minimum), boxes - positives)
    assert torch.equal(negatives.sum(1), wanted)
    assert not (negatives & foreground).any()


def test_losses_by_hand():
    # One positive and three equal negatives, all at p = 1/2; box off by 2 in one coordinate: smooth L1 is 1.5.
    boxes = torch.zeros(1, 4, 4)
    boxes[0, 0, 0] = 2.0
    losses = detection_losses(head([[[0, 0]] * 4], boxes), assignment([[1, 0, 0, 0]]), LossSettings())
    assert losses["classification"].item() == pytest.approx(4 * LOG2 / 1)
    assert losses["bbox_regression"].item() == pytest.approx(1.5)


def test_photo_without_objects_has_a_loss_only_with_a_minimum():
    args = head([[[0, 0]] * 6]), assignment([[0] * 6])
    assert detection_losses(*args, LossSettings(min_negatives=0))["classification"].item() == 0
    # The sum over three negatives is divided by 3 / 3.
    loss = detection_losses(*args, LossSettings(min_negatives=3))["classification"].item()
    assert loss == pytest.approx(3 * LOG2)


def test_focal_by_hand():
    # p_t = 1/2 everywhere: alpha * (1/2)^2 * log 2, one positive (0.25) and one negative (0.75), one positive counted.
    settings = LossSettings(classification="focal")
    loss = detection_losses(head([[[0, 0]] * 2]), assignment([[1, 0]]), settings)["classification"].item()
    assert loss == pytest.approx((0.25 + 0.75) * 0.25 * LOG2)


def test_equals_torchvision_without_a_minimum(images, targets):
    model = small_model()
    outputs = model.eval().exit_outputs(images)
    head_outputs = outputs.heads[-1]
    boxes = [target["boxes"] for target in targets]
    matched = [
        model.proposal_matcher(box_iou(box, anchors)) if len(box) else torch.full((len(anchors),), -1)
        for box, anchors in zip(boxes, outputs.anchors, strict=True)
    ]
    expected = model.compute_loss(targets, head_outputs, outputs.anchors, matched)
    losses = detection_losses(head_outputs, model.assign(targets, outputs.anchors), LossSettings(min_negatives=0))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_distillation_by_hand():
    teacher = head([[[0.0, math.log(3)]]])
    assert distillation_loss(teacher, teacher, LossSettings()).item() == pytest.approx(0, abs=1e-6)
    # Teacher (1/4, 3/4), student (1/2, 1/2): sum p log(p / q); foreground mass 3/4 is below 1, so divided by 1.
    student = head([[[0.0, 0.0]]], torch.tensor([[[2.0, 0, 0, 0]]]))
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distillation_loss(student, teacher, LossSettings()).item() == pytest.approx(divergence + 0.75 * 1.5)


def test_distillation_gives_the_teacher_no_gradient():
    student, teacher = head([[[0.0, 0.0]]]), head([[[0.0, 1.0]]])
    for part in (student, teacher):
        part["cls_logits"].requires_grad_()
    distillation_loss(student, teacher, LossSettings()).backward()
    assert student["cls_logits"].grad.abs().sum() > 0
    assert teacher["cls_logits"].grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "nxt"}, "did you mean 'next'"),
        ({"classification": "focl"}, "did you mean 'focal'"),
        ({"supervision": "teacher"}, "needs a teacher"),
        ({"neg_to_pos_ratio": 0}, "neg_to_pos_ratio is 0, expected a number above 0"),
        ({"exit_weights": 2.0}, "exit_weights is 2.0, expected a list"),
        ({"exit_weights": (1.0, -1.0)}, r"exit_weights\[1\] is -1.0, expected 0 to inf"),
        ({"full_weight": "1"}, "full_weight is '1', expected a finite number"),
        ({"focal_gamma": float("nan")}, "focal_gamma is nan, expected a finite number"),
        ({"min_negatives": None}, "min_negatives is None, expected a whole number"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(EarlyExitError, match=message):
        LossSettings(**settings)

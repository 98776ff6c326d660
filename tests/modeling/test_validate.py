"""Checks of images, targets, routers and losses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import LossSettings
from earlyexit_ssd.modeling.detector import FullPathLosses
from earlyexit_ssd.modeling.validate import check_images, check_router, check_targets
from tests.modeling.conftest import assert_equal


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image: expected a list of at least one"),
        ([np.zeros((3, 4, 4))], "image 0: expected a float tensor .* got ndarray"),
        ([torch.rand(3, 4, 4), torch.rand(3, 0, 4)], "image 1: expected a float tensor"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], "image 0: expected a float tensor"),
        ([torch.rand(3, 4, 4) * 255], "image 0: values from .* expected \\[0, 1\\]; divide pixels by 255"),
        ([torch.full((3, 4, 4), -2.0)], "image 0: values from -2 to -2, expected"),
        ([torch.full((3, 4, 4), torch.nan)], "image 0: values from nan to nan, expected"),
    ],
)
def test_invalid_images_are_named(images, message):
    with pytest.raises(EarlyExitError, match=message):
        check_images(images)


def test_values_slightly_outside_0_to_1_are_accepted():
    check_images([torch.tensor([-0.2, 1.3, 0.5])[:, None, None].expand(3, 4, 4)])


BOX = torch.tensor([[20, 30, 70, 90]])
CENTRES = BoundingBoxes(BOX, format="CXCYWH", canvas_size=(96, 96))


@pytest.mark.parametrize("boxes", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_targets_of_any_number_type_have_the_same_losses(model, boxes, labels):
    photos = [torch.full((3, 96, 96), 0.4), torch.full((3, 80, 120), 0.6)]
    plain = [
        {"boxes": BOX.float(), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)},
    ]
    other = [{"boxes": BOX.to(boxes), "labels": torch.tensor([2]).to(labels)}, plain[1]]
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 0.0
    with torch.no_grad():
        expected, losses = (model.train()(photos, targets) for targets in (plain, other))
        full_path = FullPathLosses(model).train()(photos, other)
    assert_equal(losses, expected)
    assert_equal(full_path, {key: expected[key] for key in full_path})
    assert other[0]["boxes"].dtype == boxes  # the caller's targets do not change


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "target 1: expected a dict with the tensors boxes and labels, but boxes is missing"),
        ({"boxes": torch.zeros(0, 4)}, "target 1: .* but labels is missing"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [1]}, "target 1: .* but boxes has the type list"),
        ({"boxes": np.ones((1, 4)), "labels": [1]}, "the type ndarray of float64; .* torch.as_tensor"),
        ({"boxes": torch.ones(1, 4) > 0, "labels": torch.ones(1)}, "target 1: boxes are torch.bool, expected numbers"),
        ({"boxes": BOX, "labels": torch.ones(1)}, "target 1: labels are torch.float32, expected whole numbers"),
        ({"boxes": BOX, "labels": torch.ones(1) > 0}, "target 1: labels are torch.bool, expected whole numbers"),
        ({"boxes": CENTRES, "labels": torch.tensor([1])}, "target 1: boxes are CXCYWH, expected XYXY; convert"),
        ({"boxes": BOX, "labels": torch.ones(1, 1, dtype=torch.int64)}, r"target 1: expected boxes .* and \[1, 1\]"),
        ({"boxes": torch.ones(1, 3), "labels": torch.ones(1)}, r"target 1: expected boxes \[n, 4\] and labels \[n\]"),
        ({"boxes": BOX, "labels": torch.tensor([1, 1])}, r"target 1: expected boxes \[n, 4\] and labels \[n\]"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]]), "labels": torch.tensor([1])}, "target 1, box 0: .5.0, 5.0, 5"),
        ({"boxes": BOX * math.nan, "labels": torch.tensor([1])}, "target 1, box 0: .nan"),
        ({"boxes": BOX, "labels": torch.tensor([0])}, "target 1: labels 0..0, expected 1..1"),
        ({"boxes": BOX, "labels": torch.tensor([2])}, "target 1: labels 2..2, expected 1..1"),
    ],
)
def test_invalid_targets_are_named(target, message):
    good = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([1])}
    with pytest.raises(EarlyExitError, match=message):
        check_targets([good, target], 2, ("chair",))


@pytest.mark.parametrize("router", ["max_foreground", ExitRouter, {}])
def test_objects_without_a_router_s_methods_are_refused(model, images, router):
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        check_router(router, model.num_early_exits)
    model.router = router
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        model.eval()(images)


def test_router_needs_a_temperature_loss_in_training(model, images, targets):
    model.router = SimpleNamespace(hybrid=False, confidence=len, needs=len, leaves=len)
    check_router(model.router, model.num_early_exits)
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        model.train()(images, targets)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"teacher": "full"}, "expected a LossSettings"),
        (LossSettings(exit_weights=(1, 2, 3)), "exit_weights of the losses is .1, 2, 3., expected one number"),
    ],
)
def test_constructor_checks_the_losses(model, losses, message):
    with pytest.raises(EarlyExitError, match=message):
        EarlyExitSSDLite(model, losses=losses)

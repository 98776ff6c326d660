"""What the model refuses, in one line each."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import build_ssdlite
from earlyexit_ssd.modeling.validate import check_images, check_router, check_targets


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image: expected a list of at least one"),
        ([np.zeros((3, 4, 4))], "image 0: expected a float tensor .* got ndarray"),
        ([torch.rand(3, 4, 4), torch.rand(3, 0, 4)], "image 1: expected a float tensor"),
        ([torch.rand(3, 4, 4) * 255], "image 0: values from .* expected \\[0, 1\\]; divide pixels by 255"),
        ([torch.full((3, 4, 4), -2.0)], "image 0: values from -2 to -2, expected"),
        ([torch.full((3, 4, 4), torch.nan)], "image 0: values from nan to nan, expected"),
    ],
)
def test_images_that_no_detector_understands(images, message):
    with pytest.raises(EarlyExitError, match=message):
        check_images(images)


def test_a_little_outside_is_what_interpolation_does():
    check_images([torch.tensor([-0.2, 1.3, 0.5])[:, None, None].expand(3, 4, 4)])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "target 1: expected a dict with the tensors boxes and labels, it has no boxes"),
        ({"boxes": torch.zeros(0, 4)}, "target 1: .* it has no labels"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [1]}, "target 1: .* it has boxes list"),
        ({"boxes": torch.ones(1, 3), "labels": torch.ones(1)}, r"target 1: expected boxes \[n, 4\] and labels \[n\]"),
    ],
)
def test_targets_that_teach_nothing(target, message):
    good = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([1])}
    with pytest.raises(EarlyExitError, match=message):
        check_targets([good, target], 2, ("chair",))


@pytest.mark.parametrize("router", ["max_foreground", ExitRouter, {}])
def test_a_router_is_a_router(model, images, router):
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        check_router(router, model.num_early_exits)
    model.router = router  # however it came there
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        model.eval()(images)


def test_a_router_that_trains_has_a_loss_for_its_temperatures(model, images, targets):
    model.router = SimpleNamespace(hybrid=False, confidence=len, needs=len, leaves=len)
    check_router(model.router, model.num_early_exits)
    with pytest.raises(EarlyExitError, match="expected an ExitRouter, or None"):
        model.train()(images, targets)


def test_the_constructor_looks_at_its_parts():
    detector = build_ssdlite(num_classes=2, image_size=96, width=0.25)
    with pytest.raises(EarlyExitError, match="expected a LossSettings"):
        EarlyExitSSDLite(detector, exit_layers=(8,), channels=16, depth=(1,), losses={"teacher": "full"})

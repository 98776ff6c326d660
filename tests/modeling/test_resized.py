"""The plain detector at other sizes."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.modeling.resized import resize_detector
from tests.modeling.conftest import SMALL, small_model

ARCHITECTURE = Architecture(**SMALL)


def boxes_of(generator, size: int) -> list[torch.Tensor]:
    """Default boxes of each grid, [side, side, boxes per cell, 4]."""
    sides = [side for side, _ in small_model(image_size=size).grids]
    maps = [torch.zeros(1, 1, side, side) for side in sides]
    (boxes,) = generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)
    parts = boxes.split([6 * side * side for side in sides])
    return [part.reshape(side, side, 6, 4) for part, side in zip(parts, sides, strict=True)]


@pytest.mark.parametrize("size", [64, 160])
def test_default_boxes_keep_their_pixels(model, size):
    own = boxes_of(model.anchor_generator, 96)
    others = boxes_of(resize_detector(model, ARCHITECTURE, size).anchor_generator, size)
    for mine, theirs in zip(own, others, strict=True):
        both = min(len(mine), len(theirs))
        assert torch.allclose(mine[:both, :both], theirs[:both, :both], atol=1e-3)


def test_at_its_own_size_it_is_the_full_path(model, images):
    model.eval()
    with torch.no_grad():
        expected, found = model(images), resize_detector(model, ARCHITECTURE, 96)(images)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine["boxes"], theirs["boxes"], atol=1e-3)
        assert torch.equal(mine["labels"], theirs["labels"])


def test_weights_are_the_model_s_and_the_model_is_left_alone(model, images):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    detector = resize_detector(model, ARCHITECTURE, 64)
    assert not detector.training
    with torch.no_grad():
        detector(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())

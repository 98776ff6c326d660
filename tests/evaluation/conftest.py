"""Small ground truths and detections."""

import contextlib
import io
from collections.abc import Callable

import pytest
import torch
from pycocotools.coco import COCO
from torch import nn

from earlyexit_ssd.modeling.ssdlite import earlyexit_ssdlite320_mobilenet_v3_large

Object = tuple[int, int, tuple[float, float, float, float]] | tuple[int, int, tuple[float, float, float, float], int]


def build_ground_truth(images: int, objects: list[Object], classes: tuple[str, ...] = ("cat", "dog")) -> COCO:
    """Return a COCO with images 1..n of 640 x 640. An object is (image, label, xyxy box[, iscrowd])."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index + 1, "width": 640, "height": 640} for index in range(images)],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(classes)],
        "annotations": [
            {
                "id": index + 1,
                "image_id": image,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": crowd[0] if crowd else 0,
            }
            for index, (image, label, (x1, y1, x2, y2), *crowd) in enumerate(objects)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def build_found(*found: tuple[int, float, tuple[float, float, float, float]]) -> dict[str, torch.Tensor]:
    """Return detections of one image. Each is (label, score, xyxy box)."""
    return {
        "boxes": torch.tensor([box for *_, box in found], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in found], dtype=torch.float32),
        "labels": torch.tensor([label for label, *_ in found], dtype=torch.int64),
    }


def build_random_case(seed: int, images: int = 12, classes: int = 3) -> tuple[COCO, dict[int, dict]]:
    """Return objects, some of them crowds, and detections near and far from them, with different scores."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def random_box() -> tuple[float, float, float, float]:
        x, y, side = uniform(0, 400), uniform(0, 400), uniform(40, 200)
        return x, y, x + side, y + side * uniform(0.5, 1.5)

    objects, detections = [], {}
    for image in range(1, images + 1):
        mine = [(image, integer(1, classes + 1), random_box(), int(uniform(0, 1) < 0.2)) for _ in range(integer(0, 5))]
        objects += mine
        found = [
            (label, uniform(0, 1), tuple(value + uniform(-9, 9) for value in box))
            for _, label, box, _ in mine
            for _ in range(integer(0, 3))
        ]
        found += [(integer(1, classes + 1), uniform(0, 1), random_box()) for _ in range(integer(0, 3))]
        detections[image] = build_found(*found)
    names = tuple(f"class{index}" for index in range(classes))
    return build_ground_truth(images, objects, names), detections


@pytest.fixture(scope="session")
def ground_truth() -> Callable[..., COCO]:
    return build_ground_truth


@pytest.fixture(scope="session")
def found() -> Callable[..., dict[str, torch.Tensor]]:
    return build_found


@pytest.fixture(scope="session")
def random_case() -> Callable[..., tuple[COCO, dict[int, dict]]]:
    return build_random_case


@pytest.fixture(scope="session")
def small_model() -> nn.Module:
    """An untrained detector (96 px) with exits behind layers 8 and 12, for two classes."""
    torch.manual_seed(0)
    model = earlyexit_ssdlite320_mobilenet_v3_large(
        weights_backbone=None, num_classes=3, image_size=96, width=0.35, channels=32, classes=("cat", "dog")
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    # torchvision's initialisation; with larger weights, rounding errors grow from layer to layer
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.03)
    with torch.no_grad():
        model.exit_outputs(list(torch.rand(8, 3, 96, 96)))  # BatchNorm statistics, so that photos differ in confidence
    return model

"""A small routed detector, and its exported files."""

import copy
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.modeling.ssdlite import earlyexit_ssdlite320_mobilenet_v3_large
from earlyexit_ssd.pipeline import export
from tests.deploy.fakes import fake_video  # noqa: F401 - a fixture


def build_model(**settings: object) -> EarlyExitSSDLite:
    """An untrained detector at 96 px with two classes, by default with exits after layers 8 and 12.

    Its weights are scaled so that scores differ between photos by more than rounding.
    """
    torch.manual_seed(0)
    settings = {"channels": 32, "score_thresh": 0.3, **settings}
    model = earlyexit_ssdlite320_mobilenet_v3_large(
        weights_backbone=None, num_classes=3, image_size=96, width=0.35, classes=("cat", "dog"), **settings
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision initialises: larger weights amplify rounding errors
            nn.init.normal_(module.weight, std=0.03)
    with torch.no_grad():
        outputs = model.exit_outputs(list(torch.rand(8, 3, 96, 96)))
        for head, part in zip(outputs.heads, [*model.branches.values(), model.head], strict=True):
            for name, weight in part.named_parameters():
                if "classification_head" in name and weight.shape[-2:] == (1, 1):
                    weight.mul_(2 / head["cls_logits"].std())
    return model.eval()


def build_photos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Photos uint8 [H, W, 3] of several sizes, with coloured patches."""
    rng = np.random.default_rng(seed)
    photos = []
    for height, width in rng.integers(40, 200, (count, 2)):
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        photos.append(coarse[np.arange(height) * 6 // height][:, np.arange(width) * 6 // width])
    return photos


def save_photos(folder: Path, count: int) -> Path:
    """Write `build_photos` into a folder, and return it."""
    folder.mkdir(exist_ok=True)
    for place, photo in enumerate(build_photos(count)):
        Image.fromarray(photo).save(folder / f"{place}.png")
    return folder


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    return build_photos(6)


@pytest.fixture(scope="session")
def model(photos) -> EarlyExitSSDLite:
    """A detector whose thresholds let a third of the photos leave at each exit."""
    model = build_model()
    model.router = ExitRouter(2, policy="max_foreground", temperatures=(1.5, 0.8))
    with torch.no_grad():
        outputs = model.exit_outputs([torch.from_numpy(photo / 255).permute(2, 0, 1).float() for photo in photos])
        first, second = (model.router.confidence(outputs.signals(index), index).sort() for index in range(2))
        rest = second.values[torch.isin(second.indices, first.indices[:4])]
    model.router.thresholds = float(first.values[3:5].mean()), float(rest[1:3].mean())
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def onnx_file(model, folder, made_once) -> Path:
    def make(where: Path) -> None:
        trace = functools.cache(export.build_segments)  # one trace for both formats
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "exportable", functools.cache(export.exportable))
            patch.setattr(export, "build_segments", lambda model: copy.deepcopy(trace(model)))
            for name, file_format in (("detector.onnx", "onnx"), ("staged", "staged")):
                export.export_detector(model, where / name, file_format)

    shutil.copytree(made_once("exported_once", make), folder, dirs_exist_ok=True)
    return folder / "detector.onnx"


@pytest.fixture(scope="session")
def staged_folder(onnx_file) -> Path:
    return onnx_file.with_name("staged")

"""Fixtures that write tiny data sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fvcore.common.config import CfgNode
from PIL import Image

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data.problems import MODES, Problems
from earlyexit_ssd.errors import DataError

CATEGORIES = ({"id": 62, "name": "chair"}, {"id": 3, "name": "cat"})
# x, y, width, height in a photo of 60 x 40: two chairs and a cat
ANNOTATIONS = (
    {"id": 1, "image_id": 10, "category_id": 62, "bbox": [5, 6, 20, 30], "area": 500.0, "iscrowd": 0},
    {"id": 2, "image_id": 10, "category_id": 3, "bbox": [30, 10, 10, 10], "iscrowd": 1},
    {"id": 3, "image_id": 20, "category_id": 62, "bbox": [0, 0, 60, 40], "difficult": 1},
)


def write_photo(path: Path, size: tuple[int, int] = (60, 40)) -> None:
    """Write a photo of noise that depends on the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., CfgNode]:
    """Write a COCO set of three photos (10: chair and crowd of cats, 20: difficult chair, 30: empty) named ``tiny``.

    Keyword arguments replace parts of the JSON; ``entries`` are added to the annotations, ``photos`` to the images.
    """

    def make(
        name: str = "tiny",
        entries: tuple[dict[str, Any], ...] = (),
        photos: tuple[dict[str, Any], ...] = (),
        **parts: Any,
    ) -> CfgNode:
        images = [{"id": i, "file_name": f"{name}{i}.png", "width": 60, "height": 40} for i in (10, 20, 30)]
        images += photos
        for image in images:
            if "file_name" in image and not (tmp_path / name / image["file_name"]).exists():
                write_photo(tmp_path / name / image["file_name"])
        tree = {"images": images, "annotations": [*ANNOTATIONS, *entries], "categories": CATEGORIES, **parts}
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
        cfg = get_cfg()
        cfg.DATA.ROOT = str(tmp_path)
        cfg.DATA.DATASETS = ((name, f"{name}.json", name),)
        cfg.DATA.TRAIN = (name,)
        cfg.DATA.AUGMENTATION = "none"
        return cfg

    return make


@pytest.fixture
def make_voc(tmp_path: Path) -> Callable[..., Path]:
    """Write a VOC devkit of the given XML texts, ``{stem: xml}``, and photos of 60 x 40; returns its folder."""

    def make(texts: dict[str, str], split: str = "trainval", folder: str = "VOCdevkit/VOC2012") -> Path:
        devkit = tmp_path / folder
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (devkit / part).mkdir(parents=True, exist_ok=True)
        for stem, text in texts.items():
            (devkit / "Annotations" / f"{stem}.xml").write_text(text)
            write_photo(devkit / "JPEGImages" / f"{stem}.jpg")
        (devkit / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(texts) + "\n")
        return devkit

    return make


def voc_object(name: str, box: tuple[Any, Any, Any, Any], difficult: Any = 0) -> str:
    """Return an ``<object>`` of a VOC file."""
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def voc_xml(*objects: str, filename: str = "other.jpg") -> str:
    """Return the text of a VOC file of a photo of 60 x 40 with these objects."""
    size = "<size><width>60</width><height>40</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture(params=MODES)
def on_bad(request: pytest.FixtureRequest) -> str:
    return request.param


def repaired_and_skipped(read: Callable[[Problems], Any], counts: dict[str, int], message: str) -> tuple[Any, Any]:
    """Return ``read(problems)`` in the modes "repair" and "skip", which must count ``counts``. In mode "refuse" it must
    raise a one-line error that matches ``message``."""
    with pytest.raises(DataError, match=message) as error:
        read(Problems("refuse"))
    assert "\n" not in str(error.value)
    repair, skip = Problems("repair"), Problems("skip")
    results = read(repair), read(skip)
    assert repair.counts == skip.counts == counts
    return results


@pytest.fixture
def photo_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a photo of noise and return its path."""

    def make(name: str, size: tuple[int, int] = (60, 40)) -> Path:
        write_photo(tmp_path / name, size)
        return tmp_path / name

    return make

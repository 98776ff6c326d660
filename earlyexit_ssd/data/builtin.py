"""The data sets that the catalog knows from the start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fvcore.common.config import CfgNode

from earlyexit_ssd.data import catalog
from earlyexit_ssd.data.coco import read_coco
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.data.shapes import ensure_synthetic
from earlyexit_ssd.data.voc import read_voc
from earlyexit_ssd.errors import DataError

_VOC_SPLITS = {"2007": ("trainval", "test"), "2012": ("train", "val", "trainval")}


def register_builtin() -> None:
    """Register them all; called once, when the package is imported."""
    for split in ("train", "calib", "test"):
        _register_synthetic(split)
        for name in ("voc2012_animals", "furniture"):
            catalog.register_coco(f"{name}_{split}", f"{name}/annotations/instances_{split}.json", f"{name}/{split}")
    for split in ("train", "val"):
        annotations = f"coco/annotations/instances_{split}2017.json"
        catalog.register_coco(f"coco_2017_{split}", annotations, f"coco/{split}2017")
    for year, splits in _VOC_SPLITS.items():
        for split in splits:
            _register_voc(year, split)
    catalog.register_voc("voc_xml_sample_trainval", "voc_xml_sample/VOCdevkit/VOC2012", "trainval")


def _register_synthetic(split: str) -> None:
    name = f"synthetic_chairs_{split}"

    def load(root: Path, data: CfgNode, problems: Problems) -> RawDataset:
        settings = data.SYNTHETIC
        ensure_synthetic(root, tuple(settings.SIZES), settings.IMAGE_SIZE, settings.SEED)
        folder = root / "synthetic_chairs"
        return read_coco(name, folder / "annotations" / f"instances_{split}.json", folder / split, problems)

    catalog.register(name, load)


def _register_voc(year: str, split: str) -> None:
    name = f"voc_{year}_{split}"

    def load(root: Path, data: CfgNode, problems: Problems) -> RawDataset:
        devkit = root / "VOCdevkit" / f"VOC{year}"
        listing = devkit / "ImageSets" / "Main" / f"{split}.txt"
        if not os.path.isfile(listing):
            if not data.DOWNLOAD:
                raise DataError(
                    f"{os.path.abspath(listing)}: data set {name!r} is not there; set DATA.ROOT or "
                    f"the environment variable {catalog.ROOT_VARIABLE} to the folder that holds VOCdevkit, "
                    "or set DATA.DOWNLOAD to True"
                )
            download_voc(root, year, split)
        return read_voc(name, devkit, split, problems, data.ALLOW_OUTSIDE)

    catalog.register(name, load)


def download_voc(root: Path, year: str, split: str) -> None:
    """Fetch and unpack a VOC devkit under ``root``, by torchvision: first beside it, so that the lists of photos, by
    which a devkit is known, are there when all photos are.

    Raises:
        DataError: the download failed.
    """
    from torchvision.datasets import VOCDetection

    staging, name = root / f".VOC{year}_{split}.partial", f"VOCdevkit/VOC{year}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        VOCDetection(str(staging), year=year, image_set=split, download=True)
        _move_in(staging / name, root / name)
        shutil.rmtree(staging)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"VOC {year} could not be downloaded to {root.resolve()} ({reason}); check the network, "
            "or unpack the VOCdevkit there by hand"
        ) from None


def _move_in(source: Path, target: Path) -> None:
    """Move the files of a devkit into another, which may hold those of other splits; its lists of photos last."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.parts[0] == "ImageSets", path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(target / path)

"""Data sets by name: entries of DATA.DATASETS, read by the format that recognises them, and sets that are built in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fvcore.common.config import CfgNode

from earlyexit_ssd.data import coco, folder, voc, yolo  # noqa: F401 - they register their formats
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import FORMATS, RawDataset
from earlyexit_ssd.data.shapes import SPLITS, ensure_synthetic
from earlyexit_ssd.errors import ConfigError, DataError, nearest, shown

ROOT_VARIABLE = "EARLYEXIT_SSD_DATASETS"

Loader = Callable[[Path, CfgNode, Problems], RawDataset]
"""(root of the data sets, the ``DATA`` node of the configuration, collector of problems) -> data set."""

_LOADERS: dict[str, Loader] = {}


def register(name: str, loader: Loader) -> None:
    """Make a data set known by ``name``; a DataError if the name is taken."""
    if name in _LOADERS:
        raise DataError(f"data set {name!r} is registered already; choose another name")
    _LOADERS[name] = loader


def register_coco(name: str, annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> None:
    """Make a COCO JSON file and its folder of photos known by ``name``; paths are relative to the root."""
    register(name, _entry(name, annotations, images))


def register_voc(name: str, devkit: str | os.PathLike[str], split: str) -> None:
    """Make a split of a VOC devkit (such as VOC2012) known by ``name``; the path is relative to the root."""
    register(name, _entry(name, devkit, split))


def _entry(name: str, annotations: str | os.PathLike[str], photos: str | os.PathLike[str]) -> Loader:
    """The loader of an entry as ``DATA.DATASETS`` has them."""

    def load(root: Path, data: CfgNode, problems: Problems) -> RawDataset:
        path = root / annotations
        known = next(one for one in reversed(FORMATS.values()) if one.recognises(str(annotations), path))
        if annotations:
            _require(name, path)
        if known.names_split:
            return known.read(name, path, photos, problems, data.ALLOW_OUTSIDE)
        _require(name, root / photos)
        return known.read(name, path, root / photos, problems, data.ALLOW_OUTSIDE)

    return load


def _require(name: str, path: Path, otherwise: str = "put it there") -> None:
    if not os.path.exists(path):
        fix = f"set DATA.ROOT or the environment variable {ROOT_VARIABLE} to the folder of the data sets"
        raise DataError(f"{os.path.abspath(path)}: data set {name!r} is not there; {fix}, or {otherwise}")


def get(name: str) -> Loader:
    """The loader of a registered data set; for an unknown name a ConfigError with the nearest one."""
    if name not in _LOADERS:
        hint = nearest(name, _LOADERS) or f"; known: {', '.join(sorted(_LOADERS))}"
        fix = "add your own with DATA.DATASETS or earlyexit_ssd.data.register_coco"
        raise ConfigError(f"no data set is named {name!r}{hint}; {fix}")
    return _LOADERS[name]


def find(name: str, data: CfgNode) -> Loader:
    """The loader of a data set of ``DATA.DATASETS``, else of the catalog; ``data`` is the node ``DATA``.

    A ConfigError if neither has the name, or ``DATA.DATASETS`` are no triples of distinct names. Nothing is read.
    """
    own: dict[str, Loader] = {}
    for entry in data.DATASETS:
        if not (isinstance(entry, tuple | list) and len(entry) == 3 and all(isinstance(t, str) for t in entry)):
            expected = "triples (name, annotations, photos or split)"
            raise ConfigError(f"DATA.DATASETS has {shown(entry)}, expected {expected}")
        if entry[0] in own:
            raise ConfigError(f"DATA.DATASETS has two sets named {entry[0]!r}; give each its own name")
        own[entry[0]] = _entry(*entry)
    return own.get(name) or get(name)


def load(name: str, data: CfgNode, problems: Problems) -> RawDataset:
    """Read a data set, unchecked; errors are those of :func:`find`, and a DataError for missing files or (mode
    "refuse") a broken record."""
    return find(name, data)(dataset_root(data), data, problems)


def dataset_root(data: CfgNode) -> Path:
    """``DATA.ROOT``, else the environment variable EARLYEXIT_SSD_DATASETS, else ./datasets."""
    return Path(os.path.expanduser(data.ROOT or os.environ.get(ROOT_VARIABLE) or "datasets"))


def register_builtin() -> None:
    """Register them all; called once, when the package is imported."""
    for split in SPLITS:
        register(f"synthetic_chairs_{split}", _synthetic(split))
        for name in ("voc2012_animals", "furniture"):
            register_coco(f"{name}_{split}", f"{name}/annotations/instances_{split}.json", f"{name}/{split}")
    for split in ("train", "val"):
        register_coco(f"coco_2017_{split}", f"coco/annotations/instances_{split}2017.json", f"coco/{split}2017")
    for year, splits in {"2007": ("trainval", "test"), "2012": ("train", "val", "trainval")}.items():
        for split in splits:
            register(f"voc_{year}_{split}", _voc(year, split))
    register_voc("voc_xml_sample_trainval", "voc_xml_sample/VOCdevkit/VOC2012", "trainval")


def _synthetic(split: str) -> Loader:
    def load(root: Path, data: CfgNode, problems: Problems) -> RawDataset:
        settings = data.SYNTHETIC
        made = ensure_synthetic(root, tuple(settings.SIZES), settings.IMAGE_SIZE, settings.SEED).relative_to(root)
        annotations = made / "annotations" / f"instances_{split}.json"
        return _entry(f"synthetic_chairs_{split}", annotations, made / split)(root, data, problems)

    return load


def _voc(year: str, split: str) -> Loader:
    def load(root: Path, data: CfgNode, problems: Problems) -> RawDataset:
        name, devkit = f"voc_{year}_{split}", f"VOCdevkit/VOC{year}"
        listing = root / devkit / "ImageSets" / "Main" / f"{split}.txt"
        if data.DOWNLOAD and not os.path.isfile(listing):
            download_voc(root, year, split)
        _require(name, listing, "set DATA.DOWNLOAD to True")
        return _entry(name, devkit, split)(root, data, problems)

    return load


def download_voc(root: Path, year: str, split: str) -> None:
    """Fetch and unpack a VOC devkit under ``root``, by torchvision: first beside it, so that the lists of photos, by
    which a devkit is known, are there when all photos are. A DataError if the download fails."""
    from torchvision.datasets import VOCDetection

    staging, name = root / f".VOC{year}_{split}.partial", f"VOCdevkit/VOC{year}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        VOCDetection(str(staging), year=year, image_set=split, download=True)
        for part in sorted((staging / name).iterdir(), key=lambda part: part.name == "ImageSets"):
            shutil.copytree(part, root / name / part.name, copy_function=os.replace, dirs_exist_ok=True)
        shutil.rmtree(staging)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = "check the network, or unpack the VOCdevkit there by hand"
        raise DataError(f"VOC {year} could not be downloaded to {root.resolve()} ({reason}); {fix}") from None

"""Data sets by name: the entries of DATA.DATASETS, and a catalog of registered data sets."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fvcore.common.config import CfgNode

from earlyexit_ssd.data import coco, folder, voc, yolo  # noqa: F401 - the imports register their formats
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import DATA_FORMATS, RawDataset
from earlyexit_ssd.data.shapes import SPLITS, ensure_synthetic
from earlyexit_ssd.errors import ConfigError, DataError, shown, suggest
from earlyexit_ssd.files import PathLike, lock
from earlyexit_ssd.registry import Registry

ROOT_VARIABLE = "EARLYEXIT_SSD_DATASETS"

DatasetLoader = Callable[[Path, CfgNode, Problems], RawDataset]
"""Function (root folder of the data sets, node ``DATA`` of the configuration, problems) -> data set."""

_LOADERS: Registry[DatasetLoader] = Registry("data set")


def register(name: str, loader: DatasetLoader) -> None:
    """Register the loader of a data set. Raise EarlyExitError if the name is registered already."""
    _LOADERS.register(name, loader)


def register_coco(name: str, annotations: PathLike, images: PathLike) -> None:
    """Register a COCO JSON file and its folder of photos. Paths are relative to `dataset_root`."""
    register(name, functools.partial(_load_entry, name, annotations, images))


def register_voc(name: str, devkit: PathLike, split: str) -> None:
    """Register a split of a VOC devkit (such as VOC2012). Its path is relative to `dataset_root`."""
    register(name, functools.partial(_load_entry, name, devkit, split))


def _load_entry(
    name: str, annotations: PathLike, photos: PathLike, root: Path, data: CfgNode, problems: Problems
) -> RawDataset:
    """Read an entry (name, annotations, photos or split) of ``DATA.DATASETS``. Other arguments: see `DatasetLoader`."""
    path = root / annotations
    reader = next(f for f in reversed(DATA_FORMATS.values()) if f.recognises(str(annotations), path))
    if annotations:
        _require(name, path)
    if not reader.names_split:
        photos = root / photos
        _require(name, photos)
    return reader.read(name, path, photos, problems, data.ALLOW_OUTSIDE)


def _require(name: str, path: Path, alternative: str = "correct DATA.DATASETS") -> None:
    """Raise DataError if a file or folder of data set ``name`` is missing."""
    if not os.path.exists(path):
        fix = f"set DATA.ROOT or the environment variable {ROOT_VARIABLE} to the folder of the data sets"
        raise DataError(f"{os.path.abspath(path)}: data set {name!r} not found; {fix}, or {alternative}")


def get(name: str) -> DatasetLoader:
    """Return the loader of a registered data set. Raise ConfigError with the nearest name if there is none."""
    if name not in _LOADERS:
        hint = suggest(name, _LOADERS) or f"; registered: {', '.join(sorted(_LOADERS))}"
        fix = "add it to DATA.DATASETS, or register it with earlyexit_ssd.data.register_coco"
        raise ConfigError(f"no data set is named {name!r}{hint}; {fix}")
    return _LOADERS[name]


def find(name: str, data: CfgNode) -> DatasetLoader:
    """Return the loader of a data set of ``DATA.DATASETS`` or, if the name is not there, of the catalog. Read no file.
    Raise ConfigError if the name is unknown, or ``DATA.DATASETS`` are not triples with different names."""
    loaders: dict[str, DatasetLoader] = {}
    for entry in data.DATASETS:
        if not (isinstance(entry, tuple | list) and len(entry) == 3 and all(isinstance(t, str) for t in entry)):
            expected = "triples (name, annotations, photos or split)"
            raise ConfigError(f"DATA.DATASETS has {shown(entry)}, expected {expected}")
        if entry[0] in loaders:
            raise ConfigError(f"DATA.DATASETS has two data sets named {entry[0]!r}; give each its own name")
        loaders[entry[0]] = functools.partial(_load_entry, *entry)
    return loaders.get(name) or get(name)


def load(name: str, data: CfgNode, problems: Problems) -> RawDataset:
    """Read a data set without checking its boxes and photo files. Raise ConfigError (see :func:`find`), or DataError if
    a file is missing or unreadable, or (mode "refuse") a record is broken."""
    return find(name, data)(dataset_root(data), data, problems)


def dataset_root(data: CfgNode) -> Path:
    """Return ``DATA.ROOT``, the environment variable EARLYEXIT_SSD_DATASETS, or ./datasets: the first that is set."""
    return Path(os.path.expanduser(data.ROOT or os.environ.get(ROOT_VARIABLE) or "datasets"))


def register_builtin() -> None:
    """Register the built-in data sets. The package calls this once, when it is imported."""
    for split in SPLITS:
        register(f"synthetic_chairs_{split}", functools.partial(_load_synthetic, split))
        for name in ("voc2012_animals", "furniture"):
            register_coco(f"{name}_{split}", f"{name}/annotations/instances_{split}.json", f"{name}/{split}")
    for split in ("train", "val"):
        register_coco(f"coco_2017_{split}", f"coco/annotations/instances_{split}2017.json", f"coco/{split}2017")
    for year, splits in {"2007": ("trainval", "test"), "2012": ("train", "val", "trainval")}.items():
        for split in splits:
            register(f"voc_{year}_{split}", functools.partial(_load_voc, year, split))
    register_voc("voc_xml_sample_trainval", "voc_xml_sample/VOCdevkit/VOC2012", "trainval")


def _load_synthetic(split: str, root: Path, data: CfgNode, problems: Problems) -> RawDataset:
    settings = data.SYNTHETIC
    rendered = ensure_synthetic(root, tuple(settings.SIZES), settings.IMAGE_SIZE, settings.SEED).relative_to(root)
    annotations = rendered / "annotations" / f"instances_{split}.json"
    return _load_entry(f"synthetic_chairs_{split}", annotations, rendered / split, root, data, problems)


def _load_voc(year: str, split: str, root: Path, data: CfgNode, problems: Problems) -> RawDataset:
    name, devkit = f"voc_{year}_{split}", f"VOCdevkit/VOC{year}"
    listing = root / devkit / "ImageSets" / "Main" / f"{split}.txt"
    if data.DOWNLOAD and not os.path.isfile(listing):
        with lock(root / f".VOC{year}.lock", f"VOC {year} in {root} (it is being downloaded)", wait=True):
            if not os.path.isfile(listing):  # another process may have downloaded it meanwhile
                download_voc(root, year, split)
    _require(name, listing, "set DATA.DOWNLOAD to True")
    return _load_entry(name, devkit, split, root, data, problems)


def download_voc(root: Path, year: str, split: str) -> None:
    """Download a VOC devkit with torchvision and unpack it in ``root``. Raise DataError if the download fails.

    The devkit is unpacked elsewhere and then moved, with the lists of photos last, so a devkit with lists is complete.
    """
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
        fix = "check the network, or unpack VOCdevkit in this folder"
        raise DataError(f"VOC {year} could not be downloaded to {root.resolve()} ({reason}); {fix}") from None

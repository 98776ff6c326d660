"""Data sets and loaders of photos with boxes, in the format of torchvision's detection models and reference scripts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from earlyexit_ssd.data import catalog, checks
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import (
    RawDataset,
    Record,
    limit_negatives,
    limit_photos,
    select_classes,
    shortened,
    union_of_classes,
)
from earlyexit_ssd.data.transforms import Augmentation, build_transforms, mixed_seed
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import sha256
from earlyexit_ssd.images import read_image

logger = logging.getLogger(__name__)

Target = dict[str, Tensor | int]


@dataclass(eq=False, repr=False)
class DetectionDataset(torch.utils.data.Dataset):
    """Photos with boxes. ``dataset[i]`` is ``(image, target)``.

    The image is float32 [3, H, W] RGB in [0, 1], in the size of the photo or of its augmentation. The target has the
    keys ``boxes`` float32 [N, 4] (xyxy, pixels), ``labels`` int64 [N] in 1..K, ``image_id`` int, ``area`` float32 [N]
    (square pixels) and ``iscrowd`` int64 [N]. In training, objects to ignore (crowd, difficult) are left out, and a
    photo that cannot be decoded is replaced by the next photo. Otherwise objects to ignore have ``iscrowd`` 1.

    Raises:
        DataError: ``on_bad`` is unknown, or two records have the same ``image_id``.
    """

    records: Sequence[Record]
    classes: Sequence[str]  # label i is classes[i - 1]
    transforms: Augmentation | None = None  # its random numbers depend on (seed, epoch, index) only
    train: bool = False
    seed: int = 0
    on_bad: str = "repair"  # "refuse" makes a photo that cannot be decoded an error in training too
    labelled: bool = True  # False if some photos have no annotations; a photo without boxes may then show objects

    def __post_init__(self) -> None:
        Problems(self.on_bad)  # checks the mode
        self.records, self.classes, self.epoch = tuple(self.records), tuple(self.classes), 0
        self._paths = {record.image_id: record.path for record in self.records}
        self._undecodable: set[int] = set()
        if len(self._paths) < len(self.records):
            raise DataError("two records have the same image_id; give each photo of a data set its own image_id")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.sample(index, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which the augmentation of ``dataset[index]`` depends on."""
        self.epoch = epoch

    def path_of(self, image_id: int) -> Path:
        """Return the path of the photo with this ``image_id``."""
        return self._paths[image_id]

    def subset(self, records: Sequence[Record]) -> DetectionDataset:
        """Return a copy with the photos ``records``. A photo that occurs twice is augmented differently each time."""
        other = copy.copy(self)
        other.records = tuple(records)
        return other

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """Return the size of photo ``index`` without reading it, for torchvision's grouping by aspect ratio."""
        return self.records[index].height, self.records[index].width

    def sample(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        """Return ``(image, target)`` of photo ``index`` with the augmentation of any ``epoch``. Raise DataError if the
        photo cannot be decoded (see ``on_bad``)."""
        index = range(len(self))[index]  # accepts negative indices; raises IndexError
        record, image = self._read(index)
        annotations = [a for a in record.annotations if not (self.train and a.ignore)]
        boxes = np.array([a.box for a in annotations], np.float32).reshape(-1, 4)
        if self.transforms is not None:
            seed = mixed_seed(self.seed, epoch, index)
            image, boxes, kept = self.transforms(image, boxes, np.arange(len(annotations)), seed)
            # annotated areas are wrong for an augmented photo; with None the area of the box is used
            annotations = [dataclasses.replace(annotations[k], area=None) for k in kept]
        box_areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
        areas = [a.area if a.area is not None else area for a, area in zip(annotations, box_areas, strict=True)]
        return as_tensor(image), {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([a.label for a in annotations], dtype=torch.int64),
            "image_id": record.image_id,
            "area": torch.tensor(areas, dtype=torch.float32),
            "iscrowd": torch.tensor([int(a.ignore) for a in annotations], dtype=torch.int64),
        }

    def _read(self, index: int) -> tuple[Record, np.ndarray]:
        """Return record and pixels of photo ``index`` or, in training, of the next photo that can be decoded."""
        for step in range(len(self)):
            record = self.records[(index + step) % len(self)]
            try:
                image = read_image(record.path, (record.width, record.height))
                height, width = image.shape[:2]
                if (height, width) != (record.height, record.width):
                    sizes = f"is {width} x {height}, annotated as {record.width} x {record.height}"
                    fix = "load the data set with load_dataset, which scales the boxes"
                    raise DataError(f"{checks.describe(record)} {sizes}; {fix}")
                return record, image
            except DataError as error:
                if not self.train or self.on_bad == "refuse":
                    raise
                if record.image_id not in self._undecodable:
                    self._undecodable.add(record.image_id)
                    logger.warning("%s; the next photo replaces it (%d replaced so far)", error, len(self._undecodable))
        path = self.records[index].path
        raise DataError(f"none of {len(self)} photos can be decoded, such as {path}; check that the files are photos")


def repeat_rare_classes(dataset: DetectionDataset, threshold: float, seed: int) -> DetectionDataset:
    """Repeat the photos of rare classes in a training set (Gupta et al. 2019, "LVIS", appendix B.2).

    The repeat factor r of a photo is the maximum over its classes of max(1, sqrt(threshold / f)). f is the share of all
    photos that show the class. r is rounded up or down at random (``seed``). A ``threshold`` of 0 repeats nothing.
    """
    if not threshold:
        return dataset
    factors = repeat_factors(dataset, threshold)
    counts = np.floor(factors + np.random.default_rng(seed).random(len(factors))).astype(int)
    logger.info("photos of rare classes are repeated: an epoch of %d photos has %d samples", len(counts), counts.sum())
    return dataset.subset([dataset.records[index] for index in np.repeat(np.arange(len(counts)), counts)])


def repeat_factors(dataset: DetectionDataset, threshold: float) -> np.ndarray:
    """Return the repeat factor of each photo, float [len(dataset)], 1 or more. See :func:`repeat_rare_classes`."""
    labels_of = [{a.label for a in record.annotations if not a.ignore} for record in dataset.records]
    photos = Counter(label for labels in labels_of for label in labels)
    factors = {label: max(1.0, (threshold * len(labels_of) / count) ** 0.5) for label, count in photos.items()}
    return np.array([max((factors[label] for label in labels), default=1.0) for labels in labels_of])


def photo_hashes(dataset: DetectionDataset) -> list[tuple[Path, str]]:
    """Return path and SHA-256 of each photo file. Raise DataError if a file cannot be read."""
    digest = functools.cache(sha256)  # repeated photos are hashed once
    with _readable_photos():
        return [(record.path, digest(record.path)) for record in dataset.records]


@contextlib.contextmanager
def _readable_photos() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "check the path and the permissions"
        raise DataError(f"{error.filename}: photo cannot be read ({error.strerror}); {fix}") from None


def fingerprint(dataset: DetectionDataset, hashes: Sequence[str] | None = None) -> str:
    """Return the SHA-256 of the classes and of each photo's content, id, size and objects, in the order of the photos.
    It does not depend on paths and augmentation. ``hashes`` of `photo_hashes` avoid reading the files again."""
    digest = hashlib.sha256(repr(dataset.classes).encode())
    hashes = [content for _, content in photo_hashes(dataset)] if hashes is None else hashes
    for record, content in zip(dataset.records, hashes, strict=True):
        objects = [(a.box, a.label, a.ignore, a.area) for a in record.annotations]
        digest.update(repr((content, record.image_id, record.width, record.height, objects)).encode())
    return digest.hexdigest()


def require_disjoint(**datasets: DetectionDataset) -> None:
    """Raise DataError if two of the data sets share a photo (the content of a file), or a photo cannot be read.

    Only files of equal size are read. Within a data set, files are not compared.
    """
    digest, sizes = functools.cache(sha256), {}
    with _readable_photos():
        for name, dataset in datasets.items():
            sizes[name] = {record.path.resolve(): record.path.stat().st_size for record in dataset.records}
        for (first_name, first), (second_name, second) in itertools.combinations(sizes.items(), 2):
            common = set(first.values()) & set(second.values())
            by_hash = {digest(path): path for path, size in first.items() if size in common}
            shared = [path for path, size in second.items() if size in common and digest(path) in by_hash]
            if shared:
                example = f"{by_hash[digest(shared[0])]} and {shared[0]}"
                fix = "remove them from one data set, because metrics on training photos are too high"
                names = f"{first_name} and {second_name}"
                raise DataError(f"{names} share photos ({len(shared)}), the first: {example}; {fix}")


def require_unique(name: str, records: Iterable[Record]) -> None:
    """Raise DataError if data set ``name`` has a photo file twice."""
    seen = set()
    for record in records:
        identity = checks.file_identity(record.path)
        if identity is not None and identity in seen:
            fix = "list each file once, in one of the joined data sets"
            raise DataError(f"{name} has the photo {record.path} twice; {fix}")
        seen.add(identity)


def to_coco(dataset: DetectionDataset) -> COCO:
    """Return the photos and objects as pycocotools' COCO, without reading photos. Category ids are the labels 1..K.

    Objects to ignore have ``iscrowd`` 1, because pycocotools has no other flag for them. Annotation ids start at 1,
    because pycocotools treats a match with id 0 as no match.
    """
    coco, images, annotations = COCO(), [], []
    for record in dataset.records:
        name, size = str(record.path), {"width": record.width, "height": record.height}
        images.append({"id": record.image_id, "file_name": name, **size})
        for annotation in record.annotations:
            x1, y1, x2, y2 = annotation.box
            bbox = [x1, y1, x2 - x1, y2 - y1]
            area = bbox[2] * bbox[3] if annotation.area is None else annotation.area
            ids = {"id": len(annotations) + 1, "image_id": record.image_id, "category_id": annotation.label}
            annotations.append({**ids, "bbox": bbox, "area": area, "iscrowd": int(annotation.ignore)})
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.classes, start=1)]
    coco.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """Sampler of the photos of one process in one epoch.

    In training, photos are shuffled by (seed, epoch). Batch k of ``batch_size`` photos is split over all processes, so
    their k-th batches together are the k-th batch of a single process. An incomplete last batch is dropped, unless it
    is the only batch.

    In evaluation, photos are in the order of the data set. Process r gets the whole batches r, r + world_size, ... of a
    single process, because the scores of a photo depend in the last digits on the other photos of its batch.
    """

    dataset: DetectionDataset
    batch_size: int
    train: bool
    seed: int
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    start: int = 0  # number of batches to skip at the start of the epoch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the sampler and of the data set."""
        self.epoch, self.start = epoch, start
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if not self.train:
            return iter(self._positions())
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        return (order[position] for position in self._positions())

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> Sequence[int]:
        """Return the positions of this process in the global order, ascending."""
        count, size, start = len(self.dataset), self.batch_size, self.start * self.batch_size
        if self.train:
            # the batch size is a multiple of the number of processes, so each batch is split evenly
            return range(start + self.rank, min(max(count // size, 1) * size, count), self.world_size)
        return [p for p in range(start, count) if (p - start) // size % self.world_size == self.rank]


def build_loader(
    dataset: DetectionDataset, batch_size: int, workers: int, train: bool, seed: int, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Return a loader of batches ``(list of images, list of targets)`` for process ``rank``.

    Call ``loader.sampler.set_epoch`` before each epoch. See `EpochSampler` for the photos of each process. In training,
    ``batch_size`` is the sum over all processes. With 0 ``workers``, photos are loaded in this process. At most one per
    core is started. Raise DataError if the data set is too small, or (in training) batches cannot be split evenly.
    """
    parts = world_size if train else 1  # processes that share a batch
    if batch_size < 1 or batch_size % parts:
        raise DataError(f"batch size is {batch_size}, expected a multiple of {parts}, the number of processes")
    if len(dataset) < parts:
        raise DataError(f"the data set has {len(dataset)} photos, expected at least one per process ({parts})")
    # on fewer cores PyTorch would warn
    workers = min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers:
        cv2.setNumThreads(0)  # forked workers would wait for ever for OpenCV's threads of this process
    return DataLoader(
        dataset,
        batch_size // parts,
        sampler=EpochSampler(dataset, batch_size, train, seed, rank, world_size),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # with the global generator, a resumed run would differ
    )


def as_tensor(image: np.ndarray) -> Tensor:
    """Convert a photo from uint8 [H, W, 3] to float32 [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels.to(torch.float32).div_(255)


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return a batch as two lists, because photos differ in size and number of objects."""
    return [image for image, _ in samples], [target for _, target in samples]


def _start_worker(worker: int) -> None:
    """Turn off OpenCV's threads, because the workers use all cores. Leave the process group, so that a signal to the
    group stops only the main process, which saves its state and ends the workers."""
    cv2.setNumThreads(0)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


NO_CLASS = "{} has no classes; set DATA.CLASSES to the classes to detect"

Labels = Literal["required", "annotated", "replaced", "optional"]
"""Values of the argument ``labels`` of `load_dataset`."""


def load_dataset(
    cfg: CfgNode, names: str | Sequence[str], train: bool = False, labels: Labels | None = None
) -> DetectionDataset:
    """Read, check and join data sets, with the objects of ``DATA.CLASSES`` only.

    If ``DATA.CLASSES`` is empty, the classes are those of ``DATA.TRAIN``, which is read too. By default that is the
    rendered data set of 2,100 photos. So set ``DATA.CLASSES`` or ``DATA.TRAIN`` for your own data.

    Args:
        names: names of data sets in the catalog or in ``DATA.DATASETS``.
        train: limit the photos without objects, augment, and leave out objects to ignore.
        labels: which labels the data sets must have. ``required``: all photos are annotated, and there is an object.
            ``annotated``: all photos are annotated. ``replaced``: as ``required``, or some photos are not annotated;
            then the caller replaces all labels by the full path's detections. ``optional``: no condition. The default
            is ``required`` in training, otherwise ``annotated``.

    Raises:
        ConfigError: a data set is unknown.
        DataError: a file is missing, a record is broken (``DATA.ON_BAD`` "refuse"), a class is unknown, there are
            fewer labels than ``labels`` requires, or no photo is left.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    labels = labels or ("required" if train else "annotated")
    if labels not in get_args(Labels):
        raise DataError(f"labels is {labels!r:.60}, expected one of {', '.join(get_args(Labels))}")
    data, title = cfg.DATA, " + ".join(names)
    raws = [read_dataset(cfg, name) for name in names]
    # `class_names` would read the training sets again
    classes = tuple(data.CLASSES) or (union_of_classes(raws) if names == tuple(data.TRAIN) else class_names(cfg))
    if not classes and not any(raw.labelled for raw in raws):
        raise DataError(NO_CLASS.format(title))
    unlabelled = [raw.name for raw in raws if not raw.labelled]
    if unlabelled and labels in ("required", "annotated"):  # its photos would count as photos without objects
        fix = "use data sets with boxes, such as those of `earlyexit predict --save labels`"
        if train:
            fix += ", or LOSS.SUPERVISION teacher without a joint phase"
        raise DataError(f"data set '{unlabelled[0]}' is a folder of photos without labels, expected boxes; {fix}")
    records = select_classes(raws, classes, train)
    if train and not unlabelled:  # unlabelled photos may show objects
        records = limit_negatives(records, data.NEGATIVE_SHARE, cfg.SEED)
    records = limit_photos(records, data.LIMIT, cfg.SEED)
    problems = Problems(data.ON_BAD)
    records = checks.clip_boxes(checks.check_photos(records, problems), problems)
    problems.log(title)
    if not records:
        raise DataError(f"{title}: no usable photo is left; see the warnings above, and check the folder of the photos")
    require_unique(title, records)
    flags = [annotation.ignore for record in records for annotation in record.annotations]
    ignored, objects = flags.count(True), flags.count(False)
    if not objects and (labels == "required" or (labels == "replaced" and not unlabelled)):
        raise DataError(f"{title}: {_without_boxes(classes, len(records), ignored, train)}")
    boxes = f"{objects} boxes and {ignored} to ignore" if ignored else f"{objects} boxes"
    negatives = sum(not record.has_targets for record in records)
    empty = "some photos without labels" if unlabelled else f"{negatives} photos without boxes"
    logger.info("%s: %d photos, %s, %s", title, len(records), boxes, empty)
    transforms = build_transforms(data.AUGMENTATION) if train else None
    return DetectionDataset(records, classes, transforms, train, cfg.SEED, data.ON_BAD, labelled=not unlabelled)


def _without_boxes(classes: Sequence[str], photos: int, ignored: int, train: bool) -> str:
    wanted = shortened(classes) or "any class"
    found, fix = f"no box of {wanted} in {photos} photos, expected at least one", "add photos with boxes"
    if ignored:
        found = f"all {ignored} boxes of {wanted} in {photos} photos are marked iscrowd, difficult or ignore"
        fix = "set these flags to 0 for ordinary objects (mask exports write iscrowd 1)"
    alternative = ", or set LOSS.SUPERVISION teacher" if train else ""
    return f"{found}; {fix}, or change DATA.CLASSES{alternative}"


def read_dataset(cfg: CfgNode, name: str) -> RawDataset:
    """Read one data set with all of its classes and check its boxes. Photo files are not checked."""
    problems = Problems(cfg.DATA.ON_BAD)
    raw = checks.check_boxes(catalog.load(name, cfg.DATA, problems), problems)
    raw = checks.drop_repeated_files(raw, problems)
    problems.log(name)
    return raw


def class_names(cfg: CfgNode) -> tuple[str, ...]:
    """Return the classes of the run in label order: ``DATA.CLASSES``, or all classes of the training data sets."""
    if cfg.DATA.CLASSES:
        return tuple(cfg.DATA.CLASSES)
    on_bad = "skip" if cfg.DATA.ON_BAD == "skip" else "repair"  # skip may leave out a class, refuse would fail
    names = union_of_classes([catalog.load(name, cfg.DATA, Problems(on_bad)) for name in cfg.DATA.TRAIN])
    if not names:
        raise DataError(NO_CLASS.format(" + ".join(cfg.DATA.TRAIN)))
    return names

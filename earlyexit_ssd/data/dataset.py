"""Photos with boxes as a torch data set, in the format of torchvision's detectors and evaluator."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
from earlyexit_ssd.data.problems import MODES, Problems
from earlyexit_ssd.data.records import (
    RawDataset,
    Record,
    few,
    limit_negatives,
    limit_photos,
    select_classes,
    union_of_classes,
)
from earlyexit_ssd.data.transforms import Augmentation, build_transforms, mixed_seed
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import sha256
from earlyexit_ssd.images import read_image

logger = logging.getLogger(__name__)

Target = dict[str, Tensor | int]


class DetectionDataset(torch.utils.data.Dataset):
    """``dataset[i]`` is ``(image, target)``.

    The image is float32 [3, H, W] RGB in [0, 1], at the photo's own size. The target holds ``boxes`` float32 [N, 4]
    (xyxy, pixels), ``labels`` int64 [N] in 1..K, ``image_id`` int, ``area`` float32 [N] (square pixels) and ``iscrowd``
    int64 [N].

    Args:
        records: the photos; label i means ``classes[i - 1]``.
        classes: names of the K classes.
        transforms: augmentation. Its random numbers depend on (seed, epoch, index) only, so a resumed run and any
            number of processes get the same views.
        train: leave out objects to ignore (crowd, difficult), and take the next photo for one that cannot be
            decoded. Without it such objects stay, with ``iscrowd`` 1, and such a photo is an error.
        seed: seed of the augmentation.
        on_bad: "refuse" makes a photo that cannot be decoded an error in training too.
        labelled: False if some photos have no annotations; a photo without boxes may then show objects.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        transforms: Augmentation | None = None,
        train: bool = False,
        seed: int = 0,
        on_bad: str = "repair",
        labelled: bool = True,
    ) -> None:
        if on_bad not in MODES:
            raise DataError(f"on_bad is {on_bad!r:.60}, expected one of {', '.join(MODES)}")
        self.records, self.classes = tuple(records), tuple(classes)
        self.transforms, self.train, self.on_bad, self.labelled = transforms, train, on_bad, labelled
        self.seed, self.epoch = seed, 0
        self._paths = {record.image_id: record.path for record in self.records}
        self._undecodable: set[int] = set()
        if len(self._paths) < len(self.records):
            raise DataError("two records have the same image_id; number the photos of one data set uniquely")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.sample(index, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the views that ``dataset[index]`` returns."""
        self.epoch = epoch

    def path_of(self, image_id: int) -> Path:
        return self._paths[image_id]

    def subset(self, records: Sequence[Record]) -> DetectionDataset:
        """This data set with the photos ``records`` only; one that occurs twice is augmented differently each time."""
        other = copy.copy(self)
        other.records = tuple(records)
        return other

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """Size of photo ``index``, for torchvision's grouping of photos by aspect ratio; no photo is read."""
        return self.records[index].height, self.records[index].width

    def sample(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        """Photo ``index`` with the augmentation of ``epoch``, which may differ from that of :meth:`set_epoch`.

        Raises:
            DataError: the photo cannot be decoded (see ``train`` and ``on_bad``).
        """
        index = range(len(self))[index]  # accepts negative indices; raises IndexError
        record, image = self._read(index)
        annotations = [a for a in record.annotations if not (self.train and a.ignore)]
        boxes = np.array([a.box for a in annotations], np.float32).reshape(-1, 4)
        if self.transforms is not None:
            seed = mixed_seed(self.seed, epoch, index)
            image, boxes, kept = self.transforms(image, boxes, np.arange(len(annotations)), seed)
            # the annotated areas are no longer valid, so those of the boxes are used
            annotations = [dataclasses.replace(annotations[k], area=None) for k in kept]
        own = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
        areas = [a.area if a.area is not None else area for a, area in zip(annotations, own, strict=True)]
        return as_tensor(image), {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([a.label for a in annotations], dtype=torch.int64),
            "image_id": record.image_id,
            "area": torch.tensor(areas, dtype=torch.float32),
            "iscrowd": torch.tensor([int(a.ignore) for a in annotations], dtype=torch.int64),
        }

    def _read(self, index: int) -> tuple[Record, np.ndarray]:
        """The photo, or in training the next one that can be decoded."""
        for step in range(len(self)):
            record = self.records[(index + step) % len(self)]
            try:
                image = read_image(record.path, (record.width, record.height))
                height, width = image.shape[:2]
                if (height, width) != (record.height, record.width):
                    found = f"is {width} x {height}, annotated as {record.width} x {record.height}"
                    fix = "load the data set with load_dataset, which scales the boxes"
                    raise DataError(f"{checks.describe(record)} {found}; {fix}")
                return record, image
            except DataError as error:
                if not self.train or self.on_bad == "refuse":
                    raise
                if record.image_id not in self._undecodable:
                    self._undecodable.add(record.image_id)
                    logger.warning("%s; the next photo replaces it (%d such so far)", error, len(self._undecodable))
        raise DataError(f"none of {len(self)} photos can be decoded; the first is {self.records[index].path}")


def repeat_rare_classes(dataset: DetectionDataset, threshold: float, seed: int) -> DetectionDataset:
    """A training set with each photo r times (Gupta et al. 2019, "LVIS", appendix B.2).

    r = max over the photo's classes of max(1, sqrt(threshold / f)), f the share of the photos that show the class. r is
    rounded up or down at random (``seed``). A class is rare if f is below ``threshold``; 0 repeats nothing.
    """
    if not threshold:
        return dataset
    factors = repeat_factors(dataset, threshold)
    counts = np.floor(factors + np.random.default_rng(seed).random(len(factors))).astype(int)
    logger.info("photos of rare classes are repeated: %d photos are shown %d times in all", len(counts), counts.sum())
    return dataset.subset([dataset.records[place] for place in np.repeat(np.arange(len(counts)), counts)])


def repeat_factors(dataset: DetectionDataset, threshold: float) -> np.ndarray:
    """r of every photo, float [len(dataset)], 1 or more; see :func:`repeat_rare_classes`."""
    shown = [{one.label for one in record.annotations if not one.ignore} for record in dataset.records]
    photos = Counter(label for labels in shown for label in labels)
    factor = {label: max(1.0, (threshold * len(shown) / count) ** 0.5) for label, count in photos.items()}
    return np.array([max((factor[label] for label in labels), default=1.0) for labels in shown])


def photo_hashes(dataset: DetectionDataset) -> list[tuple[Path, str]]:
    """Path and SHA-256 of every photo's file; a DataError if one cannot be read."""
    digest = functools.cache(sha256)  # photos of rare classes occur several times
    with _readable_photos():
        return [(record.path, digest(record.path)) for record in dataset.records]


@contextlib.contextmanager
def _readable_photos() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: no readable photo ({error.strerror}); put it there") from None


def fingerprint(dataset: DetectionDataset, hashes: Sequence[str] | None = None) -> str:
    """SHA-256 of the classes and of each photo's file content, id, size and objects, in the order of the photos.

    Paths and augmentation do not change it. ``hashes`` are those of `photo_hashes` if they are known already.
    """
    digest = hashlib.sha256(repr(dataset.classes).encode())
    hashes = [content for _, content in photo_hashes(dataset)] if hashes is None else hashes
    for record, content in zip(dataset.records, hashes, strict=True):
        objects = [(one.box, one.label, one.ignore, one.area) for one in record.annotations]
        digest.update(repr((content, record.image_id, record.width, record.height, objects)).encode())
    return digest.hexdigest()


def require_disjoint(**datasets: DetectionDataset) -> None:
    """Check that no photo is in two of the data sets, or twice in one of them.

    Two sets share a photo if they have the same file or files with the same content. Within one set only paths are
    compared. Only files of equal size are read.

    Raises:
        DataError: two sets share photos (the message has the first and their number), or a photo cannot be read.
    """
    digest, sizes = functools.cache(sha256), {}
    with _readable_photos():
        for name, dataset in datasets.items():
            require_unique(name, dataset.records)
            sizes[name] = {record.path.resolve(): record.path.stat().st_size for record in dataset.records}
        for (first, ours), (second, theirs) in itertools.combinations(sizes.items(), 2):
            common = set(ours.values()) & set(theirs.values())
            known = {digest(path): path for path, size in ours.items() if size in common}
            shared = [(known[digest(p)], p) for p, size in theirs.items() if size in common and digest(p) in known]
            if shared:
                found = f"share photos ({len(shared)}), the first: {shared[0][0]} and {shared[0][1]}"
                fix = "metrics on training photos are too high; take them out of one of the two"
                raise DataError(f"{first} and {second} {found}; {fix}")


def require_unique(name: str, records: Iterable[Record]) -> None:
    """Check that the set ``name`` has each photo file once; a DataError names the first that is there twice."""
    seen = set()
    for record in records:
        identity = checks.file_identity(record.path)
        if identity is not None and identity in seen:
            fix = "name each file once, in one of the set's data sets"
            raise DataError(f"{name} has the photo {record.path} twice; {fix}")
        seen.add(identity)


def to_coco(dataset: DetectionDataset) -> COCO:
    """The photos and objects as pycocotools' COCO; category ids are the labels 1..K.

    Objects to ignore have ``iscrowd`` 1, which is pycocotools' only flag for them. Annotation ids start at 1, because
    pycocotools reads a match with id 0 as no match. Nothing is printed and no photo is read.
    """
    coco, images, annotations = COCO(), [], []
    for record in dataset.records:
        name, size = str(record.path), {"width": record.width, "height": record.height}
        images.append({"id": record.image_id, "file_name": name, **size})
        for one in record.annotations:
            x1, y1, x2, y2 = one.box
            bbox, number = [x1, y1, x2 - x1, y2 - y1], len(annotations) + 1
            area = bbox[2] * bbox[3] if one.area is None else one.area
            ids = {"id": number, "image_id": record.image_id, "category_id": one.label}
            annotations.append({**ids, "bbox": bbox, "area": area, "iscrowd": int(one.ignore)})
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.classes, start=1)]
    coco.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class EpochSampler(Sampler[int]):
    """Indices of the photos of one process in one epoch.

    Training shuffles by (seed, epoch). Batch k of this global order is distributed over the processes, so their k-th
    batches together are the k-th batch of a single process (``batch_size`` is the sum over all processes). An
    incomplete last batch is dropped if there is a full one.

    Evaluation keeps the order of the data set and drops nothing. Process r gets batches r, r + world_size, ... of a run
    with one process, because other photos in a batch could change a photo's scores in the last digits.
    """

    def __init__(
        self, dataset: DetectionDataset, batch_size: int, train: bool, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.dataset, self.batch_size, self.train, self.seed = dataset, batch_size, train, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, of the data set too, and the number of batches at its start that a resumed run leaves out."""
        self.epoch, self.start = epoch, start
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if not self.train:
            return iter(self._own_places())
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        return (order[place] for place in self._own_places())

    def __len__(self) -> int:
        return len(self._own_places())

    def _own_places(self) -> Sequence[int]:
        """The places of this process in the global order, by increasing place."""
        count, size, start = len(self.dataset), self.batch_size, self.start * self.batch_size
        if self.train:
            # the batch size is a multiple of the number of processes, so each batch is distributed evenly
            return range(start + self.rank, min(max(count // size, 1) * size, count), self.world_size)
        return [place for place in range(start, count) if (place - start) // size % self.world_size == self.rank]


def build_loader(
    dataset: DetectionDataset, batch_size: int, workers: int, train: bool, seed: int, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Loader of batches ``(list of images, list of targets)``; call ``loader.sampler.set_epoch`` before each epoch.

    In training ``batch_size`` is the sum over all processes; this is process ``rank``. With 0 ``workers`` this
    process loads the photos. See `EpochSampler` for the photos of each process.

    A DataError if the data set is too small, or (in training) batches cannot be split evenly.
    """
    parts = world_size if train else 1  # of a batch; in an evaluation it belongs to one process
    if batch_size < 1 or batch_size % parts:
        raise DataError(f"batch size {batch_size} cannot be dealt out evenly over {world_size} processes")
    if len(dataset) < parts:
        raise DataError(f"a data set of {len(dataset)} photos is too small for {world_size} process(es)")
    if workers:
        _one_thread()  # OpenCV's threads in this process would block a forked worker for ever
    return DataLoader(
        dataset,
        batch_size // parts,
        sampler=EpochSampler(dataset, batch_size, train, seed, rank, world_size),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # drawing from the global one would make a resumed run differ
    )


def as_tensor(image: np.ndarray) -> Tensor:
    """A photo uint8 [H, W, 3] as the model takes it: float32 [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels.to(torch.float32).div_(255)


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch is two lists, since photos differ in size and number of objects."""
    return [image for image, _ in samples], [target for _, target in samples]


def _one_thread(worker: int = 0) -> None:
    """Switch off OpenCV's threads: the workers use all cores already."""
    cv2.setNumThreads(0)


NO_CLASS = "{} names no class; set DATA.CLASSES to what is to be detected"

Labels = Literal["required", "annotated", "replaced", "optional"]
"""What `load_dataset` accepts: see its argument ``labels``."""


def load_dataset(
    cfg: CfgNode, names: str | Sequence[str], train: bool = False, labels: Labels | None = None
) -> DetectionDataset:
    """Read, check and join data sets, and keep the wanted classes.

    Args:
        cfg: the configuration; its ``DATA`` node and ``SEED`` are used.
        names: names of the catalog or of ``DATA.DATASETS``.
        train: limit the photos without objects, augment, and leave out objects to ignore.
        labels: ``required``: all photos are annotated, and some show a wanted object. ``annotated``: all photos are
            annotated. ``replaced``: as ``required``, but if some photos are not annotated, the full path's detections
            replace the labels. ``optional``: anything. None: ``required`` in training, otherwise ``annotated``.

    Raises:
        ConfigError: an unknown data set.
        DataError: missing files, a broken record (``DATA.ON_BAD`` "refuse"), an unknown class, no photo left.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    labels = labels or ("required" if train else "annotated")
    if labels not in get_args(Labels):
        raise DataError(f"labels is {labels!r:.60}, expected one of {', '.join(get_args(Labels))}")
    data, title = cfg.DATA, " + ".join(names)
    raws = [read_dataset(cfg, name) for name in names]
    classes = tuple(data.CLASSES) or (union_of_classes(raws) if names == tuple(data.TRAIN) else class_names(cfg))
    if not classes and not any(raw.labelled for raw in raws):
        raise DataError(NO_CLASS.format(title))
    unlabelled = [raw.name for raw in raws if not raw.labelled]
    if unlabelled and labels in ("required", "annotated"):  # their photos would count as photos without objects
        fix = ", or let the full path teach, without a joint phase (LOSS.SUPERVISION teacher)" if train else ""
        needs = "is a folder of photos that nobody labelled, and boxes are needed here; name data sets with boxes"
        raise DataError(f"data set '{unlabelled[0]}' {needs}{fix}")
    records = select_classes(raws, classes, train)
    if train:
        records = limit_negatives(records, data.NEGATIVE_SHARE, cfg.SEED)
    records = limit_photos(records, data.LIMIT, cfg.SEED)
    problems = Problems(data.ON_BAD)
    records = checks.clip_boxes(checks.check_photos(records, problems), problems)
    problems.log(title)
    if not records:
        raise DataError(f"{title}: no usable photo is left; check the folder of the photos")
    require_unique(title, records)
    flags = [annotation.ignore for record in records for annotation in record.annotations]
    ignored, objects = flags.count(True), flags.count(False)
    if not objects and (labels == "required" or (labels == "replaced" and not unlabelled)):
        raise DataError(f"{title}: {_without_boxes(classes, len(records), ignored, train)}")
    also = f" and {ignored} to ignore" if ignored else ""
    negatives = sum(not record.has_targets for record in records)
    without = "nobody labelled some of the photos" if unlabelled else f"{negatives} photos without any"
    logger.info("%s: %d photos, %d boxes%s, %s", title, len(records), objects, also, without)
    transforms = build_transforms(data.AUGMENTATION) if train else None
    return DetectionDataset(records, classes, transforms, train, cfg.SEED, data.ON_BAD, labelled=not unlabelled)


def _without_boxes(classes: Sequence[str], photos: int, ignored: int, train: bool) -> str:
    wanted = few(classes) or "any class"
    found, fix = f"no box of {wanted}", "add photos that show it"
    if ignored:
        found = f"{ignored} boxes of {wanted}, all of them marked iscrowd, difficult or ignore,"
        fix = "set these flags to 0 where the objects are ordinary ones (mask exports write iscrowd 1)"
    purpose, more = ("learnt", ", or let the full path teach (LOSS.SUPERVISION teacher)") if train else ("measured", "")
    return f"{found} in {photos} photos; nothing can be {purpose}: {fix}, or name other DATA.CLASSES{more}"


def read_dataset(cfg: CfgNode, name: str) -> RawDataset:
    """One data set with checked boxes and all of its classes; its photo files are not read."""
    problems = Problems(cfg.DATA.ON_BAD)
    raw = checks.check_boxes(catalog.load(name, cfg.DATA, problems), problems)
    raw = checks.drop_repeated_files(raw, problems)
    problems.log(name)
    return raw


def class_names(cfg: CfgNode) -> tuple[str, ...]:
    """The classes of the run, in label order: ``DATA.CLASSES``, or every class of the training sets."""
    if cfg.DATA.CLASSES:
        return tuple(cfg.DATA.CLASSES)
    names = union_of_classes([catalog.load(name, cfg.DATA, Problems("repair")) for name in cfg.DATA.TRAIN])
    if not names:
        raise DataError(NO_CLASS.format(" + ".join(cfg.DATA.TRAIN)))
    return names

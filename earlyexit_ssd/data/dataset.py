"""Photos with boxes as a torch data set, in the form that torchvision's detectors and evaluator take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from earlyexit_ssd.data.checks import describe
from earlyexit_ssd.data.images import as_tensor, read_image
from earlyexit_ssd.data.problems import MODES
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.data.seeding import mixed_seed
from earlyexit_ssd.data.transforms import Augmentation
from earlyexit_ssd.errors import DataError

logger = logging.getLogger(__name__)

Target = dict[str, Tensor | int]


class DetectionDataset(torch.utils.data.Dataset):
    """``dataset[i]`` is ``(image, target)``.

    The image is float32 [3, H, W] RGB in [0, 1], at the photo's own size. The target holds ``boxes``
    float32 [N, 4] (xyxy, pixels), ``labels`` int64 [N] in 1..K, ``image_id`` int, ``area`` float32 [N]
    (square pixels) and ``iscrowd`` int64 [N].

    Args:
        records: photos whose labels index ``classes`` from 1.
        classes: the K names.
        transforms: augmentation; its random numbers depend on (seed, epoch, index) only, so that a resumed
            run, or any number of processes, sees exactly the same views.
        train: drop objects to ignore (crowd, difficult), and step over photos that cannot be decoded.
            Otherwise objects to ignore stay, with ``iscrowd`` 1, and a photo that cannot be decoded is an
            error, since an evaluation of other photos than stated would be wrong.
        on_bad: "refuse" makes a photo that cannot be decoded an error in training too.
        labelled: False where nobody labelled some of the photos: that no box is there says nothing about them.
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
            raise DataError(f"on_bad is {on_bad!r}, expected one of {', '.join(MODES)}")
        self.records = tuple(records)
        self.classes = tuple(classes)
        self.transforms = transforms
        self.train = train
        self.seed = seed
        self.epoch = 0
        self.on_bad = on_bad
        self.labelled = labelled
        self._paths = {record.image_id: record.path for record in self.records}
        self._undecodable: set[int] = set()
        if len(self._paths) < len(self.records):
            raise DataError("two records have the same image_id; number the photos of one data set uniquely")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.sample(index, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the views that indexing returns."""
        self.epoch = epoch

    def paths(self, image_id: int) -> Path:
        """The file of a photo."""
        return self._paths[image_id]

    def repeated(self, counts: Sequence[int]) -> DetectionDataset:
        """The same photos, photo i ``counts[i]`` times in a row, each time in a view of its own."""
        return self.subset([record for record, count in zip(self.records, counts, strict=True) for _ in range(count)])

    def subset(self, records: Sequence[Record]) -> DetectionDataset:
        """The same data set with these of its photos."""
        other = copy.copy(self)
        other.records = tuple(records)
        return other

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """Size of photo ``index``, unread; torchvision's grouping by aspect ratio loads every photo without it."""
        record = self.records[index]
        return record.height, record.width

    def sample(self, index: int, epoch: int) -> tuple[Tensor, Target]:
        """Photo ``index`` as epoch ``epoch`` sees it, whatever :meth:`set_epoch` said.

        Raises:
            DataError: the photo cannot be decoded (see ``train`` and ``on_bad``).
        """
        record, image = self._read(range(len(self))[index])
        annotations = [a for a in record.annotations if not (self.train and a.ignore)]
        boxes = np.array([a.box for a in annotations], np.float32).reshape(-1, 4)
        labels = np.array([a.label for a in annotations], np.int64)
        if self.transforms is None:
            return as_tensor(image), _target(record, boxes, labels, annotations)
        seed = mixed_seed(self.seed, epoch, range(len(self))[index])
        kept = np.arange(len(annotations))
        image, boxes, kept = self.transforms(image, boxes, kept, seed)
        return as_tensor(image), _target(record, boxes, labels[kept], [annotations[k] for k in kept], cropped=True)

    def _read(self, index: int) -> tuple[Record, np.ndarray]:
        """The photo, or in training the next one that can be decoded."""
        for step in range(len(self)):
            record = self.records[(index + step) % len(self)]
            try:
                return record, _read_photo(record)
            except DataError as error:
                if not self.train or self.on_bad == "refuse":
                    raise
                if record.image_id not in self._undecodable:
                    self._undecodable.add(record.image_id)
                    count = len(self._undecodable)
                    logger.warning("%s; the next photo stands in for it (%d such so far)", error, count)
        raise DataError(f"none of {len(self)} photos can be decoded; the first is {self.records[index].path}")


def _read_photo(record: Record) -> np.ndarray:
    image = read_image(record.path, (record.width, record.height))
    if image.shape[:2] != (record.height, record.width):
        height, width = image.shape[:2]
        raise DataError(
            f"{describe(record)} is {width} x {height}, annotated as {record.width} x {record.height}; "
            "load the data set with load_dataset, which scales the boxes"
        )
    return image


def _target(
    record: Record,
    boxes: np.ndarray,
    labels: np.ndarray,
    annotations: list[Annotation],
    cropped: bool = False,
) -> Target:
    """``cropped``: the annotated areas no longer hold, the boxes' own are taken."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if not cropped:
        own = zip(annotations, areas, strict=True)
        areas = np.array([a.area if a.area is not None else area for a, area in own], np.float32)
    return {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(labels),
        "image_id": record.image_id,
        "area": torch.from_numpy(areas),
        "iscrowd": torch.tensor([int(a.ignore) for a in annotations], dtype=torch.int64),
    }

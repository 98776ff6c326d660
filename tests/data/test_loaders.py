"""The order of photos, for one process, several, and a resumed run."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.loaders import EpochSampler, build_loader
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.data.transforms import build_transforms
from earlyexit_ssd.errors import DataError


class Numbers:
    """A data set of a given length that remembers its epoch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return torch.tensor([index, self.epoch or 0]), {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def batches(count, batch_size, epoch=0, start=0, **options) -> list[list[int]]:
    loader = build_loader(Numbers(count), batch_size, 0, seed=options.pop("seed", 0), **options)
    loader.sampler.set_epoch(epoch, start)
    found = [[int(image[0]) for image in images] for images, _ in loader]
    assert len(found) == len(loader)
    return found


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60), per_process=st.integers(1, 5), world=st.integers(1, 4), epoch=st.integers(0, 5),
    start=st.integers(0, 3), train=st.booleans(),
)  # fmt: skip
def test_union_over_the_processes_is_the_single_process_batch(count, per_process, world, epoch, start, train):
    size = per_process * world
    if train and count < world:
        return
    alone = batches(count, size, epoch, train=train, start=start)
    dealt = [
        batches(count, size, epoch, train=train, rank=rank, world_size=world, start=start) for rank in range(world)
    ]
    for k, batch in enumerate(alone):
        union = [index for own in dealt for index in (own[k] if k < len(own) else [])]
        assert sorted(union) == sorted(batch)
    assert sum(map(len, dealt)) <= world * len(alone)
    if train:
        assert len({len(own) for own in dealt}) == 1, "every process takes as many steps"


@given(st.integers(1, 50), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_training_drops_an_incomplete_batch_if_there_is_a_full_one(count, size):
    lengths = [len(batch) for batch in batches(count, size, train=True)]
    assert lengths == ([size] * (count // size) if count >= size else [count])


def test_evaluation_takes_every_photo_once_in_order():
    assert batches(7, 3, train=False) == [[0, 1, 2], [3, 4, 5], [6]]


def test_order_depends_on_seed_and_epoch_only():
    first = batches(50, 5, 2, train=True)
    torch.manual_seed(77)
    assert batches(50, 5, 2, train=True) == first
    assert batches(50, 5, 3, train=True) != first
    assert batches(50, 5, 2, train=True, seed=1) != first
    assert sorted(index for batch in first for index in batch) == list(range(50))


def test_resuming_within_an_epoch():
    whole = [batches(20, 4, epoch, train=True) for epoch in (1, 2)]
    loader = build_loader(Numbers(20), 4, 0, True, 0)
    for epoch, start, expected in ((1, 3, whole[0][3:]), (2, 0, whole[1])):
        loader.sampler.set_epoch(epoch, start)
        assert len(loader) == len(expected)
        for _ in range(2):
            assert [[int(image[0]) for image in images] for images, _ in loader] == expected


def test_set_epoch_reaches_the_data_set_and_its_workers():
    loader = build_loader(Numbers(4), 2, 1, True, 0)
    for epoch in (5, 6):
        loader.sampler.set_epoch(epoch)
        assert {int(image[1]) for images, _ in loader for image in images} == {epoch}


def test_the_global_generator_is_left_alone():
    """Else a run that was resumed, and so opens one loader more, would differ from one that was not."""
    state = torch.get_rng_state()
    batches(8, 2, train=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_see_the_same_views(photo_file):
    records = [Record(i, photo_file(f"{i}.jpg"), 60, 40, (Annotation((5, 6, 25, 36), 1),)) for i in range(1, 5)]
    views = []
    for workers in (0, 2):
        dataset = DetectionDataset(records, ("chair",), build_transforms("ssd"), train=True)
        loader = build_loader(dataset, 2, workers, True, 0)
        loader.sampler.set_epoch(1)
        views.append(
            [(image, target) for images, targets in loader for image, target in zip(images, targets, strict=True)]
        )
    for (image, target), (image2, target2) in zip(*views, strict=True):
        assert torch.equal(image, image2)
        assert torch.equal(target["boxes"], target2["boxes"])
        assert target["image_id"] == target2["image_id"]


class Blurred(Numbers):
    """Photos that OpenCV works on with several threads."""

    def __getitem__(self, index: int):
        return torch.from_numpy(cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 0)), {}


def test_workers_do_not_wait_for_threads_of_this_process():
    """A forked worker has OpenCV's pool of threads without the threads: it hung at its first photo."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        dataset = Blurred(2)
        dataset[0]  # starts them
        loader = build_loader(dataset, 1, 1, True, 0)
        loader.timeout = 20  # seconds; it raises then
        assert len(list(loader)) == 2
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize(
    ("count", "size", "world", "message"),
    [(10, 5, 2, "batch size 5 cannot be dealt out evenly over 2"), (10, 0, 1, "batch size 0"), (0, 4, 1, "0 photos"),
     (1, 4, 2, "1 photos is too small for 2")],
)  # fmt: skip
def test_impossible_batches(count, size, world, message):
    with pytest.raises(DataError, match=message):
        build_loader(Numbers(count), size, 0, True, 0, world_size=world)


def test_sampler_without_set_epoch_is_epoch_zero():
    sampler = EpochSampler(Numbers(9), 3, True, 0)
    order = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == order

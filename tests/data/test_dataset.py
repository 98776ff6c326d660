"""What torchvision's detectors and evaluator get."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.data.transforms import build_transforms
from earlyexit_ssd.errors import DataError

CHAIR = Annotation((5, 6, 25, 36), 1, area=500.0)
CROWD = Annotation((30, 10, 40, 20), 2, ignore=True)


@pytest.fixture
def records(photo_file):
    return [
        Record(7, photo_file("a.png"), 60, 40, (CHAIR, CROWD)),
        Record(8, photo_file("b.png"), 60, 40, ()),
        Record(9, photo_file("c.png"), 60, 40, (CROWD,)),
    ]


def test_image_and_target_for_evaluation(records):
    dataset = DetectionDataset(records, ("chair", "cat"))
    image, target = dataset[0]
    pixels = np.asarray(Image.open(records[0].path))
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
    assert image.is_contiguous()
    assert torch.equal(target["boxes"], torch.tensor([[5.0, 6, 25, 36], [30, 10, 40, 20]]))
    assert torch.equal(target["labels"], torch.tensor([1, 2]))
    assert torch.equal(target["iscrowd"], torch.tensor([0, 1]))
    assert torch.equal(target["area"], torch.tensor([500.0, 100.0]))
    assert target["image_id"] == 7
    assert set(target) == {"boxes", "labels", "image_id", "area", "iscrowd"}
    assert dataset.paths(8) == records[1].path
    assert len(dataset) == 3


def test_training_drops_objects_to_ignore(records):
    dataset = DetectionDataset(records, ("chair", "cat"), train=True)
    assert dataset[0][1]["labels"].tolist() == [1]
    assert dataset[0][1]["iscrowd"].tolist() == [0]
    empty = dataset[2][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].dtype == empty["area"].dtype == torch.float32
    assert empty["labels"].dtype == empty["iscrowd"].dtype == torch.int64


def test_views_depend_on_seed_epoch_and_index_only(records):
    def make(seed):
        return DetectionDataset(records, ("chair", "cat"), build_transforms("ssd"), train=True, seed=seed)

    def same(a, b):
        return a[0].shape == b[0].shape and torch.equal(a[0], b[0]) and torch.equal(a[1]["boxes"], b[1]["boxes"])

    dataset, other = make(0), make(0)
    dataset.set_epoch(3)
    other.sample(1, 9)
    assert same(dataset[0], other.sample(0, 3))
    assert same(dataset[-3], other.sample(0, 3))
    assert not same(dataset[0], dataset.sample(0, 4))
    assert not same(dataset[0], make(1).sample(0, 3))
    assert dataset.epoch == 3


def test_indices_outside(records):
    with pytest.raises(IndexError):
        DetectionDataset(records, ("chair", "cat"))[3]


def test_areas_after_a_crop_are_the_boxes_own(records):
    dataset = DetectionDataset(records, ("chair", "cat"), build_transforms("flip"), train=True)
    assert dataset[0][1]["area"].tolist() == pytest.approx([600])


def test_a_photo_that_breaks_during_training_is_stepped_over(records, caplog):
    records[2].path.write_bytes(records[2].path.read_bytes()[:200])
    dataset = DetectionDataset(records, ("chair", "cat"), train=True)
    with caplog.at_level(logging.WARNING):
        image, target = dataset[2]
        dataset[2]
    assert target["image_id"] == 7, "the next photo, from the start again"
    assert torch.equal(image, dataset[0][0])
    assert len(caplog.messages) == 1
    assert "c.png: not a readable photo" in caplog.messages[0]
    assert "(1 such so far)" in caplog.messages[0]


@pytest.mark.parametrize(("train", "mode"), [(True, "refuse"), (False, "repair"), (False, "skip")])
def test_a_photo_that_breaks_is_an_error_in_evaluation_and_when_refused(records, train, mode):
    records[2].path.unlink()
    dataset = DetectionDataset(records, ("chair", "cat"), train=train, on_bad=mode)
    with pytest.raises(DataError, match=r"c.png: no such photo"):
        dataset[2]


def test_no_photo_left(records):
    for record in records:
        record.path.unlink()
    with pytest.raises(DataError, match="none of 3 photos can be decoded"):
        DetectionDataset(records, ("chair", "cat"), train=True)[1]


def test_a_photo_of_another_size_than_its_record(photo_file):
    record = Record(1, photo_file("a.png"), 61, 40)
    with pytest.raises(DataError, match="is 60 x 40, annotated as 61 x 40"):
        DetectionDataset([record], ("chair",))[0]


def test_image_ids_are_unique(records):
    with pytest.raises(DataError, match="the same image_id"):
        DetectionDataset([records[0], records[0]], ("chair",))


def test_repeated_photos_have_views_of_their_own(records):
    dataset = DetectionDataset(records, ("chair", "cat"), build_transforms("ssd"), train=True).repeated([3, 1, 0])
    assert [int(dataset[place][1]["image_id"]) for place in range(len(dataset))] == [7, 7, 7, 8]
    first, second, third = (dataset[place][0] for place in range(3))
    assert not torch.equal(first, second) and not torch.equal(second, third)

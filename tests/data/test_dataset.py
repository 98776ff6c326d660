"""The data set, its loader, the checks between splits, and load_dataset as a whole."""

import dataclasses
import logging
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import class_names, load_dataset, require_disjoint
from earlyexit_ssd.data.checks import describe
from earlyexit_ssd.data.dataset import (
    DetectionDataset,
    build_loader,
    fingerprint,
    repeat_factors,
    repeat_rare_classes,
    to_coco,
)
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.data.transforms import build_transforms
from earlyexit_ssd.errors import DataError
from tests.data.conftest import voc_object, voc_xml, write_photo

CHAIR = Annotation((5, 6, 25.5, 36), 1, area=500.0)
CROWD = Annotation((30, 10, 40, 20), 2, ignore=True)


CLASSES = ("chair", "cat")


@pytest.fixture
def records(photo_file):
    objects = {"a.png": (CHAIR, CROWD), "b.png": (), "c.png": (CROWD,)}
    return [Record(i, photo_file(name), 60, 40, own) for i, (name, own) in enumerate(objects.items(), start=7)]


def test_image_and_target_for_evaluation(records):
    dataset = DetectionDataset(records, CLASSES)
    image, target = dataset[0]
    pixels = np.array(Image.open(records[0].path))
    assert image.dtype == torch.float32 and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert {key: value.tolist() for key, value in target.items() if key != "image_id"} == {
        "boxes": [[5.0, 6, 25.5, 36], [30, 10, 40, 20]], "labels": [1, 2], "iscrowd": [0, 1], "area": [500.0, 100.0],
    }  # fmt: skip
    assert (target["image_id"], dataset.path_of(8), len(dataset)) == (7, records[1].path, 3)
    with pytest.raises(IndexError):
        dataset[3]


def test_ignored_objects_are_dropped_in_training(records):
    dataset = DetectionDataset(records, CLASSES, train=True)
    assert (dataset[0][1]["labels"].tolist(), dataset[0][1]["iscrowd"].tolist()) == ([1], [0])
    empty = dataset[2][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].dtype == empty["area"].dtype == torch.float32
    assert empty["labels"].dtype == empty["iscrowd"].dtype == torch.int64


def same(a, b) -> bool:
    """Return whether two samples have the same image, boxes and id."""
    return (
        torch.equal(a[0], b[0]) and torch.equal(a[1]["boxes"], b[1]["boxes"]) and a[1]["image_id"] == b[1]["image_id"]
    )


def test_views_depend_on_seed_epoch_and_index_only(records):
    def make(seed):
        return DetectionDataset(records, CLASSES, build_transforms("ssd"), train=True, seed=seed)

    dataset, other = make(0), make(0)
    dataset.set_epoch(3)
    other.sample(1, 9)
    assert same(dataset[0], other.sample(0, 3)) and same(dataset[-3], other.sample(0, 3))
    assert not same(dataset[0], dataset.sample(0, 4)) and not same(dataset[0], make(1).sample(0, 3))
    repeated = dataset.subset([records[0], records[0], records[1]])
    assert [repeated[place][1]["image_id"] for place in range(3)] == [7, 7, 8] and repeated.epoch == 3
    assert not same(repeated[0], repeated[1])


def test_area_after_augmentation_is_that_of_the_box(records):
    dataset = DetectionDataset(records, CLASSES, build_transforms("flip"), train=True)
    assert dataset[0][1]["area"].tolist() == pytest.approx([615])


def test_unreadable_photo_is_replaced_in_training(records, caplog):
    records[2].path.write_bytes(records[2].path.read_bytes()[:200])
    dataset = DetectionDataset(records, CLASSES, train=True)
    image, target = dataset[2]
    dataset[2]
    assert target["image_id"] == 7, "the next photo; after the last photo comes the first"
    assert torch.equal(image, dataset[0][0])
    assert len(caplog.messages) == 1
    assert "c.png: not a readable photo" in caplog.messages[0]
    assert "(1 replaced so far)" in caplog.messages[0]


@pytest.mark.parametrize(
    ("train", "mode", "message"),
    [
        (True, "refuse", "c.png: no such photo"),
        (False, "repair", "c.png: no such photo"),
        (False, "skip", "c.png: no such photo"),
        (True, "repair", "none of 3 photos can be decoded"),
    ],
)
def test_unreadable_photos_are_an_error(records, train, mode, message):
    for record in records:
        record.path.unlink()
    with pytest.raises(DataError, match=message):
        DetectionDataset(records, CLASSES, train=train, on_bad=mode)[2]


def test_photo_of_another_size_than_its_record_is_an_error(photo_file):
    record = Record(1, photo_file("a.png"), 61, 40)
    with pytest.raises(DataError, match="is 60 x 40, annotated as 61 x 40"):
        DetectionDataset([record], ("chair",))[0]


def test_image_ids_are_unique(records):
    with pytest.raises(DataError, match="the same image_id"):
        DetectionDataset([records[0], records[0]], ("chair",))


# Repeated photos of rare classes.


def photos(*labels, ignore=()):
    """Return a data set with one photo for each tuple of labels."""
    records = [
        Record(number, Path(f"{number}.jpg"), 60, 40, tuple(Annotation((0, 0, 9, 9), a, a in ignore) for a in own))
        for number, own in enumerate(labels)
    ]
    return DetectionDataset(records, ("chair", "cat", "dog"), train=True)


def test_repeat_factors_by_hand():
    """Of eight photos, one shows a cat and two a dog: f = 1/8 and 1/4. For t = 1/2 the factors are 2 and 2 ** 0.5.
    Objects to ignore do not count."""
    dataset = photos((1,), (1,), (1,), (1, 2), (1, 3), (3, 3), (), (1,))
    assert repeat_factors(dataset, 0.5) == pytest.approx([1, 1, 1, 2, 2**0.5, 2**0.5, 1, 1])
    assert repeat_factors(photos((1,), (2,), ignore=(2,)), 1.0) == pytest.approx([2**0.5, 1])


def test_repeated_photos_are_adjacent_and_keep_their_ids():
    dataset = photos((1,), (1,), (1,), (1, 2))
    repeated = repeat_rare_classes(dataset, 1.0, seed=0)  # the cat's factor is sqrt(4)
    assert [record.image_id for record in repeated.records[-2:]] == [3, 3] and len(dataset) == 4
    assert repeat_rare_classes(dataset, 0.0, seed=0) is dataset


def test_repeat_factors_are_rounded_at_random_by_seed():
    dataset = photos(*[(1,)] * 900, *[(2,)] * 100)  # factors: 1 at t = 0.225, and 1.5 for the cats
    counts = [len(repeat_rare_classes(dataset, 0.225, seed)) for seed in (0, 0, 1)]
    assert counts[0] == counts[1] != counts[2] and counts == pytest.approx([1050] * 3, abs=25)


# The fingerprint of a data set.

BOX = Annotation((1.0, 2.0, 3.0, 4.0), 1)


@pytest.fixture
def record(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a photo")
    return Record(7, tmp_path / "a.jpg", 10, 20, (BOX,))


def fingerprint_of(*records, classes=CLASSES):
    return fingerprint(DetectionDataset(records, classes))


def test_fingerprint_depends_on_photos_boxes_ids_and_classes_but_not_on_paths(record, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"another")
    moved = dataclasses.replace(record, path=shutil.copy(record.path, tmp_path / "c.jpg"))
    assert fingerprint_of(record) == fingerprint_of(moved)
    boxes = [{"box": (1.0, 2.0, 3.0, 4.5)}, {"label": 2}, {"ignore": True}]
    changes = [{"annotations": (dataclasses.replace(BOX, **change),)} for change in boxes]
    changes += [{"annotations": ()}, {"path": tmp_path / "b.jpg"}, {"image_id": 8}]
    changed = [(record,), *((dataclasses.replace(record, **change),) for change in changes)]
    changed.append((record, *changed[-1]))
    fingerprints = {fingerprint_of(record, classes=("cat", "chair")), *(fingerprint_of(*own) for own in changed)}
    assert len(fingerprints) == 1 + len(changed)


# No photo in two splits.


def dataset(*paths: Path) -> DetectionDataset:
    return DetectionDataset([Record(i, path, 60, 40) for i, path in enumerate(paths, start=1)], ("chair",))


def test_splits_with_different_photos_are_disjoint(photo_file):
    """Files of equal size, and two copies within one split, are allowed."""
    a, b, c = (photo_file(f"{name}.bmp") for name in "abc")
    copy = Path(shutil.copy(a, a.with_name("copy.bmp")))
    assert len({path.stat().st_size for path in (a, b, c)}) == 1
    require_disjoint(train=dataset(a, copy), calib=dataset(b), test=dataset(c))


@pytest.mark.parametrize("how", ["same path", "detour", "symlink", "copy"])
def test_shared_photo_is_an_error(photo_file, tmp_path, how):
    """The message has the count, and the first shared photo by its path in both splits."""
    a, b, c = (photo_file(f"{name}.png") for name in "abc")
    (tmp_path / "other").mkdir()
    again = {"same path": b, "detour": tmp_path / "other" / ".." / "b.png"}.get(how, tmp_path / "other" / "again.png")
    if how == "symlink":
        again.symlink_to(b)
    elif how == "copy":
        shutil.copy(b, again)
    example = f"{b} and {again if how == 'copy' else b}"
    with pytest.raises(DataError) as error:
        require_disjoint(train=dataset(a, b), calib=dataset(c), test=dataset(again))
    message = str(error.value)
    assert message.startswith(f"train and test share photos (1), the first: {example}; remove them from one data set")
    assert "\n" not in message


def test_photo_listed_twice_is_an_error(make_coco):
    """Two data sets have the same annotation file."""
    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("again", "tiny.json", "tiny"))
    with pytest.raises(DataError, match=r"^tiny \+ again has the photo .*tiny10.png twice; list each file once"):
        load_dataset(cfg, ("tiny", "again"))


@pytest.mark.parametrize("function", [fingerprint, lambda photos: require_disjoint(train=photos)])
def test_missing_photo_is_an_error(tmp_path, function):
    with pytest.raises(DataError, match=r"lost.png: photo cannot be read \(No such file or directory\)"):
        function(dataset(tmp_path / "lost.png"))


def test_only_files_of_equal_size_are_read_and_only_once(photo_file, monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or read_bytes(self))
    photos = [photo_file(f"{name}.bmp", (50 + (name == "c"), 40)) for name in "abcde"]
    require_disjoint(train=dataset(*photos[:3]), calib=dataset(photos[3]), test=dataset(photos[4]))
    assert sorted(read) == ["a.bmp", "b.bmp", "d.bmp", "e.bmp"]


# Conversion to pycocotools.


def test_to_coco_by_hand(records, capsys):
    coco = to_coco(DetectionDataset(records, CLASSES))
    assert capsys.readouterr().out == ""
    image = {"id": 7, "file_name": str(records[0].path), "width": 60, "height": 40}
    assert coco.loadImgs([7]) == [image] and coco.getImgIds() == [7, 8, 9]
    assert coco.loadCats([1, 2]) == [{"id": 1, "name": "chair"}, {"id": 2, "name": "cat"}]
    cats = {"category_id": 2, "bbox": [30, 10, 10, 10], "area": 100, "iscrowd": 1}
    assert coco.loadAnns([1, 2, 3]) == [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 6, 20.5, 30], "area": 500.0, "iscrowd": 0},
        {"id": 2, "image_id": 7, **cats},
        {"id": 3, "image_id": 9, **cats},
    ]


# The order of photos, in one process, in several, and in a resumed run.


class Numbers(list):
    """A data set of numbers. A sample has the number and the epoch."""

    epoch = 0

    def __getitem__(self, index: int):
        return torch.tensor([super().__getitem__(index), self.epoch]), {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def batches(count, batch_size, epoch=0, start=0, seed=0, **options) -> list[list[int]]:
    loader = build_loader(Numbers(range(count)), batch_size, 0, seed=seed, **options)
    loader.sampler.set_epoch(epoch, start)
    indices = [[int(image[0]) for image in images] for images, _ in loader]
    assert len(indices) == len(loader)
    return indices


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60), per_process=st.integers(1, 5), world=st.integers(1, 4), epoch=st.integers(0, 5),
    start=st.integers(0, 3),
)  # fmt: skip
def test_union_over_the_processes_is_the_single_process_batch(count, per_process, world, epoch, start):
    size = per_process * world
    if count < world:
        return
    alone = batches(count, size, epoch, train=True, start=start)
    dealt = [batches(count, size, epoch, train=True, rank=rank, world_size=world, start=start) for rank in range(world)]
    for k, batch in enumerate(alone):
        union = [index for own in dealt for index in (own[k] if k < len(own) else [])]
        assert sorted(union) == sorted(batch)
    assert sum(map(len, dealt)) <= world * len(alone)
    assert len({len(own) for own in dealt}) == 1, "every process takes as many steps"


@given(st.integers(1, 50), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_training_drops_the_last_incomplete_batch_unless_it_is_the_only_one(count, size):
    lengths = [len(batch) for batch in batches(count, size, train=True)]
    assert lengths == ([size] * (count // size) if count >= size else [count])


@given(count=st.integers(1, 60), size=st.integers(1, 8), world=st.integers(1, 4), start=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_evaluation_batches_are_those_of_a_single_process(count, size, world, start):
    alone = batches(count, size, train=False, start=start)
    for rank in range(world):
        assert batches(count, size, train=False, rank=rank, world_size=world, start=start) == alone[rank::world]


def test_order_depends_on_seed_and_epoch_only():
    """The global generator is not used, because a resumed run opens one more loader."""
    assert batches(7, 3, train=False) == [[0, 1, 2], [3, 4, 5], [6]]
    first = batches(50, 5, 2, train=True)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert batches(50, 5, 2, train=True) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(50, 5, 3, train=True) != first != batches(50, 5, 2, train=True, seed=1)
    assert (
        list(build_loader(Numbers(range(50)), 5, 0, True, 0).sampler)
        == np.ravel(batches(50, 5, 0, train=True)).tolist()
    )
    assert sorted(np.ravel(first)) == list(range(50))


def test_resuming_within_an_epoch():
    for epoch, start in ((1, 3), (2, 0)):
        whole = batches(20, 4, epoch, train=True)
        assert batches(20, 4, epoch, start, train=True) == whole[start:]


def test_set_epoch_reaches_the_data_set_and_its_workers():
    loader = build_loader(Numbers(range(4)), 2, 1, True, 0)
    for epoch in (5, 6):
        loader.sampler.set_epoch(epoch)
        assert {int(image[1]) for images, _ in loader for image in images} == {epoch}


def test_views_do_not_depend_on_the_number_of_workers(photo_file):
    records = [Record(i, photo_file(f"{i}.jpg"), 60, 40, (Annotation((5, 6, 25, 36), 1),)) for i in range(1, 5)]
    views = []
    for workers in (0, 2):
        dataset = DetectionDataset(records, ("chair",), build_transforms("ssd"), train=True)
        loader = build_loader(dataset, 2, workers, True, 0)
        loader.sampler.set_epoch(1)
        views.append([view for images, targets in loader for view in zip(images, targets, strict=True)])
    assert all(same(view, again) for view, again in zip(*views, strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot limit a process to some cores")
def test_there_are_at_most_as_many_workers_as_cores():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(cores)])
        assert build_loader(Numbers(range(2)), 1, workers=2, train=False, seed=0).num_workers == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_workers_do_not_get_signals_to_the_process_group():
    iterator = iter(build_loader(Numbers(range(2)), 1, workers=1, train=False, seed=0))
    next(iterator)
    (worker,) = iterator._workers
    assert os.getpgid(worker.pid) != os.getpgrp()


class Blurred(Numbers):
    """A data set that OpenCV computes with several threads."""

    def __getitem__(self, index: int):
        return torch.from_numpy(cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 0)), {}


def test_worker_does_not_hang_after_opencv_used_threads():
    """A forked worker inherits OpenCV's thread pool, but not its threads. It would wait for them forever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        dataset = Blurred(range(2))
        dataset[0]  # starts OpenCV's threads
        loader = build_loader(dataset, 1, 1, True, 0)
        loader.timeout = 20  # seconds, then it raises
        assert len(list(loader)) == 2
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize(
    ("count", "size", "world", "message"),
    [(10, 5, 2, "batch size is 5, expected a multiple of 2"), (10, 0, 1, "batch size is 0"),
     (0, 4, 1, "0 photos"), (1, 4, 2, r"1 photos, expected at least one per process \(2\)")],
)  # fmt: skip
def test_impossible_batches(count, size, world, message):
    with pytest.raises(DataError, match=message):
        build_loader(Numbers(range(count)), size, 0, True, 0, world_size=world)


# load_dataset, from the configuration to the data set.


def test_classes_of_the_file_or_of_the_configuration(make_coco):
    cfg = make_coco()
    dataset = load_dataset(cfg, ["tiny"])
    assert dataset.classes == ("chair", "cat")
    assert [len(record.annotations) for record in dataset.records] == [2, 1, 0]
    cfg.DATA.AUGMENTATION = "ssdlite"
    assert load_dataset(cfg, "tiny", train=True).transforms and not dataset.transforms
    cfg.DATA.AUGMENTATION, cfg.DATA.CLASSES = "none", ("chair",)
    chairs = load_dataset(cfg, "tiny", train=True)
    assert chairs.classes == ("chair",)
    assert [chairs[i][1]["labels"].tolist() for i in range(3)] == [[1], [], []], "the difficult chair is no target"


def test_joined_sets_have_the_classes_of_the_training_set(make_coco):
    make_coco(name="other", categories=[{"id": 62, "name": "dog"}, {"id": 3, "name": "Cat"}])
    cfg = make_coco()
    cfg.DATA.DATASETS += (("other", "other.json", "other"),)
    joined = load_dataset(cfg, ("tiny", "other"))
    assert joined.classes == ("chair", "cat"), "the classes of DATA.TRAIN"
    assert [record.image_id for record in joined.records] == [1, 2, 3, 4, 5, 6]
    ids = [record.source_id for record in joined.records]
    assert ids[:3] == ids[3:] != [1, 2, 3] and f"(id {ids[4]})" in describe(joined.records[4]), "ids of the files"
    assert [a.label for record in joined.records for a in record.annotations] == [1, 2, 1, 2]
    cfg.DATA.TRAIN = ("tiny", "other")
    assert load_dataset(cfg, ("tiny", "other")).classes == class_names(cfg) == ("chair", "cat", "dog")


def test_classes_of_left_out_photos_are_no_classes(make_coco, make_voc):
    cfg, boxes = make_coco(), {name: voc_object(name, (5, 5, 20, 20)) for name in ("ape", "bear")}
    make_voc({"a": voc_xml(boxes["ape"], "<object/>"), "b": voc_xml(boxes["bear"])})
    cfg.DATA.DATASETS = (("zoo", "VOCdevkit/VOC2012", "trainval"),)
    cfg.DATA.TRAIN, cfg.DATA.ON_BAD = ("zoo",), "skip"
    assert load_dataset(cfg, "zoo").classes == class_names(cfg) == ("bear",)


def test_negative_share_and_limit(make_coco):
    cfg = make_coco(photos=tuple({"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(40, 50)))
    cfg.DATA.DATASETS += (("more", "", "more"),)
    write_photo(Path(cfg.DATA.ROOT, "more", "a.png"), (30, 30))
    cfg.DATA.NEGATIVE_SHARE = 0.5
    assert len(load_dataset(cfg, "tiny", train=True)) == 2, "a photo with only a difficult chair is a negative"
    assert len(load_dataset(cfg, "tiny")) == 13, "evaluation keeps all negatives"
    joined = load_dataset(cfg, ("tiny", "more"), train=True, labels="replaced")
    assert len(joined) == 14, "a photo without labels may show objects"
    cfg.DATA.LIMIT = 2
    first, again = (load_dataset(cfg, "tiny").records for _ in range(2))
    assert len(first) == 2 and first == again


def test_bad_records_of_all_kinds(make_coco, tmp_path, on_bad, caplog):
    size, box = {"width": 60, "height": 40}, {"category_id": 62, "bbox": [5, 5, 10, 10]}
    cfg = make_coco(
        entries=(
            {"id": 4, "image_id": 30, **box, "bbox": [5, 5, 0, 5]},
            {"id": 5, "image_id": 40, **box},
            {"id": 6, "image_id": 50, **box, "bbox": [-5, 5, 15, 10]},
        ),
        photos=(
            {"id": 40, "file_name": "lost.png", **size},
            {"id": 50, "file_name": "big.png", "width": 120, "height": 80},
            {"id": 60, "file_name": "tiny20.png", **size},  # an export of two videos that both have this frame
        ),
    )
    (tmp_path / "tiny" / "lost.png").unlink()
    cfg.DATA.ON_BAD = on_bad
    if on_bad == "refuse":
        with pytest.raises(DataError, match=r"tiny.json: photo tiny30.png .id 30., annotation 4 has box"):
            load_dataset(cfg, "tiny")
        return
    dataset = load_dataset(cfg, "tiny")
    kept = {record.image_id: record for record in dataset.records}
    assert set(kept) == ({10, 30, 50} if on_bad == "repair" else {10})
    if on_bad == "repair":
        assert (kept[50].annotations[0].box, kept[50].width, kept[50].height) == ((0, 2.5, 5, 7.5), 60, 40)
    # "skip" leaves out the photo of another size before its boxes are checked
    counts = {"box without area": 1, "box outside the photo": int(on_bad == "repair")}
    for kind, count in {**counts, "missing photo file": 1, "one file under two ids": 1}.items():
        assert caplog.text.count(f"1 x {kind}") == count
    assert {image.shape for image, _ in (dataset[i] for i in range(len(dataset)))} == {(3, 40, 60)}


def test_no_box_and_no_photo_are_errors(make_coco, tmp_path):
    cfg = make_coco(annotations=[])
    cfg.DATA.CLASSES = ("cat",)
    for share in (-1.0, 0.5):
        cfg.DATA.NEGATIVE_SHARE = share
        with pytest.raises(DataError, match="no box of cat in 3 photos.*DATA.CLASSES"):
            load_dataset(cfg, "tiny", train=True)
    shutil.rmtree(tmp_path / "tiny")
    (tmp_path / "tiny").mkdir()
    with pytest.raises(DataError, match="no usable photo is left"):
        load_dataset(cfg, "tiny")


def test_classes_of_xml_folders(make_coco, make_voc):
    """All data sets get the classes that occur in the training sets. Photos without objects are negatives."""
    cup, mug = (voc_xml(voc_object(name, (1, 1, 20, 20))) for name in ("cup", "mug"))
    folders = {"train": {"c": cup, "m": mug}, "calib": {"c": cup}, "empty": {"n": voc_xml()}}
    for name, texts in folders.items():
        make_voc(texts, folder=name)
    cfg = make_coco()
    cfg.DATA.DATASETS = tuple((name, f"{name}/Annotations", f"{name}/JPEGImages") for name in folders)
    cfg.DATA.TRAIN = ("train", "empty")
    assert len(load_dataset(cfg, cfg.DATA.TRAIN, train=True)) == 3
    for name in folders:
        assert load_dataset(cfg, name).classes == ("cup", "mug")
    cfg.DATA.CLASSES = ("mgu",)
    with pytest.raises(DataError, match=r"'mgu', which is not a class of train, empty \(did you mean 'mug'\?\)"):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True)
    cfg.DATA.CLASSES, cfg.DATA.TRAIN = (), ("empty",)
    with pytest.raises(DataError, match="no box of any class in 1 photos"):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True)


def test_boxes_of_a_photo_with_swapped_width_and_height(make_coco, caplog):
    """The boxes are not scaled. They are clipped to the size of the file, not to the annotated size."""
    image = {"id": 10, "file_name": "turned.png", "width": 40, "height": 60}
    boxes = ([30, 10, 25, 20], [50, 30, 20, 20])
    entries = [{"id": i, "image_id": 10, "category_id": 62, "bbox": box} for i, box in enumerate(boxes)]
    dataset = load_dataset(make_coco(photos=(image,), images=[image], annotations=entries), "tiny")
    assert [a.box for a in dataset.records[0].annotations] == [(30, 10, 55, 30), (50, 30, 60, 40)]
    assert dataset[0][0].shape == (3, 40, 60)
    assert caplog.text.count("1 x photo with width and height swapped") == 1
    assert caplog.text.count("1 x box outside the photo") == 1


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "photos", "chairs"),
    [
        ("voc2012_animals_test", 614, 40),
        ("furniture_test", 340, 100),
        ("coco_2017_val", 327, 138),  # two of them crowds
        ("voc_xml_sample_trainval", 74, 13),
    ],
)
def test_shared_sets(shared_root, name, photos, chairs):
    cfg = get_cfg()
    cfg.DATA.update(ROOT=str(shared_root / "data"), CLASSES=("chair",), ON_BAD="refuse")
    dataset = load_dataset(cfg, name)
    counts = [len(record.annotations) for record in dataset.records]
    assert (len(dataset), sum(counts)) == (photos, chairs)
    fullest = counts.index(max(counts))
    image, target = dataset[fullest]
    assert image.shape[1:] == dataset.get_height_and_width(fullest)
    assert len(target["boxes"]) == counts[fullest]


def test_sets_with_ignored_boxes_only_are_reported(make_coco, caplog):
    box = {"image_id": 10, "category_id": 62, "bbox": [5, 5, 10, 10]}
    cfg = make_coco(annotations=[{"id": 1, "iscrowd": 1, **box}, {"id": 2, "difficult": "yes", **box}])
    cfg.DATA.CLASSES = ("chair",)
    with pytest.raises(DataError, match="tiny: all 2 boxes of chair in 3 photos are marked iscrowd, difficult or ig"):
        load_dataset(cfg, "tiny", train=True)
    with caplog.at_level(logging.INFO):
        load_dataset(cfg, "tiny")
    assert "tiny has no box of chair (only boxes to ignore)" in caplog.messages
    assert "tiny: 3 photos, 0 boxes and 2 to ignore, 3 photos without boxes" in caplog.messages


def test_allow_outside_key(make_coco, tmp_path):
    cfg = make_coco()
    cfg.DATA.DATASETS = (("tiny", "tiny.json", "empty"),)
    (tmp_path / "empty").mkdir()
    text = (tmp_path / "tiny.json").read_text()
    (tmp_path / "tiny.json").write_text(text.replace('"tiny', f'"{tmp_path}/tiny/tiny'))
    with pytest.raises(DataError, match="no usable photo is left"):
        load_dataset(cfg, "tiny")
    cfg.DATA.ALLOW_OUTSIDE = True
    assert len(load_dataset(cfg, "tiny")) == 3

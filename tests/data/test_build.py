"""From the configuration to a data set, all steps together."""

from __future__ import annotations

import logging

import pytest
import torch

from earlyexit_ssd.data import build_loader, class_names, load_dataset, to_coco
from earlyexit_ssd.errors import ConfigError, DataError


def test_all_classes_of_the_file(make_coco):
    cfg = make_coco()
    dataset = load_dataset(cfg, ["tiny"])
    assert dataset.classes == ("chair", "cat")
    assert [len(record.annotations) for record in dataset.records] == [2, 1, 0]
    assert dataset[0][1]["iscrowd"].tolist() == [0, 1]


def test_one_class_detector(make_coco):
    cfg = make_coco()
    cfg.DATA.CLASSES = ("chair",)
    dataset = load_dataset(cfg, "tiny", train=True)
    assert dataset.classes == ("chair",)
    assert [dataset[i][1]["labels"].tolist() for i in range(3)] == [[1], [], []], "the difficult chair is no target"
    assert len(to_coco(load_dataset(cfg, "tiny")).anns) == 2


def test_two_sets_and_the_classes_of_the_training_set(make_coco):
    make_coco(name="other", categories=[{"id": 62, "name": "dog"}, {"id": 3, "name": "Cat"}])
    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("other", "other.json", "other"))
    joined = load_dataset(cfg, ("tiny", "other"))
    assert joined.classes == ("chair", "cat"), "those of DATA.TRAIN, as any other set gets"
    assert [record.image_id for record in joined.records] == [1, 2, 3, 4, 5, 6]
    assert [a.label for record in joined.records for a in record.annotations] == [1, 2, 1, 2]
    cfg.DATA.TRAIN = ("tiny", "other")
    assert load_dataset(cfg, ("tiny", "other")).classes == class_names(cfg) == ("chair", "cat", "dog")
    cfg.DATA.CLASSES = ("dog",)
    assert class_names(cfg) == ("dog",)


def test_negative_share_and_limit(make_coco):
    cfg = make_coco(photos=tuple({"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(40, 50)))
    cfg.DATA.NEGATIVE_SHARE = 0.5
    assert len(load_dataset(cfg, "tiny", train=True)) == 2, "a photo with a difficult chair alone teaches nothing"
    assert len(load_dataset(cfg, "tiny")) == 13, "evaluation keeps all negatives"
    cfg.DATA.LIMIT = 2
    first = [record.image_id for record in load_dataset(cfg, "tiny").records]
    assert len(first) == 2
    assert [record.image_id for record in load_dataset(cfg, "tiny").records] == first


def test_bad_records_of_all_kinds(make_coco, tmp_path, on_bad, caplog):
    cfg = make_coco(
        entries=(
            {"id": 4, "image_id": 30, "category_id": 62, "bbox": [5, 5, 0, 5]},
            {"id": 5, "image_id": 40, "category_id": 62, "bbox": [5, 5, 10, 10]},
            {"id": 6, "image_id": 50, "category_id": 62, "bbox": [-5, 5, 15, 10]},
        ),
        photos=(
            {"id": 40, "file_name": "lost.png", "width": 60, "height": 40},
            {"id": 50, "file_name": "big.png", "width": 120, "height": 80},
        ),
    )
    (tmp_path / "tiny" / "lost.png").unlink()
    (tmp_path / "tiny" / "big.png").unlink()
    (tmp_path / "tiny" / "tiny10.png").rename(tmp_path / "tiny" / "big.png")
    cfg.DATA.ON_BAD = on_bad
    if on_bad == "refuse":
        with pytest.raises(DataError, match=r"tiny.json: photo tiny30.png .id 30., annotation 4 has box"):
            load_dataset(cfg, "tiny")
        return
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(cfg, "tiny")
    kept = {record.image_id: record for record in dataset.records}
    assert set(kept) == ({20, 30, 50} if on_bad == "repair" else {20})
    if on_bad == "repair":
        assert kept[50].annotations[0].box == (0, 2.5, 5, 7.5)
        assert (kept[50].width, kept[50].height) == (60, 40)
    # of a photo that is left out for its size, the boxes are not looked at
    counts = {"box without area": 1, "box outside the photo": int(on_bad == "repair"), "2 x missing photo file": 1}
    for kind, count in counts.items():
        assert sum(kind in message for message in caplog.messages) == count
    for image, target in (dataset[i] for i in range(len(dataset))):
        assert image.shape == (3, 40, 60)
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()


def test_nothing_left_or_nothing_to_learn(make_coco, tmp_path):
    cfg = make_coco()
    cfg.DATA.CLASSES = ("cat",)
    (tmp_path / "tiny.json").write_text(
        (tmp_path / "tiny.json").read_text().replace('"category_id": 3', '"category_id": 62')
    )
    for share in (-1.0, 0.5):
        cfg.DATA.NEGATIVE_SHARE = share
        with pytest.raises(DataError, match="no box of cat in 3 photos.*DATA.CLASSES"):
            load_dataset(cfg, "tiny", train=True)
    for photo in (tmp_path / "tiny").iterdir():
        photo.unlink()
    with pytest.raises(DataError, match="no usable photo is left"):
        load_dataset(cfg, "tiny")


def test_unknown_data_set(make_coco):
    with pytest.raises(ConfigError, match="'tinny'"):
        load_dataset(make_coco(), ["tinny"])


def test_loader_end_to_end(make_coco):
    cfg = make_coco()
    cfg.DATA.AUGMENTATION = "ssdlite"
    dataset = load_dataset(cfg, "tiny", train=True)
    loader = build_loader(dataset, 2, 0, True, cfg.SEED)
    loader.sampler.set_epoch(1)
    images, targets = next(iter(loader))
    assert len(images) == len(targets) == 2
    assert all(isinstance(image, torch.Tensor) and image.shape[0] == 3 for image in images)


def test_xml_folders_of_ones_own(make_coco, make_voc, voc_xml, voc_object):
    """Which classes occur differs from folder to folder; photos without any are negatives."""
    cup, mug = (voc_xml(voc_object(name, (1, 1, 20, 20))) for name in ("cup", "mug"))
    make_voc({"c": cup, "m": mug}, folder="train")
    make_voc({"c": cup}, folder="calib")
    make_voc({"n": voc_xml()}, folder="empty")
    cfg = make_coco()
    cfg.DATA.DATASETS = tuple(
        (name, f"{name}/Annotations", f"{name}/JPEGImages") for name in ("train", "calib", "empty")
    )
    cfg.DATA.TRAIN = ("train", "empty")
    train = load_dataset(cfg, cfg.DATA.TRAIN, train=True)
    assert (train.classes, len(train)) == (("cup", "mug"), 3)
    for chosen in ((), ("mug",)):
        cfg.DATA.CLASSES = chosen
        for name in ("calib", "empty"):
            assert (load_dataset(cfg, name).classes, len(load_dataset(cfg, name))) == (chosen or ("cup", "mug"), 1)
    cfg.DATA.CLASSES = ("mgu",)
    with pytest.raises(DataError, match=r"'mgu', which train, empty does not have \(did you mean 'mug'\?\)"):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True)
    cfg.DATA.CLASSES, cfg.DATA.TRAIN = (), ("empty",)
    with pytest.raises(DataError, match="no box of any class in 1 photos"):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True)


def test_boxes_of_a_photo_whose_sides_are_swapped(make_coco, caplog):
    """They are neither stretched nor cut to the wrong size; what is outside the real one is."""
    image = {"id": 10, "file_name": "turned.png", "width": 40, "height": 60}
    boxes = ([30, 10, 25, 20], [50, 30, 20, 20])
    entries = [{"id": i, "image_id": 10, "category_id": 62, "bbox": box} for i, box in enumerate(boxes)]
    dataset = load_dataset(make_coco(photos=(image,), images=[image], annotations=entries), "tiny")
    assert [a.box for a in dataset.records[0].annotations] == [(30, 10, 55, 30), (50, 30, 60, 40)]
    assert dataset[0][0].shape == (3, 40, 60)
    assert sum("1 x photo with width and height swapped" in message for message in caplog.messages) == 1
    assert sum("1 x box outside the photo" in message for message in caplog.messages) == 1


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "photos", "chair_photos", "chairs"),
    [
        ("voc2012_animals_test", 614, 26, 40),
        ("furniture_test", 340, 100, 100),
        ("coco_2017_val", 327, 41, 138),  # two of them crowds
        ("voc_xml_sample_trainval", 74, None, 13),
    ],
)
def test_shared_sets(make_coco, shared_root, name, photos, chair_photos, chairs):
    cfg = make_coco()
    cfg.DATA.ROOT = str(shared_root / "data")
    cfg.DATA.CLASSES = ("chair",)
    cfg.DATA.DATASETS = ()
    cfg.DATA.ON_BAD = "refuse"
    dataset = load_dataset(cfg, name)
    counts = [len(record.annotations) for record in dataset.records]
    assert len(dataset) == photos
    assert sum(counts) == chairs
    assert chair_photos is None or sum(count > 0 for count in counts) == chair_photos
    image, target = dataset[counts.index(max(counts))]
    assert image.shape[1:] == (dataset.records[counts.index(max(counts))].height, image.shape[2])
    assert len(target["boxes"]) == max(counts)


def test_boxes_to_ignore_are_not_passed_over_in_silence(make_coco, caplog):
    box = {"image_id": 10, "category_id": 62, "bbox": [5, 5, 10, 10]}
    cfg = make_coco(annotations=[{"id": 1, "iscrowd": 1, **box}, {"id": 2, "difficult": "yes", **box}])
    cfg.DATA.CLASSES = ("chair",)
    said = "tiny: 2 boxes of chair, all of them marked iscrowd, difficult or ignore, in 3 photos; nothing can be learnt"
    with pytest.raises(DataError, match=said):
        load_dataset(cfg, "tiny", train=True)
    with caplog.at_level(logging.INFO):
        load_dataset(cfg, "tiny")
    assert "tiny has no box of chair (but some to ignore)" in caplog.messages
    assert "tiny: 3 photos, 0 boxes and 2 to ignore, 3 photos without any" in caplog.messages


def test_a_file_that_is_named_twice_is_counted(make_coco, caplog):
    """As an export writes the frames of two videos: boxes of one would be misses in the other."""
    cfg = make_coco(photos=({"id": 40, "file_name": "tiny10.png", "width": 60, "height": 40},))
    assert [record.image_id for record in load_dataset(cfg, "tiny").records] == [20, 30]
    assert "1 x one file under two ids" in caplog.text
    cfg.DATA.ON_BAD = "refuse"
    with pytest.raises(DataError, match="photo tiny10.png .id 40. is the file of id 10: one file under two ids"):
        load_dataset(cfg, "tiny")


def test_the_key_that_allows_photos_outside(make_coco, tmp_path):
    cfg = make_coco()
    cfg.DATA.DATASETS = (("tiny", "tiny.json", "empty"),)
    (tmp_path / "empty").mkdir()
    text = (tmp_path / "tiny.json").read_text()
    (tmp_path / "tiny.json").write_text(text.replace('"tiny', f'"{tmp_path}/tiny/tiny'))
    with pytest.raises(DataError, match="no usable photo is left"):
        load_dataset(cfg, "tiny")
    cfg.DATA.ALLOW_OUTSIDE = True
    assert len(load_dataset(cfg, "tiny")) == 3

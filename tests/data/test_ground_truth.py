"""pycocotools gets the same photos and objects, as does torchvision's reference conversion."""

from __future__ import annotations

import pytest
from pycocotools.cocoeval import COCOeval

from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.ground_truth import to_coco
from earlyexit_ssd.data.records import Annotation, Record


@pytest.fixture
def dataset(photo_file):
    chair = Annotation((5, 6, 25.5, 36), 1, area=500.0)
    crowd = Annotation((30, 10, 40, 20), 2, ignore=True)
    records = [
        Record(7, photo_file("a.png"), 60, 40, (chair, crowd)),
        Record(8, photo_file("b.png"), 60, 40, ()),
        Record(9, photo_file("c.png"), 60, 40, (crowd,)),
    ]
    return DetectionDataset(records, ("chair", "cat"))


def test_by_hand(dataset, capsys):
    coco = to_coco(dataset)
    assert capsys.readouterr().out == ""
    assert coco.getImgIds() == [7, 8, 9]
    assert coco.loadCats([1, 2]) == [{"id": 1, "name": "chair"}, {"id": 2, "name": "cat"}]
    assert coco.loadAnns([1, 2, 3]) == [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 6, 20.5, 30], "area": 500.0, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [30, 10, 10, 10], "area": 100, "iscrowd": 1},
        {"id": 3, "image_id": 9, "category_id": 2, "bbox": [30, 10, 10, 10], "area": 100, "iscrowd": 1},
    ]


def test_the_same_as_by_iterating_the_data_set(dataset):
    """What torchvision's reference evaluation reads from a data set."""
    coco = to_coco(dataset)
    for index in range(len(dataset)):
        image, target = dataset[index]
        entry = coco.imgs[target["image_id"]]
        assert (entry["width"], entry["height"]) == (image.shape[-1], image.shape[-2])
        boxes = target["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        own = coco.imgToAnns[target["image_id"]]
        assert [a["bbox"] for a in own] == boxes.tolist()
        assert [a["area"] for a in own] == target["area"].tolist()
        assert [a["iscrowd"] for a in own] == target["iscrowd"].tolist()
        assert [a["category_id"] for a in own] == target["labels"].tolist()


def test_evaluation_ignores_what_is_to_be_ignored(dataset, capsys):
    """One perfect chair; the detection on the crowd of cats counts neither for nor against."""
    coco = to_coco(dataset)
    results = coco.loadRes(
        [
            {"image_id": 7, "category_id": 1, "bbox": [5, 6, 20.5, 30], "score": 0.9},
            {"image_id": 7, "category_id": 2, "bbox": [30, 10, 10, 10], "score": 0.9},
        ]
    )
    evaluation = COCOeval(coco, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    assert (evaluation.eval["precision"][:, :, 1] == -1).all(), "no cat to find"


def test_without_any_object(photo_file):
    coco = to_coco(DetectionDataset([Record(1, photo_file("a.png"), 60, 40)], ("chair",)))
    assert coco.getAnnIds() == []
    assert coco.getImgIds() == [1]

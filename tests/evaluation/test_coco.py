"""AP by hand, and pycocotools' own numbers digit for digit."""

import contextlib
import io

import pytest
from pycocotools.cocoeval import COCOeval

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.coco import coco_metrics

BOX, FAR = (10.0, 10.0, 110.0, 110.0), (300.0, 300.0, 400.0, 400.0)


def direct(coco, detections):
    """The twelve figures of pycocotools, called without our wrapper."""
    results = [
        {"image_id": image, "category_id": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for image, one in detections.items()
        for (x1, y1, x2, y2), score, label in zip(
            one["boxes"].tolist(), one["scores"].tolist(), one["labels"].tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools(seed, random_case):
    coco, detections = random_case(seed)
    ours, theirs = coco_metrics(coco, detections), direct(coco, detections)
    values = [ours.AP, ours.AP50, ours.AP75, ours.AP_small, ours.AP_medium, ours.AP_large]
    assert [-1 if value is None else value for value in values] == theirs.stats[:6].tolist()
    for index, (name, figures) in enumerate(ours.per_class.items()):
        theirs.params.catIds = [index + 1]
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        assert name == f"class{index}"
        assert [-1 if value is None else value for value in figures.values()] == theirs.stats[:2].tolist()


def test_one_hit_of_two_objects(ground_truth, found):
    coco = ground_truth(2, [(1, 1, BOX), (2, 1, BOX)])
    metrics = coco_metrics(coco, {1: found((1, 0.9, BOX)), 2: found((1, 0.95, FAR))})
    # a false alarm before the hit: precision 1/2 up to recall 1/2, hence 51 of the 101 recall points
    assert pytest.approx(51 / 101 * 0.5) == metrics.AP50
    assert pytest.approx(metrics.AP50) == metrics.AP


def test_iou_between_thresholds(ground_truth, found):
    coco = ground_truth(1, [(1, 1, (0.0, 0.0, 100.0, 100.0))])
    metrics = coco_metrics(coco, {1: found((1, 0.9, (0.0, 0.0, 100.0, 72.0)))})  # IoU 0.72: five of ten thresholds
    assert pytest.approx(1.0) == metrics.AP50
    assert metrics.AP75 == 0.0
    assert pytest.approx(0.5) == metrics.AP


def test_undefined_is_none(ground_truth, found):
    metrics = coco_metrics(ground_truth(1, [(1, 1, BOX)]), {1: found((1, 0.9, BOX))})
    assert metrics.per_class["dog"] == {"AP": None, "AP50": None}
    assert metrics.per_class["cat"] == pytest.approx({"AP": 1.0, "AP50": 1.0})
    assert metrics.AP_small is None
    assert metrics.AP_large == pytest.approx(1.0)


@pytest.mark.parametrize("entry", [{}, {1: ()}], ids=["no entry", "empty entry"])
def test_no_detection_is_zero(entry, ground_truth, found):
    detections = {image: found(*items) for image, items in entry.items()}
    metrics = coco_metrics(ground_truth(1, [(1, 1, BOX)]), detections)
    assert (metrics.AP, metrics.AP50, metrics.per_class["cat"]["AP50"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("images", [0, 2])
def test_no_ground_truth_is_none(images, ground_truth, found):
    detections = {1: found((1, 0.9, BOX))} if images else {}
    assert coco_metrics(ground_truth(images, []), detections).AP50 is None


def test_crowd_is_ignored(ground_truth, found):
    coco = ground_truth(1, [(1, 1, BOX), (1, 1, FAR, 1)])
    assert pytest.approx(1.0) == coco_metrics(coco, {1: found((1, 0.9, FAR), (1, 0.8, BOX))}).AP50


def test_silent(ground_truth, found, capsys):
    coco_metrics(ground_truth(1, [(1, 1, BOX)]), {1: found((1, 0.9, BOX))})
    assert capsys.readouterr().out == ""


def test_unknown_image_is_refused(ground_truth, found):
    with pytest.raises(DataError, match="image 7"):
        coco_metrics(ground_truth(1, []), {7: found()})


def test_annotation_id_zero_is_refused(ground_truth):
    coco = ground_truth(1, [(1, 1, BOX)])
    coco.anns[0] = coco.anns.pop(1)
    with pytest.raises(DataError, match="number annotations from 1"):
        coco_metrics(coco, {})

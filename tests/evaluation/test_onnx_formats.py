"""Inputs and outputs of exported detectors, by hand."""

import math

import pytest
import torch

from earlyexit_ssd.config.check import RIVAL_FORMATS
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.onnx_formats import FORMATS, decode_boxes, decode_yolox, letterbox, squeeze


def test_formats_are_those_of_the_configuration():
    assert tuple(FORMATS) == RIVAL_FORMATS


def test_classes():
    assert len(FORMATS["yolox"].classes) == 80
    assert [FORMATS["yolox"].classes.index(name) for name in ("person", "chair", "toothbrush")] == [0, 56, 79]
    assert FORMATS["boxes"].classes[62 - 1] == "chair"  # COCO's number of it


def test_letterbox_keeps_the_shape_and_swaps_the_colours():
    photo = torch.zeros(3, 20, 40)
    photo[0] = 1.0  # red
    x, scales = letterbox(photo, (64, 64))
    assert scales == (1.6, 1.6)
    assert x.shape == (3, 64, 64)
    assert (x[2, :32] == 255).all() and (x[:2, :32] == 0).all()
    assert (x[:, 32:] == 114).all()


def test_squeeze_fills_the_input():
    x, scales = squeeze(torch.ones(3, 20, 40), (64, 32))
    assert scales == (0.8, 3.2)
    assert torch.equal(x, torch.ones(3, 64, 32))


def cells_of_64(*rows) -> torch.Tensor:
    """YOLOX's output at 64 px (64 + 16 + 4 cells) for two classes; a row is (cell, x, y, w, h, object, a, b)."""
    output = torch.zeros(1, 84, 7)
    for cell, *values in rows:
        output[0, cell] = torch.tensor(values)
    return output


def test_yolox_boxes_and_scores():
    rows = [
        (9, 0.5, 0.25, math.log(2), math.log(4), 0.8, 0.1, 0.5),  # stride 8, column 1, row 1
        (64 + 6, 0.0, 0.5, 0.0, 0.0, 0.5, 0.6, 0.2),  # stride 16, column 2, row 1
        (80 + 3, 0.0, 0.0, 0.0, 0.0, 0.01, 0.05, 0.0),  # a score under the least
    ]
    found = decode_yolox([cells_of_64(*rows)], (64, 64), 2)
    assert found["labels"].tolist() == [2, 1]
    assert found["scores"].tolist() == pytest.approx([0.4, 0.3])
    # centre (12, 10), 16 x 32; centre (32, 24), 16 x 16
    assert found["boxes"].tolist() == [pytest.approx([4, -6, 20, 26]), pytest.approx([24, 16, 40, 32])]


def test_yolox_suppresses_class_by_class():
    """Three boxes at one place: the weaker one of the same class goes, the other class stays."""
    place = (0.5, 0.5, math.log(2), math.log(2))
    rows = [(0, *place, 0.9, 1.0, 0.0), (1, -0.5, *place[1:], 0.8, 1.0, 0.0), (2, -1.5, *place[1:], 0.7, 0.0, 1.0)]
    found = decode_yolox([cells_of_64(*rows)], (64, 64), 2)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert found["labels"].tolist() == [1, 2]


def test_finished_boxes_in_any_order_with_or_without_a_batch():
    boxes, scores, labels = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), torch.tensor([62], dtype=torch.int32)
    for outputs in ([labels, boxes, scores], [boxes[None], scores[None], labels[None]]):
        found = decode_boxes(outputs, (64, 64), 90)
        assert torch.equal(found["boxes"], boxes)
        assert found["scores"].tolist() == [0.5]
        assert found["labels"].tolist() == [62]
        assert found["labels"].dtype == torch.int64


def test_four_finished_boxes_and_none():
    """Four scores in a batch look like one box."""
    for count in (0, 4):
        outputs = [torch.zeros(1, count), torch.zeros(1, count, 4), torch.ones(1, count, dtype=torch.int64)]
        assert len(decode_boxes(outputs, (64, 64), 90)["boxes"]) == count


@pytest.mark.parametrize(
    ("decode", "outputs", "message"),
    [
        (
            decode_yolox,
            [torch.zeros(1, 80, 85)],
            r"expected one output \[1, 84, 85\] for 80 classes, got \[1, 80, 85\]",
        ),
        (decode_yolox, [torch.zeros(1, 84, 85)] * 2, "expected one output"),
        (decode_yolox, [torch.zeros(1, 84, 8)], r"for 80 classes, got \[1, 84, 8\]"),
        (decode_boxes, [torch.zeros(1, 4), torch.ones(1), torch.tensor([91])], "label 91, but 80 names of classes"),
        (decode_boxes, [torch.zeros(2, 4), torch.zeros(2)], r"got torch.float32 \[2, 4\], torch.float32 \[2\]"),
        (decode_boxes, [torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, dtype=torch.int64)], "expected boxes"),
    ],
)
def test_other_outputs_are_refused(decode, outputs, message):
    with pytest.raises(EarlyExitError, match=message):
        decode(outputs, (64, 64), 80)

"""Inputs and outputs of exported detectors, by hand."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from earlyexit_ssd.config import load_config
from earlyexit_ssd.config.check import RIVAL_FORMATS
from earlyexit_ssd.data import build_loader, load_dataset, to_coco
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input, export_onnx, mmacs_to_exit
from earlyexit_ssd.evaluation.evaluate import WantedClasses, evaluate_detections
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.evaluation.onnx import (
    FORMATS,
    OnnxDetector,
    count_onnx_mmacs,
    decode_boxes,
    decode_yolox,
    letterbox,
    squeeze,
)
from earlyexit_ssd.evaluation.outputs import collect_detections
from earlyexit_ssd.modeling.detector import AllOutputs, PathToExit


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


# Counts from the graph are those from the module.


def graph(nodes, inputs, weights=(), whole_numbers=()) -> bytes:
    """A file with one output "y" of any shape; inputs (the last of int64) and weights are (name, shape)."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [
                *(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs),
                *(helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in whole_numbers),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
            [
                helper.make_tensor(name, TensorProto.FLOAT, shape, torch.zeros(*shape).flatten().tolist())
                for name, shape in weights
            ],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_a_detector_exported_and_not(small_model):
    example = example_input(small_model)
    for module, expected in (
        (PlainPath(small_model), count_mmacs(PlainPath(small_model), example)),
        (AllOutputs(PathToExit(small_model, 1)), mmacs_to_exit(small_model)[1]),
    ):
        assert count_onnx_mmacs(export_onnx(module, example)) == pytest.approx(expected)


def test_linear_layers_of_any_rank():
    module = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2))
    # three rows of 7 x 5, and 15 x 2
    assert count_onnx_mmacs(export_onnx(module, torch.zeros(1, 3, 7))) * 1e6 == pytest.approx(3 * 35 + 30)


def test_transposed_convolution():
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    # 4 x 5 x 5 inputs, each through 3 outputs of its group x 3 x 3
    assert count_onnx_mmacs(export_onnx(module, torch.zeros(1, 4, 5, 5))) * 1e6 == pytest.approx(100 * 27)


def test_a_transposed_gemm_and_a_free_batch():
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)]
    assert count_onnx_mmacs(graph(nodes, [("x", ["n", 3])], [("w", (1, 4))])) * 1e6 == pytest.approx(3 * 1 * 4)


def test_a_product_of_activations_is_no_layer():
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    assert count_onnx_mmacs(graph(nodes, [("x", [3, 3])])) == 0


def test_unknown_shapes_are_undefined():
    """The shape that Reshape makes is an input, so nobody knows it beforehand."""
    nodes = [helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    assert count_onnx_mmacs(graph(nodes, [("x", [3, 3])], [("w", (3, 3))], [("s", [2])])) is None


# A file that says always the same, used as a detector.


@pytest.fixture
def boxes_file(tmp_path):
    """Whatever the photo, labels 62 and 1 at (8, 16, 32, 48) and (60, 60, 90, 90) of 64 x 64 pixels."""

    def build(shape=(1, 3, 64, 64), **metadata):
        values = {
            "boxes": (TensorProto.FLOAT, (2, 4), [8, 16, 32, 48, 60, 60, 90, 90]),
            "scores": (TensorProto.FLOAT, (2,), [0.9, 0.5]),
            "labels": (TensorProto.INT64, (2,), [62, 1]),
        }
        nodes = [
            helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, numbers))
            for name, (kind, dims, numbers) in values.items()
        ]
        outputs = [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims, _) in values.items()]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
        graph = helper.make_graph(nodes, "constant", [image], outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        helper.set_model_props(model, metadata)
        onnx.save(model, tmp_path / "constant.onnx")
        return tmp_path / "constant.onnx"

    return build


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 64, 64), ("batch", 3, 64, 64)])
def test_boxes_come_back_in_the_photo_s_pixels(boxes_file, shape):
    detector = OnnxDetector(boxes_file(shape), "boxes")
    wide, tall = detector([torch.rand(3, 64, 128), torch.rand(3, 128, 64)])
    assert wide["boxes"].tolist() == [[16, 16, 64, 48], [120, 60, 128, 64]]  # cut at the photo's edge
    assert tall["boxes"].tolist() == [[8, 32, 32, 96], [60, 120, 64, 128]]
    assert wide["labels"].tolist() == [62, 1]
    assert detector.classes[61] == "chair"


def test_classes_that_the_file_names(boxes_file):
    detector = OnnxDetector(boxes_file(classes="cup, dining table"), "boxes")
    assert detector.classes == ("cup", "dining table")
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: format boxes: label 62, but 2 names"):
        detector([torch.rand(3, 64, 64)])


def test_unusable_files_are_one_line(boxes_file, tmp_path):
    with pytest.raises(EarlyExitError, match=r"none\.onnx: cannot be read .*No such file"):
        OnnxDetector(tmp_path / "none.onnx", "boxes")
    with pytest.raises(
        EarlyExitError, match=r"constant\.onnx: expected an input \[1, 3, height, width\], it is \[1, 8"
    ):
        OnnxDetector(boxes_file((1, 8)), "boxes")
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: format yolox: expected one output \[1, 84, 85\]"):
        OnnxDetector(boxes_file(), "yolox")([torch.rand(3, 64, 64)])


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (1, 3, 100_000, 100_000), (1, 1, 3, 64, 64), (3, "h", 64), (1, 3, 0, 64)]
)
def test_batches_and_inputs_that_nobody_has_memory_for(boxes_file, shape):
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: expected (an input \[1, 3|one input of a fixed size)"):
        OnnxDetector(boxes_file(shape), "boxes")


@pytest.fixture
def outside(boxes_file, tmp_path):
    """The file in a folder of its own; its scores stand in ``location``, seen from there."""

    def build(location):
        model = onnx.load(boxes_file())
        node = next(node for node in model.graph.node if node.output[0] == "scores")
        model.graph.node.remove(node)
        scores = TensorProto(name="scores", data_type=TensorProto.FLOAT, dims=(2,), data_location=TensorProto.EXTERNAL)
        scores.external_data.add(key="location", value=location)
        model.graph.initializer.append(scores)
        path = tmp_path / "folder" / "split.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.SerializeToString())
        return path

    return build


def test_weights_beside_the_file_are_read_and_no_others(outside, tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "scores.bin", tmp_path / "folder" / "scores.bin"):
        path.write_bytes(torch.tensor([0.9, 0.5]).numpy().tobytes())
    (tmp_path / "folder" / "link.bin").symlink_to(tmp_path / "scores.bin")
    (found,) = OnnxDetector(outside("scores.bin"), "boxes")([torch.rand(3, 64, 64)])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5])
    for location in (
        "../scores.bin",
        str(tmp_path / "scores.bin"),
        "link.bin",
        "none.bin",
        "",
        ".",
        "*/_ORT_MEM_ADDR_/*",
    ):
        with pytest.raises(EarlyExitError, match=r"split\.onnx: its tensor 'scores' has data in .*own folder"):
            OnnxDetector(outside(location), "boxes")


@pytest.mark.shared
def test_yolox_has_its_published_ap(shared_root):
    """0.258 on all of COCO's val2017; with RGB instead of BGR these photos give 0.234, with inputs in [0, 1] zero."""
    detector = OnnxDetector(shared_root / "weights" / "yolox_nano.onnx", "yolox")
    classes = f"[{', '.join(detector.classes)}]"
    dataset = load_dataset(
        load_config(None, ["DATA.ROOT", str(shared_root / "data"), "DATA.CLASSES", classes]), "coco_2017_val"
    )
    wanted = WantedClasses(detector, detector.classes, dataset.classes, "yolox")
    detections = collect_detections(wanted, build_loader(dataset, 8, 0, train=False, seed=0))
    ap = evaluate_detections(to_coco(dataset), detections, EvaluationSettings(resamples=0)).figures["AP"]
    assert ap == pytest.approx(0.267, abs=0.01)

"""Inputs, outputs and MMACs of detectors from ONNX files, compared with hand-written values."""

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
from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input, export_onnx
from earlyexit_ssd.evaluation.evaluate import WantedClasses, evaluate_detections
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.evaluation.onnx import (
    FORMATS,
    OnnxDetector,
    count_onnx_mmacs,
    decode_boxes,
    decode_nanodet,
    decode_picodet,
    decode_yolox,
    letterbox,
    squeeze_nanodet,
    squeeze_picodet,
)
from earlyexit_ssd.evaluation.outputs import collect_detections


def test_formats_are_those_of_the_configuration():
    assert tuple(FORMATS) == RIVAL_FORMATS


def test_classes_of_the_formats():
    for name in ("yolox", "nanodet", "picodet"):
        classes = FORMATS[name].classes
        assert (len(classes), classes[0], classes[56], classes[79]) == (80, "person", "chair", "toothbrush")
    assert FORMATS["boxes"].classes[62 - 1] == "chair"  # COCO's category id of chairs


def test_letterbox_keeps_the_aspect_ratio_and_returns_bgr():
    photo = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 20, 40)  # red
    x, scales = letterbox(photo, (64, 64))
    assert scales == (1.6, 1.6)
    assert x.shape == (3, 64, 64)
    assert (x[2, :32] == 255).all() and (x[:2, :32] == 0).all()
    assert (x[:, 32:] == 114).all()


def test_input_of_nanodet_is_bgr_normalised_as_for_imagenet():
    x, scales = squeeze_nanodet(torch.ones(3, 20, 40) * torch.tensor([1.0, 0, 0])[:, None, None], (64, 32))
    assert scales == (0.8, 3.2)
    # mean and deviation in [0, 255], as in NanoDet-Plus's configurations
    expected = [(0 - 103.53) / 57.375, (0 - 116.28) / 57.12, (255 - 123.675) / 58.395]
    assert x.mean((1, 2)).tolist() == pytest.approx(expected, rel=1e-5)


def test_input_of_picodet_is_rgb_with_cubic_interpolation():
    x, scales = squeeze_picodet(torch.tensor([0.0, 0, 1, 1]).expand(3, 4, 4), (8, 8))
    assert scales == (2, 2)
    # pixel 3 is at 1.25 in the photo: the bright pixels weigh 0.2617 and -0.0352; pixel 5 is over 1 and clamped
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for place, value in ((0, 0.0), (3, 0.2265625), (5, 1.0)):
        expected = [(value - mean) / deviation for mean, deviation in zip(means, deviations, strict=True)]
        assert x[:, 0, place].tolist() == pytest.approx(expected, abs=1e-5)


def cells_of_64(*rows) -> torch.Tensor:
    """Return YOLOX's output at 64 px (64 + 16 + 4 cells) for two classes. A row is (cell, x, y, w, h, object, a, b)."""
    output = torch.zeros(1, 84, 7)
    for cell, *values in rows:
        output[0, cell] = torch.tensor(values)
    return output


def test_yolox_boxes_and_scores():
    rows = [
        (9, 0.5, 0.25, math.log(2), math.log(4), 0.8, 0.1, 0.5),  # stride 8, column 1, row 1
        (64 + 6, 0.0, 0.5, 0.0, 0.0, 0.5, 0.6, 0.2),  # stride 16, column 2, row 1
        (80 + 3, 0.0, 0.0, 0.0, 0.0, 0.01, 0.05, 0.0),  # below the score threshold
    ]
    found = decode_yolox([cells_of_64(*rows)], (64, 64), 2)
    assert found["labels"].tolist() == [2, 1]
    assert found["scores"].tolist() == pytest.approx([0.4, 0.3])
    # centre (12, 10), 16 x 32; centre (32, 24), 16 x 16
    assert found["boxes"].tolist() == [pytest.approx([4, -6, 20, 26]), pytest.approx([24, 16, 40, 32])]


def test_yolox_suppresses_class_by_class():
    """Of three equal boxes, the one with a lower score in the same class is removed. The other class stays."""
    place = (0.5, 0.5, math.log(2), math.log(2))
    rows = [(0, *place, 0.9, 1.0, 0.0), (1, -0.5, *place[1:], 0.8, 1.0, 0.0), (2, -1.5, *place[1:], 0.7, 0.0, 1.0)]
    found = decode_yolox([cells_of_64(*rows)], (64, 64), 2)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert found["labels"].tolist() == [1, 2]


def distances_of_64(*rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [1, 85, 2] and distances [1, 85, 32] at 64 px (64 + 16 + 4 + 1 cells).

    A row is (cell, (a, b), left, upper, right, lower). A distance of 1.5 is 1 or 2 with equal probability.
    """
    scores, logits = torch.zeros(1, 85, 2), torch.zeros(1, 85, 4, 8)
    for cell, both, *distances in rows:
        scores[0, cell] = torch.tensor(both)
        for side, distance in enumerate(distances):
            logits[0, cell, side, [math.floor(distance), math.ceil(distance)]] = 40.0
    return scores, logits.flatten(2)


DISTANCES = [
    (9, (0.1, 0.5), 0, 1, 2, 1.5),  # stride 8, column 1, row 1
    (64 + 6, (0.4, 0.3), 1, 1, 1, 1),  # stride 16, column 2, row 1: both classes
    (80 + 2, (0.0, 0.2), 0, 0, 7, 0.5),  # stride 32, column 0, row 1
    (84, (0.6, 0.0), 0, 0, 1, 1),  # stride 64
]


def by_level(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.split([64, 16, 4, 1], 1))


def test_distances_of_nanodet_start_at_the_corner_of_the_cell():
    found = decode_nanodet([torch.cat(distances_of_64(*DISTANCES), 2)], (64, 64), 2)
    assert found["labels"].tolist() == [1, 2, 1, 2, 2, 1]
    assert found["scores"].tolist() == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    boxes = [[0, 0, 64, 64], [8, 0, 24, 20], [16, 0, 48, 32], [16, 0, 48, 32], [0, 32, 224, 48], [8, 0, 24, 20]]
    assert found["boxes"].tolist() == [pytest.approx(box, abs=1e-3) for box in boxes]


def test_distances_of_picodet_start_at_the_centre_of_the_cell():
    scores, logits = distances_of_64(*DISTANCES)
    found = decode_picodet([*by_level(scores), *by_level(logits)], (64, 64), 2)
    assert found["scores"].tolist() == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    boxes = [[32, 32, 96, 96], [12, 4, 28, 24], [24, 8, 56, 40], [24, 8, 56, 40], [16, 48, 240, 64], [12, 4, 28, 24]]
    assert found["boxes"].tolist() == [pytest.approx(box, abs=1e-3) for box in boxes]


def test_grids_are_rounded_up_if_64_does_not_divide_the_input():
    """At 416 px the grids have 52, 26, 13 and 7 cells a side."""
    assert len(decode_nanodet([torch.zeros(1, 3598, 112)], (416, 416), 80)["boxes"]) == 0
    levels = [torch.zeros(1, count, width) for width in (80, 32) for count in (2704, 676, 169, 49)]
    assert len(decode_picodet(levels, (416, 416), 80)["boxes"]) == 0
    output = torch.zeros(1, 108, 34)  # 8 x 10, 4 x 5, 2 x 3 and 1 x 2 cells of 64 x 80 pixels
    output[0, 107, 0] = 0.5  # the last cell's corner is (64, 0), and its distances are 3.5 strides
    found = decode_nanodet([output], (64, 80), 2)
    assert found["boxes"].tolist() == [pytest.approx([64 - 224, -224, 64 + 224, 224])]


def test_picodet_without_nms():
    """Of two boxes of a class with an IoU over 0.6, the one with the lower score is removed."""
    boxes, scores = torch.zeros(1, 85, 4), torch.zeros(1, 2, 85)
    boxes[0, :3] = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 25], [0, 0, 20, 40]])
    scores[0, 0, :3], scores[0, 1, 1] = torch.tensor([0.9, 0.8, 0.7]), 0.6
    found = decode_picodet([boxes, scores], (64, 64), 2)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found["labels"].tolist() == [1, 1, 2]
    assert found["boxes"].tolist() == [[0, 0, 20, 20], [0, 0, 20, 40], [0, 0, 20, 25]]


def test_picodet_with_all_post_processing():
    rows = torch.tensor([[1, 0.9, 1, 2, 3, 4], [-1, 0.0, 0, 0, 0, 0], [0, 0.5, 5, 6, 7, 8]])
    for outputs in ([rows], [rows, torch.tensor([3])]):
        found = decode_picodet(outputs, (64, 64), 2)
        assert found["labels"].tolist() == [2, 1]
        assert found["scores"].tolist() == pytest.approx([0.9, 0.5])
        assert found["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(decode_picodet([torch.zeros(0, 6), torch.tensor([0])], (64, 64), 2)["boxes"]) == 0


def test_boxes_in_any_order_with_or_without_a_batch():
    boxes, scores, labels = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), torch.tensor([62], dtype=torch.int32)
    for outputs in ([labels, boxes, scores], [boxes[None], scores[None], labels[None]]):
        found = decode_boxes(outputs, (64, 64), 90)
        assert torch.equal(found["boxes"], boxes)
        assert (found["scores"].tolist(), found["labels"].tolist()) == ([0.5], [62])
        assert found["labels"].dtype == torch.int64
    for count in (0, 4):  # four scores in a batch have the shape of one box
        outputs = [torch.zeros(1, count), torch.zeros(1, count, 4), torch.ones(1, count, dtype=torch.int64)]
        assert len(decode_boxes(outputs, (64, 64), 90)["boxes"]) == count


@pytest.mark.parametrize(
    ("decode", "outputs", "message"),
    [
        (decode_yolox, [torch.zeros(1, 80, 85)], r"one output \[1, 84, 85\] for 80 classes, got \[1, 80, 85\]"),
        (decode_yolox, [torch.zeros(1, 84, 85)] * 2, "expected one output"),
        (decode_boxes, [torch.zeros(1, 4), torch.ones(1), torch.tensor([91])], "found label 91, expected 1 to 80"),
        (decode_boxes, [torch.zeros(2, 4), torch.zeros(2)], r"got torch.float32 \[2, 4\], torch.float32 \[2\]"),
        (decode_boxes, [torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, dtype=torch.int64)], "expected boxes"),
        (decode_nanodet, [torch.zeros(1, 85, 33)], r"one output \[1, 85, 112\] for 80 classes, got \[1, 85, 33\]"),
        (decode_nanodet, [torch.full((1, 85, 112), -4.6)], "scores from -4.6 to -4.6, expected 0 to 1"),
        (decode_nanodet, [torch.full((1, 85, 112), math.nan)], "scores from nan to nan, expected 0 to 1"),
        (decode_picodet, [], "got 0"),
        (
            decode_picodet,
            [*by_level(torch.zeros(1, 85, 20)), *by_level(torch.zeros(1, 85, 32))],
            r"expected \[1, n, 80\], then \[1, n, 32\] for n = 64, 16, 4, 1, .*got 8: \[\[1, 64, 20\]",
        ),
        (decode_picodet, by_level(torch.zeros(1, 85, 80)), "got 4"),
        (decode_picodet, [torch.zeros(1, 85, 4), torch.zeros(1, 20, 85)], r"\[1, 80, 85\].*got 2: .*\[1, 20, 85\]"),
        (decode_picodet, [torch.tensor([[80, 0.5, 0, 0, 1, 1]])], "found label 81, expected 1 to 80"),
    ],
)
def test_other_outputs_are_refused(decode, outputs, message):
    with pytest.raises(EarlyExitError, match=message):
        decode(outputs, (64, 64), 80)


# Multiply-accumulates.


def one_layer(operator, x, weights=None, shape=None, **attributes) -> bytes:
    """Return a file of one node. The input has the shape ``x``, or Reshape gives it an unknown ``shape``."""
    value = helper.make_tensor_value_info
    inputs, name = [value("x", TensorProto.FLOAT, x)], "r" if shape else "x"
    nodes = [helper.make_node(operator, [name, "w" if weights else name], ["y"], **attributes)]
    if shape:
        inputs.append(value("s", TensorProto.INT64, shape))
        nodes.insert(0, helper.make_node("Reshape", ["x", "s"], ["r"]))
    constants = [onnx.numpy_helper.from_array(torch.zeros(weights).numpy(), "w")] if weights else []
    graph = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, ["rows", "columns"])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        # three rows of 7 x 5, and 15 x 2
        (nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2)), (1, 3, 7), 3 * 35 + 30),
        # 4 x 5 x 5 inputs, each through 3 outputs of its group x 3 x 3
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 100 * 27),
    ],
)
def test_mmacs_of_exported_modules_by_hand(module, shape, expected):
    assert count_onnx_mmacs(export_onnx(module, torch.zeros(shape))) * 1e6 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (one_layer("Gemm", ["n", 3], (1, 4), transA=1), 3 * 1 * 4),  # with a dynamic batch
        (one_layer("MatMul", [3, 3]), 0),  # a product of activations is no layer
        (one_layer("MatMul", [3, 3], (3, 3), shape=[2]), None),  # a shape is unknown
    ],
)
def test_mmacs_of_files_by_hand(file, expected):
    found = count_onnx_mmacs(file)
    assert (found and found * 1e6) == (expected and pytest.approx(expected))


def test_mmacs_of_an_exported_detector_equal_those_of_the_module(small_model):
    example, plain = example_input(small_model), PlainPath(small_model)
    assert count_onnx_mmacs(export_onnx(plain, example)) == pytest.approx(count_mmacs(plain, example))


# Files with constant outputs as detectors.


@pytest.fixture
def constant_file(tmp_path):
    """Build a file for 64 x 64 pixels with the constant outputs ``values``, or with the output "rows" of ``nodes``."""

    def build(values, nodes=(), inputs=(("image", (1, 3, 64, 64)),), **metadata):
        constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
        outputs = [("rows", TensorProto.FLOAT)] if nodes else [(f"{one.name}_out", one.data_type) for one in constants]
        nodes = nodes or [helper.make_node("Identity", [name], [f"{name}_out"]) for name in values]
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        graph = helper.make_graph(nodes, "constant", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        helper.set_model_props(model, metadata)
        onnx.save(model, tmp_path / "constant.onnx")
        return tmp_path / "constant.onnx"

    return build


@pytest.fixture
def boxes_file(constant_file):
    """For every photo, label 62 at (8, 16, 32, 48) and label 1 at (60, 60, 90, 90), of 64 x 64 pixels."""
    boxes, scores = torch.tensor([[8.0, 16, 32, 48], [60, 60, 90, 90]]), torch.tensor([0.9, 0.5])
    values = {"boxes": boxes, "scores": scores, "labels": torch.tensor([62, 1])}
    return lambda shape=(1, 3, 64, 64), **metadata: constant_file(values, inputs=[("image", shape)], **metadata)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 64, 64), ("batch", 3, 64, 64)])
def test_boxes_are_in_pixels_of_the_photo(boxes_file, shape):
    detector = OnnxDetector(boxes_file(shape), "boxes")
    wide, tall = detector([torch.rand(3, 64, 128), torch.rand(3, 128, 64)])
    assert wide["boxes"].tolist() == [[16, 16, 64, 48], [120, 60, 128, 64]]  # clipped to the photo
    assert tall["boxes"].tolist() == [[8, 32, 32, 96], [60, 120, 64, 128]]
    assert wide["labels"].tolist() == [62, 1]
    assert detector.classes[61] == "chair"


def test_classes_from_the_metadata(boxes_file):
    detector = OnnxDetector(boxes_file(classes="cup, dining table"), "boxes")
    assert detector.classes == ("cup", "dining table")
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: format boxes: found label 62, expected 1 to 2"):
        detector([torch.rand(3, 64, 64)])


def test_detections_of_a_nanodet_file(constant_file):
    """NanoDet-Plus's exporter lists the weights among the inputs."""
    scores, logits = distances_of_64((9, (0.1, 0.5), 0, 1, 2, 1.5))
    rows = torch.cat([scores, torch.zeros(1, 85, 78), logits], 2)
    detector = OnnxDetector(
        constant_file({"rows": rows}, inputs=[("image", (1, 3, 64, 64)), ("rows", rows.shape)]), "nanodet"
    )
    (found,) = detector([torch.rand(3, 64, 128)])
    assert [detector.classes[label - 1] for label in found["labels"]] == ["bicycle", "person"]
    assert found["boxes"].tolist() == [pytest.approx([16, 0, 48, 20], abs=1e-3)] * 2
    assert count_onnx_mmacs(detector.content) == 0


@pytest.mark.parametrize("first", [1, "batch"])
def test_a_picodet_file_that_divides_by_scales(constant_file, first):
    """The file divides the boxes by the scales (y, x), which are an input."""
    values = {
        "heads": torch.tensor([[56, 0.9]]),
        "boxes": torch.tensor([[8.0, 16, 32, 48]]),
        "places": torch.tensor([1, 0, 1, 0]),
    }
    nodes = [
        helper.make_node("Gather", ["scale_factor", "places"], ["scales"], axis=1),
        helper.make_node("Div", ["boxes", "scales"], ["divided"]),
        helper.make_node("Concat", ["heads", "divided"], ["rows"], axis=1),
    ]
    path = constant_file(values, nodes, [("scale_factor", (first, 2)), ("image", (first, 3, 64, 64))])
    detector = OnnxDetector(path, "picodet")
    (found,) = detector([torch.rand(3, 64, 128)])
    assert detector.network.input_shape == (1, 3, 64, 64)
    assert found["boxes"].tolist() == [[16, 16, 64, 48]]
    assert detector.classes[found["labels"] - 1] == "chair"
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: expected one input of a fixed size"):
        OnnxDetector(path, "boxes")


@pytest.mark.parametrize("file_format", ["yolox", "nanodet", "picodet"])
def test_unusable_files_are_refused_in_one_line(constant_file, file_format):
    path = constant_file({f"out{place}": torch.zeros(1, 85, 20) for place in range(8)})
    with pytest.raises(EarlyExitError) as caught:
        OnnxDetector(path, file_format)([torch.rand(3, 64, 64)])
    message = str(caught.value)
    assert (
        f"constant.onnx: format {file_format}: expected " in message and "got " in message and "[1, 85, 20]" in message
    )
    assert len(message) < 300 and "\n" not in message
    path.write_bytes(b"no graph")
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: ONNX Runtime cannot load it"):
        OnnxDetector(path, file_format)
    path.unlink()
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: cannot be read .*No such file"):
        OnnxDetector(path, file_format)


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (1, 3, 100_000, 100_000), (1, 1, 3, 64, 64), (3, "h", 64), (1, 3, 0, 64), (1, 8)]
)
def test_inputs_other_than_one_photo_are_refused(boxes_file, shape):
    with pytest.raises(EarlyExitError, match=r"constant\.onnx: expected (an input \[1, 3|one input of a fixed size)"):
        OnnxDetector(boxes_file(shape), "boxes")


@pytest.fixture
def outside(boxes_file, tmp_path):
    """Build the file in its own folder, with its scores as external data in ``location`` (relative to this folder)."""

    def build(location):
        model = onnx.load(boxes_file())
        scores = next(tensor for tensor in model.graph.initializer if tensor.name == "scores")
        scores.ClearField("raw_data")
        scores.data_location = TensorProto.EXTERNAL
        scores.external_data.add(key="location", value=location)
        path = tmp_path / "folder" / "split.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.SerializeToString())
        return path

    return build


def test_only_external_weights_in_the_same_folder_are_read(outside, tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "scores.bin", tmp_path / "folder" / "scores.bin"):
        path.write_bytes(torch.tensor([0.9, 0.5]).numpy().tobytes())
    (tmp_path / "folder" / "link.bin").symlink_to(tmp_path / "scores.bin")
    (found,) = OnnxDetector(outside("scores.bin"), "boxes")([torch.rand(3, 64, 64)])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5])
    wrong = "../scores.bin", str(tmp_path / "scores.bin"), "link.bin", "none.bin", "", ".", "*/_ORT_MEM_ADDR_/*"
    for location in wrong:
        with pytest.raises(EarlyExitError, match=r"split\.onnx: (cannot be read|ONNX Runtime cannot load it) .*scores"):
            OnnxDetector(outside(location), "boxes")


@pytest.mark.shared
def test_yolox_has_the_published_ap(shared_root):
    """Published: 0.258 on all of val2017. On these photos, RGB instead of BGR gives 0.234, inputs in [0, 1] give 0."""
    detector = OnnxDetector(shared_root / "weights" / "yolox_nano.onnx", "yolox")
    classes = f"[{', '.join(detector.classes)}]"
    dataset = load_dataset(
        load_config(None, ["DATA.ROOT", str(shared_root / "data"), "DATA.CLASSES", classes]), "coco_2017_val"
    )
    wanted = WantedClasses(detector, detector.classes, dataset.classes, "yolox")
    detections = collect_detections(wanted, build_loader(dataset, 8, 0, train=False, seed=0))
    ap = evaluate_detections(to_coco(dataset), detections, EvaluationSettings(resamples=0)).figures["AP"]
    assert ap == pytest.approx(0.267, abs=0.01)

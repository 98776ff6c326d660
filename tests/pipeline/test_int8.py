"""A file in 8 bits is written if it is faster and loses little AP50, with thresholds for its own confidences."""

import copy
import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from PIL import Image

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.data.dataset import as_tensor
from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.deploy.benchmark import Ratio
from earlyexit_ssd.deploy.graph import Segment
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.pipeline import int8
from earlyexit_ssd.pipeline.int8 import (
    GLANCES_ONLY,
    FloatLayers,
    _by_nncf,
    _by_onnx_runtime,
    _is_quantised,
    _quantised,
    _thresholds,
    export_int8,
    matching_threshold,
    photos_to_quantise_on,
)
from tests.deploy.conftest import build_model, save_photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture(autouse=True)
def faster(traced_once, monkeypatch):
    """Files in 8 bits are 1.4 times as fast, so no time is measured."""
    monkeypatch.setattr(int8, "speed_of", lambda *_: Ratio(1.4, 1.3, 1.5))


@pytest.fixture
def unquantised(monkeypatch):
    """Segments stay in 32 bits."""
    monkeypatch.setattr(int8, "_quantised", lambda quantise_segment, segments, *_: segments)


@pytest.fixture(scope="module")
def model(folder):
    """Routed so that half of the photos leave at exit 8; exit 12 is closed."""
    model = build_model(exit_layers=(8, 12))
    model.router = ExitRouter(2, policy="max_foreground", temperatures=1.5, thresholds=[0.0, CLOSED])
    images = [as_tensor(int8.read_image(photo)) for photo in sorted(folder.iterdir())]
    with torch.no_grad():
        confidences = model.router.confidence(model.exit_outputs(images).signals(0), 0)
    model.router.thresholds = [float(confidences.sort().values[3:5].mean()), CLOSED]
    return model


def in_float(file) -> list[str]:
    """Convolutions whose weights are not rounded, in the file and in the branches of its Ifs."""

    def convolutions(graph):
        names, rounded = [], {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        for node in graph.node:
            names += [node.name] if node.op_type == "Conv" and node.input[1] not in rounded else []
            for attribute in node.attribute:
                names += convolutions(attribute.g) if attribute.HasField("g") else []
        return names

    return convolutions(onnx.load(file).graph)


def test_a_faster_file_is_written_and_as_many_photos_leave(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "LADDER", (FloatLayers(0, False), FloatLayers(3, False)))  # the first is for OpenVINO
    dataset = photos_to_quantise_on(folder, None, model.classes)
    figures = export_int8(model, tmp_path / "detector.onnx", "onnx", dataset, ap_drop=1.0)
    assert figures.size == (tmp_path / "detector.onnx").stat().st_size and not figures.labelled
    assert "8 photos, labelled in 32 bits" in str(figures) and "1.40 [1.30, 1.50] times as fast" in str(figures)
    assert [path.name for path in tmp_path.iterdir()] == ["detector.onnx"]
    kept = in_float(tmp_path / "detector.onnx")
    assert len(kept) == 3 and all("/features.0" in name for name in kept)
    predictor = Predictor(tmp_path / "detector.onnx")
    left = [predictor(int8.read_image(photo)).exit_name for photo in sorted(folder.iterdir())]
    assert left.count("exit8") == 4 and left.count("full") == 4 and predictor.certificate is None
    assert predictor.thresholds["exit12"] is None
    assert model.router.thresholds[0] != pytest.approx(predictor.thresholds["exit8"], abs=1e-9)  # the model stays


def test_a_file_for_openvino_is_quantised_by_nncf(folder, model, tmp_path, monkeypatch):
    """The full path stays in 32 bits, since NNCF takes seconds for each segment."""
    for package in ("nncf", "openvino"):
        pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    once = iter([int8._by_nncf()])
    monkeypatch.setattr(int8, "_by_nncf", lambda: lambda *given: next(once, lambda graph, *_: graph)(*given))
    dataset = photos_to_quantise_on(folder, None, model.classes)
    figures = export_int8(model, tmp_path / "detector.xml", "openvino", dataset, ap_drop=1.0)
    assert figures.float_layers == FloatLayers(0, False) and figures.runtime == "openvino"
    predictor = Predictor(tmp_path / "detector.xml", "openvino")
    left = [predictor(int8.read_image(photo)).exit_name for photo in folder.iterdir()]
    assert left.count("exit8") == 4
    assert os.environ["NNCF_CI"]  # no telemetry


def three_convolutions() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x_in", "w"], ["y"], "/features/0/Conv"),
        helper.make_node("Conv", ["y", "v"], ["z"], "/features/1/Conv"),
        helper.make_node("Conv", ["z", "u"], ["x"], "/head/Conv"),
    ]
    values = [helper.make_tensor_value_info(name, 1, [1, 3, 8, 8]) for name in ("x_in", "x")]
    weights = [onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), name) for name in "wvu"]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


NOISE = [{"x_in": np.random.default_rng(seed).normal(size=(1, 3, 8, 8)).astype(np.float32)} for seed in range(2)]


@pytest.mark.parametrize(
    ("runtime", "layers", "names"),
    [
        ("OpenVINO", FloatLayers(1, True), ["/features/0/Conv", "/head/Conv"]),
        ("ONNX Runtime", FloatLayers(1, True), ["/features/0/Conv", "/head/Conv"]),
        ("ONNX Runtime", FloatLayers(3, False), ["/features/0/Conv", "/features/1/Conv", "/head/Conv"]),
        ("ONNX Runtime", FloatLayers(9, False), ["/features/0/Conv", "/features/1/Conv", "/head/Conv"]),  # has three
    ],
)
def test_the_named_layers_stay_in_32_bits(runtime, layers, names, tmp_path):
    if runtime == "OpenVINO":
        pytest.importorskip("nncf", reason="needs nncf: pip install nncf")
    quantise_segment = _by_nncf() if runtime == "OpenVINO" else _by_onnx_runtime
    onnx.save(quantise_segment(three_convolutions(), NOISE, layers), tmp_path / "model.onnx")
    assert in_float(tmp_path / "model.onnx") == names


def test_a_segment_gets_only_the_inputs_that_it_reads():
    """A copied branch ignores the context of a light one."""
    photos = [{**photo, "context_in": np.ones((1, 2, 4, 4), np.float32)} for photo in NOISE]
    segment = Segment(0, "full", False, three_convolutions(), full=True)
    (quantised,) = _quantised(_by_onnx_runtime, [segment], {"full": photos}, FloatLayers(0, False))
    assert "QuantizeLinear" in {node.op_type for node in quantised.model.graph.node}


def test_glances_alone_in_8_bits_are_tried_last(folder, tmp_path, unquantised, monkeypatch):
    monkeypatch.setattr(int8, "LADDER", ())
    model = build_model(exit_layers=(), glances=((64, 12),))
    model.router = ExitRouter(1, policy="emptiness", thresholds=[0.5])
    dataset = photos_to_quantise_on(folder, None, model.classes)
    figures = export_int8(model, tmp_path / "detector.onnx", "onnx", dataset, ap_drop=1.0)
    assert figures.float_layers == GLANCES_ONLY
    assert "the first 3 convolutions and everything but the glances in 32 bits" in str(figures)


def test_only_glances_are_quantised():
    glance = Segment(0, "glance8", True, three_convolutions(), of_photo=True, pixels=8)
    full = Segment(1, "full", False, three_convolutions(), full=True, of_photo=True)
    layers = FloatLayers(0, False, full_size=True)
    quantised = _quantised(_by_onnx_runtime, [glance, full], {"glance8": NOISE, "full": NOISE}, layers)
    assert "QuantizeLinear" in {node.op_type for node in quantised[0].model.graph.node}
    assert quantised[1].model is full.model


def test_a_file_without_open_exits_has_no_certificate(folder, model, tmp_path, unquantised):
    router = ExitRouter(2, policy="max_foreground")
    reference = DriftReference.from_decisions(model.exit_names, [2], [[0.5], [0.5]])
    content = {"drift": dataclasses.asdict(reference), "target": {}}
    router.certificate = SimpleNamespace(router=router.to_dict(), to_dict=lambda: content)
    model = copy.deepcopy(model)  # the fixture is shared
    model.router = router
    dataset = photos_to_quantise_on(folder, None, model.classes)
    export_int8(model, tmp_path / "detector.onnx", "onnx", dataset, ap_drop=1.0)
    assert Predictor(tmp_path / "detector.onnx").certificate is None


@pytest.mark.parametrize(
    ("speed", "ap_drop", "message"),
    [
        (Ratio(1.02, 0.98, 1.07), 1.0, "refused: 1.02 .0.98, 1.07. times as fast as in 32 bits"),
        (Ratio(1.5, 1.4, 1.6), -1.0, "AP50 lost in 95 % .* at most .* on 8 photos, even with the first 3 convolutions"),
        (Ratio(1.5, 1.4, 1.6), 1.0, "AP50 lost in 95 % .* at most .*, AP .* on 8 photos, even with the first 3"),
    ],
)
def test_a_slow_or_inaccurate_file_is_not_written(
    folder, model, unquantised, tmp_path, monkeypatch, speed, ap_drop, message
):
    monkeypatch.setattr(int8, "speed_of", lambda *_: speed)
    monkeypatch.setattr(int8, "LADDER", (FloatLayers(0, True), FloatLayers(3, True)))
    dataset = photos_to_quantise_on(folder, None, model.classes)
    with pytest.raises(EarlyExitError, match=message):
        export_int8(model, tmp_path / "detector.onnx", "onnx", dataset, ap_drop, coco_ap_drop=-1.0)
    assert not list(tmp_path.iterdir())


def test_staged_files_may_have_the_name_of_a_trial(folder, model, unquantised, tmp_path):
    dataset = photos_to_quantise_on(folder, None, model.classes)
    for name in ("float32", "trial0"):
        export_int8(model, tmp_path / name, "staged", dataset, ap_drop=1.0)
        assert Predictor(tmp_path / name).thresholds["exit8"] is not None


def test_photos_without_an_object_are_refused(folder, model, tmp_path, monkeypatch):
    """The loss of AP50 would be undefined."""
    monkeypatch.setattr(int8, "SCORE", 1.1)
    dataset = photos_to_quantise_on(folder, None, model.classes)
    with pytest.raises(EarlyExitError, match="nothing is detected in 8 photos"):
        export_int8(model, tmp_path / "detector.onnx", "onnx", dataset, ap_drop=1.0)
    assert not list(tmp_path.iterdir())


def test_labels_are_those_of_the_detectors_classes(folder, tmp_path):
    sizes = [Image.open(folder / f"{index}.png").size for index in range(8)]
    rows = [
        {"id": index, "file_name": f"{index}.png", "width": width, "height": height}
        for index, (width, height) in enumerate(sizes)
    ]
    box = {"bbox": [1, 2, 20, 30], "area": 600, "iscrowd": 0}
    boxes = [{"id": index, "image_id": index, "category_id": 5 + index % 2, **box} for index in range(8)]
    content = {"images": rows, "annotations": boxes, "categories": [{"id": 5, "name": "Dog"}, {"id": 6, "name": "owl"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    dataset = photos_to_quantise_on(folder, tmp_path / "truth.json", ("N/A", "cat", "dog", "N/A"))
    assert dataset.classes == ("dog",) and dataset.labelled
    assert sum(len(record.annotations) for record in dataset.records) == 4
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(DataError, match="no box of dog in 8 photos"):
        photos_to_quantise_on(folder, tmp_path / "empty.json", ("dog",))
    with pytest.raises(DataError, match="none of its classes .dog, owl. is the detector's"):
        photos_to_quantise_on(folder, tmp_path / "truth.json", ("cat",))
    with pytest.raises(DataError, match="0.png: it is no folder; --photos takes one folder"):
        photos_to_quantise_on(folder / "0.png", None, ("dog",))


def test_threshold_in_8_bits_by_hand():
    before, after = np.array([0.1, 0.5, 0.9]), np.array([0.15, 0.55, 0.75])
    assert matching_threshold(0.6, before, after) == pytest.approx(0.65)
    assert matching_threshold(0.3, before, after) == pytest.approx(0.35)
    assert matching_threshold(0.05, before, after) == 0.05  # all leave
    assert matching_threshold(0.95, before, after) == 0.95  # none leaves
    highest = np.float32(0.8)
    assert np.float32(matching_threshold(0.7, np.array([0.1]), np.array([float(highest)]))) > highest  # a file has fp32
    assert matching_threshold(0.7, np.array([0.8, 0.9]), np.array([0.6])) == 0.6
    assert matching_threshold(0.7, np.array([]), np.array([])) == 0.7


def test_the_photos_that_arrive_are_those_of_each_file():
    """In 8 bits the first two of four photos leave at exit 8, and one of the other two at exit 12."""
    model = SimpleNamespace(exit_names=("exit8", "exit12", "full"), router=SimpleNamespace(thresholds=[0.5, 0.5]))
    before = {"exit8": np.array([0.1, 0.2, 0.8, 0.9]), "exit12": np.array([0.4, 0.6, 0.9, 0.9])}
    after = {"exit8": np.array([0.8, 0.9, 0.1, 0.2]), "exit12": np.array([0.9, 0.9, 0.2, 0.4])}
    assert _thresholds(model, before, after) == pytest.approx({"exit8": 0.5, "exit12": 0.3})


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10**6)), min_size=1, max_size=30, unique_by=lambda p: p[1]),
    st.integers(0, 100),
)
def test_as_many_photos_leave(pairs, threshold):
    before, after = np.array(pairs).T / [[100], [10**6 + 1]]
    found = matching_threshold(threshold / 100, before, after)
    assert (after >= found).sum() == (before >= threshold / 100).sum()


@pytest.mark.parametrize(
    ("name", "operator", "quantised"),
    [
        ("/features.0.12/block/block.0/block.0.0/Conv", "Conv", True),
        ("/features.0.12/Add", "Add", True),
        ("/head/Softmax", "Softmax", False),
        ("/_policy/Mul", "Mul", False),
        ("/Conv", "Conv", False),  # the small copy for a glance
        ("log_sum_exp_3", "Add", False),
        ("", "Add", False),
    ],
)
def test_operators_of_trunk_branches_and_heads_are_quantised(name, operator, quantised):
    assert _is_quantised(helper.make_node(operator, ["a"], ["b"], name=name)) == quantised

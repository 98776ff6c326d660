"""A model in 8 bits gives nearly the outputs in 32 bits, and the rewriting before it changes nothing."""

import io
import logging
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from earlyexit_ssd.pipeline.quantize import LEVELS, Network, Statistics, _scale, _weight_scales, quantise
from earlyexit_ssd.runtimes import OnnxRuntime

RELU, HARD_SWISH = "RE", "HS"


def block(activation: str) -> onnx.ModelProto:
    """A block of MobileNetV3 with 24 hidden channels, squeeze-and-excitation and a residual connection."""
    torch.manual_seed(0)
    config = InvertedResidualConfig(16, 3, 24, 16, True, activation, 1, 1, 1.0)
    network = nn.Sequential(InvertedResidual(config, partial(nn.BatchNorm2d, eps=0.001)).eval())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # channels of different ranges
            module.weight.data = 10 ** torch.empty_like(module.weight).uniform_(-1.5, 0.7)
    content = io.BytesIO()
    names = {"input_names": ["x_in"], "output_names": ["x"], "opset_version": 17, "dynamo": False}
    torch.onnx.export(network, (torch.zeros(1, 16, 8, 8),), content, **names)
    return onnx.load_from_string(content.getvalue())


def photos(count: int = 8) -> list[dict[str, np.ndarray]]:
    return [
        {"x_in": np.random.default_rng(seed).normal(0, 1, (1, 16, 8, 8)).astype(np.float32)} for seed in range(count)
    ]


def output(model: onnx.ModelProto, photo: dict[str, np.ndarray]) -> np.ndarray:
    return OnnxRuntime(model.SerializeToString(), "test")(photo)["x"]


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def weight(network: Network, convolution: str, place: int = 1) -> np.ndarray:
    return network.weights[next(node.input[place] for node in network.nodes if node.name == convolution)]


def tiny(*nodes: onnx.NodeProto, channels: int = 2, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from x_in [1, channels, 2, 2] to x."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 2, 2]) for name in ("x_in", "x")]
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "tiny", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("activation", [RELU, HARD_SWISH])
def test_the_rewritten_model_has_the_same_outputs(activation):
    model = block(activation)
    network = Network(model)
    network.split_hard_swish()
    network.pad_channels()
    network.equalise(network.measure(photos(), {node.output[0] for node in network.convolutions()}), set())
    groups = {item.i for node in network.convolutions() for item in node.attribute if item.name == "group"}
    assert groups == {1, 32}  # 24 channels were padded
    assert "HardSwish" not in types(network.model())
    for photo in photos():
        np.testing.assert_allclose(output(network.model(), photo), output(model, photo), atol=1e-4)


@pytest.mark.parametrize("activation", [RELU, HARD_SWISH])
def test_outputs_in_8_bits_are_close(activation):
    model = block(activation)
    before = model.SerializeToString()
    quantised = quantise(model, photos(), lambda node: False)
    assert not {"HardSwish", "HardSigmoid"} & {*types(quantised)} and model.SerializeToString() == before
    floats = np.concatenate([output(model, photo) for photo in photos()]).ravel()
    found = np.concatenate([output(quantised, photo) for photo in photos()]).ravel()
    assert np.corrcoef(floats, found)[0, 1] > 0.999
    assert abs(np.mean(found - floats)) < 0.02 * floats.std()


def test_equal_ranges_help(monkeypatch):
    """Without them the first channels, which are 100 times smaller than the last, have two or three steps."""
    sizes = 10 ** np.linspace(-2, 0, 16)
    nodes = [
        helper.make_node("Conv", ["x_in", "w", "b"], ["y"], "narrow"),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
        helper.make_node("Conv", ["z", "v", "b"], ["x"], "wide", group=16),
    ]
    weights = {"w": np.diag(sizes).reshape(16, 16, 1, 1), "v": (1 / sizes).reshape(16, 1, 1, 1), "b": np.zeros(16)}
    model, rows = tiny(*nodes, channels=16, **weights), [{"x_in": photo["x_in"][:, :, :2, :2]} for photo in photos()]

    def error() -> float:
        quantised = quantise(model, rows, lambda node: False)
        return float(np.std([output(quantised, row) - output(model, row) for row in rows]))

    equalised = error()
    monkeypatch.setattr(Network, "equalise", lambda *_: None)
    assert equalised < 0.5 * error()


def test_nodes_in_32_bits_keep_their_weights():
    model = block(HARD_SWISH)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    quantised = quantise(model, photos(), lambda node: node.name.startswith(first.name))
    (kept,) = (node for node in quantised.graph.node if node.name == first.name)
    weights = {value.name: numpy_helper.to_array(value) for value in quantised.graph.initializer}
    before = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    np.testing.assert_array_equal(weights[kept.input[1]][:24], before[first.input[1]])


def test_factors_by_hand():
    """The channels reach 1 and 4, so the first is divided by 64 / 255, the nearest step to 1 / 4."""
    nodes = [
        helper.make_node("Conv", ["x_in", "w", "b"], ["y"], "first"),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
        helper.make_node("Conv", ["z", "v"], ["x"], "depthwise", group=2),
    ]
    weights = {"w": np.eye(2).reshape(2, 2, 1, 1), "b": [1, 2], "v": np.ones((2, 1, 1, 1))}
    network = Network(tiny(*nodes, **weights))
    network.equalise({"y": Statistics(-9, 9, np.array([1.0, 4.0]), np.zeros(2))}, set())
    factors = np.array([64 / LEVELS, 1.0])
    np.testing.assert_allclose(weight(network, "first")[:, :, 0, 0], np.diag(1 / factors), rtol=1e-6)
    np.testing.assert_allclose(weight(network, "first", 2), [1, 2] / factors, rtol=1e-6)
    np.testing.assert_allclose(weight(network, "depthwise").ravel(), factors, rtol=1e-6)
    # a convolution that mixes channels gets half of the difference: the root of 1 / 4 is 128 / 255 in steps
    nodes[2] = helper.make_node("Conv", ["z", "u"], ["x"], "pointwise")
    network = Network(tiny(*nodes, **weights, u=np.ones((2, 2, 1, 1))))
    network.equalise({"y": Statistics(-9, 9, np.array([1.0, 4.0]), np.zeros(2))}, set())
    np.testing.assert_allclose(weight(network, "pointwise")[0].ravel(), [128 / LEVELS, 1], rtol=1e-6)


def test_biases_by_hand():
    """The scale of the row [1, 0.5] is 1.5 / 127, so 1 becomes 85 steps and 0.5 becomes 42."""
    node = helper.make_node("Conv", ["x_in", "w", "b"], ["x"], "conv")
    network = Network(tiny(node, w=np.array([[1.0, 0.5], [1.0, -1.0]]).reshape(2, 2, 1, 1), b=[0, 0]))
    network.correct_biases({"x_in": Statistics(0, 1, np.ones(2), np.array([3.0, 10.0]))}, set())
    expected = -(85 * 1.5 / 127 - 1) * 3 - (42 * 1.5 / 127 - 0.5) * 10
    np.testing.assert_allclose(weight(network, "conv", 2), [expected, 0], atol=1e-6)


def test_weight_scales_by_hand():
    """Neighbours are channels of one position, so 3 and 4 are added below, and so are 2 and 2; 5 and -5 cancel out."""
    rows = np.array([[[[1.0, 2.0]], [[0.0, 2.0]]], [[[3.0, 0.0]], [[4.0, 0.0]]], [[[5.0, 0.0]], [[-5.0, 0.0]]]])
    np.testing.assert_allclose(_weight_scales(rows), np.array([4, 7, 5]) / 127)
    odd = np.array([1.0, 1.0, 9.0]).reshape(1, 3, 1, 1)  # the last weight has no neighbour
    np.testing.assert_allclose(_weight_scales(odd), [9 / 127])
    depthwise = np.array([[3.0, 4.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    np.testing.assert_allclose(_weight_scales(depthwise), [4 / 127, 0], atol=1e-13)


def test_large_equal_weights_do_not_saturate():
    """Without VNNI, sums of two products saturate above 2**15, if weights use all of int8."""
    node = helper.make_node("Conv", ["x_in", "w", "b"], ["x"], "conv")
    weights = np.ones((64, 64, 1, 1))
    weights[-1] = 0  # a filter of zeros keeps its bias
    model = tiny(node, channels=64, w=weights, b=np.eye(64)[-1] * 5)
    photo = {"x_in": np.full((1, 64, 2, 2), 1.0, np.float32)}
    quantised = quantise(model, [photo], lambda _: False)
    np.testing.assert_allclose(output(quantised, photo)[0, :, 0, 0], [64] * 63 + [5], rtol=0.01)
    steps = next(numpy_helper.to_array(value) for value in quantised.graph.initializer if len(value.dims) == 4)
    assert 255 * steps.reshape(64, 32, 2).astype(int).sum(2).max() < 2**15


def test_zero_below_by_hand():
    """HardSwish(0.25 * x) is 0 below x = -12."""
    node = helper.make_node("HardSwish", ["x_in"], ["x"], "swish")
    network = Network(tiny(node))
    network.split_hard_swish()
    assert network.zero_below() == {"x_in": -3}
    network.weights["x_factors"] = np.array([1, 0.25], np.float32).reshape(1, 2, 1, 1)
    assert network.zero_below() == {"x_in": -12}


def test_channels_of_an_output_are_not_padded():
    node = helper.make_node("Conv", ["x_in", "w"], ["x"], "depthwise", group=2)
    network = Network(tiny(node, w=np.ones((2, 1, 1, 1))))
    network.pad_channels()
    assert weight(network, "depthwise").shape == (2, 1, 1, 1)


def test_scales_by_hand():
    ((override,),) = [_scale(-1.0, 1.55)]
    assert override["scale"] == pytest.approx(0.01) and override["zero_point"] == 100
    ((override,),) = [_scale(0.5, 2.55)]  # 0 is in every range
    assert override["scale"] == pytest.approx(0.01) and override["zero_point"] == 0


def test_a_hard_sigmoid_whose_input_is_read_elsewhere_stays():
    """Its input needs a range of its own."""
    nodes = [
        helper.make_node("Conv", ["x_in", "w", "b"], ["y"], "conv"),
        helper.make_node("HardSigmoid", ["y"], ["gate"], "gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["y", "gate"], ["x"], "mul"),
    ]
    model = tiny(*nodes, channels=16, w=np.eye(16).reshape(16, 16, 1, 1) * 5, b=np.zeros(16))
    rows = [{"x_in": photo["x_in"][:, :, :2, :2].copy()} for photo in photos()]
    quantised = quantise(model, rows, lambda node: False)
    assert "HardSigmoid" in types(quantised)
    np.testing.assert_allclose(output(quantised, rows[0]), output(model, rows[0]), atol=0.15)


def test_the_input_of_a_hard_swish_may_be_read_elsewhere():
    """Its channels then keep their ranges."""
    nodes = [
        helper.make_node("Conv", ["x_in", "w", "b"], ["y"], "conv"),
        helper.make_node("HardSwish", ["y"], ["h"], "first"),
        helper.make_node("Conv", ["h", "v"], ["z"], "pointwise"),
        helper.make_node("HardSwish", ["y"], ["g"], "second"),
        helper.make_node("Conv", ["g", "v"], ["u"], "other"),
        helper.make_node("Add", ["z", "u"], ["x"], "add"),
    ]
    weights = {"w": np.diag([1.0, 100.0]).reshape(2, 2, 1, 1), "b": [3, 3], "v": np.ones((2, 2, 1, 1))}
    model, rows = tiny(*nodes, **weights), [{"x_in": photo["x_in"][:, :2, :2, :2]} for photo in photos()]
    network = Network(model)
    network.split_hard_swish()
    network.equalise(network.measure(rows, {node.output[0] for node in network.convolutions()}), set())
    np.testing.assert_allclose(output(network.model(), rows[0]), output(model, rows[0]), rtol=1e-5)
    assert network.zero_below() == {}


def test_an_output_may_be_constant_and_a_node_may_compute_whole_numbers():
    nodes = [
        helper.make_node("Constant", [], ["logits"], "logits", value=numpy_helper.from_array(np.float32([-30, 0]))),
        helper.make_node("Identity", ["b"], ["boxes"], "boxes"),
        helper.make_node("Shape", ["x_in"], ["shape"], "shape"),
        helper.make_node("Mul", ["shape", "shape"], ["squares"], "squares"),
        helper.make_node("Conv", ["x_in", "w", "b"], ["x"], "conv"),
    ]
    model, rows = tiny(*nodes, w=np.eye(2).reshape(2, 2, 1, 1), b=[1, 2]), [{"x_in": np.ones((1, 2, 2, 2), np.float32)}]
    types = {"logits": TensorProto.FLOAT, "boxes": TensorProto.FLOAT, "squares": TensorProto.INT64}
    model.graph.output.extend(helper.make_tensor_value_info(name, type_, None) for name, type_ in types.items())
    found = OnnxRuntime(quantise(model, rows, lambda node: False).SerializeToString(), "test")(rows[0])
    assert found["logits"].tolist() == [-30, 0] and found["squares"].tolist() == [1, 4, 4, 4]
    np.testing.assert_allclose(found["boxes"], [1, 2])
    np.testing.assert_allclose(found["x"][0, :, 0, 0], [2, 3], atol=0.02)


def test_the_level_of_logging_is_restored(monkeypatch):
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", lambda *_, **__: 1 / 0)
    logging.disable(logging.INFO)
    try:
        with pytest.raises(ZeroDivisionError):
            quantise(block(RELU), photos(1), lambda node: False)
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)

"""Counts from the graph are those from the module."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input, mmacs_to_exit
from earlyexit_ssd.evaluation.onnx_cost import count_onnx_mmacs
from earlyexit_ssd.evaluation.runtime import export_onnx
from earlyexit_ssd.modeling.paths import AllOutputs, PathToExit


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

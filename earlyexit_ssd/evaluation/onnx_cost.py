"""Multiply-accumulates of an ONNX file, in the convention of `count_mmacs`: convolutions and linear layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from earlyexit_ssd.errors import one_line
from earlyexit_ssd.evaluation.runtime import deploy_package

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


def count_onnx_mmacs(content: bytes) -> float | None:
    """Millions of multiply-accumulates of one image; None where the graph's shapes cannot be inferred.

    Counted are Conv, ConvTranspose, Gemm, and MatMul with constant weights; a product of two activations is no linear
    layer. Bodies of loops and conditions are not looked into.
    """
    onnx = deploy_package("onnx")
    try:
        return _count_graph(onnx, onnx.load_from_string(content))
    except Exception as error:  # a foreign graph may break every rule that its inference of shapes relies on
        logger.warning("multiply-accumulates of an ONNX file cannot be counted (%s)", one_line(str(error)))
        return None


def _count_graph(onnx: ModuleType, model: Any) -> float | None:
    for value in model.graph.input:
        first = value.type.tensor_type.shape.dim[0] if value.type.tensor_type.shape.dim else None
        if first is not None and not first.dim_value:
            first.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes, constants = _shapes(graph), _constants(graph)
    counts = [_count(node, shapes, constants) for node in graph.node]
    return None if None in counts else sum(counts) / 1e6


def _shapes(graph: Any) -> dict[str, Shape]:
    """Of every tensor whose lengths are all known."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        value = next((one for one in node.attribute if one.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            shapes[node.output[0]] = tuple(value.t.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        lengths = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if all(lengths):
            shapes.setdefault(value.name, lengths)
    return shapes


def _constants(graph: Any) -> set[str]:
    """Names of the tensors that no input changes: weights, and what is made of weights alone."""
    names = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and names.issuperset(filter(None, node.input))):
            names.update(node.output)
    return names


def _count(node: Any, shapes: Mapping[str, Shape], constants: set[str]) -> int | None:
    """Multiply-accumulates of one node, 0 where it has none that count, None where a shape is not known."""
    counted = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    if not counted or (node.op_type == "MatMul" and constants.isdisjoint(node.input)):
        return 0
    data, weights, output = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if data is None or weights is None or output is None:
        return None
    if node.op_type == "ConvTranspose":  # each input value meets its kernel: [in, out / groups, *kernel]
        return math.prod(data) * math.prod(weights[1:])
    if node.op_type == "Conv":  # each output value has its kernel: [out, in / groups, *kernel]
        return math.prod(output) * math.prod(weights[1:])
    transposed = node.op_type == "Gemm" and any(one.name == "transA" and one.i for one in node.attribute)
    return math.prod(output) * data[0 if transposed else -1]

"""Build the ONNX graph of a routed detector, from a photo to its detections.

A *segment* is the part of the network between two exits. The segments after an exit are in one branch of an ``If``, so
they are computed only for photos that do not leave there. This module needs the package onnx and no PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8  # supported since ONNX 1.12 and ONNX Runtime 1.12

STATE = ("x", "finest", "context")
"""Tensors passed from segment to segment: outputs of these names, and inputs with the suffix ``_in``."""
HEAD = ("cls_logits", "bbox_regression")
CONFIDENCE = "confidence"

OUTPUTS = {
    "boxes": (TensorProto.FLOAT, ["n", 4]),
    "labels": (TensorProto.INT64, ["n"]),
    "scores": (TensorProto.FLOAT, ["n"]),
    "exit_index": (TensorProto.INT64, []),
    "exit_confidence": (TensorProto.FLOAT, []),
}

MANY_ROWS = 3
"""Above so many photo rows per row of the network's input, only the rows that the resize reads are gathered and
converted to floats. Below, converting the whole photo is faster in ONNX Runtime."""
LOG_LIMIT = math.log(1000.0 / 16)
"""Largest logarithm of (box side / default box side), as in torchvision's ``BoxCoder``."""


@dataclass(frozen=True)
class Segment:
    """The part of the network between the previous exit and this exit.

    Inputs of ``model`` are the tensors of `STATE`. Its outputs are the tensors of `STATE`, those of `HEAD` if they are
    needed, and the router's `CONFIDENCE` [1] if there is a router. A glance has no output but the confidence.
    """

    index: int  # index of the exit among all exits of the model
    name: str  # name of the exit
    empty: bool  # whether photos that leave at the exit have no detections
    model: onnx.ModelProto
    full: bool = False  # whether the segment ends the full path
    of_photo: bool = False  # whether the only input is the resized photo ``x``
    pixels: int | None = None  # side of this photo for a glance; None for the network's own input size


@dataclass(frozen=True)
class Settings:
    """Settings of preprocessing and postprocessing, and the default thresholds."""

    size: tuple[int, int]  # (height, width) of the network's input in pixels
    mean: Sequence[float]  # of each channel, for pixels in [0, 1]
    std: Sequence[float]  # of each channel, for pixels in [0, 1]
    anchors: np.ndarray  # default boxes float32 [A, 4] xyxy in the input's pixels
    box_weights: Sequence[float]  # weights of torchvision's ``BoxCoder``
    thresholds: np.ndarray  # float32, one per early exit of the model
    score_thresh: np.ndarray  # float32, one per class; detections have higher scores
    nms_thresh: float  # IoU above which NMS drops the box with the lower score
    topk_candidates: int  # number of boxes per class that enter NMS
    detections_per_img: int  # largest number of detections per photo
    openvino: bool = False  # whether the graph is for OpenVINO


class Scope:
    """Nodes and constants of a graph, or of one branch of an ``If``. A branch can use the names of outer scopes.

    ``numbers`` makes names unique. All scopes of a graph share it.
    """

    def __init__(self, numbers: itertools.count) -> None:
        self.numbers = numbers
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """Add a constant. Return its name."""
        name = f"constant_{next(self.numbers)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def many(self, count: int, op_type: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with ``count`` outputs. Return their names."""
        outputs = [f"{op_type.lower()}_{next(self.numbers)}" for _ in range(count)]
        self.nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output. Return its name."""
        return self.many(1, op_type, *inputs, **attributes)[0]

    def inline(self, model: onnx.ModelProto, inputs: Mapping[str, str]) -> dict[str, str]:
        """Add all nodes of a model. ``inputs``: name of a model input -> name in this scope. Return name of a model
        output -> name in this scope."""
        prefix = f"segment_{next(self.numbers)}_"
        graph = onnx.compose.add_prefix(model, prefix).graph
        renamed = {prefix + name: outer for name, outer in inputs.items()}
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            if node.op_type == "Identity" and node.input[0] in inputs.values():  # no copy of an input
                renamed[node.output[0]] = node.input[0]
            else:
                self.nodes.append(node)
        self.constants += graph.initializer
        return {value.name: renamed.get(prefix + value.name, prefix + value.name) for value in model.graph.output}

    def if_else(self, condition: str, types: Sequence[tuple[int, list]], then: Side, otherwise: Side) -> list[str]:
        """Add an ``If`` whose branches have outputs of these types and shapes. Return the names of its outputs."""
        branches = {}
        for key, name, (scope, outputs) in (("then_branch", "then", then), ("else_branch", "otherwise", otherwise)):
            branches[key] = scope.graph(name, [(output, *type_) for output, type_ in zip(outputs, types, strict=True)])
        return self.many(len(types), "If", condition, **branches)

    def graph(self, name: str, outputs: Sequence[Value], inputs: Sequence[Any] = ()) -> onnx.GraphProto:
        """Return the scope as a graph. Each output comes from an ``Identity`` node, added last. So an output can be
        renamed, and no value is two outputs."""
        values = [helper.make_tensor_value_info(self("Identity", value), *type_) for value, *type_ in outputs]
        return helper.make_graph(self.nodes, name, inputs, values, self.constants)


Value = tuple[str, int, list]  # name, type and shape of an output
Side = tuple[Scope, Sequence[str]]  # one branch of an If: its scope and the names of its outputs


def build_graph(segments: Sequence[Segment], settings: Settings, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Build a model from a photo uint8 [height, width, 3] RGB to `OUTPUTS`.

    ``thresholds`` [exits] and ``score_thresh`` [classes] are inputs too. They have defaults, except for OpenVINO. The
    segments are from shallow to deep, the full path last. ``metadata``: keys and texts to store in the file.
    """
    scope, size = _start()
    values = _add_segments(scope, segments, {}, size, settings)
    outputs = {name: (value, *OUTPUTS[name]) for name, value in zip(OUTPUTS, values, strict=True)}
    return _model(scope, outputs, ["image"], settings, metadata)


def stage_of_photo(segment: Segment, settings: Settings) -> onnx.ModelProto:
    """Build a model from a photo to the segment's outputs, for a folder with one file per segment."""
    scope, size = _start()
    values, outputs = scope.inline(segment.model, _photo_inputs(scope, segment, size, settings)), {}
    for output in segment.model.graph.output:
        tensor = output.type.tensor_type
        outputs[output.name] = values[output.name], tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim]
    return _model(scope, outputs, ["image"], settings)


def last_stage(settings: Settings) -> onnx.ModelProto:
    """Build a model from `HEAD` and ``photo_size`` int64 [2] (height, width) to boxes, labels and scores, for a folder
    with one file per segment."""
    scope = Scope(itertools.count())
    values = postprocess(scope, *HEAD, "photo_size", settings)
    outputs = {name: (value, *OUTPUTS[name]) for name, value in zip(OUTPUTS, values, strict=False)}
    return _model(scope, outputs, [*HEAD, "photo_size"], settings)


def _start() -> tuple[Scope, str]:
    """Return a scope, and the name of the photo's size (height, width) in it."""
    scope = Scope(itertools.count())
    return scope, scope("Slice", scope("Shape", "image"), scope.constant([0], np.int64), scope.constant([2], np.int64))


def _photo_inputs(scope: Scope, segment: Segment, size: str, settings: Settings) -> dict[str, str]:
    """Add the preprocessing for a segment whose input is the photo. Return the segment's inputs."""
    if segment.pixels is not None:
        settings = replace(settings, size=(segment.pixels, segment.pixels))
    return {"x_in": preprocess(scope, size, settings)}


def _model(
    scope: Scope,
    outputs: Mapping[str, Value],
    inputs: Sequence[str],
    settings: Settings,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the scope as a model. ``outputs`` maps names of the model's outputs to values in the scope."""
    anchors, classes = len(settings.anchors), len(settings.score_thresh)
    types = {
        "image": (TensorProto.UINT8, ["height", "width", 3]),
        "photo_size": (TensorProto.INT64, [2]),
        "cls_logits": (TensorProto.FLOAT, [1, anchors, classes + 1]),
        "bbox_regression": (TensorProto.FLOAT, [1, anchors, 4]),
    }
    values = [helper.make_tensor_value_info(name, *types[name]) for name in inputs]
    used = {name for node in scope.nodes for name in _names_used(node)}
    for name in ("thresholds", "score_thresh"):
        if name in used:
            default = numpy_helper.from_array(np.asarray(getattr(settings, name), np.float32), name)
            if not settings.openvino:  # OpenVINO would treat an input with a default as a constant
                scope.constants.append(default)
            values.append(helper.make_tensor_value_info(name, default.data_type, list(default.dims)))
    graph = scope.graph("earlyexit_ssd", list(outputs.values()), values)
    # the last nodes are the Identity nodes of the outputs
    for node, value, name in zip(graph.node[-len(outputs) :], graph.output, outputs, strict=True):
        node.output[0] = value.name = name
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="earlyexit_ssd")
    model.ir_version = IR_VERSION
    helper.set_model_props(model, dict(metadata or {}))
    onnx.checker.check_model(model)
    return model


def _names_used(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node and the nodes in its branches read."""
    inner = [child for attribute in node.attribute if attribute.HasField("g") for child in attribute.g.node]
    return [*node.input, *(name for child in inner for name in _names_used(child))]


def expand_log_sum_exp(model: onnx.ModelProto) -> None:
    """Replace every ``ReduceLogSumExp`` by elementary operators, in place.

    These are nine times as fast in ONNX Runtime. OpenVINO 2026 sums ``ReduceLogSumExp`` over all axes, which is wrong.
    """
    graph, nodes = model.graph, []
    for node in graph.node:
        if node.op_type != "ReduceLogSumExp":
            nodes.append(node)
            continue
        (values,), (out,) = node.input, node.output
        arguments = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes, keep = arguments["axes"], arguments.get("keepdims", 1)
        graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{out}_axes"))
        steps = [
            ("ReduceMax", [values], f"{out}_max", {"axes": axes, "keepdims": 1}),
            ("Sub", [values, f"{out}_max"], f"{out}_shifted", {}),
            ("Exp", [f"{out}_shifted"], f"{out}_exp", {}),
            ("ReduceSum", [f"{out}_exp", f"{out}_axes"], f"{out}_sum", {"keepdims": 1}),
            ("Log", [f"{out}_sum"], f"{out}_log", {}),
            ("Add", [f"{out}_log", f"{out}_max"], out if keep else f"{out}_kept", {}),
        ]
        if not keep:
            steps.append(("Squeeze", [f"{out}_kept", f"{out}_axes"], out, {}))
        for op_type, inputs, output, attributes in steps:
            nodes.append(helper.make_node(op_type, inputs, [output], name=f"log_sum_exp_{len(nodes)}", **attributes))
    del graph.node[:]
    graph.node.extend(nodes)


# Routing.


def _add_segments(
    scope: Scope, segments: Sequence[Segment], state: Mapping[str, str], size: str, settings: Settings
) -> list[str]:
    """Add the segments and the postprocessing to ``scope``. Return the names of all `OUTPUTS`.

    ``state`` has the inputs of the first segment unless its input is the photo. Leading empty exits are handled here,
    so photos that leave there need no postprocessing. From the first other exit on, `_add_heads` chooses one exit's
    outputs, which are postprocessed once. ``leave`` is the branch of the ``If`` for a photo that leaves, ``go_on`` the
    branch for the other photos.
    """
    segment, *deeper = segments
    state = _photo_inputs(scope, segment, size, settings) if segment.of_photo else state
    values = scope.inline(segment.model, state)
    if not segment.empty:
        logits, offsets, *routing = _add_heads(scope, segments, values, settings)
        return [*postprocess(scope, logits, offsets, size, settings), *routing]
    condition, leave, go_on = _leaves(scope, segment, values), Scope(scope.numbers), Scope(scope.numbers)
    no_objects = []
    # not as constants, since OpenVINO loses the shape of an empty constant
    for elem_type, shape in list(OUTPUTS.values())[:3]:
        shape = leave.constant([0, *shape[1:]], np.int64)
        zero = helper.make_tensor("zero", elem_type, [1], [0])
        no_objects.append(leave("ConstantOfShape", shape, value=zero))
    no_objects += [leave.constant(segment.index, np.int64), leave("Squeeze", values[CONFIDENCE])]
    rest = _add_segments(go_on, deeper, next_inputs(values), size, settings)
    return scope.if_else(condition, list(OUTPUTS.values()), (leave, no_objects), (go_on, rest))


def _add_heads(scope: Scope, segments: Sequence[Segment], values: Mapping[str, str], settings: Settings) -> list[str]:
    """Add the deeper segments. ``values`` are the outputs of the first segment, which is in ``scope`` already.

    Return the names of the `HEAD`, ``exit_index`` and ``exit_confidence`` of the exit at which the photo leaves.
    """
    segment, *deeper = segments
    confidence = scope("Squeeze", values[CONFIDENCE]) if CONFIDENCE in values else scope.constant(np.nan)
    outputs = [*(values[name] for name in HEAD), scope.constant(segment.index, np.int64), confidence]
    if segment.full:
        return outputs
    condition, leave, go_on = _leaves(scope, segment, values), Scope(scope.numbers), Scope(scope.numbers)
    rest = _add_heads(go_on, deeper, go_on.inline(deeper[0].model, next_inputs(values)), settings)
    anchors, classes = len(settings.anchors), len(settings.score_thresh)
    heads = (TensorProto.FLOAT, [1, anchors, classes + 1]), (TensorProto.FLOAT, [1, anchors, 4])
    return scope.if_else(condition, [*heads, *list(OUTPUTS.values())[3:]], (leave, outputs), (go_on, rest))


def _leaves(scope: Scope, segment: Segment, values: Mapping[str, str]) -> str:
    """Add the comparison of the confidence with the threshold. Return the name of the result (bool)."""
    threshold = scope("Gather", "thresholds", scope.constant([segment.index], np.int64))
    return scope("Squeeze", scope("GreaterOrEqual", values[CONFIDENCE], threshold))


T = TypeVar("T")


def next_inputs(values: Mapping[str, T]) -> dict[str, T]:
    """Return the inputs of the next segment, from the outputs of a segment: their values or their names."""
    return {f"{name}_in": values[name] for name in STATE if name in values}


# Preprocessing and postprocessing as in torchvision's GeneralizedRCNNTransform and SSD.postprocess_detections.


def preprocess(scope: Scope, size: str, settings: Settings) -> str:
    """Resize (bilinear without antialiasing) and normalise the photo ``image``, uint8 [H, W, 3].

    ``size`` is int64 [2] (H, W). The result is float32 [1, 3, *settings.size].
    """
    if settings.openvino:
        return _gather_and_resize(scope, size, settings)
    many, few = Scope(scope.numbers), Scope(scope.numbers)
    height = scope("Gather", size, scope.constant(0, np.int64))
    has_many = scope("Greater", height, scope.constant(MANY_ROWS * settings.size[0], np.int64))
    branches = (many, [_gather_rows_and_resize(many, size, settings)]), (few, [_convert_and_resize(few, settings)])
    return scope.if_else(has_many, [(TensorProto.FLOAT, [1, 3, *settings.size])], *branches)[0]


def _normalise(scope: Scope, pixels: str, settings: Settings, layout: Callable[[np.ndarray], np.ndarray]) -> str:
    """Normalise pixels in 0..255. ``layout`` arranges values per channel [3] like the pixels."""
    mean, std = np.asarray(settings.mean, np.float64), np.asarray(settings.std, np.float64)
    scale, shift = (scope.constant(layout(values)) for values in (1 / (255 * std), -mean / std))
    return scope("Add", scope("Mul", pixels, scale), shift)


def _convert_and_resize(scope: Scope, settings: Settings) -> str:
    """Convert the whole photo to floats, then resize it."""
    return _normalise(scope, _resize(scope, "image", settings), settings, lambda values: values.reshape(1, 3, 1, 1))


def _resize(scope: Scope, rows: str, settings: Settings) -> str:
    """Resize uint8 [rows, width, 3] to float32 [1, 3, *settings.size]."""
    # uint8 is transposed faster than float32
    pixels = scope("Cast", scope("Transpose", rows, perm=[2, 0, 1]), to=TensorProto.FLOAT)
    pixels = scope("Unsqueeze", pixels, scope.constant([0], np.int64))
    target = scope.constant([1, 3, *settings.size], np.int64)
    return scope("Resize", pixels, "", "", target, mode="linear", coordinate_transformation_mode="half_pixel")


def _gather_rows_and_resize(scope: Scope, size: str, settings: Settings) -> str:
    """Gather the two photo rows around each output row, resize both along the width, and interpolate between them."""
    top, bottom, weight = _neighbours(scope, size, 0, settings.size[0])
    sides = [_resize(scope, scope("Gather", "image", rows, axis=0), settings) for rows in (top, bottom)]
    weight = scope("Reshape", weight, scope.constant([-1, 1], np.int64))
    pixels = _interpolate(scope, *sides, weight)
    return _normalise(scope, pixels, settings, lambda values: values.reshape(1, 3, 1, 1))


def _gather_and_resize(scope: Scope, size: str, settings: Settings) -> str:
    """Gather the values of the four pixels around each output point, convert only these to floats, and interpolate.

    Arithmetic is on rows of width * 3 values, and the transposition comes last. This halves the time in OpenVINO, which
    also gathers single values faster than pixels.
    """
    height, width = settings.size
    top, bottom, y_weight = _neighbours(scope, size, 0, height)
    left, right, x_weight = _neighbours(scope, size, 1, width)
    y_weight = scope("Reshape", y_weight, scope.constant([height, 1], np.int64))
    x_weight = scope("Reshape", x_weight, scope.constant([width, 1], np.int64))
    x_weight = scope("Expand", x_weight, scope.constant([width, 3], np.int64))
    x_weight = scope("Reshape", x_weight, scope.constant([1, width * 3], np.int64))
    columns, rows = [_value_indices(scope, side, width) for side in (left, right)], []
    for indices in (top, bottom):
        row = scope("Reshape", scope("Gather", "image", indices, axis=0), scope.constant([height, -1], np.int64))
        sides = [scope("Cast", scope("Gather", row, column, axis=1), to=TensorProto.FLOAT) for column in columns]
        rows.append(_interpolate(scope, *sides, x_weight))
    pixels = _normalise(scope, _interpolate(scope, *rows, y_weight), settings, lambda values: np.tile(values, width))
    pixels = scope("Reshape", pixels, scope.constant([1, height, width, 3], np.int64))
    return scope("Transpose", pixels, perm=[0, 3, 1, 2])


def _value_indices(scope: Scope, pixels: str, count: int) -> str:
    """Convert indices of pixels in a row [count] to indices of their three values [3 * count]."""
    pixels = scope("Reshape", pixels, scope.constant([count, 1], np.int64))
    values = scope("Add", scope("Mul", pixels, scope.constant([3], np.int64)), scope.constant([[0, 1, 2]], np.int64))
    return scope("Cast", scope("Reshape", values, scope.constant([-1], np.int64)), to=TensorProto.INT32)


def _neighbours(scope: Scope, size: str, axis: int, count: int) -> tuple[str, str, str]:
    """Return three names, [count] each: the pixel indices before and after each of ``count`` output points along an
    axis of the photo, and the weight of the pixel after it, in [0, 1)."""
    length = scope("Gather", size, scope.constant([axis], np.int64))
    scale = scope("Div", scope("Cast", length, to=TensorProto.FLOAT), scope.constant([count]))
    points = scope("Sub", scope("Mul", scope.constant(np.arange(count) + 0.5), scale), scope.constant([0.5]))
    points = scope("Max", points, scope.constant([0.0]))
    floor = scope("Floor", points)
    before, one = scope("Cast", floor, to=TensorProto.INT64), scope.constant([1], np.int64)
    after = scope("Min", scope("Add", before, one), scope("Sub", length, one))
    return before, after, scope("Sub", points, floor)


def _interpolate(scope: Scope, first: str, second: str, weight: str) -> str:
    return scope("Add", first, scope("Mul", scope("Sub", second, first), weight))


def postprocess(scope: Scope, cls_logits: str, bbox_regression: str, size: str, settings: Settings) -> list[str]:
    """Add decoding and NMS per class. Return the names of boxes, labels and scores by decreasing score.

    Only default boxes with a score above the class's ``score_thresh`` are decoded. Per class, the ``topk_candidates``
    boxes of highest score enter NMS.
    """
    zero = scope.constant([0], np.int64)
    probabilities = scope("Softmax", scope("Squeeze", cls_logits, zero), axis=1)
    start_stop_axis = [scope.constant([value], np.int64) for value in (1, len(settings.score_thresh) + 1, 1)]
    scores = scope("Slice", probabilities, *start_stop_axis)
    # NMS drops scores of 0, so from here on 0 marks a class that is not detected at a default box
    scores = scope("Where", scope("Greater", scores, "score_thresh"), scores, scope.constant(0.0))
    candidates = scope("NonZero", scope("ReduceMax", scores, axes=[1], keepdims=0))
    candidates = scope("Reshape", candidates, scope.constant([-1], np.int64))
    scores = scope("Transpose", scope("Gather", scores, candidates, axis=0), perm=[1, 0])
    scores = _keep_top_k(scope, scores, candidates, settings)

    offsets = scope("Gather", scope("Squeeze", bbox_regression, zero), candidates, axis=0)
    boxes = _decode(scope, offsets, candidates, settings)
    selected = scope(
        "NonMaxSuppression",
        scope("Unsqueeze", boxes, zero),
        scope("Unsqueeze", scores, zero),
        scope.constant([settings.detections_per_img], np.int64),
        scope.constant([max(settings.nms_thresh, 1e-6)]),  # above 0, since OpenVINO also drops boxes at the threshold
        scope.constant([0.0]),
    )
    _, classes, indices = scope.many(3, "Split", selected, axis=1)
    kept = scope("GatherND", scores, scope("Concat", classes, indices, axis=1))
    count = scope("Min", scope("Shape", kept), scope.constant([settings.detections_per_img], np.int64))
    scores, order = scope.many(2, "TopK", kept, count)
    one = scope.constant([1], np.int64)
    labels = scope("Add", scope("Gather", scope("Squeeze", classes, one), order), one)
    boxes = scope("Gather", boxes, scope("Gather", scope("Squeeze", indices, one), order), axis=0)
    photo = scope("Gather", scope("Cast", size, to=TensorProto.FLOAT), scope.constant([1, 0, 1, 0], np.int64))
    height, width = settings.size
    scale = scope("Div", photo, scope.constant([width, height, width, height]))
    boxes = scope("Reshape", scope("Mul", boxes, scale), scope.constant([-1, 4], np.int64))  # OpenVINO needs the rank
    return [boxes, labels, scores]


def _keep_top_k(scope: Scope, scores: str, candidates: str, settings: Settings) -> str:
    """Set all but the ``topk_candidates`` highest scores of each class to 0, in scores [classes, n]. Scores equal to
    the lowest of these are kept too."""
    k = scope.constant([settings.topk_candidates], np.int64)
    has_more, more, fewer = scope("Greater", scope("Shape", candidates), k), Scope(scope.numbers), Scope(scope.numbers)
    values, _ = more.many(2, "TopK", scores, k, axis=1)
    lowest = more("ReduceMin", values, axes=[1], keepdims=1)
    kept = more("Where", more("GreaterOrEqual", scores, lowest), scores, more.constant(0.0))
    types = [(TensorProto.FLOAT, [len(settings.score_thresh), "candidates"])]
    branches = (more, [kept]), (fewer, [scores])
    return scope.if_else(scope("Squeeze", has_more), types, *branches)[0]


def _decode(scope: Scope, offsets: str, candidates: str, settings: Settings) -> str:
    """Decode offsets [n, 4] to boxes xyxy in pixels of the input, clipped to it (torchvision's ``BoxCoder``)."""
    anchors = np.asarray(settings.anchors, np.float32)
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = anchors[:, :2] + np.float32(0.5) * sides
    sides, centres = (scope("Gather", scope.constant(value), candidates, axis=0) for value in (sides, centres))
    shift, log_ratio = scope.many(2, "Split", scope("Div", offsets, scope.constant(settings.box_weights)), axis=1)
    centres = scope("Add", scope("Mul", shift, sides), centres)
    ratio = scope("Exp", scope("Min", log_ratio, scope.constant(LOG_LIMIT)))
    halves = scope("Mul", scope("Mul", ratio, sides), scope.constant(0.5))
    corners = scope("Concat", scope("Sub", centres, halves), scope("Add", centres, halves), axis=1)
    height, width = settings.size
    clipped = scope("Min", corners, scope.constant([width, height, width, height]))
    return scope("Max", clipped, scope.constant(0.0))

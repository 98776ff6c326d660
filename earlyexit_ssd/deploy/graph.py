"""Build one ONNX graph from a photo to its detections, from the segments of a routed detector.

The layers after an exit are in one side of an ``If``, so a runtime computes them only for photos that do not leave
there. This module needs the package onnx and no PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

LARGE = 1_000_000
"""Number of pixels above which a photo is large. A large photo is resized by gathering only the pixels that the resize
reads, a smaller one by converting the whole photo: each is the faster way in ONNX Runtime. In OpenVINO gathering is
always faster."""
LOG_LIMIT = math.log(1000.0 / 16)
"""Largest logarithm of (box side / default box side), as in torchvision's ``BoxCoder``."""


@dataclass(frozen=True)
class Segment:
    """The network between the previous exit and this one.

    ``model`` is a graph. Its inputs are the tensors of `STATE`. Its outputs are the tensors of `STATE`, those of `HEAD`
    if they are needed, and the router's `CONFIDENCE` [1] if there is a router.
    """

    index: int  # of the exit among all exits of the model
    name: str  # of the exit
    empty: bool  # whether photos that leave there have no detections
    model: onnx.ModelProto
    full: bool = False  # whether it ends the full path


@dataclass(frozen=True)
class Contract:
    """Settings of pre- and post-processing, and the thresholds."""

    size: tuple[int, int]  # (height, width) of the network's input, pixels
    mean: Sequence[float]  # of each channel, for pixels in [0, 1]
    std: Sequence[float]  # of each channel, for pixels in [0, 1]
    anchors: np.ndarray  # default boxes float32 [A, 4] xyxy in the input's pixels
    box_weights: Sequence[float]  # weights of torchvision's ``BoxCoder``
    thresholds: np.ndarray  # float32, one per early exit of the model
    score_thresh: np.ndarray  # float32, one per class; a detection's score is above it
    nms_thresh: float  # IoU above which NMS drops the box of lower score
    topk_candidates: int  # number of boxes per class that enter NMS, by score
    detections_per_img: int  # largest number of detections per photo
    large: int = LARGE  # number of pixels, see `LARGE`; 0: for OpenVINO, always gather


class Scope:
    """Nodes and constants of a graph, or of one side of an ``If``. Such a side can use the names of outer scopes.

    ``numbers`` makes names unique. All scopes of a graph share it.
    """

    def __init__(self, numbers: itertools.count) -> None:
        self.numbers = numbers
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """Add a constant; returns its name."""
        name = f"constant_{next(self.numbers)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def zeros(self, shape: Sequence[int], kind: int) -> str:
        """Add a node that gives zeros of this shape; returns the name of its output. This is no constant, since
        OpenVINO loses the shape of an empty constant."""
        zero = helper.make_tensor("zero", kind, [1], [0])
        return self("ConstantOfShape", self.constant(shape, np.int64), value=zero)

    def many(self, count: int, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node; returns the names of its outputs."""
        outputs = [f"{kind.lower()}_{next(self.numbers)}" for _ in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; returns the name of its only output."""
        return self.many(1, kind, *inputs, **attributes)[0]

    def inline(self, model: onnx.ModelProto, inputs: Mapping[str, str]) -> dict[str, str]:
        """Add all nodes of a graph. ``inputs`` maps the names of its inputs to names in this scope; the returned dict
        does the same for its outputs."""
        prefix = f"segment_{next(self.numbers)}_"
        graph = onnx.compose.add_prefix(model, prefix).graph
        here = {prefix + name: where for name, where in inputs.items()}
        for node in graph.node:
            node.input[:] = [here.get(name, name) for name in node.input]
            if node.op_type == "Identity" and node.input[0] in inputs.values():  # passed on without a copy
                here[node.output[0]] = node.input[0]
            else:
                self.nodes.append(node)
        self.constants += graph.initializer
        return {one.name: here.get(prefix + one.name, prefix + one.name) for one in model.graph.output}

    def either(self, condition: str, kinds: Sequence[tuple[int, list]], then: Branch, otherwise: Branch) -> list[str]:
        """Add an ``If`` whose two sides have outputs of these types and shapes; returns the names of its outputs."""
        graphs = {}
        for side, name, (scope, outputs) in (("then_branch", "then", then), ("else_branch", "otherwise", otherwise)):
            graphs[side] = scope.graph(name, [(one, *kind) for one, kind in zip(outputs, kinds, strict=True)])
        return self.many(len(kinds), "If", condition, **graphs)

    def graph(self, name: str, outputs: Sequence[Value], inputs: Sequence[Any] = ()) -> onnx.GraphProto:
        """The scope as a graph. Each output comes from an ``Identity`` node of its own, added last. So an output can be
        renamed, and no two outputs are the same value."""
        values = [helper.make_tensor_value_info(self("Identity", where), kind, shape) for where, kind, shape in outputs]
        return helper.make_graph(self.nodes, name, inputs, values, self.constants)


Value = tuple[str, int, list]  # name, type and shape of an output
Branch = tuple[Scope, Sequence[str]]  # one side of an If: its scope and the names of its outputs


def build_graph(segments: Sequence[Segment], contract: Contract, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """A model from a photo uint8 [height, width, 3] RGB to `OUTPUTS`.

    ``thresholds`` [exits] and ``score_thresh`` [classes] are inputs with defaults.

    Args:
        segments: shallow to deep, the full path last.
        metadata: metadata of the file, text by key.
    """
    scope, size, state = _photo(contract)
    answer = _answer(scope, segments, state, size, contract)
    outputs = [(name, *kind) for name, kind in zip(answer, OUTPUTS.values(), strict=True)]
    return _model(scope, outputs, ["image"], contract, tuple(OUTPUTS), metadata)


def first_stage(segment: Segment, contract: Contract) -> onnx.ModelProto:
    """A graph from a photo to the first segment's outputs."""
    scope, _, state = _photo(contract)
    found, outputs = scope.inline(segment.model, state), []
    for value in segment.model.graph.output:
        kind = value.type.tensor_type
        outputs.append((found[value.name], kind.elem_type, [one.dim_value for one in kind.shape.dim]))
    return _model(scope, outputs, ["image"], contract, tuple(found))


def last_stage(contract: Contract) -> onnx.ModelProto:
    """A graph from the head's outputs and ``photo_size`` int64 [2] (height, width) to boxes, labels and scores."""
    scope, names = Scope(itertools.count()), tuple(OUTPUTS)[:3]
    found = detections(scope, *HEAD, "photo_size", contract)
    outputs = [(where, *OUTPUTS[name]) for where, name in zip(found, names, strict=True)]
    return _model(scope, outputs, [*HEAD, "photo_size"], contract, names)


def _photo(contract: Contract) -> tuple[Scope, str, dict[str, str]]:
    """A scope with the photo's size (height, width) and the first segment's input."""
    scope = Scope(itertools.count())
    size = scope("Slice", scope("Shape", "image"), scope.constant([0], np.int64), scope.constant([2], np.int64))
    return scope, size, {"x_in": normalised(scope, "image", size, contract)}


def _model(
    scope: Scope,
    outputs: Sequence[Value],
    inputs: Sequence[str],
    contract: Contract,
    names: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The scope as a model, whose ``outputs`` get these ``names``."""
    anchors, classes = len(contract.anchors), len(contract.score_thresh)
    kinds = {
        "image": (TensorProto.UINT8, ["height", "width", 3]),
        "photo_size": (TensorProto.INT64, [2]),
        "cls_logits": (TensorProto.FLOAT, [1, anchors, classes + 1]),
        "bbox_regression": (TensorProto.FLOAT, [1, anchors, 4]),
    }
    values = [helper.make_tensor_value_info(name, *kinds[name]) for name in inputs]
    used = {name for node in scope.nodes for name in _names_used(node)}
    for name in ("thresholds", "score_thresh"):
        if name in used:
            default = numpy_helper.from_array(np.asarray(getattr(contract, name), np.float32), name)
            if contract.large:  # OpenVINO takes inputs with defaults for constants
                scope.constants.append(default)
            values.append(helper.make_tensor_value_info(name, default.data_type, list(default.dims)))
    graph = scope.graph("earlyexit_ssd", outputs, values)
    # the last nodes are those of the outputs
    for node, value, name in zip(graph.node[-len(outputs) :], graph.output, names, strict=True):
        node.output[0] = value.name = name
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="earlyexit_ssd")
    model.ir_version = IR_VERSION
    helper.set_model_props(model, dict(metadata or {}))
    onnx.checker.check_model(model)
    return model


def _names_used(node: onnx.NodeProto) -> list[str]:
    inner = [part for attribute in node.attribute if attribute.HasField("g") for part in attribute.g.node]
    return [*node.input, *(name for part in inner for name in _names_used(part))]


def expand_log_sum_exp(model: onnx.ModelProto) -> None:
    """Replace every ``ReduceLogSumExp`` by elementary operators, in place.

    They are nine times as fast in ONNX Runtime. OpenVINO 2026 sums ``ReduceLogSumExp`` over all axes, which is wrong.
    """
    graph, nodes = model.graph, []
    for node in graph.node:
        if node.op_type != "ReduceLogSumExp":
            nodes.append(node)
            continue
        (values,), (out,) = node.input, node.output
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axes, keep = settings["axes"], settings.get("keepdims", 1)
        graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), f"{out}_axes"))
        steps = [
            ("ReduceMax", [values], f"{out}_most", {"axes": axes, "keepdims": 1}),
            ("Sub", [values, f"{out}_most"], f"{out}_less", {}),
            ("Exp", [f"{out}_less"], f"{out}_exp", {}),
            ("ReduceSum", [f"{out}_exp", f"{out}_axes"], f"{out}_sum", {"keepdims": 1}),
            ("Log", [f"{out}_sum"], f"{out}_log", {}),
            ("Add", [f"{out}_log", f"{out}_most"], out if keep else f"{out}_kept", {}),
        ]
        if not keep:
            steps.append(("Squeeze", [f"{out}_kept", f"{out}_axes"], out, {}))
        for kind, inputs, output, attributes in steps:
            nodes.append(helper.make_node(kind, inputs, [output], name=f"log_sum_exp_{len(nodes)}", **attributes))
    del graph.node[:]
    graph.node.extend(nodes)


# Routing.


def _answer(
    scope: Scope, segments: Sequence[Segment], state: Mapping[str, str], size: str, contract: Contract
) -> list[str]:
    """Add the segments to ``scope``, starting from ``state``; returns the names of all `OUTPUTS`.

    ``stay`` is the side of the ``If`` for a photo that leaves at this exit, ``go_on`` for one that goes on to the next.
    """
    segment, *deeper = segments
    found = scope.inline(segment.model, state)
    if not segment.empty:
        logits, offsets, *left = _head(scope, segments, found, contract)
        return [*detections(scope, logits, offsets, size, contract), *left]
    leaves, stay, go_on = _leaves(scope, segment, found), Scope(scope.numbers), Scope(scope.numbers)
    shapes = ([0, 4], TensorProto.FLOAT), ([0], TensorProto.INT64), ([0], TensorProto.FLOAT)
    nothing = [stay.zeros(*shape) for shape in shapes]
    nothing += [stay.constant(segment.index, np.int64), stay("Squeeze", found[CONFIDENCE])]
    rest = _answer(go_on, deeper, _state(found), size, contract)
    return scope.either(leaves, list(OUTPUTS.values()), (stay, nothing), (go_on, rest))


def _head(scope: Scope, segments: Sequence[Segment], found: Mapping[str, str], contract: Contract) -> list[str]:
    """Names of the `HEAD`, ``exit_index`` and ``exit_confidence`` of the exit at which the photo leaves."""
    segment, *deeper = segments
    confidence = scope("Squeeze", found[CONFIDENCE]) if CONFIDENCE in found else scope.constant(np.nan)
    here = [*(found[name] for name in HEAD), scope.constant(segment.index, np.int64), confidence]
    if segment.full:
        return here
    leaves, stay, go_on = _leaves(scope, segment, found), Scope(scope.numbers), Scope(scope.numbers)
    behind = _head(go_on, deeper, go_on.inline(deeper[0].model, _state(found)), contract)
    anchors, outputs = len(contract.anchors), len(contract.score_thresh) + 1
    heads = (TensorProto.FLOAT, [1, anchors, outputs]), (TensorProto.FLOAT, [1, anchors, 4])
    return scope.either(leaves, [*heads, *list(OUTPUTS.values())[3:]], (stay, here), (go_on, behind))


def _leaves(scope: Scope, segment: Segment, found: Mapping[str, str]) -> str:
    threshold = scope("Gather", "thresholds", scope.constant([segment.index], np.int64))
    return scope("Squeeze", scope("GreaterOrEqual", found[CONFIDENCE], threshold))


def _state(found: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}_in": found[name] for name in STATE if name in found}


# Pre- and post-processing as in torchvision's GeneralizedRCNNTransform and SSD.postprocess_detections.


def normalised(scope: Scope, image: str, size: str, contract: Contract) -> str:
    """Resize and normalise a photo: uint8 [H, W, 3] with its ``size`` (H, W) to float32 [1, 3, *contract.size],
    bilinear without antialiasing."""
    if contract.large == 0:
        return _fetched(scope, image, size, contract)
    large, small = Scope(scope.numbers), Scope(scope.numbers)
    is_large = scope("Greater", scope("ReduceProd", size, keepdims=0), scope.constant(contract.large, np.int64))
    branches = (large, [_fetched(large, image, size, contract)]), (small, [_resized(small, image, contract)])
    return scope.either(is_large, [(TensorProto.FLOAT, [1, 3, *contract.size])], *branches)[0]


def _normalise(scope: Scope, pixels: str, contract: Contract, arrange: Callable[[np.ndarray], np.ndarray]) -> str:
    """Pixels in 0..255 to the network's input; ``arrange`` gives values per channel [3] the layout of the pixels."""
    mean, std = np.asarray(contract.mean, np.float64), np.asarray(contract.std, np.float64)
    scale, shift = (scope.constant(arrange(values)) for values in (1 / (255 * std), -mean / std))
    return scope("Add", scope("Mul", pixels, scale), shift)


def _resized(scope: Scope, image: str, contract: Contract) -> str:
    """Convert the whole photo, then resize it."""
    pixels = scope("Cast", scope("Transpose", image, perm=[2, 0, 1]), to=TensorProto.FLOAT)  # bytes transpose faster
    pixels = scope("Unsqueeze", pixels, scope.constant([0], np.int64))
    target = scope.constant([1, 3, *contract.size], np.int64)
    pixels = scope("Resize", pixels, "", "", target, mode="linear", coordinate_transformation_mode="half_pixel")
    return _normalise(scope, pixels, contract, lambda values: values.reshape(1, 3, 1, 1))


def _fetched(scope: Scope, image: str, size: str, contract: Contract) -> str:
    """Resize from the four pixels around each output point, and convert only these.

    Arithmetic is on rows of width * 3 values, and the transposition comes last. This halves the time in OpenVINO.
    """
    height, width = contract.size
    top, bottom, down = _neighbours(scope, size, 0, height)
    left, right, across = _neighbours(scope, size, 1, width)
    down = scope("Reshape", down, scope.constant([height, 1], np.int64))
    across = scope("Reshape", across, scope.constant([width, 1], np.int64))
    across = scope("Expand", across, scope.constant([width, 3], np.int64))
    across = scope("Reshape", across, scope.constant([1, width * 3], np.int64))
    flat, rows = scope.constant([height, width * 3], np.int64), []
    if contract.large == 0:  # OpenVINO gathers single values faster than pixels, ONNX Runtime does not
        left, right = _of_values(scope, left, width), _of_values(scope, right, width)
    for row in (top, bottom):
        row = scope("Gather", image, row, axis=0)
        row = scope("Reshape", row, scope.constant([height, -1], np.int64)) if contract.large == 0 else row
        ends = [scope("Reshape", scope("Gather", row, end, axis=1), flat) for end in (left, right)]
        rows.append(_between(scope, *(scope("Cast", end, to=TensorProto.FLOAT) for end in ends), across))
    pixels = _normalise(scope, _between(scope, *rows, down), contract, lambda values: np.tile(values, width))
    pixels = scope("Reshape", pixels, scope.constant([1, height, width, 3], np.int64))
    return scope("Transpose", pixels, perm=[0, 3, 1, 2])


def _of_values(scope: Scope, pixels: str, count: int) -> str:
    """Indices of pixels in a row [count] to indices of their three values [3 * count]."""
    pixels = scope("Reshape", pixels, scope.constant([count, 1], np.int64))
    values = scope("Add", scope("Mul", pixels, scope.constant([3], np.int64)), scope.constant([[0, 1, 2]], np.int64))
    return scope("Cast", scope("Reshape", values, scope.constant([-1], np.int64)), to=TensorProto.INT32)


def _neighbours(scope: Scope, size: str, axis: int, count: int) -> tuple[str, str, str]:
    """Along one axis of the photo, the pixel indices before and after each of ``count`` output points, and the point's
    relative position between them, [count] each."""
    length = scope("Gather", size, scope.constant([axis], np.int64))
    scale = scope("Div", scope("Cast", length, to=TensorProto.FLOAT), scope.constant([count]))
    points = scope("Sub", scope("Mul", scope.constant(np.arange(count) + 0.5), scale), scope.constant([0.5]))
    points = scope("Max", points, scope.constant([0.0]))
    floor = scope("Floor", points)
    before, one = scope("Cast", floor, to=TensorProto.INT64), scope.constant([1], np.int64)
    behind = scope("Min", scope("Add", before, one), scope("Sub", length, one))
    return before, behind, scope("Sub", points, floor)


def _between(scope: Scope, first: str, second: str, share: str) -> str:
    return scope("Add", first, scope("Mul", scope("Sub", second, first), share))


def detections(scope: Scope, cls_logits: str, bbox_regression: str, size: str, contract: Contract) -> list[str]:
    """Names of boxes, labels and scores by decreasing score, after NMS per class.

    Only default boxes with a score above the class's ``score_thresh`` are decoded. Per class, the ``topk_candidates``
    boxes of highest score enter NMS.
    """
    zero = scope.constant([0], np.int64)
    probability = scope("Softmax", scope("Squeeze", cls_logits, zero), axis=1)
    ends = [scope.constant([value], np.int64) for value in (1, len(contract.score_thresh) + 1, 1)]
    objects = scope("Slice", probability, *ends)
    above = scope("Where", scope("Greater", objects, "score_thresh"), objects, scope.constant(0.0))
    largest = scope("ReduceMax", above, axes=[1], keepdims=0)
    candidates = scope("NonZero", largest)
    candidates = scope("Reshape", candidates, scope.constant([-1], np.int64))
    scores = scope("Transpose", scope("Gather", above, candidates, axis=0), perm=[1, 0])
    scores = _surest(scope, scores, candidates, contract)

    boxes = _decoded(scope, scope("Gather", scope("Squeeze", bbox_regression, zero), candidates, axis=0), candidates,
                     contract)  # fmt: skip
    chosen = scope(
        "NonMaxSuppression",
        scope("Unsqueeze", boxes, zero),
        scope("Unsqueeze", scores, zero),
        scope.constant([contract.detections_per_img], np.int64),
        scope.constant([contract.nms_thresh]),
        scope.constant([0.0]),
    )
    _, classes, places = scope.many(3, "Split", chosen, axis=1)
    kept = scope("GatherND", scores, scope("Concat", classes, places, axis=1))
    count = scope("Min", scope("Shape", kept), scope.constant([contract.detections_per_img], np.int64))
    ordered, order = scope.many(2, "TopK", kept, count)
    one = scope.constant([1], np.int64)
    labels = scope("Add", scope("Gather", scope("Squeeze", classes, one), order), one)
    found = scope("Gather", boxes, scope("Gather", scope("Squeeze", places, one), order), axis=0)
    photo = scope("Gather", scope("Cast", size, to=TensorProto.FLOAT), scope.constant([1, 0, 1, 0], np.int64))
    height, width = contract.size
    ratio = scope("Div", photo, scope.constant([width, height, width, height]))
    found = scope("Reshape", scope("Mul", found, ratio), scope.constant([-1, 4], np.int64))  # OpenVINO needs the rank
    return [found, labels, ordered]


def _surest(scope: Scope, scores: str, candidates: str, contract: Contract) -> str:
    """Scores [classes, n], with all but the ``topk_candidates`` highest of each class set to 0. Scores equal to the
    lowest of these stay too."""
    most = scope.constant([contract.topk_candidates], np.int64)
    too_many, cut, same = scope("Greater", scope("Shape", candidates), most), Scope(scope.numbers), Scope(scope.numbers)
    values, _ = cut.many(2, "TopK", scores, most, axis=1)
    least = cut("ReduceMin", values, axes=[1], keepdims=1)
    kept = cut("Where", cut("GreaterOrEqual", scores, least), scores, cut.constant(0.0))
    kinds = [(TensorProto.FLOAT, [len(contract.score_thresh), "candidates"])]
    branches = (cut, [kept]), (same, [same("Identity", scores)])
    return scope.either(scope("Squeeze", too_many), kinds, *branches)[0]


def _decoded(scope: Scope, offsets: str, candidates: str, contract: Contract) -> str:
    """Decode offsets [n, 4] to boxes xyxy in the input's pixels, clipped to it (torchvision's ``BoxCoder``)."""
    anchors = np.asarray(contract.anchors, np.float32)
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = anchors[:, :2] + np.float32(0.5) * sides
    sides, centres = (scope("Gather", scope.constant(value), candidates, axis=0) for value in (sides, centres))
    shift, stretch = scope.many(2, "Split", scope("Div", offsets, scope.constant(contract.box_weights)), axis=1)
    centres = scope("Add", scope("Mul", shift, sides), centres)
    stretch = scope("Exp", scope("Min", stretch, scope.constant(LOG_LIMIT)))
    halves = scope("Mul", scope("Mul", stretch, sides), scope.constant(0.5))
    corners = scope("Concat", scope("Sub", centres, halves), scope("Add", centres, halves), axis=1)
    height, width = contract.size
    inside = scope("Min", corners, scope.constant([width, height, width, height]))
    return scope("Max", inside, scope.constant(0.0))

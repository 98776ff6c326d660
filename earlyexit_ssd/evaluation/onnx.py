"""Rivals from ONNX files (EVAL.RIVALS.ONNX): preparation of the photo, decoding of the outputs, and MMACs."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from earlyexit_ssd.config.check import LARGEST_SIDE
from earlyexit_ssd.errors import EarlyExitError, import_package, one_line, shown
from earlyexit_ssd.evaluation.cost import OnnxNetwork
from earlyexit_ssd.evaluation.outputs import ImageDetections
from earlyexit_ssd.modeling import COCO_CLASSES
from earlyexit_ssd.plain import read_bytes

logger = logging.getLogger(__name__)


Size = tuple[int, int]  # height and width, pixels
Shape = tuple[int, ...]

SCORE_THRESHOLD, MAX_DETECTIONS = 0.001, 300  # for all formats that are decoded here
YOLOX_STRIDES, YOLOX_PADDING, YOLOX_NMS_IOU = (8, 16, 32), 114.0, 0.65

# NanoDet-Plus and PicoDet predict the distances from a point to the sides of its box.
DISTANCE_STRIDES = (8, 16, 32, 64)
DISTANCE_BINS = 8  # a distance is 0 to 7 strides
DISTANCE_NMS_IOU, MAX_CANDIDATES = 0.6, 1000
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
CHECK_CLASSES = "check the classes in its metadata"


@dataclass(frozen=True)
class OnnxFormat:
    """How to run the ONNX files of one project or exporter.

    ``prepare`` takes a photo [3, H, W], RGB in [0, 1], and the input size. It returns the network's input [3, height,
    width] and the scales (x, y) from photo to input. ``decode`` takes the outputs, the input size and the number of
    classes K. It returns detections in pixels of the input.
    """

    classes: tuple[str, ...]  # names of the labels 1..K, unless the file's metadata names them
    prepare: Callable[[Tensor, Size], tuple[Tensor, tuple[float, float]]]
    decode: Callable[[Sequence[Tensor], Size, int], ImageDetections]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # further inputs -> their values [1, n]


def letterbox(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """Return YOLOX's input: BGR in [0, 255], resized with the photo's aspect ratio, with grey padding on the right and
    bottom."""
    scale = min(size[0] / photo.shape[1], size[1] / photo.shape[2])
    height, width = (max(int(side * scale), 1) for side in photo.shape[1:])
    pixels = F.interpolate(photo[None] * 255, (height, width), mode="bilinear")[0]
    padded = F.pad(pixels, (0, size[1] - width, 0, size[0] - height), value=YOLOX_PADDING)
    return padded.flip(0), (scale, scale)


def grid(size: Size, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return column and row [N, 2] and stride [N, 1] of each cell: one grid per stride, each row by row."""
    cells, lengths = [], []
    for stride in strides:
        y, x = torch.meshgrid(*(torch.arange(math.ceil(side / stride)) for side in size), indexing="ij")
        cells.append(torch.stack([x, y], -1).reshape(-1, 2).float())
        lengths.append(torch.full((y.numel(), 1), stride))
    return torch.cat(cells), torch.cat(lengths)


def decode_yolox(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """Decode YOLOX's raw output [1, cells, 5 + K] (Ge et al. 2021): box, objectness and class probabilities per cell.

    A box is given by its centre, relative to the cell's upper left corner, and the logarithms of its width and height,
    all in strides. The score is objectness times the highest class probability.
    """
    cells, strides = grid(size, YOLOX_STRIDES)
    rows = _only_output(outputs, [1, len(cells), 5 + num_classes], num_classes)
    probability, best = rows[:, 5:].max(1)
    scores = rows[:, 4] * probability
    keep = scores >= SCORE_THRESHOLD
    centres = (rows[keep, :2] + cells[keep]) * strides[keep]
    halves = rows[keep, 2:4].exp() * strides[keep] / 2
    return _suppress(torch.cat([centres - halves, centres + halves], 1), scores[keep], best[keep] + 1, YOLOX_NMS_IOU)


def _only_output(outputs: Sequence[Tensor], expected: list[int], num_classes: int) -> Tensor:
    """Return the rows of the only output, which must have the shape ``expected``."""
    if [list(output.shape) for output in outputs] != [expected]:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        message = f"expected one output {expected} for {num_classes} classes, got {shapes}"
        raise EarlyExitError(f"{message}; {CHECK_CLASSES}")
    return outputs[0][0].float()


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> ImageDetections:
    """Run non-maximum suppression class by class and keep the `MAX_DETECTIONS` best boxes."""
    order = batched_nms(boxes, scores, labels, iou)[:MAX_DETECTIONS]
    return {"boxes": boxes[order], "scores": scores[order], "labels": labels[order]}


def squeeze(photo: Tensor, size: Size, mode: str = "bilinear") -> tuple[Tensor, tuple[float, float]]:
    """Return the photo in [0, 1], resized to the input size without keeping its aspect ratio, as in torchvision's
    SSD."""
    scales = size[1] / photo.shape[2], size[0] / photo.shape[1]
    return F.interpolate(photo[None], size, mode=mode, align_corners=False)[0], scales


def decode_boxes(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """Check outputs that are detections already: boxes [N, 4] xyxy, scores [N] and integer labels [N] in 1..K, in any
    order. Each may have a batch dimension of 1."""
    floats = sorted((output for output in outputs if output.is_floating_point()), key=Tensor.dim)
    integers = [output for output in outputs if not output.is_floating_point()]
    shapes = ", ".join(f"{output.dtype} {list(output.shape)}" for output in outputs)
    message = f"expected boxes [N, 4], scores [N] and integer labels [N], got {shapes}; check the format"
    if len(floats) != 2 or len(integers) != 1:
        raise EarlyExitError(message)
    scores, boxes, labels = *floats, integers[0].flatten().long()
    if boxes.dim() == scores.dim() or boxes.shape[-1] != 4 or not scores.numel() == len(labels) == boxes.numel() // 4:
        raise EarlyExitError(message)
    invalid = labels[(labels < 1) | (labels > num_classes)]
    if len(invalid):
        message = f"found label {int(invalid[0])}, expected 1 to {num_classes}, the number of class names"
        raise EarlyExitError(f"{message}; {CHECK_CLASSES}")
    return {"boxes": boxes.reshape(-1, 4).float(), "scores": scores.flatten().float(), "labels": labels}


def squeeze_nanodet(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """Return NanoDet-Plus's input: resized as by `squeeze`, BGR, normalised with ImageNet's mean and deviation."""
    x, scales = squeeze(photo, size)
    return ((x - IMAGENET_MEAN) / IMAGENET_STD).flip(0), scales


def squeeze_picodet(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """Return PicoDet's input: resized as by `squeeze` with cubic interpolation, RGB, normalised as for ImageNet."""
    x, scales = squeeze(photo, size, "bicubic")
    return (x.clamp(0, 1) - IMAGENET_MEAN) / IMAGENET_STD, scales


def boxes_from_distances(points: Tensor, strides: Tensor, logits: Tensor) -> Tensor:
    """Return boxes [N, 4] xyxy in pixels around ``points`` [N, 2] in strides (Li et al. 2020, generalised focal loss).

    ``logits`` [N, 4 * 8] are logits of the distances 0, 1, ..., 7 strides, for the left, upper, right and lower side.
    The predicted distance of a side is the mean of this distribution.
    """
    probabilities = logits.reshape(-1, 4, DISTANCE_BINS).softmax(-1)
    left_top, right_bottom = (probabilities @ torch.arange(float(DISTANCE_BINS))).split(2, 1)
    return torch.cat([points - left_top, points + right_bottom], 1) * strides


def suppress_all_classes(boxes: Tensor, scores: Tensor) -> ImageDetections:
    """Run non-maximum suppression class by class. Each of the ``boxes`` [N, 4] has a score in all K classes, [N, K].

    Raises:
        EarlyExitError: a score is outside [0, 1].
    """
    if not ((scores > -0.01) & (scores < 1.01)).all():
        low, high = float(scores.min()), float(scores.max())
        raise EarlyExitError(f"scores from {low:.4g} to {high:.4g}, expected 0 to 1; export it with its sigmoid")
    row, column = (scores >= SCORE_THRESHOLD).nonzero(as_tuple=True)
    scores, best = scores[row, column].topk(min(len(row), MAX_CANDIDATES))
    return _suppress(boxes[row[best]], scores, column[best] + 1, DISTANCE_NMS_IOU)


def decode_nanodet(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """Decode NanoDet-Plus's output [1, cells, K + 4 * 8]: scores and logits of the distances from the cell's upper left
    corner, see `boxes_from_distances`."""
    cells, strides = grid(size, DISTANCE_STRIDES)
    rows = _only_output(outputs, [1, len(cells), num_classes + 4 * DISTANCE_BINS], num_classes)
    return suppress_all_classes(boxes_from_distances(cells, strides, rows[:, num_classes:]), rows[:, :num_classes])


def decode_picodet(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """Decode PicoDet's outputs (Yu et al. 2021), which depend on how much post-processing the file contains:

    - none: scores [1, n, K] of each grid, then for each grid the logits [1, n, 4 * 8] of the distances from the cell's
      centre, see `boxes_from_distances`;
    - all but NMS: boxes [1, cells, 4] xyxy and scores [1, K, cells];
    - all: rows [n, 6] of class (from 0), score and box, and optionally a second output, their number. A row with a
      negative class is no detection.
    """
    cells, strides = grid(size, DISTANCE_STRIDES)
    counts = [int((strides == stride).sum()) for stride in DISTANCE_STRIDES]
    shapes = [list(output.shape) for output in outputs]
    if shapes == [[1, count, width] for width in (num_classes, 4 * DISTANCE_BINS) for count in counts]:
        scores, logits = (torch.cat(part, 1)[0].float() for part in (outputs[:4], outputs[4:]))
        return suppress_all_classes(boxes_from_distances(cells + 0.5, strides, logits), scores)
    if shapes == [[1, len(cells), 4], [1, num_classes, len(cells)]]:
        return suppress_all_classes(outputs[0][0].float(), outputs[1][0].float().T)
    if len(shapes) in (1, 2) and len(shapes[0]) == 2 and shapes[0][1] == 6:
        rows = outputs[0][outputs[0][:, 0] >= 0].float()
        return decode_boxes([rows[:, 2:], rows[:, 1], rows[:, 0].long() + 1], size, num_classes)
    raise EarlyExitError(
        f"expected [1, n, {num_classes}], then [1, n, {4 * DISTANCE_BINS}] for n = {str(counts)[1:-1]}, or"
        f" [1, {len(cells)}, 4], [1, {num_classes}, {len(cells)}], or [n, 6]; got {len(shapes)}: {shown(shapes, 40)};"
        f" {CHECK_CLASSES}"
    )


COCO_80 = tuple(name for name in COCO_CLASSES if name != "N/A")
FORMATS: dict[str, OnnxFormat] = {
    "yolox": OnnxFormat(COCO_80, letterbox, decode_yolox),
    "boxes": OnnxFormat(COCO_CLASSES, squeeze, decode_boxes),
    "nanodet": OnnxFormat(COCO_80, squeeze_nanodet, decode_nanodet),
    # the file divides the boxes by scale_factor; with ones they stay in pixels of the input
    "picodet": OnnxFormat(COCO_80, squeeze_picodet, decode_picodet, {"scale_factor": (1.0, 1.0)}),
}
"""Name of a format in EVAL.RIVALS.ONNX -> the format."""


# Multiply-accumulates of an ONNX file. As in `count_mmacs`, convolutions and linear layers are counted.


def count_onnx_mmacs(content: bytes, name: str = "the ONNX file") -> float | None:
    """Return the MMACs of one image; None if a shape that is needed cannot be inferred.

    A MatMul is counted if one of its factors is constant. The bodies of loops and conditions are not counted. ``name``
    is the file's name in a warning.
    """
    onnx = import_package("onnx")
    try:
        return _count_graph(onnx, onnx.load_from_string(content))
    except Exception as error:  # shape inference may raise any exception on an invalid graph
        logger.warning("%s: its multiply-accumulates cannot be counted (%s)", name, one_line(str(error)))
        return None


def _count_graph(onnx: ModuleType, model: Any) -> float | None:
    for value in model.graph.input:
        for batch in value.type.tensor_type.shape.dim[:1]:
            batch.dim_value = batch.dim_value or 1  # a dynamic batch size
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*graph.output, *graph.value_info, *graph.input)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}  # names of values that do not depend on the inputs
    counts = []
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and constants.issuperset(filter(None, node.input))):
            constants.update(node.output)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") or (
            node.op_type == "MatMul" and not constants.isdisjoint(node.input)
        ):
            operands = [shapes.get(name, (0,)) for name in (*node.input[:2], node.output[0])]
            if not all(map(all, operands)):  # 0 is an unknown length
                return None
            counts.append(_count_node(node, *operands))
    return sum(counts) / 1e6


def _count_node(node: Any, data: Shape, weights: Shape, output: Shape) -> int:
    if node.op_type == "ConvTranspose":  # weights [in, out / groups, *kernel]; one kernel per input value
        return math.prod(data) * math.prod(weights[1:])
    if node.op_type == "Conv":  # weights [out, in / groups, *kernel]; one kernel per output value
        return math.prod(output) * math.prod(weights[1:])
    transposed = node.op_type == "Gemm" and any(part.name == "transA" and part.i for part in node.attribute)
    return math.prod(output) * data[0 if transposed else -1]


def read_onnx(path: str | os.PathLike[str], constants: Mapping[str, tuple[float, ...]]) -> bytes:
    """Return the content of an ONNX file with all weights inside. Raise an EarlyExitError if it cannot be read.

    ``constants`` are the values [1, n] of further inputs, which become constants. The package onnx refuses external
    weights outside the file's folder, because a file of somebody else may name any file of this machine.
    """
    onnx = import_package("onnx")
    try:
        model = onnx.load_model_from_string(read_bytes(path))
        onnx.load_external_data_for_model(model, os.path.dirname(os.path.abspath(path)))
        for name in constants.keys() & {value.name for value in model.graph.input}:
            dims = (1, len(constants[name]))
            model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, dims, constants[name]))
        return model.SerializeToString()
    except OSError as error:
        raise EarlyExitError(f"{path}: cannot be read as an ONNX file ({error.strerror or error})") from None
    except Exception as error:  # a damaged or foreign file may raise any exception
        raise EarlyExitError(f"{path}: ONNX Runtime cannot load it ({error})") from None


class OnnxDetector(nn.Module):
    """A detector from an ONNX file, with torchvision's interface. It runs on the CPU, photo by photo.

    ``file_format`` is a key of `FORMATS`. An EarlyExitError is raised if the file cannot be read or run, or if its
    input is not one photo.

    Attributes:
        classes: names of the labels 1..K, from ``classes`` in the file's metadata (separated by commas), otherwise from
            the format.
        network: the graph without preparation and decoding.
    """

    def __init__(self, path: str | os.PathLike[str], file_format: str, threads: int = 1) -> None:
        super().__init__()
        if file_format not in FORMATS:
            raise EarlyExitError(f"format {shown(file_format)}: expected one of {', '.join(FORMATS)}")
        self.path, self.format, self._format_name = path, FORMATS[file_format], file_format
        self.content = read_onnx(path, self.format.constants)
        self.network = OnnxNetwork(self.content, threads, str(path))
        shape = self.network.input_shape
        if shape[:-2] not in ((3,), (1, 3)) or max(shape) > LARGEST_SIDE:
            limit = f"with sides of at most {LARGEST_SIDE} pixels, got {list(shape)}; export it for one photo"
            raise EarlyExitError(f"{path}: expected an input [1, 3, height, width] {limit}")
        listed = self.network.metadata.get("classes", "")
        self.classes = tuple(name.strip() for name in listed.split(",")) if listed else self.format.classes

    def forward(self, photos: list[Tensor]) -> list[ImageDetections]:
        """Return one dict per photo [3, H, W], RGB in [0, 1]: ``boxes`` [N, 4] xyxy in pixels of the photo, ``scores``
        and ``labels`` [N]."""
        return list(map(self._detect, photos))

    def _detect(self, photo: Tensor) -> ImageDetections:
        size = self.network.input_shape[-2:]
        x, scales = self.format.prepare(photo.cpu(), size)
        try:
            outputs = self.network(x.reshape(self.network.input_shape))
            detections = self.format.decode(outputs, size, len(self.classes))
        except EarlyExitError as error:
            raise EarlyExitError(f"{self.path}: format {self._format_name}: {error}") from None
        if not all(detections[key].isfinite().all() for key in ("boxes", "scores")):
            raise EarlyExitError(f"{self.path}: its boxes or scores are not finite; export it again")
        boxes = detections["boxes"] / torch.tensor([*scales, *scales])
        return detections | {"boxes": clip_boxes_to_image(boxes, photo.shape[-2:])}

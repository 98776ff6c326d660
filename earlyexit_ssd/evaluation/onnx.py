"""Detectors from ONNX files: what each format takes and gives (an entry of `FORMATS`), and their cost."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from earlyexit_ssd.config.check import LARGEST_SIDE
from earlyexit_ssd.errors import EarlyExitError, import_package, one_line, shown
from earlyexit_ssd.evaluation.cost import OnnxNetwork, first_line
from earlyexit_ssd.evaluation.outputs import ImageDetections
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES
from earlyexit_ssd.plain import read_bytes

logger = logging.getLogger(__name__)


Size = tuple[int, int]  # height and width, pixels
Shape = tuple[int, ...]

YOLOX_STRIDES, YOLOX_PADDING = (8, 16, 32), 114.0
LEAST_SCORE, NMS_IOU, MOST_DETECTIONS = 0.001, 0.65, 300

DISTANCE_STRIDES = (8, 16, 32, 64)
DISTANCE_BINS = 8  # distances from a point to its box's sides are 0 to 7 strides
DISTANCE_NMS_IOU, MOST_CANDIDATES = 0.6, 1000
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@dataclass(frozen=True)
class OnnxFormat:
    """One way of exporting a detector.

    ``prepare`` turns a photo [3, H, W] RGB in [0, 1] and the input size into the input [3, height, width] and the
    scales (x, y) from photo to input. ``decode`` turns outputs, input size and K into detections in the input's pixels.
    """

    classes: tuple[str, ...]  # names of the labels 1..K, unless the file names its own
    prepare: Callable[[Tensor, Size], tuple[Tensor, tuple[float, float]]]
    decode: Callable[[Sequence[Tensor], Size, int], ImageDetections]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # inputs besides the photo, [1, n]


def letterbox(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """YOLOX's input: BGR in [0, 255], the photo's shape kept, in the upper left corner on grey."""
    scale = min(size[0] / photo.shape[1], size[1] / photo.shape[2])
    height, width = (max(int(side * scale), 1) for side in photo.shape[1:])
    pixels = F.interpolate(photo[None] * 255, (height, width), mode="bilinear")[0]
    padded = F.pad(pixels, (0, size[1] - width, 0, size[0] - height), value=YOLOX_PADDING)
    return padded.flip(0), (scale, scale)


def grid(size: Size, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Column and row [N, 2] and stride [N, 1] of each cell: the grids fine to coarse, each row by row."""
    cells, lengths = [], []
    for stride in strides:
        y, x = torch.meshgrid(*(torch.arange(math.ceil(side / stride)) for side in size), indexing="ij")
        cells.append(torch.stack([x, y], -1).reshape(-1, 2).float())
        lengths.append(torch.full((y.numel(), 1), stride))
    return torch.cat(cells), torch.cat(lengths)


def decode_yolox(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """YOLOX's raw output [1, cells, 5 + K] (Ge et al. 2021): box, objectness and class probabilities of each cell.

    A box is its centre, as an offset from the cell's corner, and the logarithms of its sides, all in strides. The score
    is objectness times the best class's probability; non-maximum suppression goes class by class.
    """
    cells, strides = grid(size, YOLOX_STRIDES)
    _require_one(outputs, [1, len(cells), 5 + num_classes], num_classes)
    rows = outputs[0][0].float()
    probability, best = rows[:, 5:].max(1)
    scores = rows[:, 4] * probability
    keep = scores >= LEAST_SCORE
    centres = (rows[keep, :2] + cells[keep]) * strides[keep]
    halves = rows[keep, 2:4].exp() * strides[keep] / 2
    boxes, scores, labels = torch.cat([centres - halves, centres + halves], 1), scores[keep], best[keep] + 1
    order = batched_nms(boxes, scores, labels, NMS_IOU)[:MOST_DETECTIONS]
    return {"boxes": boxes[order], "scores": scores[order], "labels": labels[order]}


def _require_one(outputs: Sequence[Tensor], expected: list[int], num_classes: int) -> None:
    if [list(output.shape) for output in outputs] != [expected]:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise EarlyExitError(f"expected one output {expected} for {num_classes} classes, got {shapes}")


def squeeze(photo: Tensor, size: Size, mode: str = "bilinear") -> tuple[Tensor, tuple[float, float]]:
    """The photo in [0, 1], squeezed to the input's shape as torchvision's SSD does it."""
    scales = size[1] / photo.shape[2], size[0] / photo.shape[1]
    return F.interpolate(photo[None], size, mode=mode, align_corners=False)[0], scales


def decode_boxes(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """Finished detections in any order: boxes [N, 4] xyxy, scores [N], whole-numbered labels [N] in 1..K; a batch of
    one is fine."""
    floats = sorted((one for one in outputs if one.is_floating_point()), key=Tensor.dim)
    whole = [one for one in outputs if not one.is_floating_point()]
    fits = len(floats) == 2 and len(whole) == 1 and floats[1].shape[-1] == 4 and floats[1].dim() > floats[0].dim()
    if not fits or not floats[0].numel() == whole[0].numel() == floats[1].numel() // 4:
        shapes = ", ".join(f"{one.dtype} {list(one.shape)}" for one in outputs)
        raise EarlyExitError(f"expected boxes [N, 4], scores [N] and integer labels [N], got {shapes}")
    labels = whole[0].flatten().long()
    strange = labels[(labels < 1) | (labels > num_classes)]
    if len(strange):
        raise EarlyExitError(f"label {int(strange[0])}, but {num_classes} names of classes")
    return {"boxes": floats[1].reshape(-1, 4).float(), "scores": floats[0].flatten().float(), "labels": labels}


def squeeze_nanodet(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """NanoDet-Plus's input: BGR, squeezed, with ImageNet's mean and deviation."""
    x, scales = squeeze(photo, size)
    return ((x - IMAGENET_MEAN) / IMAGENET_STD).flip(0), scales


def squeeze_picodet(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """PicoDet's input: RGB, squeezed with cubic interpolation, with ImageNet's mean and deviation."""
    x, scales = squeeze(photo, size, "bicubic")
    return (x.clamp(0, 1) - IMAGENET_MEAN) / IMAGENET_STD, scales


def boxes_from_distances(points: Tensor, strides: Tensor, logits: Tensor) -> Tensor:
    """Boxes [N, 4] of points [N, 2] in strides (Li et al. 2020, generalised focal loss).

    The distances to the left, upper, right and lower side are expected values, in strides; ``logits`` [N, 4 * 8] are of
    the chances of 0 to 7.
    """
    chances = logits.reshape(-1, 4, DISTANCE_BINS).softmax(-1)
    left_top, right_bottom = (chances @ torch.arange(float(DISTANCE_BINS))).split(2, 1)
    return torch.cat([points - left_top, points + right_bottom], 1) * strides


def suppress(boxes: Tensor, scores: Tensor) -> ImageDetections:
    """Non-maximum suppression, class by class; each of the boxes [N, 4] counts in every class with a score [N, K]."""
    if not ((scores > -0.01) & (scores < 1.01)).all():
        low, high = float(scores.min()), float(scores.max())
        raise EarlyExitError(f"scores from {low:.4g} to {high:.4g}, expected 0 to 1; export it with its sigmoid")
    row, column = (scores >= LEAST_SCORE).nonzero(as_tuple=True)
    values, best = scores[row, column].topk(min(len(row), MOST_CANDIDATES))
    boxes, labels = boxes[row[best]], column[best] + 1
    order = batched_nms(boxes, values, labels, DISTANCE_NMS_IOU)[:MOST_DETECTIONS]
    return {"boxes": boxes[order], "scores": values[order], "labels": labels[order]}


def decode_nanodet(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """NanoDet-Plus's output [1, cells, K + 4 * 8]: scores and distances, see `boxes_from_distances`; a cell's point is
    its upper left corner."""
    cells, strides = grid(size, DISTANCE_STRIDES)
    _require_one(outputs, [1, len(cells), num_classes + 4 * DISTANCE_BINS], num_classes)
    rows = outputs[0][0].float()
    return suppress(boxes_from_distances(cells, strides, rows[:, num_classes:]), rows[:, :num_classes])


def decode_picodet(outputs: Sequence[Tensor], size: Size, num_classes: int) -> ImageDetections:
    """PicoDet's outputs (Yu et al. 2021), whatever of its post-processing the file has.

    None: scores [1, n, K] of each grid, then distances [1, n, 4 * 8], see `boxes_from_distances`; a cell's point is its
    centre. All but suppression: boxes [1, cells, 4] xyxy and scores [1, K, cells]. All: rows [n, 6] of class from 0,
    score and box, and their number; a negative class is no detection.
    """
    cells, strides = grid(size, DISTANCE_STRIDES)
    counts = [int((strides == stride).sum()) for stride in DISTANCE_STRIDES]
    shapes = [list(output.shape) for output in outputs]
    if shapes == [[1, count, width] for width in (num_classes, 4 * DISTANCE_BINS) for count in counts]:
        scores, logits = (torch.cat(part, 1)[0].float() for part in (outputs[:4], outputs[4:]))
        return suppress(boxes_from_distances(cells + 0.5, strides, logits), scores)
    if shapes == [[1, len(cells), 4], [1, num_classes, len(cells)]]:
        return suppress(outputs[0][0].float(), outputs[1][0].float().T)
    if len(shapes) in (1, 2) and len(shapes[0]) == 2 and shapes[0][1] == 6:
        rows = outputs[0][outputs[0][:, 0] >= 0].float()
        return decode_boxes([rows[:, 2:], rows[:, 1], rows[:, 0].long() + 1], size, num_classes)
    raise EarlyExitError(
        f"expected [1, n, {num_classes}], then [1, n, {4 * DISTANCE_BINS}] for n = {str(counts)[1:-1]}, or"
        f" [1, {len(cells)}, 4], [1, {num_classes}, {len(cells)}], or [n, 6]; got {len(shapes)}: {shown(shapes, 80)}"
    )


COCO_80 = tuple(name for name in COCO_CLASSES if name != "N/A")
FORMATS: dict[str, OnnxFormat] = {
    "yolox": OnnxFormat(COCO_80, letterbox, decode_yolox),
    "boxes": OnnxFormat(COCO_CLASSES, squeeze, decode_boxes),
    "nanodet": OnnxFormat(COCO_80, squeeze_nanodet, decode_nanodet),
    # scale_factor divides the boxes; with ones they stay in the input's pixels
    "picodet": OnnxFormat(COCO_80, squeeze_picodet, decode_picodet, {"scale_factor": (1.0, 1.0)}),
}
"""Names in EVAL.RIVALS.ONNX -> how to use such a file."""


# Multiply-accumulates of an ONNX file, in the convention of `count_mmacs`: convolutions and linear layers.


def count_onnx_mmacs(content: bytes) -> float | None:
    """Millions of multiply-accumulates of one image; None where the graph's shapes cannot be inferred.

    A MatMul counts if it has constant weights. Bodies of loops and conditions are not looked into.
    """
    onnx = import_package("onnx")
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
    shapes: dict[str, Shape] = {}
    for value in (*graph.output, *graph.value_info, *graph.input):
        lengths = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if all(lengths):
            shapes[value.name] = lengths
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {tensor.name for tensor in graph.initializer}  # what no input changes
    counts = []
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and constants.issuperset(filter(None, node.input))):
            constants.update(node.output)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") or (
            node.op_type == "MatMul" and not constants.isdisjoint(node.input)
        ):
            counts.append(_count(node, *(shapes.get(name) for name in (*node.input[:2], node.output[0]))))
    return None if None in counts else sum(counts) / 1e6


def _count(node: Any, data: Shape | None, weights: Shape | None, output: Shape | None) -> int | None:
    if data is None or weights is None or output is None:
        return None
    if node.op_type == "ConvTranspose":  # each input value meets its kernel: [in, out / groups, *kernel]
        return math.prod(data) * math.prod(weights[1:])
    if node.op_type == "Conv":  # each output value has its kernel: [out, in / groups, *kernel]
        return math.prod(output) * math.prod(weights[1:])
    transposed = node.op_type == "Gemm" and any(one.name == "transA" and one.i for one in node.attribute)
    return math.prod(output) * data[0 if transposed else -1]


def read_onnx(path: str | os.PathLike[str], constants: Mapping[str, tuple[float, ...]]) -> bytes:
    """The content of an ONNX file with its weights inside, and with values [1, n] for those of its inputs that
    ``constants`` names. Weights beside the file must lie in its folder: a foreign file may name any file.

    Raises:
        EarlyExitError: the file cannot be read, is damaged, or its weights are elsewhere.
    """
    onnx, folder = import_package("onnx"), Path(path).parent
    try:
        model = onnx.load_model_from_string(read_bytes(path))
        for tensor in _tensors(model, onnx.TensorProto):
            if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
                locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
                if len(locations) != 1 or not _lies_in(locations[0], folder):
                    told = f"{path}: its tensor {shown(tensor.name)} has data in {shown(locations)}, expected a file in"
                    raise EarlyExitError(f"{told} its own folder; export it with the weights inside")
                part = {entry.key: entry.value for entry in tensor.external_data}
                with (folder / locations[0]).open("rb") as file:
                    file.seek(int(part.get("offset", 0)))
                    tensor.raw_data = file.read(int(part.get("length", -1)))
                tensor.data_location = tensor.DEFAULT
                del tensor.external_data[:]
        for name in constants.keys() & {value.name for value in model.graph.input}:
            dims = (1, len(constants[name]))
            model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, dims, constants[name]))
        return model.SerializeToString()
    except EarlyExitError:
        raise
    except OSError as error:
        raise EarlyExitError(f"{path}: cannot be read as an ONNX file ({error.strerror or error})") from None
    except Exception as error:  # a damaged or foreign file may raise any exception
        raise EarlyExitError(f"{path}: ONNX Runtime cannot load it ({first_line(error)})") from None


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """Every tensor (protobuf class ``kind``) in a message: weights and constants, also in functions and loop bodies."""
    if isinstance(message, kind):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in value if isinstance(value, Sequence) or hasattr(value, "add") else (value,):
                yield from _tensors(part, kind)


def _lies_in(location: str | bytes, folder: Path) -> bool:
    """Whether ``location`` is a file in ``folder`` after following links; Windows paths and bytes are refused."""
    if not isinstance(location, str) or not location or set(location) & set("\0\\:") or os.path.isabs(location):
        return False
    path = (folder / location).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()


class OnnxDetector(nn.Module):
    """``detector(photos)`` is one dict per photo: ``boxes`` [n, 4] xyxy in its pixels, ``scores``, ``labels`` 1..K.

    ``classes`` are the K names in the file's metadata under ``classes``, separated by commas, or those of the format, a
    name of `FORMATS`. ``network`` is the graph alone; the file is for one photo.

    Raises:
        EarlyExitError: the file cannot be read or run.
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
            limits = f"a batch is one photo, and sides are {LARGEST_SIDE} pixels at most"
            raise EarlyExitError(f"{path}: expected an input [1, 3, height, width], it is {list(shape)}; {limits}")
        named = self.network.metadata.get("classes", "")
        self.classes = tuple(name.strip() for name in named.split(",")) if named else self.format.classes

    def forward(self, photos: list[Tensor]) -> list[ImageDetections]:
        """Detections in photos [3, H, W] RGB in [0, 1]."""
        return list(map(self._detect, photos))

    def _detect(self, photo: Tensor) -> ImageDetections:
        size = self.network.input_shape[-2:]
        x, scales = self.format.prepare(photo.cpu(), size)
        try:
            found = self.format.decode(self.network(x.reshape(self.network.input_shape)), size, len(self.classes))
        except EarlyExitError as error:
            reason = f"format {self._format_name}: {error}"
            raise EarlyExitError(f"{self.path}: {reason}; its metadata may name its classes") from None
        if not all(found[key].isfinite().all() for key in ("boxes", "scores")):
            raise EarlyExitError(f"{self.path}: its boxes or scores are not finite; export it anew")
        boxes = found["boxes"] / torch.tensor([*scales, *scales])
        return found | {"boxes": clip_boxes_to_image(boxes, photo.shape[-2:])}

"""What exported detectors take and give: photo to input, outputs to boxes; one entry of `FORMATS` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.retrofit import COCO_CLASSES

Size = tuple[int, int]
Found = dict[str, Tensor]
"""``boxes`` [N, 4] xyxy, ``scores`` [N] and ``labels`` [N] of one photo."""

YOLOX_STRIDES = (8, 16, 32)
YOLOX_PADDING = 114.0
LEAST_SCORE, NMS_IOU, MOST_DETECTIONS = 0.001, 0.65, 300


@dataclass(frozen=True)
class OnnxFormat:
    """One way of exporting a detector.

    classes: names of the labels 1..K, unless the file names its own.
    prepare: photo [3, H, W] RGB in [0, 1] and input size (height, width) to the input [3, height, width] and the
        scales (x, y) from photo to input.
    decode: outputs, input size and K to what was found, boxes in the input's pixels.
    """

    classes: tuple[str, ...]
    prepare: Callable[[Tensor, Size], tuple[Tensor, tuple[float, float]]]
    decode: Callable[[Sequence[Tensor], Size, int], Found]


def letterbox(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """YOLOX's input: BGR in [0, 255], the photo's shape kept, in the upper left corner on grey."""
    height, width = size
    scale = min(height / photo.shape[1], width / photo.shape[2])
    inner = (max(int(photo.shape[1] * scale), 1), max(int(photo.shape[2] * scale), 1))
    pixels = F.interpolate(photo[None] * 255, inner, mode="bilinear")[0]
    padded = F.pad(pixels, (0, width - inner[1], 0, height - inner[0]), value=YOLOX_PADDING)
    return padded.flip(0), (scale, scale)


def decode_yolox(outputs: Sequence[Tensor], size: Size, num_classes: int) -> Found:
    """YOLOX's raw output [1, cells, 5 + K] (Ge et al. 2021): box, objectness and class probabilities of each cell.

    A box is its centre, as an offset from the cell's corner, and the logarithms of its sides, all in strides. Each cell
    is of its best class; the score is objectness times that class's probability; non-maximum suppression goes class by
    class.
    """
    cells, strides = _yolox_cells(size)
    expected = [1, len(cells), 5 + num_classes]
    if [list(output.shape) for output in outputs] != [expected]:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise EarlyExitError(f"format yolox: expected one output {expected} for {num_classes} classes, got {shapes}")
    rows = outputs[0][0].float()
    probability, best = rows[:, 5:].max(1)
    scores = rows[:, 4] * probability
    keep = scores >= LEAST_SCORE
    centres = (rows[keep, :2] + cells[keep]) * strides[keep]
    halves = rows[keep, 2:4].exp() * strides[keep] / 2
    boxes, scores, labels = torch.cat([centres - halves, centres + halves], 1), scores[keep], best[keep] + 1
    order = batched_nms(boxes, scores, labels, NMS_IOU)[:MOST_DETECTIONS]
    return {"boxes": boxes[order], "scores": scores[order], "labels": labels[order]}


def _yolox_cells(size: Size) -> tuple[Tensor, Tensor]:
    """Corners [cells, 2] (x, y in cells) and strides [cells, 1] of all grids, fine to coarse, row by row."""
    corners, strides = [], []
    for stride in YOLOX_STRIDES:
        y, x = torch.meshgrid(torch.arange(size[0] // stride), torch.arange(size[1] // stride), indexing="ij")
        corners.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((y.numel(), 1), stride))
    return torch.cat(corners).float(), torch.cat(strides).float()


def squeeze(photo: Tensor, size: Size) -> tuple[Tensor, tuple[float, float]]:
    """The photo in [0, 1], squeezed to the input's shape as torchvision's SSD does it."""
    scales = size[1] / photo.shape[2], size[0] / photo.shape[1]
    return F.interpolate(photo[None], size, mode="bilinear", align_corners=False)[0], scales


def decode_boxes(outputs: Sequence[Tensor], size: Size, num_classes: int) -> Found:
    """Finished detections in any order: boxes [N, 4] xyxy, scores [N], whole-numbered labels [N] in 1..K; a batch of
    one is fine."""
    floats = sorted((one for one in outputs if one.is_floating_point()), key=Tensor.dim)
    whole = [one for one in outputs if not one.is_floating_point()]
    fits = len(floats) == 2 and len(whole) == 1 and floats[1].shape[-1] == 4 and floats[1].dim() > floats[0].dim()
    if not fits or not floats[0].numel() == whole[0].numel() == floats[1].numel() // 4:
        shapes = ", ".join(f"{one.dtype} {list(one.shape)}" for one in outputs)
        raise EarlyExitError(f"format boxes: expected boxes [N, 4], scores [N] and integer labels [N], got {shapes}")
    labels = whole[0].flatten().long()
    strange = labels[(labels < 1) | (labels > num_classes)]
    if len(strange):
        raise EarlyExitError(f"format boxes: label {int(strange[0])}, but {num_classes} names of classes")
    return {"boxes": floats[1].reshape(-1, 4).float(), "scores": floats[0].flatten().float(), "labels": labels}


FORMATS: dict[str, OnnxFormat] = {
    "yolox": OnnxFormat(tuple(name for name in COCO_CLASSES if name != "N/A"), letterbox, decode_yolox),
    "boxes": OnnxFormat(COCO_CLASSES, squeeze, decode_boxes),
}
"""Names in EVAL.RIVALS.ONNX -> how to use such a file."""

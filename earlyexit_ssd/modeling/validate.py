"""Checks of the model's inputs and parts. Errors name the image or target, the value and what was expected."""

from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from earlyexit_ssd.errors import EarlyExitError, suggest
from earlyexit_ssd.modeling.heads import num_outputs
from earlyexit_ssd.modeling.losses import LossSettings

SLACK = 0.5  # distance from [0, 1] that pixel values may have, because of augmentation and interpolation

LEAST_SCORE = 0.001  # score threshold of a class without an entry in ``score_thresh``; torchvision's for SSDLite

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_images(images: Sequence[Tensor]) -> None:
    """Check that images are float tensors [3, H, W] in [0, 1]. Values are checked only on the CPU, since a GPU would
    have to synchronise."""
    if not len(images):
        raise EarlyExitError("no image: expected a list of at least one float tensor [3, H, W]")
    for index, image in enumerate(images):
        fits = isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3 and image.shape[0] == 3
        if not fits or not image.numel():
            actual = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise EarlyExitError(f"image {index}: expected a float tensor [3, H, W] in [0, 1], got {actual}")
        if image.device.type == "cpu" and not is_traced():
            low, high = (float(value) for value in image.aminmax())
            if not (low >= -SLACK and high <= 1 + SLACK):
                fix = "divide pixels by 255 and do not normalise them, since the model does it"
                raise EarlyExitError(f"image {index}: values from {low:g} to {high:g}, expected [0, 1]; {fix}")


def check_targets(
    targets: Sequence[dict[str, Tensor]] | None, count: int, classes: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Return copies of the targets of ``count`` images, with fp32 boxes and int64 labels; other keys stay.

    ``boxes`` [n, 4] are xyxy with positive width and height, of any real number type. ``labels`` [n] are integers of
    any type in 1..K. Raises an EarlyExitError for other targets.
    """
    if targets is None or len(targets) != count:
        present = 0 if targets is None else len(targets)
        raise EarlyExitError(f"train mode needs one target per image: {count} images, {present} targets")
    return [_check_target(target, index, classes) for index, target in enumerate(targets)]


def _check_target(target: dict[str, Tensor], index: int, classes: Sequence[str]) -> dict[str, Tensor]:
    boxes, labels = (_tensor_of(target, key, index) for key in ("boxes", "labels"))
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.dim() != 1 or len(boxes) != len(labels):
        shapes = f"{list(boxes.shape)} and {list(labels.shape)}"
        raise EarlyExitError(f"target {index}: expected boxes [n, 4] and labels [n], got {shapes}")
    if not (boxes.is_floating_point() or boxes.dtype in INTEGERS):
        raise EarlyExitError(f"target {index}: boxes are {boxes.dtype}, expected numbers such as torch.float32")
    if labels.dtype not in INTEGERS and len(labels):  # no labels: torch.zeros(0), which is float, is accepted
        raise EarlyExitError(f"target {index}: labels are {labels.dtype}, expected whole numbers such as torch.int64")
    if isinstance(boxes, BoundingBoxes) and boxes.format is not BoundingBoxFormat.XYXY:
        fix = "convert them with torchvision.transforms.v2.ConvertBoundingBoxFormat"
        raise EarlyExitError(f"target {index}: boxes are {boxes.format.value}, expected XYXY; {fix}")
    boxes, labels = boxes.to(torch.float32), labels.to(torch.int64)
    bad = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & torch.isfinite(boxes).all(1))
    if bad.any():
        first = int(bad.nonzero()[0])
        box = f"target {index}, box {first}: {boxes[first].tolist()}"
        raise EarlyExitError(f"{box}, expected xyxy with positive width and height")
    if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= len(classes)):
        found = f"labels {int(labels.min())}..{int(labels.max())}"
        raise EarlyExitError(f"target {index}: {found}, expected 1..{len(classes)} (0 is background)")
    return {**target, "boxes": boxes, "labels": labels}


def _tensor_of(target: object, key: str, index: int) -> Tensor:
    expected = f"target {index}: expected a dict with the tensors boxes and labels"
    if not isinstance(target, Mapping) or key not in target:
        raise EarlyExitError(f"{expected}, but {key} is missing")
    value = target[key]
    if not isinstance(value, Tensor):
        actual = f"{type(value).__name__}{f' of {value.dtype}' if hasattr(value, 'dtype') else ''}"
        raise EarlyExitError(f"{expected}, but {key} has the type {actual}; convert it with torch.as_tensor")
    return value


def score_thresh(value: object, classes: Sequence[str]) -> float | dict[str, float]:
    """Return the checked ``score_thresh``, a number or a dict. The dict's keys are in the order of ``classes``."""
    expected = "expected a number, or a dict of class names to numbers"
    if not isinstance(value, Mapping):
        if isinstance(value, bool) or not isinstance(value, Real) or value != value:
            raise EarlyExitError(f"score_thresh is {value!r:.60}, {expected}")
        return value
    if not value:
        raise EarlyExitError(f"score_thresh is an empty dict, {expected}")
    for name, score in value.items():
        if name not in classes:
            hint = suggest(str(name), classes) or f"; the classes are {', '.join(classes)[:100]}"
            raise EarlyExitError(f"score_thresh has {name!r:.60}, which is no class of the model{hint}")
        if isinstance(score, bool) or not isinstance(score, Real) or not 0 <= score <= 1:
            raise EarlyExitError(f"score_thresh of {name!r:.60} is {score!r:.40}, expected a number in [0, 1]")
    return {name: float(value[name]) for name in dict.fromkeys(classes) if name in value}


def check_head(head: nn.Module, num_classes: int) -> None:
    """Check that the full path's head, which may have been replaced, has the model's number of classes."""
    classification = getattr(head, "classification_head", None)
    outputs = num_outputs(classification) if hasattr(classification, "num_columns") else num_classes
    if outputs != num_classes:
        expected = f"expected {num_classes} (background and the model's classes)"
        fix = "build a new model, EarlyExitSSDLite(detector, classes=...), so that the exits fit too"
        raise EarlyExitError(f"the head has {outputs} outputs, {expected}; {fix}")


def is_traced() -> bool:
    """Return whether the model is being traced for TorchScript, ONNX or torch.export. False for torch.compile."""
    if hasattr(torch.compiler, "is_exporting"):
        exporting = torch.compiler.is_exporting()
    else:  # before torch 2.7
        exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exporting


def check_not_traced(router: object) -> None:
    """Raise an EarlyExitError while a model with a router is traced: all photos would take the sample photo's exit."""
    if router is not None and is_traced():
        reason = "every photo would take the sample photo's exit"
        fix = "use `earlyexit export` for an ONNX file that routes, or set model.router = None for the full path alone"
        raise EarlyExitError(f"a model with a router cannot be traced or exported: {reason}; {fix}")


def check_losses(losses: object, exits: int) -> None:
    """Check the type of the loss settings and the number of exit weights."""
    if not isinstance(losses, LossSettings):
        raise EarlyExitError(f"losses is {losses!r:.60}, expected a LossSettings")
    if len(losses.exit_weights) not in (1, exits):
        weights = f"exit_weights of the losses is {losses.exit_weights}"
        raise EarlyExitError(f"{weights}, expected one number, or one for each of {exits} exits")


def check_router(router: object, count: int, trains: bool = False) -> None:
    """Check that a router is None or implements `Router` for ``count`` early exits. With ``trains`` it must also have
    ``temperature_loss``."""
    methods = ["confidence", "needs", "leaves"] + ["temperature_loss"] * trains
    complete = all(callable(getattr(router, name, None)) for name in methods) and hasattr(router, "hybrid")
    if router is not None and (isinstance(router, type) or not complete):
        raise EarlyExitError(f"router is {router!r:.60}, expected an ExitRouter, or None")
    exits = getattr(router, "num_exits", count)
    if exits != count:
        raise EarlyExitError(f"the router is for {exits} early exits, the model has {count}; set num_exits={count}")


def check_batch(model: nn.Module, count: int) -> None:
    """Raise an EarlyExitError for a training batch of one image, since BatchNorm cannot normalise its 1x1 map."""
    if count == 1 and any(module.training for module in model.modules() if isinstance(module, _BatchNorm)):
        fix = "use a larger batch size"
        raise EarlyExitError(f"a training batch of 1 image: BatchNorm needs 2 or more on the 1x1 map; {fix}")

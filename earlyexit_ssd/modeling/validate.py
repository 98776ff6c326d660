"""Checks of what is handed to the model, one line each: what was expected, what came, and which image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.losses import LossSettings

SLACK = 0.5
"""That augmentation and interpolation may leave [0, 1] by."""


def check_images(images: Sequence[Tensor]) -> None:
    """Images are [3, H, W] float tensors in [0, 1]; the values are looked at on a CPU only, where it costs no wait."""
    if not len(images):
        raise EarlyExitError("no image: expected a list of at least one float tensor [3, H, W]")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise EarlyExitError(f"image {index}: expected a float tensor [3, H, W], got {type(image).__name__}")
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.numel():
            raise EarlyExitError(
                f"image {index}: expected a float tensor [3, H, W] in [0, 1], got {image.dtype} {list(image.shape)}"
            )
        if image.device.type == "cpu" and not torch.jit.is_tracing():
            _check_values(index, image)


def _check_values(index: int, image: Tensor) -> None:
    """Pixels as integers, normalised twice, or not a number: detectors say "nothing there" to all of these."""
    low, high = (float(value) for value in image.aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise EarlyExitError(
            f"image {index}: values from {low:g} to {high:g}, expected [0, 1]; divide pixels by 255, and leave the "
            "normalisation to the model"
        )


def check_targets(targets: Sequence[dict[str, Tensor]] | None, count: int, classes: Sequence[str]) -> None:
    """Targets have boxes xyxy with positive width and height, and labels in 1..K."""
    if targets is None or len(targets) != count:
        raise EarlyExitError(
            f"train mode needs one target per image: {count} images, {targets and len(targets)} targets"
        )
    for index, target in enumerate(targets):
        boxes, labels = (_tensor_of(target, key, index) for key in ("boxes", "labels"))
        if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
            raise EarlyExitError(
                f"target {index}: expected boxes [n, 4] and labels [n], "
                f"got {list(boxes.shape)} and {list(labels.shape)}"
            )
        bad = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & torch.isfinite(boxes).all(1))
        if bad.any():
            first = int(bad.nonzero()[0])
            raise EarlyExitError(
                f"target {index}, box {first}: {boxes[first].tolist()} has no positive width and height (xyxy expected)"
            )
        if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= len(classes)):
            raise EarlyExitError(
                f"target {index}: labels {int(labels.min())}..{int(labels.max())}, "
                f"expected 1..{len(classes)} (0 is background)"
            )


def _tensor_of(target: object, key: str, index: int) -> Tensor:
    value = target.get(key) if isinstance(target, dict) else None
    if not isinstance(value, Tensor):
        found = f"{key} {type(value).__name__}" if isinstance(target, dict) and key in target else f"no {key}"
        raise EarlyExitError(f"target {index}: expected a dict with the tensors boxes and labels, it has {found}")
    return value


def check_losses(losses: object, exits: int) -> None:
    """What the model is given to train with is what it says, for as many exits as there are."""
    if not isinstance(losses, LossSettings):
        raise EarlyExitError(f"losses is {losses!r:.60}, expected a LossSettings")
    if len(losses.exit_weights) not in (1, exits):
        raise EarlyExitError(
            f"exit_weights of the losses is {losses.exit_weights}, expected one number, or one for each of {exits}"
            " exits"
        )


def check_router(router: object, count: int, trains: bool = False) -> None:
    """A router, where there is one, answers what a `Router` is asked, in training for its temperatures too, and
    decides for as many exits as there are."""
    asked = ("confidence", "needs", "leaves", *(("temperature_loss",) if trains else ()))
    answers = all(callable(getattr(router, name, None)) for name in asked) and hasattr(router, "hybrid")
    if router is not None and (isinstance(router, type) or not answers):
        raise EarlyExitError(f"router is {router!r:.60}, expected an ExitRouter, or None")
    known = getattr(router, "num_exits", count)
    if known != count:
        raise EarlyExitError(f"the router knows {known} early exits, the model has {count}; build it with {count}")


def check_batch(model: nn.Module, count: int) -> None:
    """BatchNorm cannot normalise the 1x1 map of a single image; say so before it does."""
    trains_norm = any(module.training for module in model.modules() if isinstance(module, _BatchNorm))
    if count == 1 and trains_norm:
        raise EarlyExitError(
            "a training batch of 1 image: BatchNorm needs 2 or more on the 1x1 map; use a larger batch size"
        )

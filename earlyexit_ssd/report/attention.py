"""Where an exit looks: maps over the photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.branches import LightBranch
from earlyexit_ssd.modeling.detector import AtExit, walk
from earlyexit_ssd.modeling.trunk import evaluating

CHANNELS, GRADIENTS = "channel attention", "gradients"
SIDE = 240
"""Largest side of a picture, pixels."""


@dataclass(frozen=True)
class Attention:
    """A picture of a photo (its place among the photos) under the map of an exit, and how the map was made."""

    photo: int
    exit: str
    method: str
    picture: Image.Image


def attention_maps(model: EarlyExitSSDLite, image: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Exit name -> method and map [h, w] in [0, 1], of the exits with a head; a map that is 0 everywhere stays 0.

    A branch with squeeze-excitation (Hu et al. 2018) shows its tap weighted by the channel attention: the mean over the
    channels of |attention * tap|. The others show relu(sum over the channels of gradient * tap), smoothed over 3 x 3
    cells, with the gradient of the largest object log-probability. That is Grad-CAM (Selvaraju et al. 2017) with a
    weight for each cell instead of a mean over all cells, since a detection depends on a part of the photo (Zhao and
    Chan 2023, "ODAM"). The full path's map is the finest map of its head.

    Args:
        image: photo, float [3, H, W] in [0, 1], on the model's device.
    """
    maps = {}
    with evaluating(model), torch.enable_grad():
        x = model.transform([image], None)[0].tensors.detach().requires_grad_()
        for at in walk(model, x):
            name = model.exit_names[at.index]
            if not at.full and model.empty[at.index]:
                continue
            branch = None if at.full else model.branches[name]
            if isinstance(branch, LightBranch):
                maps[name] = CHANNELS, _scaled(branch.attention(at.tap)[0].abs().mean(0))
                continue
            head, features = (at.head(), at.tap) if not at.full else _full(at)
            score = head["cls_logits"][0].log_softmax(-1)[:, 1:].max()
            (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
            maps[name] = (
                GRADIENTS,
                _scaled(F.avg_pool2d((gradient * features).sum(1), 3, 1, 1, count_include_pad=False)[0].relu()),
            )
    return maps


def _full(at: AtExit) -> tuple[dict[str, Tensor], Tensor]:
    maps = at.maps()
    return at.model.head(maps), maps[0]


def _scaled(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return values / values.max().clamp(min=1e-30)


def attention_pictures(model: EarlyExitSSDLite, images: Sequence[tuple[int, Tensor]]) -> tuple[Attention, ...]:
    """The maps of every exit over these photos: (place among the photos, float [3, H, W] in [0, 1])."""
    device, found = next(model.parameters()).device, []
    for place, image in images:
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        photo = Image.fromarray(np.ascontiguousarray(pixels))
        photo.thumbnail((SIDE, SIDE))
        for name, (method, values) in attention_maps(model, image.to(device)).items():
            # the network sees the photo squeezed to a square, so its map is stretched to the photo
            heat = Image.fromarray((values.numpy() * 255).round().astype(np.uint8)).resize(photo.size, Image.BICUBIC)
            colors = matplotlib.colormaps["inferno"](np.asarray(heat), bytes=True)[..., :3]
            found.append(Attention(place, name, method, Image.blend(photo, Image.fromarray(colors), 0.6)))
    return tuple(found)

"""The photos of the report page: matches and confidences for the threshold explorer, boxes, thumbnails, attention."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
from pycocotools import mask
from pycocotools.coco import COCO
from torch import Tensor

from earlyexit_ssd.calibration.thresholds import pareto_path, threshold_grid
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.matches import ExitMatches, ap_of_choice, photo_counts
from earlyexit_ssd.images import read_thumbnail
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.branches import LightBranch
from earlyexit_ssd.modeling.detector import walk
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.report.pictures import as_picture

MAX_THUMBNAILS = 400  # number of photos with a thumbnail; for the others the page shows only the boxes
THUMBNAIL_SIDE = 240  # longer side of a thumbnail and of a picture of attention, in pixels
MAX_BOXES = 30  # largest number of boxes per photo and exit; those with the highest scores are kept
CURVE_CHOICES = 150  # approximate number of threshold combinations that are tried for the curve of the explorer


@dataclass(frozen=True)
class OpenCosts:
    """Costs of a photo that leaves at each exit, the full path last, if the exits ``opened`` are open. None: not
    measured."""

    opened: tuple[bool, ...]  # for each early exit
    mmacs: Sequence[float] | None = None
    ms: Sequence[float] | None = None


@dataclass(frozen=True)
class PagePhotos:
    """The n photos of a split by rising image id, and the detections of every exit."""

    ground_truth: COCO  # photos and objects; for unlabelled photos, the full path's detections are the objects
    matches: ExitMatches  # of every exit; hits and false positives are those at the IoU of the last condition
    exit_names: Sequence[str]
    confidences: np.ndarray  # float [early exits, n]
    thresholds: Sequence[float]  # the evaluated thresholds
    costs: Sequence[OpenCosts]  # of every set of open exits whose costs are known
    plain_mmacs: float | None  # of the detector without exits
    plain_ms: float | None
    score: float  # minimum score of the detections that are counted and drawn
    labelled: bool = True
    chosen_here: bool = False  # whether thresholds may be chosen on these photos, because they are no test photos
    attention: tuple[Attention, ...] = ()


def by_gain(matches: ExitMatches, score: float) -> np.ndarray:
    """Return the indices of the photos [n], those first in which the full path gains most: errors (misses and false
    positives) of the first exit minus errors of the full path."""
    errors = photo_counts(matches, score).errors
    return np.argsort(errors[:, -1] - errors[:, 0], kind="stable")


def photos_json(photos: PagePhotos) -> dict[str, object]:
    """Return the values that page.js reads."""
    matches, counts = photos.matches, photo_counts(photos.matches, photos.score)
    images = photos.ground_truth.loadImgs(matches.image_ids)
    files = [str(image.get("file_name", image["id"])) for image in images]
    folder = os.path.commonpath(map(os.path.dirname, files)) if all(map(os.path.isabs, files)) else ""
    thumbnails = _thumbnails(photos)
    return {
        "exits": list(photos.exit_names),
        "labelled": photos.labelled,
        "chosen_here": photos.chosen_here,
        "classes": [category["name"] for _, category in sorted(photos.ground_truth.cats.items())],
        "folder": folder,
        "files": [os.path.relpath(file, folder) if folder else file for file in files],
        "sizes": [[image["width"], image["height"]] for image in images],
        "confidences": np.asarray(photos.confidences, np.float32).tolist(),
        "thresholds": np.asarray(photos.thresholds, np.float32).tolist(),
        "costs": [dataclasses.asdict(costs) for costs in photos.costs],
        "plain": {"mmacs": photos.plain_mmacs, "ms": photos.plain_ms},
        "score": photos.score,
        "objects": matches.objects.tolist(),
        "hits": counts.true_positives.tolist(),
        "false": counts.false_positives.tolist(),
        "matches": _matches_json(matches),
        "curve": _curve(photos),
        "truth": _truth(photos),
        "found": _boxes(photos),
        "thumbnails": {index: _jpeg(picture) for index, picture in thumbnails.items()},
        "groups": _groups(photos, thumbnails),
        "attention": [{**vars(attention), "picture": _jpeg(attention.picture)} for attention in photos.attention],
    }


def _matches_json(matches: ExitMatches) -> list[dict[str, int | list[int]]]:
    """Return what page.js computes AP50 from, for each class with objects. See `ExitMatches.ranked_positives`.

    ``objects`` is the number of objects. ``hits`` are the pairs (photo and exit) of the true positives. ``rows``,
    ``pairs`` and ``counts`` are the sparse array of the false positives in CSR form: lengths of the rows, column
    indices (each as the difference to the one before), and values.
    """
    classes = []
    objects_of_class = matches.objects_by_size["all"].sum(axis=1).tolist()
    for objects, (hits, false) in zip(objects_of_class, matches.ranked_positives(matches.ap50_condition), strict=True):
        if objects:
            rows, pairs = np.diff(false.indptr), np.diff(false.indices, prepend=0)
            parts = {"hits": hits, "rows": rows, "pairs": pairs, "counts": false.data.astype(np.int64)}
            classes.append({"objects": objects, **{name: values.tolist() for name, values in parts.items()}})
    return classes


def _curve(photos: PagePhotos) -> list[dict[str, object]]:
    """Return the Pareto-optimal thresholds of a coarse grid, in AP50 and cost, by falling cost."""
    early = len(photos.exit_names) - 1
    costs_of = {costs.opened: costs.mmacs or costs.ms for costs in photos.costs}
    if not early or not photos.labelled or len(costs_of) < 2**early or not photos.matches.objects.sum():
        return []
    levels = max(1, int(CURVE_CHOICES ** (1 / early)) - 2)  # per exit; the grid adds 0 and `CLOSED`
    grid = threshold_grid(list(photos.confidences), levels)
    opened = [tuple(bool(value < CLOSED) for value in row) for row in grid.thresholds]
    cost = grid.mean_cost(np.array([costs_of[exits] for exits in opened]))
    ap50 = np.array([ap_of_choice(photos.matches, choice, ap50_only=True).AP50 for choice in grid.choices])
    path = pareto_path(-ap50, cost).tolist()
    return [{"thresholds": grid.thresholds[index].tolist(), "AP50": float(ap50[index])} for index in path]


def _truth(photos: PagePhotos) -> list[list[list[int]]]:
    """Return the objects of each photo: x1, y1, x2, y2 in pixels, index of the class, and 1 for an ignored object."""
    classes, rows = sorted(photos.ground_truth.cats), []
    for image_id in photos.matches.image_ids:
        rows.append([])
        for annotation in photos.ground_truth.imgToAnns.get(image_id, []):
            x, y, width, height = annotation["bbox"]
            box = map(round, (x, y, x + width, y + height))
            rows[-1].append([*box, classes.index(annotation["category_id"]), int(annotation.get("iscrowd", 0))])
    return rows


def _boxes(photos: PagePhotos) -> list[list[list[list[int]]]]:
    """Return the detections of each photo and exit, by falling score: x1, y1, x2, y2 in pixels, index of the class,
    score in percent, and 1 for a hit, 2 for an ignored detection, 0 for a false positive."""
    matches = photos.matches
    rows: list[list[list[list[int]]]] = [[[] for _ in range(matches.exits)] for _ in matches.image_ids]
    states = np.where(matches.true_positive[-1], 1, np.where(matches.false_positive[-1], 0, 2))
    drawn = np.flatnonzero(matches.score >= photos.score)
    drawn = drawn[np.argsort(-matches.score[drawn], kind="stable")]
    values = *matches.box.round(), matches.label, (100 * matches.score).round(), states
    boxes = np.stack([value[drawn] for value in values], axis=1).astype(np.int64).tolist()
    for photo, exit_index, box in zip(matches.photo[drawn], matches.exit[drawn], boxes, strict=True):
        if len(rows[photo][exit_index]) < MAX_BOXES:
            rows[photo][exit_index].append(box)
    return rows


def _thumbnails(photos: PagePhotos) -> dict[int, Image.Image]:
    """Return a dict: index of a photo -> thumbnail, for the first photos of `_notable` with a readable file."""
    thumbnails, images = {}, photos.ground_truth.loadImgs(photos.matches.image_ids)
    for index in _notable(photos)[:MAX_THUMBNAILS]:
        image = images[index]
        with contextlib.suppress(DataError, KeyError):  # the file may have been removed
            thumbnails[index] = read_thumbnail(image["file_name"], (image["width"], image["height"]), THUMBNAIL_SIDE)
    return thumbnails


def _jpeg(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=70)
    return base64.b64encode(content.getvalue()).decode()


def _notable(photos: PagePhotos) -> list[int]:
    """Return the indices of all photos, in turns from four orders: greatest gain first (see `by_gain`), smallest gain
    first, confidence nearest to a threshold first, and by image id."""
    gain, count = by_gain(photos.matches, photos.score), photos.matches.photos
    thresholds = np.array(photos.thresholds).reshape(-1, 1)
    # confidences of a model without early exits have the shape [0]
    distance = np.abs(photos.confidences - thresholds).min(axis=0) if len(thresholds) else np.zeros(count)
    orders = gain, gain[::-1], np.argsort(distance, kind="stable"), np.arange(count)
    return list(dict.fromkeys(np.stack(orders, axis=1).ravel().tolist()))


GROUPS = {
    "number of objects": {"0": 1, "1": 2, "2": 3, "3 to 4": 5, "5 or more": math.inf},
    "typical size of an object, share of the side": {
        "under 10%": 0.1, "10% to 20%": 0.2, "20% to 40%": 0.4, "40% to 60%": 0.6, "60% or more": math.inf,
    },
    "crowding: largest IoU of two objects": {
        "under 0.01": 0.01, "0.01 to 0.1": 0.1, "0.1 to 0.3": 0.3, "0.3 or more": math.inf,
    },
    "mean brightness, of 255": {
        "under 70": 70, "70 to 100": 100, "100 to 130": 130, "130 to 160": 160, "160 or more": math.inf,
    },
}  # fmt: skip
"""Property of a photo -> label of a group of photos -> upper limit of the group's values, exclusive."""


def _groups(photos: PagePhotos, thumbnails: dict[int, Image.Image]) -> list[dict[str, object]]:
    """Return the groups of photos for each property (`GROUPS`, and the classes that a photo shows): ``title``, and
    ``bins`` with the indices of their photos."""
    truth = photos.ground_truth
    names = {category: truth.cats[category]["name"] for category in sorted(truth.cats)}
    groups: dict[str, dict[str, list[int]]] = {title: {label: [] for label in bins} for title, bins in GROUPS.items()}
    groups["class shown"] = {name: [] for name in names.values()}
    for index, image_id in enumerate(photos.matches.image_ids):
        objects = [row for row in truth.imgToAnns.get(image_id, []) if not row.get("iscrowd", 0)]
        pixels = truth.imgs[image_id]["width"] * truth.imgs[image_id]["height"]
        sides = [(row["area"] / pixels) ** 0.5 for row in objects]
        brightness = ImageStat.Stat(thumbnails[index].convert("L")).mean[0] if index in thumbnails else None
        boxes = np.array([row["bbox"] for row in objects], np.float64)
        values = len(objects), np.median(sides) if sides else None, _crowding(boxes), brightness
        for (title, bins), value in zip(GROUPS.items(), values, strict=True):
            if value is not None:
                groups[title][next(label for label, limit in bins.items() if value < limit)].append(index)
        for name in {names[row["category_id"]] for row in objects}:
            groups["class shown"][name].append(index)
    return [
        {"title": title, "bins": [{"label": label, "photos": members} for label, members in bins.items() if members]}
        for title, bins in groups.items()
    ]


def _crowding(boxes: np.ndarray) -> float | None:
    """Return the largest IoU of two of the boxes [N, 4] (xywh); None for fewer than two."""
    if len(boxes) < 2:
        return None
    overlap = mask.iou(boxes, boxes, np.zeros(len(boxes), np.uint8))
    return float(overlap[~np.eye(len(boxes), dtype=bool)].max())


CHANNEL_ATTENTION, GRADIENTS = "channel attention", "gradients"


@dataclass(frozen=True)
class Attention:
    """The attention map of an exit, drawn over a photo."""

    photo: int  # index
    exit: str
    method: str  # `CHANNEL_ATTENTION` or `GRADIENTS`
    picture: Image.Image


def attention_maps(model: EarlyExitSSDLite, image: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Return exit name -> method and map [h, w] in [0, 1], for the exits with a head. Each map's maximum is 1, unless
    the map is 0 everywhere.

    For a branch with squeeze-excitation (Hu et al. 2018), the map is the mean over the channels of |attention * tap|.
    For all other exits it is relu(sum over the channels of gradient * tap), smoothed over 3 x 3 cells, with the
    gradient of the largest object log-probability. That is Grad-CAM (Selvaraju et al. 2017) with a weight for each cell
    instead of a mean over all cells, because a detection depends on a part of the photo (Zhao and Chan 2023, "ODAM").
    In the full path, the finest map of the head takes the place of the tap. ``image`` is a float [3, H, W] in [0, 1]
    on the model's device.
    """
    maps = {}
    with evaluating(model), torch.enable_grad():
        x = model.transform([image], None)[0].tensors.detach().requires_grad_()
        for at in walk(model, x):
            name = model.exit_names[at.index]
            if at.full:
                pyramid = at.maps()
                features, head = pyramid[0], model.head(pyramid)
            elif model.empty[at.index]:
                continue
            elif isinstance(branch := model.branches[name], LightBranch):
                maps[name] = CHANNEL_ATTENTION, _scaled(branch.attention(at.tap)[0].abs().mean(0))
                continue
            else:
                features, head = at.tap, at.head()
            score = head["cls_logits"][0].log_softmax(-1)[:, 1:].max()
            (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
            smooth = F.avg_pool2d((gradient * features).sum(1), 3, 1, 1, count_include_pad=False)
            maps[name] = GRADIENTS, _scaled(smooth[0].relu())
    return maps


def _scaled(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return values / values.max().clamp(min=1e-30)


def attention_pictures(model: EarlyExitSSDLite, images: Sequence[tuple[int, Tensor]]) -> tuple[Attention, ...]:
    """Draw the maps of every exit over ``images``: (index of the photo, float [3, H, W] in [0, 1])."""
    device, pictures = next(model.parameters()).device, []
    for index, image in images:
        photo = as_picture(image)
        photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        for name, (method, values) in attention_maps(model, image.to(device)).items():
            # the network's input is the photo resized to a square, so the map is resized to the photo
            heat = Image.fromarray((values.numpy() * 255).round().astype(np.uint8)).resize(photo.size, Image.BICUBIC)
            colors = matplotlib.colormaps["inferno"](np.asarray(heat), bytes=True)[..., :3]
            pictures.append(Attention(index, name, method, Image.blend(photo, Image.fromarray(colors), 0.6)))
    return tuple(pictures)

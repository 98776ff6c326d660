"""The photos of the report page: matches and confidences for the threshold explorer, boxes, thumbnails, attention."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
from pycocotools import mask
from pycocotools.coco import COCO
from torch import Tensor

from earlyexit_ssd.calibration.thresholds import pareto_path, threshold_grid
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.matches import Detections, ExitMatches, ap_of_choice, photo_counts
from earlyexit_ssd.images import read_thumbnail
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.branches import LightBranch
from earlyexit_ssd.modeling.detector import walk
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.report.pictures import as_picture

MOST_THUMBNAILS, THUMBNAIL = 400, 240
"""Photos whose thumbnail is in the page, and its largest side in pixels; of the others the page draws boxes only."""
MOST_BOXES = 30  # boxes per photo and exit, those with the highest scores
CURVE_CHOICES = 150  # about so many combinations of thresholds are tried for the curve of the explorer


@dataclass(frozen=True)
class OpenCosts:
    """Costs of one photo to each exit, the full path last, with some exits open; None where they are not measured."""

    opened: tuple[bool, ...]
    mmacs: Sequence[float] | None = None
    ms: Sequence[float] | None = None


@dataclass(frozen=True)
class PagePhotos:
    """The n photos of a split, by rising image id, and what every exit finds in them."""

    ground_truth: COCO  # photos and objects; for photos without labels, what the full path finds
    detections: Sequence[Detections]  # per exit, the full path last
    matches: ExitMatches  # of these detections; counts are under their last condition
    exit_names: Sequence[str]
    confidences: np.ndarray  # float [early exits, n]
    thresholds: Sequence[float]  # those that were evaluated
    costs: Sequence[OpenCosts]  # of every set of open exits that is known
    plain_mmacs: float | None  # of the detector without exits
    plain_ms: float | None
    score: float  # from which a detection counts and is drawn
    labelled: bool = True
    chosen_here: bool = False  # the photos may choose thresholds: they are no test photos
    attention: tuple[Attention, ...] = ()  # where exits look, on some photos


class CocoImage(TypedDict):
    """Keys that are read of a photo in a COCO ground truth; sides are in pixels."""

    file_name: str
    width: int
    height: int


class CocoObject(TypedDict):
    """Keys that are read of an object; ``bbox`` is x, y, width, height in pixels."""

    bbox: list[float]
    area: float
    category_id: int
    iscrowd: int


def by_gain(matches: ExitMatches, score: float) -> np.ndarray:
    """The photos [n] by falling gain: errors (misses and false positives) of the first exit less the full path's."""
    counts = photo_counts(matches, score)
    errors = counts.misses + counts.false_positives
    return np.argsort(errors[:, -1] - errors[:, 0], kind="stable")


def photos_json(photos: PagePhotos) -> dict[str, object]:
    """What page.js reads."""
    matches, counts = photos.matches, photo_counts(photos.matches, photos.score)
    images = [photos.ground_truth.imgs[image_id] for image_id in matches.image_ids]
    files = [str(image.get("file_name", image["id"])) for image in images]
    folder = os.path.commonpath(map(os.path.dirname, files)) if all(map(os.path.isabs, files)) else ""
    thumbnails = _thumbnails(photos, images)
    return {
        "exits": list(photos.exit_names),
        "labelled": photos.labelled,
        "chosen_here": photos.chosen_here,
        "classes": [category["name"] for _, category in sorted(photos.ground_truth.cats.items())],
        "folder": folder,
        "files": [os.path.relpath(file, folder) if folder else file for file in files],
        "sizes": [[image["width"], image["height"]] for image in images],
        "confidences": [np.asarray(row, np.float32).tolist() for row in photos.confidences],
        "thresholds": [float(np.float32(value)) for value in photos.thresholds],
        "costs": [dataclasses.asdict(one) for one in photos.costs],
        "plain": {"mmacs": photos.plain_mmacs, "ms": photos.plain_ms},
        "score": photos.score,
        "objects": matches.objects.tolist(),
        "hits": counts.hits.tolist(),
        "false": counts.false_positives.tolist(),
        "matches": _matches_json(matches),
        "curve": _curve(photos),
        "truth": _truth(photos),
        "found": _boxes(photos),
        "thumbnails": {index: _jpeg(picture) for index, picture in thumbnails.items()},
        "groups": _groups(photos, images, thumbnails),
        "attention": [{**vars(one), "picture": _jpeg(one.picture)} for one in photos.attention],
    }


def _matches_json(matches: ExitMatches) -> list[dict[str, int | list[int]]]:
    """Per class with objects what AP50 is computed from (`ExitMatches.hits_and_false`): number of objects, pairs of the
    hits, and in CSR form pairs (as differences) and numbers of the false positives before each hit."""
    found = []
    counts = matches.objects_by_size["all"].sum(axis=1).tolist()
    for objects, (hits, false) in zip(counts, matches.hits_and_false(matches.ap50_condition), strict=True):
        if objects:
            rows, pairs = np.diff(false.indptr), np.diff(false.indices, prepend=0)
            parts = {"hits": hits, "rows": rows, "pairs": pairs, "counts": false.data.astype(np.int64)}
            found.append({"objects": objects, **{name: values.tolist() for name, values in parts.items()}})
    return found


def _curve(photos: PagePhotos) -> list[dict[str, object]]:
    """Thresholds that no others of a coarse grid beat in both AP50 and cost, by falling cost."""
    early = len(photos.exit_names) - 1
    known = {one.opened: one.mmacs or one.ms for one in photos.costs}
    if not early or not photos.labelled or len(known) < 2**early or not photos.matches.objects.sum():
        return []
    grid = threshold_grid(list(photos.confidences), max(1, int(CURVE_CHOICES ** (1 / early)) - 2))
    opened = [tuple(bool(value <= 1) for value in row) for row in grid.thresholds]
    cost = grid.mean_cost(np.array([known[one] for one in opened]))
    ap50 = np.array([ap_of_choice(photos.matches, one, ap50_only=True).AP50 for one in grid.choices])
    path = pareto_path(-ap50, cost)
    return [{"thresholds": grid.thresholds[one].tolist(), "AP50": float(ap50[one])} for one in path.tolist()]


def _truth(photos: PagePhotos) -> list[list[list[int]]]:
    """Per photo its objects: x1, y1, x2, y2 in pixels, place of the class, whether it is ignored."""
    places, rows = _places(photos), []
    for image_id in photos.matches.image_ids:
        rows.append([])
        for one in photos.ground_truth.imgToAnns.get(image_id, []):
            x, y, width, height = one["bbox"]
            corners = map(round, (x, y, x + width, y + height))
            rows[-1].append([*corners, places[one["category_id"]], int(one.get("iscrowd", 0))])
    return rows


def _places(photos: PagePhotos) -> dict[int, int]:
    """Category id -> place of the class."""
    return {category: place for place, category in enumerate(sorted(photos.ground_truth.cats))}


def _boxes(photos: PagePhotos) -> list[list[list[list[int]]]]:
    """Per photo and exit the detections of at least the score: x1, y1, x2, y2 in pixels, place of the class, score in
    percent, and 1 for a hit, 2 for an ignored one, 0 for a false positive."""
    matches, places, states = photos.matches, _places(photos), defaultdict(list)
    drawn = matches.score >= photos.score
    state = np.where(matches.hit[-1], 1, np.where(matches.false[-1], 0, 2))
    columns = (part[drawn].tolist() for part in (matches.photo, matches.exit, matches.label, state))
    for photo, exit, place, value in zip(*columns, strict=True):  # by falling score, as a photo's detections of a class
        states[photo, exit, place].append(value)
    rows: list[list[list[list[int]]]] = []
    for photo, image_id in enumerate(matches.image_ids):
        rows.append([])
        for exit, of_exit in enumerate(photos.detections):
            boxes: list[list[int]] = []
            if found := of_exit.get(image_id):
                scores, labels = found["scores"].double().numpy(), found["labels"].tolist()
                corners, ranks = found["boxes"].round().int().tolist(), defaultdict(itertools.count)
                for one in np.argsort(-scores, kind="stable").tolist():
                    place = places.get(labels[one])
                    if scores[one] >= photos.score and place is not None:
                        state = states[photo, exit, place][next(ranks[place])]
                        boxes.append([*corners[one], place, round(100 * float(scores[one])), state])
            rows[-1].append(boxes[:MOST_BOXES])
    return rows


def _thumbnails(photos: PagePhotos, images: Sequence[CocoImage]) -> dict[int, Image.Image]:
    """Thumbnails of the most notable photos, by the photo's place."""
    found = {}
    for index in _notable(photos)[:MOST_THUMBNAILS]:
        image = images[index]
        with contextlib.suppress(DataError, KeyError):  # a photo that is gone since has no thumbnail
            found[index] = read_thumbnail(image["file_name"], (image["width"], image["height"]), THUMBNAIL)
    return found


def _jpeg(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=70)
    return base64.b64encode(content.getvalue()).decode()


def _notable(photos: PagePhotos) -> list[int]:
    """The photos in turns: greatest gain, least gain, nearest to a threshold, and the rest in their order."""
    gain, count = by_gain(photos.matches, photos.score), photos.matches.photos
    thresholds = np.array(photos.thresholds).reshape(-1, 1)
    distance = np.abs(photos.confidences - thresholds) if len(photos.thresholds) else np.zeros((1, count))
    orders = gain, gain[::-1], np.argsort(distance.min(axis=0), kind="stable"), np.arange(count)
    return list(dict.fromkeys(itertools.chain.from_iterable(np.stack(orders, axis=1).tolist())))


BINS = {
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
"""What photos are grouped by -> group -> the number that values of the group stay below."""


def _groups(
    photos: PagePhotos, images: Sequence[CocoImage], thumbnails: dict[int, Image.Image]
) -> list[dict[str, object]]:
    """What the photos differ in: title, and labels with the photos that have it."""
    truth = photos.ground_truth
    names = {key: truth.cats[key]["name"] for key in sorted(truth.cats)}
    groups: dict[str, dict[str, list[int]]] = {title: {label: [] for label in bins} for title, bins in BINS.items()}
    groups["class shown"] = {name: [] for name in names.values()}
    for index, (image_id, image) in enumerate(zip(photos.matches.image_ids, images, strict=True)):
        objects = [one for one in truth.imgToAnns.get(image_id, []) if not one.get("iscrowd", 0)]
        sides = [(one["area"] / (image["width"] * image["height"])) ** 0.5 for one in objects]
        brightness = ImageStat.Stat(thumbnails[index].convert("L")).mean[0] if index in thumbnails else None
        values = len(objects), np.median(sides) if sides else None, _crowding(objects), brightness
        for (title, bins), value in zip(BINS.items(), values, strict=True):
            if value is not None:
                groups[title][next(label for label, limit in bins.items() if value < limit)].append(index)
        for name in {names[one["category_id"]] for one in objects}:
            groups["class shown"][name].append(index)
    return [
        {"title": title, "bins": [{"label": label, "photos": found} for label, found in bins.items() if found]}
        for title, bins in groups.items()
    ]


def _crowding(objects: Sequence[CocoObject]) -> float | None:
    """Largest IoU of two of the objects; None for fewer than two."""
    if len(objects) < 2:
        return None
    boxes = np.array([one["bbox"] for one in objects], np.float64)
    overlap = mask.iou(boxes, boxes, np.zeros(len(boxes), np.uint8))
    return float(overlap[~np.eye(len(boxes), dtype=bool)].max())


CHANNELS, GRADIENTS = "channel attention", "gradients"
SIDE = 240  # largest side of a picture, pixels


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
            if at.full:
                pyramid = at.maps()
                features, head = pyramid[0], model.head(pyramid)
            elif model.empty[at.index]:
                continue
            elif isinstance(branch := model.branches[name], LightBranch):
                maps[name] = CHANNELS, _scaled(branch.attention(at.tap)[0].abs().mean(0))
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
    """The maps of every exit over these photos: (place among the photos, float [3, H, W] in [0, 1])."""
    device, found = next(model.parameters()).device, []
    for place, image in images:
        photo = as_picture(image)
        photo.thumbnail((SIDE, SIDE))
        for name, (method, values) in attention_maps(model, image.to(device)).items():
            # the network sees the photo squeezed to a square, so its map is stretched to the photo
            heat = Image.fromarray((values.numpy() * 255).round().astype(np.uint8)).resize(photo.size, Image.BICUBIC)
            colors = matplotlib.colormaps["inferno"](np.asarray(heat), bytes=True)[..., :3]
            found.append(Attention(place, name, method, Image.blend(photo, Image.fromarray(colors), 0.6)))
    return tuple(found)

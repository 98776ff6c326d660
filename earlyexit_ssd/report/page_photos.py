"""The photos of the report page: matches and confidences for the threshold explorer, boxes, thumbnails, attention."""

from __future__ import annotations

import base64
import io
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
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


def by_gain(matches: ExitMatches, score: float) -> np.ndarray:
    """The photos [n] by falling gain: errors (misses and false positives) of the first exit less the full path's."""
    counts = photo_counts(matches, score)
    errors = counts.misses + counts.false_positives
    return np.argsort(errors[:, -1] - errors[:, 0], kind="stable")


def photos_json(photos: PagePhotos) -> dict[str, Any]:
    """What page.js reads."""
    matches, counts = photos.matches, photo_counts(photos.matches, photos.score)
    images = [photos.ground_truth.imgs[image_id] for image_id in matches.image_ids]
    files = [str(image.get("file_name", image["id"])) for image in images]
    folder = os.path.commonpath(map(os.path.dirname, files)) if all(map(os.path.isabs, files)) else ""
    thumbnails = _thumbnails(photos, images)
    brightness = {index: value for index, (value, _) in thumbnails.items()}
    return {
        "exits": list(photos.exit_names),
        "labelled": photos.labelled,
        "chosen_here": photos.chosen_here,
        "classes": [photos.ground_truth.cats[key]["name"] for key in sorted(photos.ground_truth.cats)],
        "folder": folder,
        "files": [os.path.relpath(file, folder) if folder else file for file in files],
        "sizes": [[image["width"], image["height"]] for image in images],
        "confidences": [np.asarray(row, np.float32).tolist() for row in photos.confidences],
        "thresholds": [float(np.float32(value)) for value in photos.thresholds],
        "costs": [
            {"opened": list(one.opened), "mmacs": one.mmacs and list(one.mmacs), "ms": one.ms and list(one.ms)}
            for one in photos.costs
        ],
        "plain": {"mmacs": photos.plain_mmacs, "ms": photos.plain_ms},
        "score": photos.score,
        "objects": matches.objects.tolist(),
        "hits": counts.hits.tolist(),
        "false": counts.false_positives.tolist(),
        "matches": _matches_json(matches),
        "curve": _curve(photos),
        "truth": _truth(photos),
        "found": _boxes(photos),
        "thumbnails": {index: picture for index, (_, picture) in thumbnails.items()},
        "groups": _groups(photos, images, brightness),
        "attention": [
            {"photo": one.photo, "exit": one.exit, "method": one.method, "picture": _jpeg(one.picture)}
            for one in photos.attention
        ],
    }


def _matches_json(matches: ExitMatches) -> list[dict[str, Any]]:
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


def _curve(photos: PagePhotos) -> list[dict[str, Any]]:
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
    places = {category: place for place, category in enumerate(sorted(photos.ground_truth.cats))}
    return [
        [
            [*(round(value) for value in (x, y, x + width, y + height)), places[one["category_id"]],
             int(one.get("iscrowd", 0))]
            for one in photos.ground_truth.imgToAnns.get(image_id, [])
            for x, y, width, height in [one["bbox"]]
        ]
        for image_id in photos.matches.image_ids
    ]  # fmt: skip


def _boxes(photos: PagePhotos) -> list[list[list[list[int]]]]:
    """Per photo and exit the detections of at least the score: x1, y1, x2, y2 in pixels, place of the class, score in
    percent, and 1 for a hit, 2 for an ignored one, 0 for a false positive."""
    matches, states = photos.matches, defaultdict(list)
    places = {category: place for place, category in enumerate(sorted(photos.ground_truth.cats))}
    drawn = matches.score >= photos.score
    state = np.where(matches.hit[-1], 1, np.where(matches.false[-1], 0, 2))
    columns = (part[drawn].tolist() for part in (matches.photo, matches.exit, matches.label, state))
    for photo, exit, place, value in zip(*columns, strict=True):  # by falling score, as a photo's detections of a class
        states[photo, exit, place].append(value)
    rows: list[list[list[list[int]]]] = []
    for photo, image_id in enumerate(matches.image_ids):
        rows.append([])
        for exit, of_exit in enumerate(photos.detections):
            boxes, found = [], of_exit.get(image_id)
            if found is not None:
                scores = found["scores"].double().numpy()
                ranks = defaultdict(itertools.count)
                order = [one for one in np.argsort(-scores, kind="stable").tolist() if scores[one] >= photos.score]
                labels, corners = found["labels"].tolist(), found["boxes"].round().int().tolist()
                for one in order:
                    if (place := places.get(labels[one])) is not None:
                        value = states[photo, exit, place][next(ranks[place])]
                        boxes.append([*corners[one], place, round(100 * float(scores[one])), value])
            rows[-1].append(boxes[:MOST_BOXES])
    return rows


def _thumbnails(photos: PagePhotos, images: Sequence[dict[str, Any]]) -> dict[int, tuple[float, str]]:
    """Place of a photo -> its mean brightness in 0..255 and its thumbnail, a JPEG in base64."""
    found = {}
    for index in _notable(photos)[:MOST_THUMBNAILS]:
        image = images[index]
        with_size = image["width"], image["height"]
        try:
            small = read_thumbnail(image["file_name"], with_size, THUMBNAIL)
        except (DataError, KeyError):  # a photo that is gone since has no thumbnail
            continue
        found[index] = (ImageStat.Stat(small.convert("L")).mean[0], _jpeg(small))
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


def _groups(photos: PagePhotos, images: Sequence[dict[str, Any]], brightness: dict[int, float]) -> list[dict[str, Any]]:
    """What the photos differ in: title, and labels with the photos that have it."""
    truth, classes = photos.ground_truth, sorted(photos.ground_truth.cats)
    objects = [
        [one for one in truth.imgToAnns.get(image_id, []) if not one.get("iscrowd", 0)]
        for image_id in photos.matches.image_ids
    ]
    sides = [
        float(np.median([(one["area"] / (image["width"] * image["height"])) ** 0.5 for one in found]))
        if found
        else None
        for found, image in zip(objects, images, strict=True)
    ]
    shown = [{one["category_id"] for one in found} for found in objects]
    crowding, light = list(map(_crowding, objects)), [brightness.get(index) for index in range(len(images))]
    groups = [
        _binned("number of objects", [len(found) for found in objects], (1, 2, 3, 5), "{:g}".format, whole=True),
        _binned("typical size of an object, share of the side", sides, (0.1, 0.2, 0.4, 0.6), "{:.0%}".format),
        _binned("crowding: largest IoU of two objects", crowding, (0.01, 0.1, 0.3), "{:g}".format),
        _binned("mean brightness, of 255", light, (70, 100, 130, 160), "{:g}".format),
    ]
    of_class = [(truth.cats[key]["name"], [i for i, one in enumerate(shown) if key in one]) for key in classes]
    bins = [{"label": name, "photos": found} for name, found in of_class if found]
    return [*groups, {"title": "class shown", "bins": bins}]


def _binned(
    title: str,
    values: Sequence[float | None],
    edges: Sequence[float],
    text: Callable[[float], str],
    whole: bool = False,
) -> dict[str, Any]:
    """Photos with a value below the first edge, from each edge to the next, and from the last on; None is left out."""
    lows, highs = (None, *edges), (*edges, None)
    bins: list[dict[str, Any]] = []
    for low, high in zip(lows, highs, strict=True):
        inside = [
            index
            for index, value in enumerate(values)
            if value is not None and (low is None or value >= low) and (high is None or value < high)
        ]
        label = f"under {text(high)}" if low is None else f"{text(low)} or more" if high is None else ""
        if whole and high is not None:
            label = text(high - 1) if low in (None, high - 1) else f"{text(low)} to {text(high - 1)}"
        bins.append({"label": label or f"{text(low)} to {text(high)}", "photos": inside})
    return {"title": title, "bins": [one for one in bins if one["photos"]]}


def _crowding(objects: Sequence[dict[str, Any]]) -> float | None:
    """Largest IoU of two of the objects; None for fewer than two."""
    if len(objects) < 2:
        return None
    boxes = np.array([one["bbox"] for one in objects], np.float64)
    low, high, area = boxes[:, :2], boxes[:, :2] + boxes[:, 2:], boxes[:, 2] * boxes[:, 3]
    both = np.maximum(np.minimum(high[:, None], high) - np.maximum(low[:, None], low), 0).prod(-1)
    overlap = both / np.maximum(area[:, None] + area - both, 1e-9)
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
            if not at.full and model.empty[at.index]:
                continue
            branch = None if at.full else model.branches[name]
            if isinstance(branch, LightBranch):
                maps[name] = CHANNELS, _scaled(branch.attention(at.tap)[0].abs().mean(0))
                continue
            if at.full:
                pyramid = at.maps()
                head, features = model.head(pyramid), pyramid[0]
            else:
                head, features = at.head(), at.tap
            score = head["cls_logits"][0].log_softmax(-1)[:, 1:].max()
            (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
            maps[name] = (
                GRADIENTS,
                _scaled(F.avg_pool2d((gradient * features).sum(1), 3, 1, 1, count_include_pad=False)[0].relu()),
            )
    return maps


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

"""COCO's average precision, by pycocotools, as named numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.outputs import Collected, routed_detections

Detections = Mapping[int, Mapping[str, Tensor]]
"""Image id -> ``boxes`` [N,4] (xyxy, photo pixels), ``scores`` [N] and ``labels`` [N] (category ids)."""


@dataclass(frozen=True)
class CocoMetrics:
    """Average precisions in [0, 1]; ``None`` where there is no object to find (pycocotools says -1).

    ``per_class`` maps a class name to its ``AP`` and ``AP50``, in the order of the category ids.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    per_class: dict[str, dict[str, float | None]]


def coco_metrics(ground_truth: COCO, detections: Detections) -> CocoMetrics:
    """The figures that pycocotools gives for the same boxes, digit for digit.

    Images without an entry in ``detections`` count as images without a detection; labels that are no category
    of ``ground_truth`` are left out, as pycocotools does.

    Raises:
        DataError: detections of an unknown image, or an annotation whose id pycocotools cannot represent.
    """
    return summarize(coco_evaluation(ground_truth, detections))


def coco_evaluation(ground_truth: COCO, detections: Detections) -> COCOeval:
    """An evaluated and accumulated ``COCOeval`` (bbox, its default parameters), made without printing."""
    _check(ground_truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, _as_results(ground_truth, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def summarize(evaluation: COCOeval) -> CocoMetrics:
    """Name the figures of an accumulated evaluation."""
    ap, ap50, ap75, small, medium, large = (_defined(value) for value in evaluation.stats[:6])
    # precision: [IoU thresholds, recalls, classes, sizes, detections per image]; size 0 is all, the last 100
    # a photo
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    at_half = np.isclose(evaluation.params.iouThrs, 0.5)
    categories = evaluation.cocoGt.loadCats([int(category) for category in evaluation.params.catIds])
    per_class = {
        category["name"]: {
            "AP": _mean(precision[:, :, index]),
            "AP50": _mean(precision[at_half, :, index]),
        }
        for index, category in enumerate(categories)
    }
    return CocoMetrics(ap, ap50, ap75, small, medium, large, per_class)


def xywh(boxes: Tensor) -> Tensor:
    """COCO's xywh of xyxy boxes [N,4], in their own precision, as torchvision's reference does it."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def _mean(precision: np.ndarray) -> float | None:
    """Mean over the defined entries; pycocotools marks the undefined ones with -1."""
    defined = precision[precision > -1]
    return float(np.mean(defined)) if defined.size else None


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)


def _check(ground_truth: COCO, detections: Detections) -> None:
    unknown = [image_id for image_id in detections if image_id not in ground_truth.imgs]
    if unknown:
        raise DataError(f"detections of image {unknown[0]}: the ground truth has no image of this id")
    if 0 in ground_truth.anns:
        # pycocotools stores the matched id and reads 0 as "no match"
        raise DataError("annotation id 0: pycocotools counts its match as a miss; number annotations from 1")


def _as_results(ground_truth: COCO, detections: Detections) -> COCO:
    """pycocotools' result object; ``loadRes`` itself fails on an empty list."""
    records = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for image_id, found in detections.items()
        for box, label, score in zip(
            xywh(found["boxes"]).tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]
    if records:
        return ground_truth.loadRes(records)
    empty = COCO()
    empty.dataset = {
        "images": ground_truth.dataset["images"],
        "categories": ground_truth.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty


# What a user sees at one score threshold: hits, misses and false alarms.


@dataclass(frozen=True)
class OperatingPoint:
    """Counts over all photos and classes at one score threshold, and the rates that follow from them.

    precision: tp / (tp + fp) in [0, 1]; None when nothing was detected.
    recall: tp / (tp + fn) in [0, 1]; 0.0 when nothing was found, None when there was nothing to find.
    f1: 2 tp / (2 tp + fp + fn); None when there is neither a detection nor an object.
    false_positives_per_image: fp / images; None without photos.
    false_positives_per_empty_image: the false positives on empty photos / empty photos. A photo is empty when
        it has no counted object of any evaluated class (it may hold ignored ones; see `empty_images`). None
        when no photo is empty.
    localization_error: 1 - mean IoU of the true positives with their objects, in [0, 1 - IoU threshold]; None
        without a true positive.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    false_positives_per_image: float | None
    false_positives_per_empty_image: float | None
    localization_error: float | None
    true_positives: int
    false_positives: int
    false_negatives: int
    images: int
    empty_images: int


@dataclass(frozen=True)
class Matches:
    """Outcome of one photo and class: IoU of each true positive, number of false positives and of misses."""

    ious: list[float]
    false_positives: int
    false_negatives: int


def operating_point(ground_truth: COCO, detections: Detections, score: float = 0.5, iou: float = 0.5) -> OperatingPoint:
    """Match per photo and class, in falling order of the scores, every detection with ``scores >= score``.

    Each detection takes the free counted object of its class that it overlaps most, if that IoU is at least
    ``iou``: a true positive. One that finds none but lies on an ignored object (``iscrowd`` = 1: COCO crowds,
    VOC difficult; intersection over the detection's own area at least ``iou``, any number of detections each)
    is dropped. The rest are false positives, counted objects left over are misses, and ignored objects are
    neither hit nor missed. These are pycocotools' rules, without its limit of 100 detections a photo. Labels
    that are no category of ``ground_truth`` are left out.
    """
    ious: list[float] = []
    false_positives = false_negatives = on_empty = 0
    category_ids = ground_truth.getCatIds()
    empty = set(empty_images(ground_truth))
    for image_id in ground_truth.getImgIds():
        objects = ground_truth.imgToAnns.get(image_id, [])
        for category_id in category_ids:
            matches = match_class(objects, detections.get(image_id), category_id, score, iou)
            ious += matches.ious
            false_positives += matches.false_positives
            false_negatives += matches.false_negatives
            on_empty += matches.false_positives if image_id in empty else 0
    images, true_positives = len(ground_truth.getImgIds()), len(ious)
    return OperatingPoint(
        precision=_ratio(true_positives, true_positives + false_positives),
        recall=_ratio(true_positives, true_positives + false_negatives),
        f1=_ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        false_positives_per_image=_ratio(false_positives, images),
        false_positives_per_empty_image=_ratio(on_empty, len(empty)),
        localization_error=1.0 - float(np.mean(ious)) if ious else None,
        true_positives=true_positives,
        false_positives=false_positives,
        false_negatives=false_negatives,
        images=images,
        empty_images=len(empty),
    )


def empty_images(ground_truth: COCO) -> list[int]:
    """Ids of the images without a counted object of a listed category (``iscrowd`` = 1 is not counted)."""
    categories = set(ground_truth.getCatIds())
    return [
        image_id
        for image_id in ground_truth.getImgIds()
        if not any(
            annotation["category_id"] in categories and not _ignored(annotation)
            for annotation in ground_truth.imgToAnns.get(image_id, [])
        )
    ]


def match(boxes: np.ndarray, objects: np.ndarray, ignored: np.ndarray, iou: float) -> Matches:
    """Match the ``boxes`` [D,4] of one photo and class, best score first, with its ``objects`` [G,4]; both
    xywh.

    ``ignored`` bool [G] marks the objects that are neither hit nor missed.
    """
    overlaps = _overlaps(boxes, objects, ignored)
    iou = min(iou, 1 - 1e-10)  # so that equal boxes match at 1, as in pycocotools
    free = ~ignored
    ious: list[float] = []
    false_positives = 0
    for row in overlaps:
        candidates = np.where(free, row, -1.0)
        # among equals the last one is taken, as pycocotools does
        best = len(row) - 1 - int(np.argmax(candidates[::-1])) if len(row) else -1
        if best >= 0 and candidates[best] >= iou:
            free[best] = False
            ious.append(float(row[best]))
        elif not (row[ignored] >= iou).any():
            false_positives += 1
    return Matches(ious, false_positives, int(free.sum()))


def match_class(
    objects: list[dict], found: Mapping[str, Tensor] | None, category_id: int, score: float, iou: float
) -> Matches:
    """`match` for the annotations ``objects`` of a photo and what was ``found`` there, one class."""
    own = [annotation for annotation in objects if annotation["category_id"] == category_id]
    truth = np.array([annotation["bbox"] for annotation in own], dtype=np.float64).reshape(-1, 4)
    ignored = np.array([_ignored(annotation) for annotation in own], dtype=bool)
    if found is None:
        boxes = np.zeros((0, 4))
    else:
        scores = found["scores"].double().numpy()
        keep = np.flatnonzero((found["labels"].numpy() == category_id) & (scores >= score))
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        boxes = xywh(found["boxes"]).double().numpy()[keep]
    return match(boxes, truth, ignored, iou)


def _overlaps(boxes: np.ndarray, objects: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """[D,G] IoU by pycocotools; with ignored objects, intersection over the detection's area."""
    if not len(boxes) or not len(objects):
        return np.zeros((len(boxes), len(objects)))
    return np.asarray(mask.iou(boxes, objects, ignored.astype(np.uint8).tolist()))


def _ignored(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd", 0))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# How far AP and AP50 would move with other photos of the same kind: a bootstrap over photos.


class Draws(NamedTuple):
    """AP and AP50 in every draw of photos, float [resamples]; NaN where undefined, or not asked for."""

    AP: np.ndarray
    AP50: np.ndarray


def bootstrap_choices(
    matches: ExitMatches,
    choices: Sequence[ArrayLike],
    resamples: int = 200,
    seed: int = 0,
    *,
    ap50_only: bool = True,
    groups: np.ndarray | None = None,
) -> list[Draws]:
    """Per choice of exits [n], its figures in ``resamples`` draws of as many photos with replacement.

    The same seed draws the same photos, so all values on one data set are paired. ``ap50_only`` is ten times as fast.
    Photos that go together, numbered from 0 in ``groups`` [n], are drawn together.
    """
    count = matches.photos if groups is None or not len(groups) else int(groups.max()) + 1
    generator = np.random.default_rng(seed)
    values = [Draws(np.full(resamples, np.nan), np.full(resamples, np.nan)) for _ in choices]
    for index in range(resamples):
        weights = np.bincount(generator.integers(count, size=count) if count else [], minlength=count)
        weights = weights if groups is None else weights[groups]
        for draws, choice in zip(values, choices, strict=True):
            found = ap_of_choice(matches, choice, weights, ap50_only=ap50_only)
            draws.AP[index], draws.AP50[index] = found.AP, found.AP50  # numpy stores None as NaN
    return values


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The central ``level`` of ``values`` (percentiles), NaN left out; None when nothing is left."""
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# AP and AP50 of any choice of exits, one per photo, in milliseconds.


@dataclass(frozen=True)
class ExitClassMatches:
    """The matches of one class: every exit's detections (all sizes, 100 a photo), in falling order of the scores.

    Equal scores keep the order of the photos, then of the exits, so that any choice is in pycocotools' order.

    hit: bool [T, D], true positives per IoU threshold; never ignored.
    ignored: bool [T, D], neither right nor wrong (on a crowd).
    photo, exit: int [D], indices of the detection's photo and exit.
    score: float [D].
    objects: int [n], counted objects per photo.
    """

    hit: np.ndarray
    ignored: np.ndarray
    photo: np.ndarray
    exit: np.ndarray
    score: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class ExitMatches:
    """The matches of all classes and exits.

    recalls: float [R], to interpolate at; iou_thresholds: float [T].
    image_ids: of the n photos, in the order of every [n] of this module (rising, as pycocotools sorts them).
    exits: how many there are (K).
    """

    classes: list[ExitClassMatches]
    recalls: np.ndarray
    iou_thresholds: np.ndarray
    image_ids: list[int]
    exits: int
    _tables: dict[int, _Table] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def photos(self) -> int:
        """The number of photos (n)."""
        return len(self.image_ids)

    @property
    def half(self) -> int:
        """The index of IoU 0.5 among the thresholds."""
        return int(np.flatnonzero(np.isclose(self.iou_thresholds, 0.5))[0])


@dataclass(frozen=True)
class APs:
    """Average precisions in [0, 1]; ``None`` where there is no object to find, or where it was not asked for."""

    AP: float | None
    AP50: float | None


@dataclass(frozen=True)
class _Table:
    """One IoU threshold's matches as counts: only the precision at hits decides AP.

    A cell is a photo's exit, ``photo * K + exit``. The hits of all exits stand in the order of the classes, then
    of the ranking; a hit that is not chosen has weight 0 and changes nothing.

    hit_cells: int [H], each hit's cell.
    bounds: int [classes + 1], where each class starts among the hits.
    false_slots: per cell, the hit that follows each false positive; those behind the last hit do not matter.
    false_counts: int [n * K], their number per cell.
    """

    hit_cells: np.ndarray
    bounds: np.ndarray
    false_slots: list[np.ndarray]
    false_counts: np.ndarray


def exit_matches(ground_truth: COCO, detections: Sequence[Detections]) -> ExitMatches:
    """Match the detections of every exit, shallow to deep, by pycocotools; errors as `coco_evaluation`."""
    if not detections:
        raise EarlyExitError("no exits to choose from: give the detections of at least one")
    return matches_of([coco_evaluation(ground_truth, found) for found in detections])


def matches_of(evaluations: Sequence[COCOeval]) -> ExitMatches:
    """The matches of exits that were evaluated on the same photos, shallow to deep."""
    entries = []
    for evaluation in evaluations:
        params, image_ids = evaluation.params, [int(image_id) for image_id in evaluation.params.imgIds]
        # evalImgs: [classes, sizes, photos], flat; size 0 is all
        starts = np.arange(len(params.catIds)) * len(params.areaRng) * len(image_ids)
        entries.append([evaluation.evalImgs[start : start + len(image_ids)] for start in starts])
    classes = [_class_matches(per_exit, len(params.iouThrs)) for per_exit in zip(*entries, strict=True)]
    return ExitMatches(classes, np.asarray(params.recThrs), np.asarray(params.iouThrs), image_ids, len(evaluations))


def ap_of_choice(
    matches: ExitMatches, choice: ArrayLike, weights: ArrayLike | None = None, *, ap50_only: bool = False
) -> APs:
    """AP and AP50 where photo i takes exit ``choice[i]`` (int [n]) and counts ``weights[i]`` times (int [n]).

    The figures are pycocotools' for the detections of the chosen exits. Classes without an object among the
    weighted photos are left out. ``ap50_only`` leaves ``AP`` None, which is ten times as fast.
    """
    cells = _cells(matches, choice)
    weights = None if weights is None else _one_each(matches, "weights", weights)
    thresholds = [matches.half] if ap50_only else range(len(matches.iou_thresholds))
    curves = {index: _curves(matches, index, cells, weights) for index in thresholds}
    at_half = curves[matches.half]
    if not at_half.size:
        return APs(None, None)
    return APs(None if ap50_only else float(np.mean(np.stack(list(curves.values())))), float(np.mean(at_half)))


def _cells(matches: ExitMatches, choice: ArrayLike) -> np.ndarray:
    choice = _one_each(matches, "choice", choice)
    if choice.size and not (choice.min() >= 0 and choice.max() < matches.exits):
        raise EarlyExitError(f"choice in {choice.min()}..{choice.max()}: exits are 0..{matches.exits - 1}")
    return np.arange(matches.photos) * matches.exits + choice


def _one_each(matches: ExitMatches, name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (matches.photos,) or (values.size and values.dtype.kind not in "iu"):
        raise EarlyExitError(f"{name} {values.dtype} {list(values.shape)}: give {matches.photos} whole numbers")
    return values.astype(np.int64)


def _curves(matches: ExitMatches, threshold: int, cells: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Interpolated precision of the classes with objects, [R, classes]."""
    if threshold not in matches._tables:
        matches._tables[threshold] = _build_table(matches, threshold)
    table = matches._tables[threshold]
    cell_weights = np.zeros(len(table.false_counts), dtype=np.int64)
    cell_weights[cells] = 1 if weights is None else weights
    hit_weights = cell_weights[table.hit_cells]
    slots = np.concatenate([np.zeros(0, np.int64), *(table.false_slots[cell] for cell in cells.tolist())])
    slot_weights = None if weights is None else np.repeat(weights, table.false_counts[cells])
    false_weights = np.bincount(slots, slot_weights, minlength=len(hit_weights))
    curves = []
    for one, start, end in zip(matches.classes, table.bounds[:-1], table.bounds[1:], strict=True):
        objects = int(one.objects.sum() if weights is None else weights @ one.objects)
        if objects:
            true, false = np.cumsum(hit_weights[start:end]), np.cumsum(false_weights[start:end])
            precision = true / (false + true + np.spacing(1))
            # the best precision at this recall or a higher one
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            position = np.searchsorted(true / objects, matches.recalls, side="left")
            curves.append(np.append(envelope, 0.0)[position])
    return np.stack(curves, axis=1) if curves else np.zeros((len(matches.recalls), 0))


def _build_table(matches: ExitMatches, threshold: int) -> _Table:
    bounds, empty = [0], np.zeros(0, dtype=np.int64)
    hit_cells, false_cells, slots = [empty], [empty], [empty]
    for one in matches.classes:
        cell = one.photo * matches.exits + one.exit
        hits = np.flatnonzero(one.hit[threshold])
        false = np.flatnonzero(~(one.hit[threshold] | one.ignored[threshold]))
        slot = np.searchsorted(hits, false)
        matters = slot < len(hits)
        hit_cells.append(cell[hits])
        false_cells.append(cell[false[matters]])
        slots.append(bounds[-1] + slot[matters])
        bounds.append(bounds[-1] + len(hits))
    cells = np.concatenate(false_cells)
    counts = np.bincount(cells, minlength=matches.photos * matches.exits)
    by_cell = np.concatenate(slots)[np.argsort(cells, kind="stable")]
    return _Table(np.concatenate(hit_cells), np.array(bounds), np.split(by_cell, np.cumsum(counts)[:-1]), counts)


def _class_matches(per_exit: Sequence[list[dict | None]], thresholds: int) -> ExitClassMatches:
    """Stack one class's matches, [exits][photos]."""
    exits, photos = len(per_exit), len(per_exit[0])
    per_cell = [entry for per_photo in zip(*per_exit, strict=True) for entry in per_photo]  # [n * K]
    # a photo without objects and detections has no entry
    objects = np.array([np.count_nonzero(entry["gtIgnore"] == 0) if entry else 0 for entry in per_exit[0]], np.int64)
    counts = np.array([len(entry["dtScores"]) if entry else 0 for entry in per_cell], np.int64)
    nothing = np.zeros((thresholds, 0), dtype=bool)
    present = [entry for entry in per_cell if entry is not None]
    score = np.concatenate([np.zeros(0), *(entry["dtScores"] for entry in present)])
    ignored = np.concatenate([nothing, *(entry["dtIgnore"].astype(bool) for entry in present)], axis=1)
    hit = np.concatenate([nothing, *(entry["dtMatches"] != 0 for entry in present)], axis=1) & ~ignored
    order = np.argsort(-score, kind="stable")
    cell = np.repeat(np.arange(photos * exits), counts)[order]
    return ExitClassMatches(hit[:, order], ignored[:, order], cell // exits, cell % exits, score[order], objects)


# What routing costs a single photo: objects that it loses and false ones that it adds, at the deployed score.


@dataclass(frozen=True)
class PhotoCounts:
    """Per photo, int [n]: objects found, objects missed, detections that are none; classes summed."""

    hits: np.ndarray
    misses: np.ndarray
    false_positives: np.ndarray


def photo_counts(ground_truth: COCO, detections: Detections, score: float, iou: float) -> PhotoCounts:
    """The counts behind `operating_point`, photo by photo, by rising image id."""
    image_ids, category_ids = sorted(ground_truth.getImgIds()), ground_truth.getCatIds()
    counts = np.zeros((3, len(image_ids)), dtype=np.int64)
    for row, image_id in enumerate(image_ids):
        objects = ground_truth.imgToAnns.get(image_id, [])
        for category_id in category_ids:
            found = match_class(objects, detections.get(image_id), category_id, score, iou)
            counts[:, row] += len(found.ious), found.false_negatives, found.false_positives
    return PhotoCounts(*counts)


def photo_list(
    ground_truth: COCO,
    collected: Collected,
    chosen: Tensor,
    exit_names: Sequence[str],
    files: Callable[[int], object],
    score: float,
    iou: float,
) -> list[dict[str, Any]]:
    """A row for every photo, in the order of ``collected``, by the exit that it takes (``chosen`` [n]).

    ``file``, ``exit`` (its name), ``confidence`` (the router's there; None where its policy has none), ``objects``,
    ``found`` of them, ``lost`` (objects missed beyond what the full path misses there) and ``added`` (false positives
    beyond the full path's); all at ``score`` and ``iou``.

    Args:
        files: image id -> file.
    """
    routed = photo_counts(ground_truth, routed_detections(collected, chosen), score, iou)
    full = photo_counts(ground_truth, collected.detections[-1], score, iou)
    row_of = {image_id: row for row, image_id in enumerate(sorted(ground_truth.getImgIds()))}
    rows = []
    for place, (image_id, exit_index) in enumerate(zip(collected.image_ids, chosen.tolist(), strict=True)):
        row = row_of[image_id]
        confidence = float(collected.confidences[exit_index][place])
        rows.append(
            {
                "file": str(files(image_id)),
                "exit": exit_names[exit_index],
                "confidence": confidence if confidence >= 0 else None,
                "objects": int(routed.hits[row] + routed.misses[row]),
                "found": int(routed.hits[row]),
                "lost": max(0, int(routed.misses[row] - full.misses[row])),
                "added": max(0, int(routed.false_positives[row] - full.false_positives[row])),
            }
        )
    return rows


def losses_against_full(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit, against what the full path says there; [n, exits] in [0, 1].

    min(1, (missed + added) / max(1, |F|)): F are the full path's detections from ``score`` on, missed those of F that
    the exit's detections from ``score`` on do not match at ``iou``, added the exit's that match none of F. 0 in the
    last column. No label is needed.

    Args:
        ground_truth: names the photos and the classes; its objects are not looked at.
        exits: per exit, the full path last.
    """
    truth = as_ground_truth(ground_truth, exits[-1], score)
    return np.stack([_share(photo_counts(truth, found, score, iou)) for found in exits], axis=1)


def losses_against_labels(ground_truth: COCO, exits: Sequence[Detections], score: float, iou: float) -> np.ndarray:
    """Loss of every photo at every exit, against the objects in it; [n, exits] in [0, 1].

    min(1, (max(0, m - m_full) + max(0, f - f_full)) / max(1, objects)): m objects missed and f false positives, each
    beyond those of the full path. 0 in the last column.
    """
    counts = [photo_counts(ground_truth, found, score, iou) for found in exits]
    full = counts[-1]
    objects = np.maximum(full.hits + full.misses, 1)
    worse = [
        np.maximum(one.misses - full.misses, 0) + np.maximum(one.false_positives - full.false_positives, 0)
        for one in counts
    ]
    return np.stack([np.minimum(one / objects, 1.0) for one in worse], axis=1)


def _share(counts: PhotoCounts) -> np.ndarray:
    return np.minimum((counts.misses + counts.false_positives) / np.maximum(counts.hits + counts.misses, 1), 1.0)


@dataclass(frozen=True)
class Agreement:
    """How far a detector says what the full path says, at a score and an IoU.

    Attributes:
        objects: what the full path finds in all photos; kept: how many of them the detector finds.
        added: what it finds beyond them.
        same_photos: share of the photos with nothing lost and nothing added; None without a photo.
    """

    objects: int
    kept: int
    added: int
    same_photos: float | None


def agreement(ground_truth: COCO, full: Detections, found: Detections, score: float, iou: float) -> Agreement:
    """Of what a detector has found with what the full path has; no label is looked at."""
    counts = photo_counts(as_ground_truth(ground_truth, full, score), found, score, iou)
    same = (counts.misses + counts.false_positives) == 0
    objects, kept = int((counts.hits + counts.misses).sum()), int(counts.hits.sum())
    return Agreement(objects, kept, int(counts.false_positives.sum()), float(same.mean()) if len(same) else None)


def as_ground_truth(template: COCO, detections: Detections, score: float) -> COCO:
    """The detections from ``score`` on as objects of the template's photos and classes."""
    annotations: list[Mapping] = []
    for image_id, found in detections.items():
        keep = found["scores"] >= score
        for box, label in zip(xywh(found["boxes"][keep]).tolist(), found["labels"][keep].tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    truth = COCO()
    truth.dataset = {**template.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth

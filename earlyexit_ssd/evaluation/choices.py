"""AP and AP50 of any choice of exits, one per photo, in milliseconds.

Matching never crosses photos, so pycocotools does it once per exit; a choice only selects among the stacked
matches and accumulates again. That gives what pycocotools gives for the detections of the chosen exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.coco import Detections, coco_evaluation


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

"""The figures of one detector on a set of photos, as metrics.json holds them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.evaluation.cost import EAGER
from earlyexit_ssd.evaluation.matches import (
    SIZES,
    APs,
    ExitMatches,
    bootstrap_choices,
    interval,
    mean_precision,
    precision_curves,
)

Figure = float | list[float] | dict[str, dict[str, float | None]] | None
Figures = dict[str, Figure]

COLUMNS = {
    "AP": ("AP", 3),
    "AP50": ("AP50", 3),
    "P": ("precision", 3),
    "R": ("recall", 3),
    "F1": ("f1", 3),
    "FP/img": ("false_positives_per_image", 2),
    "FP/empty": ("false_positives_per_empty_image", 2),
    "loc.err": ("localization_error", 3),
}
"""Heading in the table -> name of a figure and its decimals."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate."""

    score: float = 0.5  # where precision, recall and the like are counted, in [0, 1]
    iou: float = 0.5  # the same
    runs: int = 30  # single-image runs per exit
    threads: int = 1  # CPU threads of these
    runtime: str = EAGER  # what runs the networks meanwhile, a key of RUNTIME_TITLES
    resamples: int = 200  # of the bootstrap over photos; 0 leaves the intervals out
    seed: int = 0  # of the bootstrap


@dataclass(frozen=True)
class DetectorEvaluation:
    """A detector's matches, and the figures that follow from them."""

    matches: ExitMatches  # of one detector (`ExitMatches.choose`), with all `SIZES`
    settings: EvaluationSettings
    labelled: bool = True  # False where the objects are what the full path finds: then accuracy is not known

    @functools.cached_property
    def draws(self) -> APs:
        """AP and AP50 in bootstrap draws; detectors on the same photos share their draws."""
        resamples, everyone = self.settings.resamples if self.labelled else 0, np.zeros(self.matches.photos, np.int64)
        return bootstrap_choices(self.matches, [everyone], resamples, self.settings.seed, ap50_only=False)[0]

    @functools.cached_property
    def figures(self) -> Figures:
        """Average precisions and their intervals, all None without labels, and the figures at the score."""
        accuracy = average_precisions(self.matches)
        accuracy |= {"AP_interval": interval(self.draws.AP), "AP50_interval": interval(self.draws.AP50)}
        accuracy = accuracy if self.labelled else _undefined(accuracy)
        return {**accuracy, **operating_point(self.matches, self.settings.score)}

    def ap50_minus(self, other: DetectorEvaluation) -> list[float] | None:
        """95 % interval of the difference in AP50, on the same draws of photos; None where it is undefined."""
        return interval(self.draws.AP50 - other.draws.AP50)


def _undefined(figures: Figures) -> Figures:
    return {key: _undefined(value) if isinstance(value, dict) else None for key, value in figures.items()}


def average_precisions(matches: ExitMatches) -> Figures:
    """COCO's average precisions of one detector, digit for digit those of pycocotools."""
    curves = {size: precision_curves(matches, size) for size in SIZES}
    every = curves["all"]
    figures = {"AP": every, "AP50": every[:1], "AP75": every[5:6]}
    figures |= {f"AP_{size}": curves[size] for size in ("small", "medium", "large")}
    per_class = {name: {"AP": None, "AP50": None} for name in matches.classes}
    with_objects = np.flatnonzero(matches.objects_by_size["all"].any(axis=1)).tolist()
    for column, label in enumerate(with_objects):
        own = [curve[:, column] for curve in every]
        per_class[matches.classes[label]] = {"AP": mean_precision(own), "AP50": mean_precision(own[:1])}
    return {**{name: mean_precision(part) for name, part in figures.items()}, "per_class": per_class}


def operating_point(matches: ExitMatches, score: float) -> Figures:
    """What a user sees at one score, over all photos and classes; docs/metrics.md says when a figure is None."""
    sure, empty = matches.score >= score, matches.objects == 0
    hit = matches.hit[-1] & sure
    # photo by photo: a mean depends on the order in its last digit
    ious = matches.overlap[hit][np.argsort(matches.photo[hit], kind="stable")]
    false_by_photo = np.bincount(matches.photo[matches.false[-1] & sure], minlength=matches.photos)
    tp, fp, fn = len(ious), int(false_by_photo.sum()), int(matches.objects.sum()) - len(ious)
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "false_positives_per_image": _ratio(fp, matches.photos),
        "false_positives_per_empty_image": _ratio(int(false_by_photo[empty].sum()), int(empty.sum())),
        "localization_error": 1.0 - float(np.mean(ious)) if tp else None,
        "true_positives": tp,
        "false_positives": fp,
        "false_negatives": fn,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

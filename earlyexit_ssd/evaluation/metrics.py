"""The figures of one detector on a set of photos, as metrics.json holds them.

A metric is a function of a `DetectorEvaluation` that returns named figures. `register_metric` puts them into
metrics.json and into the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.evaluation.cost import EAGER
from earlyexit_ssd.evaluation.matches import (
    SIZES,
    APs,
    ExitMatches,
    bootstrap_choices,
    bootstrap_weights,
    interval,
    mean_precision,
    photo_counts,
    precision_curves,
)
from earlyexit_ssd.registry import Registry

Figure = float | list[float] | dict[str, dict[str, float | None]] | None
Figures = dict[str, Figure]


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation."""

    score: float = 0.5  # score threshold of precision, recall and the counts
    iou: float = 0.5  # IoU threshold of the same figures
    runs: int = 30  # timed runs of each network
    threads: int = 1  # CPU threads of these runs
    runtime: str = EAGER  # runtime of these runs, a key of RUNTIME_TITLES
    resamples: int = 200  # bootstrap draws of the photos; with 0 the intervals are None
    seed: int = 0  # seed of the bootstrap


@dataclass(frozen=True)
class DetectorEvaluation:
    """A detector's matches, and the figures that follow from them."""

    matches: ExitMatches  # of one detector (`ExitMatches.choose`), with all `SIZES`
    settings: EvaluationSettings
    labelled: bool = True  # False: the objects are the full path's detections, so AP is None
    blocks: np.ndarray | None = None  # number of the block of each photo, int [n], see `bootstrap_weights`; None: none

    @functools.cached_property
    def draws(self) -> APs:
        """AP and AP50 in every bootstrap draw, [resamples]. Detectors on the same photos have the same draws."""
        resamples, everyone = self.settings.resamples if self.labelled else 0, np.zeros(self.matches.photos, np.int64)
        choices, seed = [everyone], self.settings.seed
        return bootstrap_choices(self.matches, choices, resamples, seed, ap50_only=False, blocks=self.blocks)[0]

    @functools.cached_property
    def figures(self) -> Figures:
        """The figures of all registered metrics."""
        figures: Figures = {}
        for name, metric in METRICS.items():
            values = metric.measure(self)
            if repeated := figures.keys() & values.keys():
                problem = f"metric '{name}' returns the figure '{min(repeated)}', as another metric does"
                raise EarlyExitError(f"{problem}; rename it")
            figures |= values if self.labelled or not metric.needs_labels else _undefined(values)
        return figures

    def ap50_minus(self, other: DetectorEvaluation) -> list[float] | None:
        """Return the 95 % interval of the difference in AP50 on the same bootstrap draws; None if it is undefined."""
        return interval(self.draws.AP50 - other.draws.AP50)

    def mean_draws(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of a value per photo [n] in every bootstrap draw, [resamples]."""
        draws = bootstrap_weights(len(values), self.settings.resamples, self.settings.seed, self.blocks)
        return np.array([np.average(values, weights=weights) for weights in draws])


Measure = Callable[[DetectorEvaluation], Figures]


@dataclass(frozen=True)
class Metric:
    """A function that measures figures, and their columns in the table."""

    measure: Measure
    columns: Mapping[str, tuple[str, int]]  # heading in the table -> name of the figure, number of decimals
    needs_labels: bool  # for photos without labels its figures are None


METRICS: Registry[Metric] = Registry("metric")  # in the order of metrics.json and of the table


def register_metric(
    columns: Mapping[str, tuple[str, int]] | None = None, needs_labels: bool = False
) -> Callable[[Measure], Measure]:
    """Return a decorator that registers a metric under the function's name. The arguments are fields of `Metric`.

    Raises:
        EarlyExitError: a metric of the function's name is registered already, or ``columns`` is no dict.
    """
    if not isinstance(columns, Mapping | None):
        raise EarlyExitError(f"columns of a metric are {shown(columns)}, expected a dict; write @register_metric()")

    def register(measure: Measure) -> Measure:
        METRICS.register(measure.__name__, Metric(measure, columns or {}, needs_labels))
        return measure

    return register


def _undefined(figures: Figures) -> Figures:
    return {key: _undefined(value) if isinstance(value, dict) else None for key, value in figures.items()}


@register_metric({"AP": ("AP", 3), "AP50": ("AP50", 3)}, needs_labels=True)
def average_precisions(detector: DetectorEvaluation) -> Figures:
    """COCO's average precisions, digit for digit those of pycocotools."""
    matches = detector.matches
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


@register_metric(needs_labels=True)
def bootstrap_intervals(detector: DetectorEvaluation) -> Figures:
    """95 % bootstrap intervals over the photos."""
    return {"AP_interval": interval(detector.draws.AP), "AP50_interval": interval(detector.draws.AP50)}


@register_metric(
    {
        "P": ("precision", 3),
        "R": ("recall", 3),
        "F1": ("f1", 3),
        "FP/img": ("false_positives_per_image", 2),
        "FP/empty": ("false_positives_per_empty_image", 2),
        "loc.err": ("localization_error", 3),
    }
)
def operating_point(detector: DetectorEvaluation) -> Figures:
    """Precision, recall and related figures at one score, over all photos and classes (docs/metrics.md)."""
    matches, score = detector.matches, detector.settings.score
    counts, empty = photo_counts(matches, score), matches.objects == 0
    tp, fp, fn = (int(x.sum()) for x in (counts.true_positives, counts.false_positives, counts.false_negatives))
    true = matches.true_positive[-1] & (matches.score >= score)
    # sorted by photo, because the order changes the last digit of the mean
    ious = matches.overlap[true][np.argsort(matches.photo[true], kind="stable")]
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "false_positives_per_image": _ratio(fp, matches.photos),
        "false_positives_per_empty_image": _ratio(int(counts.false_positives[empty].sum()), int(empty.sum())),
        "localization_error": 1.0 - float(np.mean(ious)) if tp else None,
        "true_positives": tp,
        "false_positives": fp,
        "false_negatives": fn,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

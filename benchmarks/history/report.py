"""Tables and pictures of the reproduced history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from benchmarks.history.attempts import ATTEMPTS, EXITS, LIGHT
from benchmarks.history.features import Features
from benchmarks.history.figures import RULE, Trial, detect
from benchmarks.history.training import AttemptLosses, predict
from earlyexit_ssd.report.charts import draw_charts
from earlyexit_ssd.report.pictures import Example, detection_grid

MATCHINGS = {"random": "at random", "iou": "by IoU"}
STRONGEST = 5
"""Detections that are drawn of a photo."""
PHOTOS = 2
"""Photos in the picture of detections."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def attempts_table(trials: Sequence[Trial], ms: Sequence[float]) -> str:
    """The history's own table, with AP50 and the doctor's first finding.

    Args:
        ms: milliseconds to each exit.
    """
    heads = ["attempt", "default boxes", "exit 8 / 12 / full, %", "ms", "confidence", "AP50", "routed", "first finding"]
    rows = []
    for attempt in ATTEMPTS:
        told = attempt.published
        shares, confidences = "/".join(map(str, told.shares)), " ".join(f"{one:.3f}" for one in told.confidences)
        rows.append([attempt.name, "history", shares, f"{told.ms:.1f}", confidences, "never", "never", "-"])
        for one in (one for one in trials if one.attempt == attempt.name):
            cost = sum(exit.share * time for exit, time in zip(one.exits, ms, strict=True))
            rows.append(
                [
                    "",
                    MATCHINGS[one.matching],
                    "/".join(f"{100 * exit.share:.0f}" for exit in one.exits),
                    f"{cost:.1f}",
                    " ".join(f"{exit.confidence:.3f}" for exit in one.exits),
                    " ".join(f"{exit.AP50:.2f}" for exit in one.exits),
                    f"{one.routed_AP50:.2f}",
                    one.findings[0] if one.findings else "nothing",
                ]
            )
    return table(heads, rows)


def light_table(trials: Sequence[Trial]) -> str:
    """AP50 of the branches with and without their parts, mean and range over the seeds."""
    rows = []
    for attempt in LIGHT:
        own = [one for one in trials if one.attempt == attempt.name]
        if own:
            values = [[one.exits[index].AP50 for one in own] for index in range(len(EXITS))]
            cells = [f"{mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in values]
            rows.append([attempt.name, str(len(own)), *cells])
    return table(["branch", "seeds", *EXITS], rows)


def rule_table(trials: Sequence[Trial]) -> str:
    """What the mean foreground decides on detectors that work: those of `light_table` with all parts."""
    shares = ["largest mean foreground", f"at {RULE:.2f} or more"]
    heads = ["seed", "exit", *shares, "AP50 if the highest half leaves", "a random half", "the lowest half"]
    rows = []
    for one in (one for one in trials if one.attempt == LIGHT[0].name):
        for name, rule in zip(EXITS, one.rule, strict=False):
            figures = [f"{value:.3f}" for value in (rule.highest, rule.coin, rule.lowest)]
            rows.append([str(one.seed), name, f"{rule.largest:.3f}", f"{100 * rule.share:.1f} %", *figures])
    return table(heads, rows)


def curves_picture(trials: Sequence[Trial]) -> Image.Image:
    """Confidence of attempt 1.9 and temperatures of attempt 1.7 per epoch, for both assignments of default boxes."""
    found = {(one.attempt, one.matching): one for one in trials}

    def draw(all_axes: np.ndarray) -> None:
        for column, (matching, title) in enumerate(MATCHINGS.items()):
            top, bottom = all_axes[:, column]
            top.set_title(f"default boxes assigned {title}", loc="left")
            for index, name in enumerate(EXITS):
                gated, free = (found[attempt, matching].curve for attempt in ("1.9", "1.7"))
                epochs = [point.epoch for point in gated]
                top.plot(epochs, [point.confidences[index] for point in gated], marker=".", label=name)
                bottom.plot(epochs, [point.temperatures[index] for point in free], marker=".", label=name)
            bottom.set_xlabel("epoch")
            for axes in (top, bottom):
                axes.set_yscale("log")
        label(all_axes[0, 0], "mean confidence, attempt 1.9")
        label(all_axes[1, 0], "temperature, attempt 1.7")
        all_axes[0, 0].legend(frameon=False)

    return draw_charts(draw, 2, 2, (9, 6))


def label(axes: Axes, text: str) -> None:
    """Name the vertical axis."""
    axes.set_ylabel(text)


def detections_picture(losses: Mapping[str, AttemptLosses], features: Features) -> Image.Image:
    """The strongest detections of two exits in the first photos with an object, for both assignments of default boxes.

    Args:
        losses: matching -> trained attempt.
        features: of the photos.
    """
    showing = [row for row, target in enumerate(features.targets) if len(target["boxes"])]
    photos = [features.dataset[row] for row in showing[:PHOTOS]]
    columns, found = [], []
    for matching, trained in losses.items():
        of_exits = detect(trained, predict(trained, features))
        for index in (0, len(EXITS) - 1):
            columns.append(f"{MATCHINGS[matching]}, {EXITS[index]}")
            found.append(of_exits[index])
    examples = []
    for image, target in photos:
        of_photo = [one[int(target["image_id"])] for one in found]
        strongest = [{key: value[:STRONGEST] for key, value in one.items()} for one in of_photo]
        examples.append(Example(image, target, strongest))
    picture = detection_grid(examples, columns, ["chair"], score=0.0)
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    return small.quantize(64)

"""Tables and pictures of the reproduced history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from PIL import Image

from benchmarks.history.attempts import ATTEMPTS, EXITS, LIGHT, PLAIN
from benchmarks.history.features import Features
from benchmarks.history.figures import RULE, Trial, detect
from benchmarks.history.training import HeadLosses, predict
from earlyexit_ssd.report.pictures import Example, detection_grid, draw_charts

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
        results = [(one, own) for one in trials for own in one.attempts if own.attempt == attempt.name]
        for trial, own in results:
            cost = sum(share * time for share, time in zip(own.shares, ms, strict=True))
            rows.append(
                [
                    "",
                    MATCHINGS[trial.matching],
                    "/".join(f"{100 * share:.0f}" for share in own.shares),
                    f"{cost:.1f}",
                    " ".join(f"{one:.3f}" for one in own.confidences),
                    " ".join(f"{exit.AP50:.2f}" for exit in trial.exits),
                    f"{own.routed_AP50:.2f}",
                    own.findings[0] if own.findings else "nothing",
                ]
            )
    return table(heads, rows)


def scores_table(trials: Sequence[Trial]) -> str:
    """What the heads of the attempts have learnt, per exit."""
    heads = ["attempts", "default boxes", "exit", "AP50 [95 %]", "scores: 5 %, 50 %, 95 %", "AUC of the scores"]
    rows = []
    for trial in (one for one in trials if one.attempts[0].attempt != PLAIN.name):
        names = trial.attempts[0].attempt, trial.attempts[-1].attempt
        for name, one in zip(EXITS, trial.exits, strict=True):
            low, high = one.AP50_interval
            rows.append(
                [
                    " to ".join(dict.fromkeys(names)),
                    MATCHINGS[trial.matching],
                    name,
                    f"{one.AP50:.3f} [{low:.3f}, {high:.3f}]",
                    ", ".join(f"{value:.3f}" for value in one.scores),
                    f"{one.score_auc:.2f}",
                    f"{100 * one.large_deltas:.0f} %",
                    f"{one.overlap:.2f}",
                ]
            )
    return table([*heads, "deltas outside [-5, 5]", "overlap of the likeliest box"], rows)


def light_table(trials: Sequence[Trial]) -> str:
    """AP50 of the branches with and without their parts, mean and range over the seeds."""
    rows = []
    for name in (one.name for one in LIGHT):
        own = [one for one in trials if one.detector == name and one.attempts[0].attempt == PLAIN.name]
        if own:
            values = [[one.exits[index].AP50 for one in own] for index in range(len(EXITS))]
            cells = [f"{mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in values]
            rows.append([name, str(len(own)), *cells])
    return table(["branch", "seeds", *EXITS], rows)


def rule_table(trials: Sequence[Trial]) -> str:
    """What the mean foreground decides on detectors that work: those of `light_table` with all parts."""
    shares = ["largest mean foreground", f"at {RULE:.2f} or more"]
    heads = ["seed", "exit", *shares, "AP50 if the highest half leaves", "a random half", "the lowest half"]
    rows = []
    for one in (one for one in trials if one.detector == LIGHT[0].name and one.attempts[0].attempt == PLAIN.name):
        for name, rule in zip(EXITS, one.rule, strict=False):
            figures = [f"{value:.3f}" for value in (rule.highest, rule.coin, rule.lowest)]
            rows.append([str(one.seed), name, f"{rule.largest:.3f}", f"{100 * rule.share:.1f} %", *figures])
    return table(heads, rows)


def curves_picture(trials: Sequence[Trial]) -> Image.Image:
    """Confidence of attempt 1.9 and temperatures of attempt 1.7 per epoch, for both assignments of default boxes."""
    found = {(own.attempt, one.matching): own for one in trials for own in one.attempts}

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
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        all_axes[1, 0].set_yticks([1, 2, 3, 5, 7])
        label(all_axes[0, 0], "mean confidence, attempt 1.9")
        label(all_axes[1, 0], "temperature, attempt 1.7")
        all_axes[0, 0].legend(frameon=False)

    return draw_charts(draw, 2, 2, (9, 6)).quantize(64)


def label(axes: Axes, text: str) -> None:
    """Name the vertical axis."""
    axes.set_ylabel(text)


def detections_picture(losses: Mapping[str, HeadLosses], features: Features, classes: Sequence[str]) -> Image.Image:
    """The strongest detections of two exits in the first photos with an object, for both assignments of default boxes.

    Args:
        losses: matching -> trained heads.
        features: of the photos.
        classes: names of the labels 1..K.
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
    picture = detection_grid(examples, columns, classes, score=0.0)
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    return small.quantize(64)

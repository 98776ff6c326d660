"""Tables and pictures of the reproduced history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from matplotlib.ticker import NullFormatter
from PIL import Image

from benchmarks.history.attempts import ATTEMPTS, EXITS, LIGHT, PLAIN, Detector
from benchmarks.history.features import Features
from benchmarks.history.figures import RULE, Trial, detect
from benchmarks.history.training import HeadLosses, predict
from earlyexit_ssd.report.pictures import Example, detection_grid, draw_charts

MATCHINGS = {"random": "at random", "iou": "by IoU"}
STRONGEST = 5  # number of detections that are drawn in a photo
PHOTOS = 2  # number of photos in the picture of detections


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def attempts_table(trials: Sequence[Trial], ms: Sequence[float]) -> str:
    """Return the history's own table, with AP50 and the doctor's first finding. ``ms`` is the time to each exit."""
    heads = ["attempt", "default boxes", "exit 8 / 12 / full, %", "ms", "confidence", "AP50", "routed", "first finding"]
    rows = []
    for attempt in ATTEMPTS:
        published = attempt.published
        shares, confidences = "/".join(map(str, published.shares)), decimals(published.confidences)
        rows.append([attempt.name, "history", shares, f"{published.ms:.1f}", confidences, "never", "never", "-"])
        results = [(trial, own) for trial in trials for own in trial.attempts if own.attempt == attempt.name]
        for trial, own in results:
            cost = sum(share * time for share, time in zip(own.shares, ms, strict=True))
            rows.append(
                [
                    "",
                    MATCHINGS[trial.matching],
                    "/".join(f"{100 * share:.0f}" for share in own.shares),
                    f"{cost:.1f}",
                    decimals(own.confidences),
                    decimals([figures.AP50 for figures in trial.exits], 2),
                    f"{own.routed_AP50:.2f}",
                    own.findings[0] if own.findings else "nothing",
                ]
            )
    return table(heads, rows)


def decimals(values: Sequence[float], digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def scores_table(trials: Sequence[Trial]) -> str:
    """Return a table of what the heads of the attempts have learnt, a row per exit."""
    heads = ["attempts", "default boxes", "exit", "AP50 [95 %]", "scores: 5 %, 50 %, 95 %", "AUC of the scores"]
    rows = []
    for trial in trials:
        names = trial.attempts[0].attempt, trial.attempts[-1].attempt
        if PLAIN.name in names:
            continue
        for name, figures in zip(EXITS, trial.exits, strict=True):
            low, high = figures.AP50_interval
            rows.append(
                [
                    " to ".join(dict.fromkeys(names)),
                    MATCHINGS[trial.matching],
                    name,
                    f"{figures.AP50:.3f} [{low:.3f}, {high:.3f}]",
                    ", ".join(f"{value:.3f}" for value in figures.scores),
                    f"{figures.score_auc:.2f}",
                    f"{100 * figures.large_deltas:.0f} %",
                    f"{figures.overlap:.2f}",
                ]
            )
    return table([*heads, "deltas outside [-5, 5]", "overlap of the likeliest box"], rows)


def plain_trials(trials: Sequence[Trial], detector: Detector) -> list[Trial]:
    """Return the trials of `PLAIN` with this detector."""
    return [trial for trial in trials if (trial.detector, trial.attempts[0].attempt) == (detector.name, PLAIN.name)]


def light_table(trials: Sequence[Trial]) -> str:
    """Return a table of AP50 of the branches with and without their parts, mean and range over the seeds."""
    rows = []
    for detector in LIGHT:
        if seeds := plain_trials(trials, detector):
            ap50 = [[trial.exits[index].AP50 for trial in seeds] for index in range(len(EXITS))]
            cells = [f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in ap50]
            rows.append([detector.name, str(len(seeds)), *cells])
    return table(["branch", "seeds", *EXITS], rows)


def rule_table(trials: Sequence[Trial]) -> str:
    """Return a table of the mean foreground as a rule, on the detectors of `light_table` with all parts."""
    shares = ["largest mean foreground", f"at {RULE:.2f} or more"]
    heads = ["seed", "exit", *shares, "AP50 if the highest half leaves", "a random half", "the lowest half"]
    rows = []
    for trial in plain_trials(trials, LIGHT[0]):
        for name, rule in zip(EXITS, trial.rule, strict=False):
            figures = [f"{value:.3f}" for value in (rule.highest, rule.coin, rule.lowest)]
            rows.append([str(trial.seed), name, f"{rule.largest:.3f}", f"{100 * rule.share:.1f} %", *figures])
    return table(heads, rows)


def curves_picture(trials: Sequence[Trial]) -> Image.Image:
    """Draw the confidences of attempt 1.9 and the temperatures of attempt 1.7 per epoch, for both assignments of
    default boxes."""
    curves = {(own.attempt, trial.matching): own.curve for trial in trials for own in trial.attempts}

    def draw(all_axes: np.ndarray) -> None:
        for column, (matching, title) in enumerate(MATCHINGS.items()):
            top, bottom = all_axes[:, column]
            top.set_title(f"default boxes assigned {title}", loc="left")
            for index, name in enumerate(EXITS):
                gated, free = (curves[attempt, matching] for attempt in ("1.9", "1.7"))
                epochs = [point.epoch for point in gated]
                top.plot(epochs, [point.confidences[index] for point in gated], marker=".", label=name)
                bottom.plot(epochs, [point.temperatures[index] for point in free], marker=".", label=name)
            bottom.set_xlabel("epoch")
            for axes in (top, bottom):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        all_axes[1, 0].set_yticks([1, 2, 3, 5, 7])
        all_axes[0, 0].set_ylabel("mean confidence, attempt 1.9")
        all_axes[1, 0].set_ylabel("temperature, attempt 1.7")
        all_axes[0, 0].legend(frameon=False)

    return draw_charts(draw, 2, 2, (9, 6)).quantize(64)


def detections_picture(losses: Mapping[str, HeadLosses], features: Features, classes: Sequence[str]) -> Image.Image:
    """Draw the strongest detections of two exits in the first photos with an object.

    Args:
        losses: matching -> trained heads.
        classes: names of the labels 1..K.
    """
    rows = [row for row, target in enumerate(features.targets) if len(target["boxes"])][:PHOTOS]
    columns, detections = [], []
    for matching, trained in losses.items():
        of_exits = detect(trained, predict(trained, features))
        for index in (0, len(EXITS) - 1):
            columns.append(f"{MATCHINGS[matching]}, {EXITS[index]}")
            detections.append(of_exits[index])
    examples = []
    for image, target in (features.dataset[row] for row in rows):
        of_photo = [of_exit[int(target["image_id"])] for of_exit in detections]
        strongest = [{key: value[:STRONGEST] for key, value in boxes.items()} for boxes in of_photo]
        examples.append(Example(image, target, strongest))
    picture = detection_grid(examples, columns, classes, score=0.0)
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    return small.quantize(64)

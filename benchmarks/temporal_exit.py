#!/usr/bin/env python
"""Compare a temporal exit with running the detector on every n-th frame only.

The rule is calibrated on the first half of a video, and the figures are from the second half. No labels are needed: the
figures measure the agreement with the detector's detections on every frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.console import run_tool
from earlyexit_ssd.deploy import Detections, Predictor
from earlyexit_ssd.deploy.predict import images_of, open_predictor
from earlyexit_ssd.deploy.sources import find_sources
from earlyexit_ssd.deploy.stream import MOST_REPEATS, StreamRecording, StreamRule, calibrate_stream
from earlyexit_ssd.errors import EarlyExitError, suggest

EXAMPLES = """
examples:
  %(prog)s --weights coco.onnx --classes bottle --share 0.02 bottle-detection.mp4
      a detector of 80 classes, of which one is used; without a guarantee
  %(prog)s --weights coco.onnx --classes bottle --share 0.1 --delta 0.05 --block 15 bottle-detection.mp4
      the share is guaranteed with probability 0.95, on blocks of 15 frames
"""
RESAMPLES = 4000


class OnlyClasses:
    """A detector without the detections of other classes than ``names``. The labels stay the same."""

    def __init__(self, predictor: Predictor, names: Sequence[str]) -> None:
        for name in names:
            if name not in predictor.classes:
                raise EarlyExitError(
                    f"--classes has {name!r}, expected classes of the detector{suggest(name, predictor.classes)}"
                )
        self.predictor, self.classes = predictor, tuple(names or predictor.classes)
        self.labels = [predictor.classes.index(name) + 1 for name in self.classes]

    def __call__(self, image: np.ndarray) -> Detections:
        result = self.predictor(image)
        keep = np.isin(result.labels, self.labels)
        names = [name for name in result.class_names if name in self.classes]
        kept = {"boxes": result.boxes[keep], "labels": result.labels[keep], "scores": result.scores[keep]}
        return dataclasses.replace(result, **kept, class_names=names)


@dataclass(frozen=True)
class Row:
    """Figures of the second half, three of them with a 95 % bootstrap interval over blocks: (value, low, high)."""

    frames: int
    speedup: tuple[float, float, float]  # over the detector on every frame; comparing frames counts as time
    agreement: tuple[float, float, float]  # share of frames with the detections of the detector
    gain: tuple[float, float, float]  # agreement minus the agreement of every n-th frame at the same cost
    events: int  # number of changes of the detections

    def __str__(self) -> str:
        figures = (self.speedup, self.agreement, self.gain)
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in figures]
        return f"| {self.frames} | {' | '.join(cells)} | {self.events} |"


def report(recording: StreamRecording, rule: StreamRule, block: int) -> Row:
    """Return the figures of ``rule`` on a recording. The bootstrap resamples blocks of ``block`` frames."""
    computed, changed = recording.apply_rule(rule.threshold, rule.most_repeats)
    figures = recording.figures(rule.threshold, rule.most_repeats, 0.5, None, block)
    rival = np.mean([recording.changed(run) for run in recording.nth_frames(figures.speedup)], axis=0)
    count = max(1, len(recording) // block)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))

    def resampled(losses: np.ndarray) -> np.ndarray:
        """Means [RESAMPLES] of ``losses`` [frames]."""
        return losses[: count * block].reshape(count, -1).mean(1)[draws].mean(1)

    def interval(value: float, drawn: np.ndarray) -> tuple[float, float, float]:
        return value, *np.percentile(drawn, [2.5, 97.5]).tolist()

    compared = recording.ms_compared / recording.ms
    return Row(
        len(recording),
        interval(figures.speedup, 1 / (resampled(computed) + compared)),
        interval(1 - figures.changed, 1 - resampled(changed)),
        interval(float(rival.mean()) - figures.changed, resampled(rival) - resampled(changed)),
        figures.events,
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run the videos and print a table for each. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", help="videos of static cameras")
    parser.add_argument("--weights", required=True, help="an exported detector")
    parser.add_argument("--classes", nargs="+", default=[], help="classes to use; all by default")
    parser.add_argument("--score", type=float, default=0.5, help="score threshold of detections; 0.5")
    parser.add_argument("--share", type=float, default=0.02, help="largest share of frames with other detections; 0.02")
    parser.add_argument("--delta", type=float, help="probability that the guarantee may fail; no guarantee by default")
    parser.add_argument("--block", type=int, default=30, help="frames of a block, which is treated as independent; 30")
    repeats = f"largest number of repeated detections in a row; {MOST_REPEATS}"
    parser.add_argument("--most-repeats", type=int, default=MOST_REPEATS, help=repeats)
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        detector = OnlyClasses(open_predictor(args.weights, "onnxruntime", 1, args.score), args.classes)
        for source in find_sources(args.videos):
            recording = StreamRecording.of(detector, images_of([source]), args.score)
            half = len(recording) // 2
            first, second = recording.part(0, half), recording.part(half, len(recording))
            rule = calibrate_stream(detector, first, args.share, args.delta, args.block, args.score, args.most_repeats)
            print(f"{source.title}: {recording.ms:.1f} ms per frame, {recording.ms_compared:.2f} ms per comparison")
            print(f"first half, threshold {rule.threshold:.2f}: {rule.figures}\n")
            print("| frames | speed-up | agreement | more than every n-th frame | changes of the answer |")
            print(f"| ---: | ---: | ---: | ---: | ---: |\n{report(second, rule, args.block)}\n")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

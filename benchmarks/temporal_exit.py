#!/usr/bin/env python
"""A temporal exit against every n-th frame: the first half of a video calibrates, the second half is reported.

Nobody labels the frames. What counts is the agreement with the detector's own answer on every frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlyexit_ssd.command_line import run_tool
from earlyexit_ssd.deploy import Detections, Predictor
from earlyexit_ssd.deploy.predict import images_of, open_predictor
from earlyexit_ssd.deploy.sources import find_sources
from earlyexit_ssd.deploy.stream import MOST_REPEATS, Recording, StreamRule, calibrate_stream
from earlyexit_ssd.errors import EarlyExitError, nearest

EXAMPLES = """
examples:
  %(prog)s --weights coco.onnx --classes bottle --share 0.02 bottle-detection.mp4
      a detector of 80 classes, of which one counts; nothing is promised
  %(prog)s --weights coco.onnx --classes bottle --share 0.1 --delta 0.05 --block 15 bottle-detection.mp4
      the share is promised with probability 0.95, on blocks of 15 frames
"""
RESAMPLES = 4000


class OnlyClasses:
    """A detector of which some classes count; labels stay as they are."""

    def __init__(self, predictor: Predictor, names: Sequence[str]) -> None:
        for name in names:
            if name not in predictor.classes:
                raise EarlyExitError(f"--classes {name!r}: no class of the detector{nearest(name, predictor.classes)}")
        self.predictor, self.classes = predictor, tuple(names or predictor.classes)
        self.labels = [predictor.classes.index(name) + 1 for name in self.classes]

    def __call__(self, image: np.ndarray) -> Detections:
        found = self.predictor(image)
        keep = np.isin(found.labels, self.labels)
        names = [name for name in found.class_names if name in self.classes]
        parts = {"boxes": found.boxes[keep], "labels": found.labels[keep], "scores": found.scores[keep]}
        return dataclasses.replace(found, **parts, class_names=names)


@dataclass(frozen=True)
class Row:
    """Of the half that is reported, each figure with its 95 % bootstrap interval over blocks.

    speedup: in milliseconds, comparison included. agreement: share of equal answers. gain: agreement minus that of
    every n-th frame at the same cost.
    """

    frames: int
    speedup: tuple[float, float, float]
    agreement: tuple[float, float, float]
    gain: tuple[float, float, float]
    events: int

    def __str__(self) -> str:
        shown = [f"{one[0]:.3f} [{one[1]:.3f}, {one[2]:.3f}]" for one in (self.speedup, self.agreement, self.gain)]
        return f"| {self.frames} | {' | '.join(shown)} | {self.events} |"


def report(recording: Recording, rule: StreamRule, block: int) -> Row:
    """What ``rule`` does on a recording; blocks of ``block`` frames are drawn again for the intervals."""
    computed, changed = recording.with_rule(rule.threshold, rule.most_repeats)
    figures = recording.figures(rule.threshold, rule.most_repeats, 0.5, None, block)
    rival = np.mean([recording.changed(one) for one in recording.nth_frames(figures.speedup)], axis=0)
    count = max(1, len(recording) // block)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))

    def of(losses: np.ndarray) -> np.ndarray:
        return losses[: count * block].reshape(count, -1).mean(1)[draws].mean(1)

    def interval(value: float, drawn: np.ndarray) -> tuple[float, float, float]:
        return value, *np.percentile(drawn, [2.5, 97.5]).tolist()

    compared = recording.ms_compared / recording.ms
    return Row(
        len(recording),
        interval(figures.speedup, 1 / (of(computed) + compared)),
        interval(1 - figures.changed, 1 - of(changed)),
        interval(float(rival.mean()) - figures.changed, of(rival) - of(changed)),
        figures.events,
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, watch the videos, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", help="of static cameras")
    parser.add_argument("--weights", required=True, help="an exported detector")
    parser.add_argument("--classes", nargs="+", default=[], help="that count; all by default")
    parser.add_argument("--score", type=float, default=0.5, help="0.5")
    parser.add_argument("--share", type=float, default=0.02, help="of changed answers; 0.02")
    parser.add_argument("--delta", type=float, help="of a promise; by default nothing is promised")
    parser.add_argument("--block", type=int, default=30, help="frames that count as one draw; 30")
    parser.add_argument("--most-repeats", type=int, default=MOST_REPEATS, help=f"{MOST_REPEATS}")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        detector = OnlyClasses(open_predictor(args.weights, "onnxruntime", 1, args.score), args.classes)
        for source in find_sources(args.videos):
            recording = Recording.of(detector, images_of([source]), args.score)
            half = len(recording) // 2
            first, second = recording.part(0, half), recording.part(half, len(recording))
            rule = calibrate_stream(detector, first, args.share, args.delta, args.block, args.score, args.most_repeats)
            print(f"{source.title}: {recording.ms:.1f} ms a frame, {recording.ms_compared:.2f} ms a comparison")
            print(f"first half, threshold {rule.threshold:.2f}: {rule.figures}\n")
            print("| frames | speed-up | agreement | more than every n-th frame | changes of the answer |")
            print(f"| ---: | ---: | ---: | ---: | ---: |\n{report(second, rule, args.block)}\n")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

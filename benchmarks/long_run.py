#!/usr/bin/env python
"""Measure whether memory, open files and detections of a predictor stay the same over many frames. Linux only."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earlyexit_ssd.console import run_tool
from earlyexit_ssd.deploy import Detections, Predictor
from earlyexit_ssd.deploy.predict import images_of
from earlyexit_ssd.deploy.sources import find_sources
from earlyexit_ssd.errors import EarlyExitError

EXAMPLES = """
examples:
  %(prog)s detector.onnx bottle-detection.mp4
      10,000 frames: the first 100 frames of the video, repeated
"""


@dataclass(frozen=True)
class Row:
    """State of the process after a number of frames."""

    frames: int  # frames that were run so far
    memory_mb: float  # resident memory, MB
    files: int  # number of open files
    changed: int  # frames whose detections differ from those of the first run of the same frame


def long_run(predictor: Predictor, images: Sequence[np.ndarray], frames: int, rows: int = 10) -> Iterator[Row]:
    """Run ``frames`` frames by repeating ``images``. Yield ``rows`` rows, evenly spaced."""
    first: dict[int, Detections] = {}
    changed, step = 0, max(1, frames // rows)
    for number, index in enumerate(itertools.islice(itertools.cycle(range(len(images))), frames), start=1):
        detections = predictor(images[index])
        changed += not _equal(first.setdefault(index, detections), detections)
        if number % step == 0:
            yield Row(number, _memory_mb(), len(os.listdir("/proc/self/fd")), changed)


def _equal(a: Detections, b: Detections) -> bool:
    arrays = all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ("boxes", "labels", "scores"))
    return arrays and (a.exit_index, a.exit_confidence) == (b.exit_index, b.exit_confidence)


def _memory_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def job(args: argparse.Namespace) -> None:
    """Run the frames and print each row when it is complete."""
    images = list(itertools.islice(images_of(find_sources(args.sources)), args.distinct))
    if not images:
        raise EarlyExitError(f"{', '.join(args.sources)[:100]}: no frame could be read; use other photos or videos")
    predictor = Predictor(args.detector, "openvino" if args.detector.endswith(".xml") else "onnxruntime")
    print(f"{len(images)} frames, repeated\n")
    print("| frames | memory, MB | open files | other answers |\n|---|---|---|---|")
    for row in long_run(predictor, images, args.frames):
        print(f"| {row.frames} | {row.memory_mb:.1f} | {row.files} | {row.changed} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detector", help="file of earlyexit export; .xml runs in OpenVINO, .onnx in ONNX Runtime")
    parser.add_argument("sources", nargs="+", help="photos, folders, videos")
    parser.add_argument("--frames", type=int, default=10_000, help="number of frames; 10,000")
    parser.add_argument("--distinct", type=int, default=100, help="number of different frames, kept in memory; 100")
    args = parser.parse_args(arguments)
    return run_tool(lambda: job(args))


if __name__ == "__main__":
    sys.exit(main())

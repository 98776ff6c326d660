#!/usr/bin/env python
"""Do memory, open files and answers of a predictor stay the same over many frames? Linux only."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earlyexit_ssd.command_line import run_tool
from earlyexit_ssd.deploy import Detections, Predictor
from earlyexit_ssd.deploy.predict import images_of
from earlyexit_ssd.deploy.sources import find_sources
from earlyexit_ssd.errors import EarlyExitError

EXAMPLES = """
examples:
  %(prog)s detector.onnx bottle-detection.mp4
      10,000 frames: 100 frames of the video, again and again
"""


@dataclass(frozen=True)
class Row:
    """The process after so many frames.

    Attributes:
        frames: run so far.
        memory_mb: resident memory, MB.
        files: open files.
        changed: frames whose answer was not that of the same frame before.
    """

    frames: int
    memory_mb: float
    files: int
    changed: int


def long_run(predictor: Predictor, images: Sequence[np.ndarray], frames: int, rows: int = 10) -> Iterator[Row]:
    """Run the images in turn until there were ``frames``; yields ``rows`` rows, evenly spaced."""
    first: dict[int, Detections] = {}
    changed, step = 0, max(1, frames // rows)
    for number, place in enumerate(itertools.islice(itertools.cycle(range(len(images))), frames), start=1):
        found = predictor(images[place])
        changed += not _same(first.setdefault(place, found), found)
        if number % step == 0:
            yield Row(number, _memory_mb(), len(os.listdir("/proc/self/fd")), changed)


def _same(one: Detections, other: Detections) -> bool:
    arrays = all(np.array_equal(getattr(one, key), getattr(other, key)) for key in ("boxes", "labels", "scores"))
    return arrays and (one.exit_index, one.exit_confidence) == (other.exit_index, other.exit_confidence)


def _memory_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def job(args: argparse.Namespace) -> None:
    """Run, and print a row as soon as it is there."""
    images = list(itertools.islice(images_of(find_sources(args.sources)), args.distinct))
    if not images:
        raise EarlyExitError(f"{', '.join(args.sources)[:100]}: no frame could be read; name others")
    predictor = Predictor(args.detector, "openvino" if args.detector.endswith(".xml") else "onnxruntime")
    print(f"{len(images)} frames, again and again\n")
    print("| frames | memory, MB | open files | other answers |\n|---|---|---|---|")
    for row in long_run(predictor, images, args.frames):
        print(f"| {row.frames} | {row.memory_mb:.1f} | {row.files} | {row.changed} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; the exit code as the tools have it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detector", help="what earlyexit export wrote; .xml runs in OpenVINO")
    parser.add_argument("sources", nargs="+", help="photos, folders, videos")
    parser.add_argument("--frames", type=int, default=10_000, help="10,000")
    parser.add_argument("--distinct", type=int, default=100, help="frames kept in memory; 100")
    args = parser.parse_args(arguments)
    return run_tool(lambda: job(args))


if __name__ == "__main__":
    sys.exit(main())

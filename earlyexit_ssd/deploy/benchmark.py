"""Time detectors in turns, from a decoded photo to its detections. PyTorch is not imported."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from earlyexit_ssd.console import progress
from earlyexit_ssd.deploy.predictor import Predictor
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.images import read_image

logger = logging.getLogger(__name__)

PACKAGES = ("earlyexit_ssd", "numpy", "onnxruntime", "openvino", "torch", "torchvision")
MIXED, EASY, HARD = "as they come", "all easy", "all hard"  # see `Row.stream`
DRAWS = 2000  # number of bootstrap draws
MIN_CALLS = 6  # smallest number of calls for an interval
WARM_UP_CALLS = 2

Detect = Callable[[list[np.ndarray]], "list[int | None]"]
"""Function from photos uint8 [H, W, 3] RGB to the index of the early exit of each; None for the full path."""


@dataclass(frozen=True)
class Contestant:
    """Base class of a detector in a file, to be timed in its own process.

    Subclasses have the attribute ``runtime``, such as ``ONNX Runtime``. Ratios compare detectors of the same runtime.
    """

    path: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(self.path).name

    def open(self, threads: int, score: float) -> Detect:
        """Load the detector for this number of threads and this score threshold."""
        raise NotImplementedError  # defined by `ExportedFile`, and by subclasses in pipeline/predictor.py


@dataclass(frozen=True)
class ExportedFile(Contestant):
    """An output of ``earlyexit export``. A file .xml runs in OpenVINO, any other in ONNX Runtime."""

    @property
    def runtime(self) -> str:
        return "OpenVINO" if self.path.lower().endswith(".xml") else "ONNX Runtime"

    def open(self, threads: int, score: float) -> Detect:
        runtime = "openvino" if self.runtime == "OpenVINO" else "onnxruntime"
        predictor = Predictor(self.path, runtime, threads, score)
        predictor.warm_up()
        exits = [*range(len(predictor.exit_names) - 1), None]
        return lambda photos: [exits[detections.exit_index] for detections in predictor.predict(photos)]


@dataclass(frozen=True)
class Times:
    """Milliseconds per photo: mean and percentiles over calls."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Times:
        return cls(float(values.mean()), *map(float, np.quantile(values, (0.5, 0.9, 0.99))))


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % bootstrap interval over calls. With fewer than `MIN_CALLS` calls it has none."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


@dataclass(frozen=True)
class Comparison:
    """Times of a detector divided by those of the detector ``name``, for the means and the p99s."""

    name: str
    wall: Ratio
    cpu: Ratio
    wall_p99: Ratio
    cpu_p99: Ratio


@dataclass(frozen=True)
class Row:
    """Figures of one detector in one setting.

    Attributes:
        batch: number of photos per call.
        stream: group of photos: ``as they come`` (all), ``all easy`` (the first detector lets them leave at the
            shallowest exit that it uses) or ``all hard`` (they take its full path).
        photos: number of photos in the group.
        calls: number of timed calls.
        wall, cpu: wall time, and CPU time of all threads of the process.
        against: comparison with the first detector of the same runtime. The first detector of each runtime is compared
            with the first detector of all. None for this one.
        peak_mb: peak memory of the process in MB; None if the system does not report it.
    """

    name: str
    runtime: str
    threads: int
    batch: int
    stream: str
    photos: int
    calls: int
    wall: Times
    cpu: Times
    against: Comparison | None
    peak_mb: float | None


def benchmark(
    contestants: Sequence[Contestant],
    photos: Sequence[str],
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = 1,
    score: float = 0.5,
) -> list[Row]:
    """Time all detectors on all photos in turns. Each detector runs in its own process.

    Times include resizing and non-maximum suppression, and exclude decoding of the photo.

    Args:
        contestants: detectors, the routed detector first.
        photos: paths of the photos.
        threads: numbers of threads. All detectors are timed with each.
        batches: numbers of photos per call. An incomplete last call is not run.
        rounds: number of passes over all photos.
        score: score threshold of the detections.

    Raises:
        EarlyExitError: a detector or photo cannot be read, a number is out of its range, or a process has died.
    """
    for name, numbers in (("threads", threads), ("batch", batches), ("rounds", [rounds])):
        if not numbers or min(numbers) < 1:
            raise EarlyExitError(f"{name} {list(numbers)}: expected whole numbers, at least 1")
    if not 0 <= score <= 1:
        raise EarlyExitError(f"score {score}: expected a number in [0, 1]")
    if not contestants or len(photos) < min(batches):
        expected = f"expected at least one detector, and at least {min(batches)} readable photos (no videos)"
        raise EarlyExitError(f"{len(photos)} photos and {len(contestants)} detectors: {expected}")
    rows = []
    for thread_count in threads:
        with ExitStack() as stack:
            workers = [stack.enter_context(_Worker(contestant)) for contestant in contestants]
            for worker in progress(workers, desc=f"open, threads {thread_count}"):
                worker(_open, worker.contestant, thread_count, score)
            timed = []
            for batch, (stream, group) in itertools.product(batches, _streams(workers[0], photos).items()):
                if len(group) < batch:
                    logger.warning("batch %d is not timed on %s photos: there are %d", batch, stream, len(group))
                    continue
                times = _time(workers, group, batch, rounds, f"threads {thread_count}, batch {batch}, {stream}")
                timed.append(((thread_count, batch, stream, len(group) // batch * batch), times))
            peaks = [worker(_peak_mb) for worker in workers]
        for setting, times in timed:
            rows += _rows(contestants, setting, times, peaks)
    return rows


def _streams(worker: _Worker, photos: Sequence[str]) -> dict[str, list[str]]:
    """Return groups of the photos, by the exits at which they leave in the detector of ``worker``."""
    exits = []
    for photo in progress(photos, desc="find the exits of photos"):
        _, _, (exit_index,) = worker(_run, [photo])
        exits.append(exit_index)
    shallowest = min((index for index in exits if index is not None), default=None)
    if shallowest is None:
        return {MIXED: list(photos)}
    easy = [photo for photo, index in zip(photos, exits, strict=True) if index == shallowest]
    hard = [photo for photo, index in zip(photos, exits, strict=True) if index is None]
    return {MIXED: list(photos), EASY: easy, HARD: hard}


def _time(workers: Sequence[_Worker], photos: Sequence[str], batch: int, rounds: int, desc: str) -> np.ndarray:
    """Return milliseconds per photo [detectors, rounds, calls, 2], the last axis for wall time and CPU time."""
    calls = [list(photos[start : start + batch]) for start in range(0, len(photos) - batch + 1, batch)]
    for worker, call in itertools.product(workers, [calls[0]] * WARM_UP_CALLS):
        worker(_run, call)
    times = np.zeros((len(workers), rounds, len(calls), 2))
    turns = list(itertools.product(range(rounds), range(len(calls))))
    for turn, (round_index, call_index) in enumerate(progress(turns, desc=desc)):
        for step in range(len(workers)):
            index = (turn + step) % len(workers)  # each turn starts with another detector
            times[index, round_index, call_index] = workers[index](_run, calls[call_index])[:2]
    return 1000 * times / batch


def _rows(
    contestants: Sequence[Contestant],
    setting: tuple[int, int, str, int],
    times: np.ndarray,
    peaks: Sequence[float | None],
) -> Iterator[Row]:
    """Yield a row for each detector. ``setting`` is (threads, batch, stream, photos); for ``times`` see `_time`."""
    runtimes, names = [contestant.runtime for contestant in contestants], [each.name for each in contestants]
    names = [each.path if names.count(each.name) > 1 else each.name for each in contestants]
    for index, contestant in enumerate(contestants):
        first, comparison = runtimes.index(contestant.runtime), None
        reference = 0 if first == index else first
        if index:
            ratios = [
                ratio(times[index, ..., clock], times[reference, ..., clock], quantile)
                for quantile, clock in itertools.product((None, 0.99), range(2))
            ]
            comparison = Comparison(names[reference], *ratios)
        wall, cpu = times[index, ..., 0], times[index, ..., 1]
        figures = Times.of(wall), Times.of(cpu)
        yield Row(names[index], contestant.runtime, *setting, wall.size, *figures, comparison, peaks[index])


def ratio(times: np.ndarray, against: np.ndarray, quantile: float | None = None) -> Ratio:
    """Divide the mean (or a quantile) of ``times`` by that of ``against``, both [rounds, calls].

    The bootstrap draws calls, with all rounds, and the same calls in both arrays.
    """

    def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        if quantile is None:
            return numerator.mean(-1) / denominator.mean(-1)
        return np.quantile(numerator, quantile, axis=-1) / np.quantile(denominator, quantile, axis=-1)

    value = float(divide(times.ravel(), against.ravel()))
    if times.shape[1] < MIN_CALLS:
        return Ratio(value, None, None)
    drawn = np.random.default_rng(0).integers(0, times.shape[1], (DRAWS, times.shape[1]))
    resampled = [np.concatenate([calls[drawn] for calls in array], axis=1) for array in (times, against)]
    low, high = np.quantile(divide(*resampled), (0.025, 0.975))
    return Ratio(value, float(low), float(high))


def table(rows: Sequence[Row]) -> str:
    """Return Markdown with one table for each setting."""
    heads = ["detector", "runtime", "mean", "p50", "p90", "p99", "CPU mean", "CPU p99", "MB", "against"]
    heads += [f"x {figure}" for figure in ("mean", "CPU mean", "p99", "CPU p99")]
    lines: list[str] = []
    settings = itertools.groupby(rows, key=lambda row: (row.threads, row.batch, row.stream, row.photos, row.calls))
    for (threads, batch, stream, photos, calls), group in settings:
        title = f"threads {threads}, batch {batch}, {photos} photos {stream}, {calls} calls; milliseconds for a photo"
        lines += [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in group:
            times = (row.wall.mean, row.wall.p50, row.wall.p90, row.wall.p99, row.cpu.mean, row.cpu.p99)
            cells = [row.name, row.runtime, *(f"{value:.1f}" for value in times)]
            cells.append("-" if row.peak_mb is None else f"{row.peak_mb:.0f}")
            if row.against is None:
                cells += ["-"] * 5
            else:
                ratios = (row.against.wall, row.against.cpu, row.against.wall_p99, row.against.cpu_p99)
                cells += [row.against.name, *map(str, ratios)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Describe the machine of the figures: processor, cores, load, system, and versions by package."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # the file exists only on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    details = {"processor": name, "cores": os.cpu_count(), "load": load, "system": platform.platform()}
    return {**details, "versions": versions}


# Each detector has its own process, so that its memory and threads can be measured.


class _Worker(ProcessPoolExecutor):
    """A process of a detector. ``worker(job, ...)`` runs ``job(...)`` in it and returns the result."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__(1, mp_context=get_context("spawn"))
        self.contestant = contestant

    def __call__(self, job: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.submit(job, *arguments).result()
        except BrokenProcessPool:
            fix = "maybe out of memory; time fewer detectors at once"
            raise EarlyExitError(f"{self.contestant.name}: its process died, {fix}") from None


_detect: Detect  # set by `_open` in the process of a detector


def _open(contestant: Contestant, threads: int, score: float) -> None:
    global _detect
    _detect = contestant.open(threads, score)


def _run(paths: list[str]) -> tuple[float, float, list[int | None]]:
    """Return wall and CPU seconds of a call, without decoding, and the exits of the photos."""
    photos = [read_image(path) for path in paths]
    wall, cpu = time.perf_counter(), time.process_time()
    exits = _detect(photos)
    return time.perf_counter() - wall, time.process_time() - cpu, exits


def _peak_mb() -> float | None:
    """Return the peak memory of this process in MB, not by ``getrusage``, which can report the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)

"""Time detectors side by side, from a decoded photo to its detections; PyTorch is not imported."""

from __future__ import annotations

import itertools
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

from earlyexit_ssd.deploy.predictor import Predictor
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.images import read_image
from earlyexit_ssd.progress import progress

PACKAGES = ("earlyexit_ssd", "numpy", "onnxruntime", "openvino", "torch", "torchvision")
MIXED, EASY, HARD = "as they come", "all easy", "all hard"
DRAWS = 2000  # of the bootstrap
FEWEST = 6  # calls of which an interval says something
WARM_UP_CALLS = 2

Detect = Callable[[list[np.ndarray]], "list[int | None]"]
"""Photos uint8 [H, W, 3] RGB to the early exit that each has left at; None: everything was computed."""


@dataclass(frozen=True)
class Contestant:
    """A detector in a file, opened in a process of its own; base class.

    ``runtime`` is ONNX Runtime, OpenVINO, ... What is timed first in a runtime is what the others there are held
    against.
    """

    path: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    def open(self, threads: int, score: float) -> Detect:
        """Load it, for ``threads`` threads and detections from ``score`` on."""
        raise NotImplementedError  # abstract: `ExportedFile` and the eager ones of pipeline.predictor define it


@dataclass(frozen=True)
class ExportedFile(Contestant):
    """What ``earlyexit export`` has written: .xml runs in OpenVINO, all else in ONNX Runtime."""

    @property
    def runtime(self) -> str:
        return "OpenVINO" if self.path.lower().endswith(".xml") else "ONNX Runtime"

    def open(self, threads: int, score: float) -> Detect:
        predictor = Predictor(self.path, self.runtime.lower().replace(" ", ""), threads, score)
        predictor.warm_up()
        early = [*range(len(predictor.exit_names) - 1), None]  # None for the full path
        return lambda photos: [early[found.exit_index] for found in predictor.predict(photos)]


@dataclass(frozen=True)
class Times:
    """Milliseconds for a photo."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Times:
        return cls(float(values.mean()), *map(float, np.quantile(values, (0.5, 0.9, 0.99))))


@dataclass(frozen=True)
class Ratio:
    """With a 95 % bootstrap interval over the calls; None where they are fewer than `FEWEST`."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


@dataclass(frozen=True)
class Comparison:
    """A detector's times through those of the detector ``name``: of their means and of their p99."""

    name: str
    wall: Ratio
    cpu: Ratio
    wall_p99: Ratio
    cpu_p99: Ratio


@dataclass(frozen=True)
class Row:
    """One detector in one setting.

    Attributes:
        stream: which photos, ``as they come``, ``all easy`` (that leave at the shallowest exit taken) or ``all hard``
            (that go through everything), by the first detector.
        photos: in it; calls: timed, each of ``batch`` photos.
        wall, cpu: time on the clock, and of all threads of the process.
        against: the first detector of the same runtime, or the first of all where it is that itself; None for the
            first of all.
        peak_mb: memory of the process at its peak; None where the system does not say.
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
    """Time all detectors on all photos in turns, each in a process of its own.

    Decoding is left out; resizing and non-maximum suppression are in.

    Args:
        contestants: the routed detector first.
        photos: files.
        threads: of each detector, one run for each number.
        batches: photos in a call; those that do not fill a last call are left out.
        rounds: over all photos.
        score: score threshold of the detections.

    Raises:
        EarlyExitError: a detector or a photo that cannot be read, a number out of its range, or a process that died.
    """
    for name, numbers in (("threads", threads), ("batch", batches), ("rounds", [rounds])):
        if not numbers or min(numbers) < 1:
            raise EarlyExitError(f"{name} {list(numbers)}: expected whole numbers, at least 1")
    if not 0 <= score <= 1:
        raise EarlyExitError(f"score {score}: expected a number in [0, 1]")
    if not contestants or len(photos) < min(batches):
        raise EarlyExitError(f"{len(photos)} photos and {len(contestants)} detectors: name one, and photos for a call")
    rows = []
    for number in threads:
        with ExitStack() as stack:
            workers = [stack.enter_context(_Worker(one)) for one in contestants]
            for worker in progress(workers, desc=f"open, threads {number}"):
                worker(_open, worker.contestant, number, score)
            timed = []
            for batch, (stream, inside) in itertools.product(batches, _streams(workers[0], photos).items()):
                if len(inside) >= batch:
                    times = _time(workers, inside, batch, rounds, f"threads {number}, batch {batch}, {stream}")
                    timed.append(((number, batch, stream, len(inside)), times))
            peaks = [worker(_peak_mb) for worker in workers]
        for setting, times in timed:
            rows += _rows(contestants, setting, times, peaks)
    return rows


def _streams(worker: _Worker, photos: Sequence[str]) -> dict[str, list[str]]:
    """The photos by what the first detector does with them."""
    exits = [worker(_run, [photo])[2][0] for photo in progress(photos, desc="where photos leave")]
    first = min((one for one in exits if one is not None), default=None)
    if first is None:
        return {MIXED: list(photos)}
    easy, hard = ([photo for photo, one in zip(photos, exits, strict=True) if one == end] for end in (first, None))
    return {MIXED: list(photos), EASY: easy, HARD: hard}


def _time(workers: Sequence[_Worker], photos: Sequence[str], batch: int, rounds: int, desc: str) -> np.ndarray:
    """Milliseconds for a photo [detectors, rounds, calls, 2], on the clock and of the CPU."""
    calls = [list(photos[start : start + batch]) for start in range(0, len(photos) - batch + 1, batch)]
    for worker, call in itertools.product(workers, [calls[0]] * WARM_UP_CALLS):
        worker(_run, call)
    times = np.zeros((len(workers), rounds, len(calls), 2))
    turns = list(itertools.product(range(rounds), range(len(calls))))
    for turn, (around, place) in enumerate(progress(turns, desc=desc)):
        for step in range(len(workers)):
            which = (turn + step) % len(workers)  # nobody is always behind the same one
            times[which, around, place] = workers[which](_run, calls[place])[:2]
    return 1000 * times / batch


def _rows(
    contestants: Sequence[Contestant],
    setting: tuple[int, int, str, int],
    times: np.ndarray,
    peaks: Sequence[float | None],
) -> Iterator[Row]:
    """A row for each detector; ``setting`` has threads, batch, stream and photos, ``times`` is that of `_time`."""
    runtimes = [one.runtime for one in contestants]
    for place, one in enumerate(contestants):
        first = runtimes.index(one.runtime)
        against, comparison = 0 if first == place else first, None
        if place:
            ratios = [
                ratio(times[place, ..., kind], times[against, ..., kind], quantile)
                for quantile, kind in itertools.product((None, 0.99), range(2))
            ]
            comparison = Comparison(contestants[against].name, *ratios)
        wall, cpu = times[place, ..., 0], times[place, ..., 1]
        both = Times.of(wall), Times.of(cpu)
        yield Row(one.name, one.runtime, *setting, wall.size, *both, comparison, peaks[place])


def ratio(times: np.ndarray, against: np.ndarray, quantile: float | None = None) -> Ratio:
    """Mean, or quantile, of ``times`` through that of ``against``, both [rounds, calls].

    Calls are drawn in pairs, each with all its rounds.
    """

    def through(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if quantile is None:
            return one.mean(-1) / other.mean(-1)
        return np.quantile(one, quantile, axis=-1) / np.quantile(other, quantile, axis=-1)

    value = float(through(times.ravel(), against.ravel()))
    if times.shape[1] < FEWEST:
        return Ratio(value, None, None)
    drawn = np.random.default_rng(0).integers(0, times.shape[1], (DRAWS, times.shape[1]))
    resampled = [np.concatenate([row[drawn] for row in one], axis=1) for one in (times, against)]
    low, high = np.quantile(through(*resampled), (0.025, 0.975))
    return Ratio(value, float(low), float(high))


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table for each setting."""
    heads = ["detector", "runtime", "mean", "p50", "p90", "p99", "CPU mean", "CPU p99", "MB", "against"]
    heads += [f"x {kind}" for kind in ("mean", "CPU mean", "p99", "CPU p99")]
    lines: list[str] = []
    settings = itertools.groupby(rows, key=lambda row: (row.threads, row.batch, row.stream, row.photos, row.calls))
    for (threads, batch, stream, photos, calls), inside in settings:
        title = f"threads {threads}, batch {batch}, {photos} photos {stream}, {calls} calls; milliseconds for a photo"
        lines += [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in inside:
            times = (row.wall.mean, row.wall.p50, row.wall.p90, row.wall.p99, row.cpu.mean, row.cpu.p99)
            cells = [row.name, row.runtime, *(f"{value:.1f}" for value in times)]
            cells.append("-" if row.peak_mb is None else f"{row.peak_mb:.0f}")
            one = row.against
            cells += ["-"] * 5 if one is None else [one.name, *map(str, (one.wall, one.cpu, one.wall_p99, one.cpu_p99))]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the figures belong to: processor, cores, load, system, and versions by package."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # no Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {"processor": name, "cores": os.cpu_count(), "load": load, "system": platform.platform()}
    return {**found, "versions": versions}


# One process for each detector: its memory is its own, and so are its threads.


class _Worker:
    """``worker(job, ...)`` is what ``job(...)`` gives in the process."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, job: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(job, *arguments).result()
        except BrokenProcessPool:
            raise EarlyExitError(
                f"{self.contestant.name}: its process died, maybe for want of memory; time fewer detectors at once"
            ) from None


_detect: Detect


def _open(contestant: Contestant, threads: int, score: float) -> None:
    global _detect
    _detect = contestant.open(threads, score)


def _run(paths: list[str]) -> tuple[float, float, list[int | None]]:
    """Seconds on the clock and of the CPU, decoding left out, and the exits."""
    photos = [read_image(path) for path in paths]
    wall, cpu = time.perf_counter(), time.process_time()
    exits = _detect(photos)
    return time.perf_counter() - wall, time.process_time() - cpu, exits


def _peak_mb() -> float | None:
    """Of this process since it was started; ``getrusage`` would count what its parent had."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)

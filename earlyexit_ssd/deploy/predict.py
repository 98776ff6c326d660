"""Run a detector on photos, videos and cameras, frame by frame, and write pictures and tables."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from earlyexit_ssd.deploy.predictor import Detections, Predictor
from earlyexit_ssd.deploy.sources import Frame, Source, opencv, read_frames
from earlyexit_ssd.deploy.stream import CLOSE, REPEATED, StreamRule, TemporalExit
from earlyexit_ssd.errors import CannotWrite, DataError, EarlyExitError, nearest
from earlyexit_ssd.files import atomic_path, make_folder, write_image
from earlyexit_ssd.images import SMALLEST_TEXT, color_of, draw_boxes
from earlyexit_ssd.progress import progress

SAVES = ("pictures", "json", "csv", "counts")
"""Kinds of output: annotated photos (PNG) and videos (MP4), COCO results, a row per detection, a row per frame."""
EXPORTED = (".onnx", ".xml")
LIVE_FPS = 10.0  # frames per second of the annotated video of a camera that does not report its own

Draw = Callable[[np.ndarray, Detections, float], Image.Image]
"""Function from a photo uint8 [H, W, 3], its detections and the score threshold to the annotated picture."""


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an output of ``earlyexit export``: an ONNX file, an OpenVINO model or a staged folder."""
    return Path(path).suffix.lower() in EXPORTED or (Path(path) / "manifest.json").is_file()


def open_predictor(path: str | os.PathLike[str], runtime: str, threads: int, score: float) -> Predictor:
    """A warmed-up exported detector that reports detections with scores down to ``score - CLOSE``, but not below the
    file's score thresholds."""
    predictor = Predictor(path, runtime, threads)
    predictor.score_thresh = np.maximum(predictor.score_thresh, np.float32(max(score - CLOSE, 0)))
    predictor.warm_up()
    return predictor


def annotate(image: np.ndarray, found: Detections, score: float) -> Image.Image:
    """The photo (uint8 [H, W, 3]) with its detections of at least ``score``, its exit and milliseconds drawn on it."""
    keep = found.scores >= score
    labels, names = found.labels[keep].tolist(), itertools.compress(found.class_names, keep)
    texts = [f"{name} {value:.2f}" for name, value in zip(names, found.scores[keep].tolist(), strict=True)]
    picture = Image.fromarray(image)
    size = max(SMALLEST_TEXT, max(picture.size) // 55)
    colors = [color_of(label) for label in labels]
    return draw_boxes(picture, found.boxes[keep].tolist(), texts, colors, size, f"{found.exit_name}{_sure(found)}")


def _sure(found: Detections) -> str:
    sure = "" if found.exit_confidence is None else f", confidence {found.exit_confidence:.2f}"
    return f"{sure}, {found.ms:.0f} ms" if found.ms >= 1 else f"{sure}, {found.ms:.1f} ms"


def predict(
    detector: Any,
    sources: Sequence[Source],
    out: str | os.PathLike[str],
    *,
    save: Iterable[str] = ("pictures",),
    score: float = 0.5,
    stride: int = 1,
    most_frames: int | None = None,
    show: bool = False,
    rule: StreamRule | None = None,
    draw: Draw = annotate,
) -> Iterator[str | DataError]:
    """Detect in every frame of every source, and write the outputs ``save`` into the folder ``out``.

    Files appear when they are complete: the picture of a photo at once, a video at its end, tables at the end of the
    run. Ctrl-C ends a live stream and keeps its output so far.

    Args:
        detector: a `Predictor`, or a function with its call and its ``classes``.
        save: names of `SAVES`; ``none`` is left out.
        score: score threshold of the detections, in [0, 1].
        stride, most_frames: use every ``stride``-th frame of a video or stream, and at most ``most_frames`` of each.
        show: show the pictures in a window; q ends it.
        rule: rule of a temporal exit.

    Yields:
        one line per photo and per detection in it, one per video at its end, or the reason why a source was not read;
        at the end a warning if ``detector.drift()`` says so. With ``rule`` there is none, since the detector then sees
        a selection of the frames.

    Raises:
        EarlyExitError: a number out of its range, another name to save, a rule for another detector, or OpenCV missing.
        CannotWrite: no room, or no such folder.
    """
    if not 0 <= score <= 1:
        raise EarlyExitError(f"score {score}: expected a number in [0, 1]")
    save = [name for name in map(str.strip, save) if name != "none"]
    for name in save:
        if name not in SAVES:
            raise EarlyExitError(f"--save {name!r}: expected some of {', '.join(SAVES)}, or none{nearest(name, SAVES)}")
    if show or any(source.kind != "photo" for source in sources):
        opencv()
    if save:
        make_folder(out)
    look = detector if rule is None else TemporalExit(detector, rule, score)
    paths = output_paths(sources, out) if "pictures" in save else [None] * len(sources)
    with contextlib.ExitStack() as files:
        loop = _Loop(look, _Tables(files, Path(out), save, detector.classes, score), score, show, draw)
        for source, path in zip(sources, paths, strict=True):
            if source.kind != "photo" and rule is not None:
                look.reset()
            yield from loop.run(source, path, stride, most_frames)
            if loop.stopped:
                break
    if rule is None and hasattr(detector, "drift"):
        drift = None
        with contextlib.suppress(EarlyExitError):  # scipy is missing: a device need not have it
            drift = detector.drift()
        if drift is not None and drift.drifted:
            yield f"warning: {drift.text}"


def images_of(sources: Sequence[Source], stride: int = 1, most_frames: int | None = None) -> Iterator[np.ndarray]:
    """Yield the pictures of all sources, for a calibration; a DataError if one cannot be read."""
    for source in sources:
        for frame in itertools.islice(read_frames(source, stride), most_frames):
            if isinstance(frame, DataError):
                raise frame
            yield frame.image


class _Loop:
    """Detects in the frames of one source after another, writes, draws and shows them."""

    def __init__(
        self, look: Callable[[np.ndarray], Detections], tables: _Tables, score: float, show: bool, draw: Draw
    ) -> None:
        self.look, self.tables, self.score, self.show, self.draw = look, tables, score, show, draw
        self.numbers, self.stopped = itertools.count(1), False

    def run(self, source: Source, path: Path | None, stride: int, most: int | None) -> Iterator[str | DataError]:
        """Yield the lines of one source, whose picture or video is ``path``; see `predict`."""
        start, photo, where = time.monotonic(), source.kind == "photo", f" -> {path}" if path else ""
        exits, computed_ms, write = Counter(), 0.0, None
        with contextlib.ExitStack() as files, contextlib.closing(read_frames(source, stride)) as frames:
            bar = files.enter_context(progress(desc=None if photo else Path(source.title).name, unit="frame"))
            try:
                for frame in frames:
                    if isinstance(frame, DataError):
                        yield frame
                        continue
                    bar.total = frame.total
                    found = self.look(frame.image)
                    exits[found.exit_name] += 1
                    computed_ms += 0 if found.exit_name == REPEATED else found.ms
                    self.tables.write(next(self.numbers), frame, found)
                    if path or self.show:
                        picture = self.draw(frame.image, found, self.score)
                    if path and photo:
                        write_image(path, picture)
                    elif path:
                        write = write or files.enter_context(_video(path, frame.fps or LIVE_FPS, picture.size))
                        write(picture)
                    if self.show:
                        self.stopped = _show(picture, wait=0 if photo else 1)
                    if photo:
                        yield "\n".join(_lines(source, found, self.score, where))
                    bar.update()
                    if self.stopped or exits.total() == most:
                        break
            except KeyboardInterrupt:
                if source.kind != "live":
                    raise
                self.stopped = True
        if exits and not photo:
            count, seconds = exits.total(), max(time.monotonic() - start, 1e-9)
            computed = count - exits[REPEATED]
            each = f"{computed_ms / computed:.1f} ms a computed frame, " if computed else ""
            shares = ", ".join(f"{name} {part / count:.0%}" for name, part in exits.most_common())
            yield f"{source.title}: {count} frames, {count / seconds:.1f} a second, {each}left at {shares}{where}"


def _lines(source: Source, found: Detections, score: float, where: str) -> Iterator[str]:
    """The lines of a photo."""
    keep = np.flatnonzero(found.scores >= score)
    yield f"{source.title}: {found.exit_name}{_sure(found)}, {len(keep)} found{where}"
    for index in keep:
        sides = ", ".join(f"{side:.0f}" for side in found.boxes[index])
        yield f"  {found.class_names[index]} {found.scores[index]:.2f} at {sides}"


# Output files.


def output_paths(sources: Sequence[Source], folder: str | os.PathLike[str]) -> list[Path]:
    """A PNG in ``folder`` for each photo, an MP4 for each video or stream; no source is overwritten.

    Equal names get numbers (dog.png, dog_2.png). Names that differ in case only are equal, as on some disks.
    """
    folder = Path(folder)
    names = [path for source in sources for path in (Path(source.name), Path(source.name).resolve())]
    taken = {name.name.lower() for name in names if name.parent.resolve() == folder.resolve()}
    paths = []
    for source in sources:
        stem, suffix = Path(source.title.rstrip("/")).stem or "stream", ".png" if source.kind == "photo" else ".mp4"
        if source.kind == "live" and source.name.isdecimal():
            stem = f"camera_{source.name}"
        name, number = f"{stem}{suffix}", 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}{suffix}"
        taken.add(name.lower())
        paths.append(folder / name)
    return paths


class _Tables:
    """The text files that ``save`` names, written frame by frame under temporary names and renamed when ``files``
    closes."""

    def __init__(
        self, files: contextlib.ExitStack, out: Path, save: Sequence[str], classes: Sequence[str], score: float
    ) -> None:
        def opened(name: str) -> TextIO:
            temporary = files.enter_context(atomic_path(out / name))
            return files.enter_context(temporary.open("w", encoding="utf-8", newline=""))

        self.classes, self.score = classes, score
        self.json = self.rows = self.counts = None
        about = ["image_id", "source", "frame", "seconds"]
        if "json" in save:
            self.json, self.separator = opened("detections.json"), "\n"
            self.json.write("[")
            files.callback(self.json.write, "\n]\n")
        if "csv" in save:
            self.rows = csv.writer(opened("detections.csv"), lineterminator="\n")
            self.rows.writerow([*about, "class", "score", "x1", "y1", "x2", "y2"])
        if "counts" in save:
            self.counts = csv.writer(opened("counts.csv"), lineterminator="\n")
            self.counts.writerow([*about, "exit", "confidence", "ms", "found", *classes])

    def write(self, number: int, frame: Frame, found: Detections) -> None:
        """Write frame ``number`` of all sources, counted from 1."""
        title, seconds = frame.source.title, "" if frame.time is None else f"{frame.time:.3f}"
        keep = np.flatnonzero(found.scores >= self.score).tolist()
        for index in keep:
            name, score, box = found.class_names[index], found.scores[index], found.boxes[index]
            if self.json:
                x1, y1, x2, y2 = (round(float(side), 2) for side in box)
                row = {  # COCO's results format, and the frame
                    "image_id": number,
                    "category_id": int(found.labels[index]),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "score": round(float(score), 5),
                    "category": name,
                    "source": title,
                    "frame": frame.index,
                }
                self.json.write(self.separator + json.dumps(row))
                self.separator = ",\n"
            if self.rows:
                sides = [f"{side:.2f}" for side in box]
                self.rows.writerow([number, title, frame.index, seconds, name, f"{score:.5f}", *sides])
        if self.counts:
            counts = np.bincount(found.labels[keep], minlength=len(self.classes) + 1)[1:].tolist()
            confidence = "" if found.exit_confidence is None else f"{found.exit_confidence:.5f}"
            routed = [found.exit_name, confidence, f"{found.ms:.2f}"]
            self.counts.writerow([number, title, frame.index, seconds, *routed, len(keep), *counts])


@contextlib.contextmanager
def _video(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that adds a picture to the MP4 ``path``; pictures of another ``size`` are fitted to it."""
    cv2, frames = opencv(), 0
    with atomic_path(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            raise CannotWrite(f"{path}: cannot be written; make room or name another folder")

        def write(picture: Image.Image) -> None:
            nonlocal frames
            picture = picture if picture.size == size else picture.resize(size)
            writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))
            frames += 1

        try:
            yield write
        finally:
            writer.release()
        video = cv2.VideoCapture(str(temporary))
        written = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.release()
        if written < frames:  # OpenCV does not report a full disk
            raise CannotWrite(f"{path}: {written} of {frames} frames could be written; make room")


def _show(picture: Image.Image, wait: int) -> bool:
    """Show a picture and wait ``wait`` milliseconds for a key (0: for ever); returns whether the user wants to stop."""
    cv2 = opencv()
    try:
        cv2.imshow("earlyexit predict", np.asarray(picture)[..., ::-1])
        return cv2.waitKey(wait) & 0xFF in (ord("q"), 27)
    except cv2.error:
        raise EarlyExitError(
            "this OpenCV opens no windows; leave --show out, or pip install opencv-python in place of the headless one"
        ) from None

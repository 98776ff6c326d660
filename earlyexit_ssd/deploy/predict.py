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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
"""Function from a photo uint8 [H, W, 3], its detections and the lowest score to the annotated picture."""


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an output of ``earlyexit export``: an ONNX file, an OpenVINO model or a staged folder."""
    return Path(path).suffix.lower() in EXPORTED or (Path(path) / "manifest.json").is_file()


def open_predictor(path: str | os.PathLike[str], runtime: str, threads: int, score: float) -> Predictor:
    """A warmed-up exported detector that reports detections with scores down to ``score - CLOSE``, but not below the
    file's lowest scores."""
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
        score: lowest score of a detection, in [0, 1].
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
    photos = iter(picture_paths([source.name for source in sources if source.kind == "photo"], out))
    videos = iter(video_paths([source for source in sources if source.kind != "photo"], out))
    numbers = itertools.count(1)
    with contextlib.ExitStack() as files:
        tables = [kind(files, Path(out), detector.classes, score) for name, kind in _TABLES.items() if name in save]
        for source in sources:
            if source.kind != "photo" and rule is not None:
                look.reset()
            path = next(photos if source.kind == "photo" else videos)
            job = _Job(look, source, path if "pictures" in save else None, score, show, draw, tables, numbers)
            yield from job.run(read_frames(source, stride), most_frames)
            if job.stopped:
                break
    if rule is None and hasattr(detector, "drift"):
        try:
            drift = detector.drift()
        except EarlyExitError:  # scipy is missing: a device need not have it
            drift = None
        if drift is not None and drift.drifted:
            yield f"warning: {drift.text}"


def images_of(sources: Sequence[Source], stride: int = 1, most_frames: int | None = None) -> Iterator[np.ndarray]:
    """Yield the pictures of all sources, for a calibration; a DataError if one cannot be read."""
    for source in sources:
        for frame in itertools.islice(read_frames(source, stride), most_frames):
            if isinstance(frame, DataError):
                raise frame
            yield frame.image


@dataclass
class _Job:
    """The processing of one source."""

    look: Callable[[np.ndarray], Detections]
    source: Source
    path: Path | None
    score: float
    show: bool
    draw: Draw
    tables: list[_Table]
    numbers: Iterator[int]
    stopped: bool = False
    exits: Counter[str] = field(default_factory=Counter)
    computed_ms: float = 0.0
    video: _Video | None = None

    def run(self, frames: Iterator[Frame | DataError], most_frames: int | None) -> Iterator[str | DataError]:
        start, photo = time.monotonic(), self.source.kind == "photo"
        with contextlib.ExitStack() as files, contextlib.closing(frames):
            bar = files.enter_context(progress(desc=None if photo else Path(self.source.title).name, unit="frame"))
            try:
                for frame in frames:
                    if isinstance(frame, DataError):
                        yield frame
                        continue
                    if bar.total is None:
                        bar.total = frame.total
                    found = self.look(frame.image)
                    self.handle(frame, found, files)
                    if photo:
                        yield self.told(found)
                    bar.update()
                    if self.stopped or sum(self.exits.values()) == most_frames:
                        break
            except KeyboardInterrupt:
                if self.source.kind != "live":
                    raise
                self.stopped = True
        if self.exits and not photo:
            yield self.summary(max(time.monotonic() - start, 1e-9))

    def handle(self, frame: Frame, found: Detections, files: contextlib.ExitStack) -> None:
        """Count, write and show one frame."""
        self.exits[found.exit_name] += 1
        if found.exit_name != REPEATED:
            self.computed_ms += found.ms
        number = next(self.numbers)
        for table in self.tables:
            table.write(number, frame, found)
        if self.path is None and not self.show:
            return
        drawn, photo = self.draw(frame.image, found, self.score), self.source.kind == "photo"
        if self.path is not None and photo:
            write_image(self.path, drawn)
        elif self.path is not None:
            if self.video is None:
                self.video = files.enter_context(_video(self.path, frame.fps or LIVE_FPS))
            self.video.write(drawn)
        if self.show:
            self.stopped = _show(drawn, wait=0 if photo else 1)

    def told(self, found: Detections) -> str:
        """The lines of a photo."""
        keep = np.flatnonzero(found.scores >= self.score)
        where = f" -> {self.path}" if self.path else ""
        lines = [f"{self.source.title}: {found.exit_name}{_sure(found)}, {len(keep)} found{where}"]
        for index in keep[np.argsort(-found.scores[keep], kind="stable")]:
            sides = ", ".join(f"{side:.0f}" for side in found.boxes[index])
            lines.append(f"  {found.class_names[index]} {found.scores[index]:.2f} at {sides}")
        return "\n".join(lines)

    def summary(self, seconds: float) -> str:
        """The line of a video or stream."""
        frames = sum(self.exits.values())
        computed = frames - self.exits[REPEATED]
        shares = ", ".join(f"{name} {count / frames:.0%}" for name, count in self.exits.most_common())
        each = f"{self.computed_ms / computed:.1f} ms a computed frame, " if computed else ""
        where = f" -> {self.path}" if self.path else ""
        return f"{self.source.title}: {frames} frames, {frames / seconds:.1f} a second, {each}left at {shares}{where}"


def picture_paths(photos: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> list[Path]:
    """A PNG in ``folder`` for each photo; equal names get numbers (dog.png, dog_2.png), and no photo is overwritten."""
    folder, photos = Path(folder), [Path(photo) for photo in photos]
    taken = {photo.name.lower().removesuffix(".png") for photo in photos if photo.parent.resolve() == folder.resolve()}
    names = []
    for photo in photos:
        name, number = photo.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{photo.stem}_{number}"
        taken.add(name.lower())
        names.append(folder / f"{name}.png")
    return names


# Output files.


class _Table:
    """A text file, written frame by frame under a temporary name and renamed at the end."""

    name: str

    def __init__(self, files: contextlib.ExitStack, out: Path, classes: Sequence[str], score: float) -> None:
        self.classes, self.score = classes, score
        temporary = files.enter_context(atomic_path(out / self.name))
        self.file = files.enter_context(temporary.open("w", encoding="utf-8", newline=""))
        self.begin()
        files.callback(self.end)

    def begin(self) -> None: ...

    def write(self, number: int, frame: Frame, found: Detections) -> None:
        raise NotImplementedError  # abstract: each kind of table writes its own rows

    def end(self) -> None: ...


class _CocoResults(_Table):
    """COCO's results format: boxes x, y, width, height. ``image_id`` counts frames from 1, so each row also has the
    frame's source and number."""

    name = "detections.json"
    _first = True

    def begin(self) -> None:
        self.file.write("[")

    def write(self, number: int, frame: Frame, found: Detections) -> None:
        for index in np.flatnonzero(found.scores >= self.score).tolist():
            x1, y1, x2, y2 = (round(float(side), 2) for side in found.boxes[index])
            row = {
                "image_id": number,
                "category_id": int(found.labels[index]),
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "score": round(float(found.scores[index]), 5),
                "category": found.class_names[index],
                "source": frame.source.title,
                "frame": frame.index,
            }
            self.file.write(("\n" if self._first else ",\n") + json.dumps(row))
            self._first = False

    def end(self) -> None:
        self.file.write("\n]\n")


class _Rows(_Table):
    """CSV with a row per detection."""

    name = "detections.csv"

    def begin(self) -> None:
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.rows.writerow([*_ABOUT, "class", "score", "x1", "y1", "x2", "y2"])

    def write(self, number: int, frame: Frame, found: Detections) -> None:
        for index in np.flatnonzero(found.scores >= self.score).tolist():
            sides = [f"{side:.2f}" for side in found.boxes[index]]
            self.rows.writerow([*_about(number, frame), found.class_names[index], f"{found.scores[index]:.5f}", *sides])


class _Counts(_Table):
    """CSV with a row per frame: its exit and the number of detections per class."""

    name = "counts.csv"

    def begin(self) -> None:
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.rows.writerow([*_ABOUT, "exit", "confidence", "ms", "found", *self.classes])

    def write(self, number: int, frame: Frame, found: Detections) -> None:
        labels = found.labels[found.scores >= self.score]
        counts = np.bincount(labels, minlength=len(self.classes) + 1)[1:].tolist()
        confidence = "" if found.exit_confidence is None else f"{found.exit_confidence:.5f}"
        routed = [found.exit_name, confidence, f"{found.ms:.2f}"]
        self.rows.writerow([*_about(number, frame), *routed, len(labels), *counts])


_TABLES: dict[str, type[_Table]] = {"json": _CocoResults, "csv": _Rows, "counts": _Counts}


_ABOUT = ("image_id", "source", "frame", "seconds")


def _about(number: int, frame: Frame) -> list[int | str]:
    return [number, frame.source.title, frame.index, "" if frame.time is None else f"{frame.time:.3f}"]


class _Video:
    """An MP4 in progress; frames of other sizes are fitted to the size of the first."""

    def __init__(self, path: Path, temporary: Path, fps: float) -> None:
        self.path, self._temporary, self._fps = path, temporary, fps
        self._writer: Any = None
        self._size, self._frames = (0, 0), 0

    def write(self, picture: Image.Image) -> None:
        cv2 = opencv()
        if self._writer is None:
            self._size = picture.size
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._temporary), code, self._fps, self._size)
            if not self._writer.isOpened():
                raise CannotWrite(f"{self.path}: cannot be written; make room or name another folder")
        if picture.size != self._size:
            picture = picture.resize(self._size)
        self._writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))
        self._frames += 1

    def close(self, whole: bool) -> None:
        """Finish the file. OpenCV does not report a full disk, so the frames of a ``whole`` video are counted."""
        if self._writer is None:
            return
        self._writer.release()
        if whole:
            cv2 = opencv()
            written = cv2.VideoCapture(str(self._temporary))
            frames = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
            written.release()
            if frames < self._frames:
                raise CannotWrite(f"{self.path}: {frames} of {self._frames} frames could be written; make room")


@contextlib.contextmanager
def _video(path: Path, fps: float) -> Iterator[_Video]:
    with atomic_path(path) as temporary:
        video = _Video(path, temporary, fps)
        try:
            yield video
        except BaseException:
            video.close(whole=False)
            raise
        video.close(whole=True)


def video_paths(sources: Sequence[Source], folder: str | os.PathLike[str]) -> list[Path]:
    """An MP4 in ``folder`` for each video or stream; equal names get numbers, and no source is overwritten."""
    taken = {Path(source.name).resolve() for source in sources}
    paths = []
    for source in sources:
        name = f"camera_{source.name}" if source.name.isdecimal() else Path(source.title.rstrip("/")).stem or "stream"
        path, number = Path(folder) / f"{name}.mp4", 1
        while path.resolve() in taken:
            number += 1
            path = Path(folder) / f"{name}_{number}.mp4"
        taken.add(path.resolve())
        paths.append(path)
    return paths


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

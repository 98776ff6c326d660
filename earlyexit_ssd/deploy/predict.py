"""Run a detector on photos, videos and cameras. Write annotated pictures and tables."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from earlyexit_ssd.console import progress
from earlyexit_ssd.deploy.predictor import Detections, Predictor
from earlyexit_ssd.deploy.sources import Frame, Source, opencv, read_frames
from earlyexit_ssd.deploy.stream import CLOSE_MARGIN, REPEATED, StreamRule, TemporalExit
from earlyexit_ssd.errors import CannotWrite, DataError, EarlyExitError, suggest
from earlyexit_ssd.files import atomic_path, make_folder, write_image
from earlyexit_ssd.images import SMALLEST_TEXT, color_of, draw_boxes

logger = logging.getLogger(__name__)

TABLES = {"json": "detections.json", "csv": "detections.csv", "counts": "counts.csv", "labels": "labels.json"}
SAVES = ("pictures", *TABLES)
"""Outputs: annotated photos (PNG) and videos (MP4), COCO results, a row per detection, a row per frame, and the photos
with the detections as objects, a data set in COCO's format."""
EXPORTED = (".onnx", ".xml")
LIVE_FPS = 10.0  # frame rate of the annotated video if a camera does not report its frame rate

Draw = Callable[[np.ndarray, Detections, float], Image.Image]
"""Function that draws detections of at least a score threshold on a photo uint8 [H, W, 3]."""


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is an output of ``earlyexit export``: an ONNX file, OpenVINO model or staged folder."""
    return Path(path).suffix.lower() in EXPORTED or (Path(path) / "manifest.json").is_file()


def open_predictor(path: str | os.PathLike[str], runtime: str, threads: int, score: float) -> Predictor:
    """Open and warm up an exported detector. Its score thresholds become ``score - CLOSE_MARGIN``, which a temporal
    exit needs. Higher thresholds of the file are kept."""
    predictor = Predictor(path, runtime, threads)
    least = max(score - CLOSE_MARGIN, 0.0)
    predictor.score_thresh = {
        name: max(value, least) for name, value in zip(predictor.classes, predictor.score_thresh.tolist(), strict=True)
    }
    predictor.warm_up()
    return predictor


def annotate(image: np.ndarray, detections: Detections, score: float) -> Image.Image:
    """Draw the detections of at least ``score``, the exit and the milliseconds on a photo uint8 [H, W, 3]."""
    keep = detections.scores >= score
    labels, names = detections.labels[keep].tolist(), itertools.compress(detections.class_names, keep)
    texts = [f"{name} {value:.2f}" for name, value in zip(names, detections.scores[keep].tolist(), strict=True)]
    picture = Image.fromarray(image)
    size = max(SMALLEST_TEXT, max(picture.size) // 55)
    colors = [color_of(label) for label in labels]
    return draw_boxes(picture, detections.boxes[keep].tolist(), texts, colors, size, _exit_text(detections))


def _exit_text(detections: Detections) -> str:
    """Return exit, confidence and milliseconds as text."""
    confidence, ms = detections.exit_confidence, detections.ms
    text = detections.exit_name if confidence is None else f"{detections.exit_name}, confidence {confidence:.2f}"
    return f"{text}, {ms:.0f} ms" if ms >= 1 else f"{text}, {ms:.1f} ms"


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
    """Detect in every frame of every source, and write outputs into the folder ``out``.

    Files appear when they are complete: the picture of a photo at once, a video at its end, tables at the end of the
    run. Ctrl-C and full disks keep the output so far, also the first part of a video.

    Args:
        detector: `Predictor`, or another callable with its signature and ``classes``.
        save: names in `SAVES`. The name ``none`` is ignored.
        score: score threshold of the detections, in [0, 1].
        stride, most_frames: use every ``stride``-th frame of a video or stream, and at most ``most_frames`` of each.
        show: show the pictures in a window. The key q ends the run.
        rule: rule of a temporal exit; None: run the detector on every frame.
        draw: function that annotates the pictures.

    Yields:
        text of a photo with a line per detection, a summary line of a video, or the error of a source or frame that
        cannot be read. The last line is a warning if ``detector.drift()`` reports drift. With ``rule`` drift is not
        checked, since the detector then gets only some of the frames.

    Raises:
        EarlyExitError: a number is out of its range, a name in ``save`` is unknown, the rule is for another detector,
            score or stride, or OpenCV is needed and missing.
        CannotWrite: an output cannot be written.
        KeyboardInterrupt: stopped by Ctrl-C in a photo or video. In a live stream Ctrl-C is the usual end.
    """
    if not 0 <= score <= 1:
        raise EarlyExitError(f"score {score}: expected a number in [0, 1]")
    moving = next((source for source in sources if source.kind != "photo"), None)
    if rule is not None and rule.stride != stride and moving:
        raise EarlyExitError(f"the stream rule is for stride {rule.stride}, not {stride}; calibrate a rule for it")
    save = [name for name in map(str.strip, save) if name != "none"]
    for name in save:
        if name not in SAVES:
            raise EarlyExitError(f"--save {name!r}: expected some of {', '.join(SAVES)}, or none{suggest(name, SAVES)}")
    if "labels" in save and moving:
        raise EarlyExitError(
            f"--save labels takes photos, but {moving.title} is a {moving.kind}; save its frames first"
        )
    if show or moving:
        opencv()
    if save:
        make_folder(out)
    detect = detector if rule is None else TemporalExit(detector, rule, score)
    paths = output_paths(sources, out) if "pictures" in save else [None] * len(sources)
    with contextlib.ExitStack() as files:
        tables = _Tables(files, Path(out), save, detector.classes, score, sources)
        loop = _Loop(detect, tables, score, show, draw)
        kind, ended_by = "", None
        try:
            for source, path in zip(sources, paths, strict=True):
                if rule is not None and (source.kind, kind) != ("photo", "photo"):  # photos may be frames of one camera
                    detect.reset()
                kind = source.kind
                yield from loop.run(source, path, stride, most_frames)
                if loop.stopped:
                    break
        except (KeyboardInterrupt, GeneratorExit, CannotWrite) as error:
            ended_by = error
        if loop.interrupted:
            ended_by = ended_by or KeyboardInterrupt()
        if ended_by is not None and not loop.frames:  # empty tables would replace those of an earlier run
            raise ended_by
    if ended_by is not None:  # only now, so that the tables are kept
        raise ended_by
    if "labels" in save:
        entry = json.dumps(["NAME", str(Path(out).absolute() / TABLES["labels"]), tables.folder], ensure_ascii=False)
        yield f"an entry of DATA.DATASETS: {entry}"
    if rule is None and hasattr(detector, "drift"):
        drift = None
        with contextlib.suppress(EarlyExitError):  # scipy is optional on a device
            drift = detector.drift()
        if drift is not None and drift.drifted:
            yield f"warning: {drift.text}"


def images_of(sources: Sequence[Source], stride: int = 1, most_frames: int | None = None) -> Iterator[np.ndarray]:
    """Yield the pictures of all sources, uint8 [H, W, 3] RGB. A frame that cannot be read is logged and skipped. If it
    is the first of its source, raise a DataError."""
    for source in sources:
        for place, frame in enumerate(itertools.islice(read_frames(source, stride), most_frames)):
            if not isinstance(frame, DataError):
                yield frame.image
            elif place == 0:
                raise frame
            else:
                logger.warning("%s", frame)


class _Loop:
    """Loop over the frames of one source after another.

    ``frames`` counts the frames so far. ``stopped`` is true once the user has stopped the loop, ``interrupted`` if that
    was not in a live stream.
    """

    def __init__(
        self, detect: Callable[[np.ndarray], Detections], tables: _Tables, score: float, show: bool, draw: Draw
    ) -> None:
        self.detect, self.tables, self.score, self.show, self.draw = detect, tables, score, show, draw
        self.frames, self.stopped, self.interrupted = 0, False, False

    def run(self, source: Source, path: Path | None, stride: int, most_frames: int | None) -> Iterator[str | DataError]:
        """Yield the texts of one source; see `predict`. Its picture or video is written to ``path``."""
        start, photo, arrow = time.monotonic(), source.kind == "photo", f" -> {path}" if path else ""
        exits, computed_ms, write = Counter(), 0.0, None
        with contextlib.ExitStack() as files, contextlib.closing(read_frames(source, stride)) as frames:
            bar = files.enter_context(progress(desc=None if photo else Path(source.title).name, unit="frame"))
            try:
                for frame in frames:
                    if isinstance(frame, DataError):
                        yield frame
                        continue
                    bar.total = frame.total and min(-(-frame.total // stride), most_frames or frame.total)
                    detections = self.detect(frame.image)
                    exits[detections.exit_name] += 1
                    computed_ms += 0 if detections.exit_name == REPEATED else detections.ms
                    self.frames += 1
                    self.tables.write(self.frames, frame, detections)
                    if path or self.show:
                        picture = self.draw(frame.image, detections, self.score)
                    if path and photo:
                        write_image(path, picture)
                    elif path:
                        fps = frame.fps / stride if frame.fps else LIVE_FPS
                        write = write or files.enter_context(_video(path, fps, picture.size))
                        write(picture)
                    if self.show:
                        self.stopped = _show(picture, wait=0 if photo else 1)
                    if photo:
                        yield "\n".join(_lines(source, detections, self.score, arrow))
                    bar.update()
                    if self.stopped or exits.total() == most_frames:
                        break
            except KeyboardInterrupt:
                self.stopped, self.interrupted = True, source.kind != "live"
        if exits and not photo:
            count, seconds = exits.total(), max(time.monotonic() - start, 1e-9)
            computed = count - exits[REPEATED]
            mean_ms = f"{computed_ms / computed:.1f} ms per computed frame, " if computed else ""
            shares = ", ".join(f"{name} {frames / count:.0%}" for name, frames in exits.most_common())
            yield f"{source.title}: {count} frames, {count / seconds:.1f} per second, {mean_ms}exits: {shares}{arrow}"


def _lines(source: Source, detections: Detections, score: float, arrow: str) -> Iterator[str]:
    """Yield the lines about a photo."""
    keep = np.flatnonzero(detections.scores >= score)
    yield f"{source.title}: {_exit_text(detections)}, {len(keep)} found{arrow}"
    for index in keep:
        box = ", ".join(f"{value:.0f}" for value in detections.boxes[index])
        yield f"  {detections.class_names[index]} {detections.scores[index]:.2f} at {box}"


# Output files.


def output_paths(sources: Sequence[Source], folder: str | os.PathLike[str]) -> list[Path]:
    """Return a path in ``folder`` for each source: PNG for a photo, MP4 for a video or stream.

    No path is that of a source. Equal names get numbers (dog.png, dog_2.png). Names that differ only in case count as
    equal, since some file systems ignore case.
    """
    folder = Path(folder)
    inputs = [path for source in sources for path in (Path(source.name), Path(source.name).resolve())]
    taken = {path.name.lower() for path in inputs if path.parent.resolve() == folder.resolve()}
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
    """The JSON and CSV files, written frame by frame to temporary files that are renamed when ``files`` closes."""

    def __init__(
        self,
        files: contextlib.ExitStack,
        out: Path,
        save: Sequence[str],
        classes: Sequence[str],
        score: float,
        sources: Sequence[Source],
    ) -> None:
        def open_file(name: str) -> TextIO:
            temporary = files.enter_context(atomic_path(out / name))
            return files.enter_context(temporary.open("w", encoding="utf-8", errors="backslashreplace", newline=""))

        old = [name for name in TABLES.values() if (out / name).exists()]
        if old and TABLES.keys() & set(save):
            text = "%s: %s of an earlier run; new tables replace those of the same name, image ids count from 1 again"
            logger.warning(text, out, ", ".join(old))
        self.classes, self.score = classes, score
        self.json = self.rows = self.counts = self.labels = None
        self.counted = [label for label, name in enumerate(classes, 1) if name != "N/A"]  # an unused id of COCO
        frame_columns = ["image_id", "source", "frame", "seconds"]
        if "json" in save:
            self.json, self.separator = open_file(TABLES["json"]), "\n"
            self.json.write("[")
            files.callback(self.json.write, "\n]\n")
        if "csv" in save:
            self.rows = csv.writer(open_file(TABLES["csv"]), lineterminator="\n")
            self.rows.writerow([*frame_columns, "class", "score", "x1", "y1", "x2", "y2"])
        if "counts" in save:
            self.counts = csv.writer(open_file(TABLES["counts"]), lineterminator="\n")
            names = [classes[label - 1] for label in self.counted]
            self.counts.writerow([*frame_columns, "exit", "confidence", "ms", "found", *names])
        if "labels" in save:
            names = [os.path.abspath(source.name) for source in sources] or [out.absolute() / "none"]
            self.folder = os.path.commonpath(map(os.path.dirname, names))
            categories = [{"id": label, "name": classes[label - 1]} for label in self.counted]
            self.labels = {"images": [], "annotations": [], "categories": categories}
            stream = open_file(TABLES["labels"])
            files.callback(json.dump, self.labels, stream, indent=1)

    def write(self, image_id: int, frame: Frame, detections: Detections) -> None:
        """Write the detections of a frame. ``image_id`` counts the frames of all sources from 1."""
        title, seconds = frame.source.title, "" if frame.time is None else f"{frame.time:.3f}"
        keep = np.flatnonzero(detections.scores >= self.score).tolist()
        if self.labels:
            name, (height, width, _) = os.path.relpath(frame.source.name, self.folder), frame.image.shape
            self.labels["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for index in keep:
            name, score, box = detections.class_names[index], detections.scores[index], detections.boxes[index]
            x1, y1, x2, y2 = (round(float(value), 2) for value in box)
            row = {  # COCO's results format
                "image_id": image_id,
                "category_id": int(detections.labels[index]),
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "score": round(float(score), 5),
            }
            if self.labels:
                area, annotations = row["bbox"][2] * row["bbox"][3], self.labels["annotations"]
                annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
            if self.json:
                row |= {"category": name, "source": title, "frame": frame.index}
                self.json.write(self.separator + json.dumps(row))
                self.separator = ",\n"
            if self.rows:
                self.rows.writerow(
                    [image_id, title, frame.index, seconds, name, f"{score:.5f}", *(f"{value:.2f}" for value in box)]
                )
        if self.counts:
            counts = np.bincount(detections.labels[keep], minlength=len(self.classes) + 1)[self.counted].tolist()
            confidence = "" if detections.exit_confidence is None else f"{detections.exit_confidence:.5f}"
            routing = [detections.exit_name, confidence, f"{detections.ms:.2f}"]
            self.counts.writerow([image_id, title, frame.index, seconds, *routing, len(keep), *counts])


@contextlib.contextmanager
def _video(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that adds a picture to the MP4 ``path``. Pictures are resized to ``size`` (width, height)."""
    cv2, frames = opencv(), 0
    with atomic_path(path) as temporary:
        writer = cv2.VideoWriter(str(temporary.absolute()), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            raise CannotWrite(f"{path}: the video cannot be written; make room or name another folder")

        def write(picture: Image.Image) -> None:
            nonlocal frames
            picture = picture if picture.size == size else picture.resize(size)
            writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))
            frames += 1

        try:
            yield write
        finally:
            writer.release()
        video = cv2.VideoCapture(str(temporary.absolute()))
        written = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.release()
        if written < frames:  # OpenCV does not report a full disk
            raise CannotWrite(f"{path}: only {max(written, 0)} of {frames} frames can be read back; make room")


def _show(picture: Image.Image, wait: int) -> bool:
    """Show a picture and wait ``wait`` milliseconds for a key (0: no limit). Return whether the key was q or Escape."""
    cv2 = opencv()
    try:
        cv2.imshow("earlyexit predict", np.asarray(picture)[..., ::-1])
        return cv2.waitKey(wait) & 0xFF in (ord("q"), 27)
    except cv2.error:
        fix = "replace it: pip uninstall opencv-python-headless, pip install opencv-python"
        raise EarlyExitError(f"this OpenCV cannot open windows; remove --show, or {fix}") from None

"""Read photos, folders, patterns, videos, cameras and network streams, one frame at a time."""

import glob
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files, natural_order, read_image

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
"""File name suffixes of videos, in lower case. Upper case is accepted too."""
LONGEST_WAIT = 30.0
"""Longest wait in seconds before reconnecting to a lost camera. Waits start at one second and double."""
MISSING_FRAMES = 2  # number of frames that may be missing from a video, since frame counts in headers are inexact


@dataclass(frozen=True)
class Source:
    """A photo, a video, or a live stream. The name of a live stream is a camera index or a URL (``rtsp://...``)."""

    name: str
    kind: Literal["photo", "video", "live"]
    problem: str | None = None  # why the argument ``name`` gives no file

    @property
    def title(self) -> str:
        """The name without the user and password of a URL, for messages and output files."""
        return re.sub(r"://[^/]*@", "://", self.name)


@dataclass(frozen=True)
class Frame:
    """A photo, or a frame of a video or live stream."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    source: Source
    index: int = 0  # position in the source, from 0; skipped frames are counted
    time: float | None = None  # seconds from the source's start; None for a photo
    fps: float | None = None  # frames per second of the source; None if unknown
    total: int | None = None  # number of frames of the source; None if unknown


def find_sources(arguments: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return the sources that command-line arguments name, in order.

    A number is a camera, and an argument with ``://`` is a stream. A folder gives all photos and videos in it and in
    its subfolders. A pattern (``*``, ``?``, ``[...]``, ``**``) gives all matching files. Both are in `natural_order`.
    Any other argument is a file. A file that is named twice is taken once.
    If a folder has no photos and videos, or no file matches a pattern, the source has a `Source.problem`. If this holds
    for all arguments, it raises DataError.
    """
    sources: list[Source] = []
    for argument in map(os.fspath, arguments):
        exists = os.path.exists(argument)
        if (argument.isdecimal() and not exists) or "://" in argument:
            sources.append(Source(argument, "live"))
            continue
        paths: Sequence[str | Path] = [argument]
        problem = None
        if os.path.isdir(argument):
            paths, others = find_files(Path(argument), PHOTO_SUFFIXES + VIDEO_SUFFIXES)
            paths.sort(key=natural_order)
            if others:
                text = "%s: %d files are ignored, since they are neither photos nor videos; the first is %s"
                logger.warning(text, argument, len(others), others[0])
            problem = "the folder has no photos and no videos; name files or another folder"
        elif glob.has_magic(argument) and not exists:
            found = filter(os.path.isfile, map(Path, glob.glob(argument, recursive=True)))
            paths = sorted(found, key=natural_order)
            problem = "no file matches this pattern; check the folder and upper and lower case"
        for path in paths:
            kind = "video" if Path(path).suffix.lower() in VIDEO_SUFFIXES else "photo"
            sources.append(Source(os.fspath(path), kind))
        if not paths:
            sources.append(Source(argument, "photo", f"{argument}: {problem}"))
    sources = list(dict.fromkeys(sources))
    if sources and all(source.problem for source in sources):
        raise DataError(sources[0].problem)
    return sources


def count_frames(sources: Sequence[Source], stride: int = 1, most: int | None = None) -> int | None:
    """Return the number of frames that `read_frames` yields, at most ``most`` of each source, by the headers of videos;
    None if a source does not say."""
    counts = []
    for source in sources:
        if source.kind == "live" and most is None:
            return None
        count = most if source.kind == "live" else 1
        if source.kind == "video":
            if not _is_utf8(source.name):
                return None
            count = int(opencv().VideoCapture(os.path.abspath(source.name)).get(opencv().CAP_PROP_FRAME_COUNT))
            if count <= 0:
                return None
            count = -(-count // stride)
        counts.append(min(count, most or count))
    return sum(counts)


def read_frames(source: Source, stride: int = 1) -> Iterator[Frame | DataError]:
    """Yield the frames of a source. A frame or source that cannot be read is yielded as an error.

    Only one frame is in memory at a time. Of a video or live stream, every ``stride``-th frame is yielded, from the
    first. If a live stream is lost, it is reopened until it is back, and each attempt is logged. If it cannot be opened
    at the start, one error is yielded. A stride below 1, or a missing OpenCV, raises EarlyExitError.
    """
    if stride < 1:
        raise EarlyExitError(f"stride is {stride}, expected 1 (every frame) or more")
    if source.problem:
        yield DataError(source.problem)
        return
    if source.kind != "photo":
        yield from _read_video(source, stride)
        return
    try:
        yield Frame(read_image(source.name), source)
    except DataError as error:
        yield error


def opencv() -> ModuleType:
    """Import OpenCV, which only videos, cameras and windows need. Raise an EarlyExitError if it is not installed."""
    try:
        import cv2
    except ImportError:
        fix = "pip install opencv-python-headless"
        raise EarlyExitError(f"videos and cameras need OpenCV, which is not installed: {fix}") from None
    return cv2


def _is_utf8(name: str) -> bool:
    return name.encode("utf-8", "replace").decode() == name


def _read_video(source: Source, stride: int) -> Iterator[Frame | DataError]:
    cv2 = opencv()
    live, address = source.kind == "live", int(source.name) if source.name.isdecimal() else source.name
    address = address if live else os.path.abspath(source.name)  # OpenCV takes the "12" of 12:30.mp4 for a protocol
    if not live and not os.path.isfile(source.name):
        yield DataError(f"{source.title}: no such video; check the path")
        return
    if not _is_utf8(source.name):  # OpenCV would crash
        yield DataError(f"{source.title}: OpenCV cannot read a name that is not UTF-8; rename the file")
        return
    capture = cv2.VideoCapture(address)
    try:
        if not capture.isOpened():
            fix = "check the number or address and the cable, and close other programs that use it"
            fix = fix if live else "copy it again, or convert it to MP4 (H.264)"
            yield DataError(f"{source.title}: {'camera or stream' if live else 'video'} cannot be opened; {fix}")
            return
        if live:
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # buffered frames would be outdated
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 0 < fps < 1000 else None
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        endless = live and total <= 0  # a URL of a file has a frame count, so it is not reopened at its end
        start, wait = time.monotonic(), 1.0
        for index in itertools.count():
            while not capture.grab():
                if not endless:
                    if index < total - MISSING_FRAMES:
                        yield DataError(
                            f"{source.title}: ends after {index} of {total} frames; the file is truncated or damaged, "
                            "copy it again"
                        )
                    return
                logger.warning("%s: no frame received; reconnecting in %.0f s", source.title, wait)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
                capture.release()
                capture.open(address)
                capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            if index % stride:
                continue
            decoded, image = capture.retrieve()
            if not decoded or image is None or image.size == 0:
                yield DataError(f"{source.title} frame {index}: cannot be decoded")
                continue
            if wait > 1:
                logger.warning("%s: connected again", source.title)
                wait = 1.0
            seconds = time.monotonic() - start if endless else index / fps if fps else None
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.ndim == 3 else cv2.COLOR_GRAY2RGB)
            yield Frame(rgb, source, index, seconds, fps, None if endless or total <= 0 else total)
    finally:
        capture.release()

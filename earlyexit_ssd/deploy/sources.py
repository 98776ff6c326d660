"""Where pictures come from: photos, folders, patterns, videos, cameras and network streams, one frame at a time."""

from __future__ import annotations

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
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files, read_image

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
"""File name suffixes of videos, in any case."""
LONGEST_WAIT = 30.0
"""Longest wait in seconds before reconnecting to a lost camera; waits start at one second and double."""
SHORT = 2  # number of frames by which a video may be shorter than its header states: containers are imprecise


@dataclass(frozen=True)
class Source:
    """An input: a photo, a video, or a live stream (camera index, or address such as ``rtsp://...``)."""

    name: str
    kind: Literal["photo", "video", "live"]

    @property
    def title(self) -> str:
        """The name for messages and files: without the user and password of an address."""
        return re.sub(r"://[^/@]*@", "://", self.name)


@dataclass(frozen=True)
class Frame:
    """One picture."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    source: Source
    index: int = 0  # index of the frame in its source, from 0; frames skipped by a stride count
    time: float | None = None  # seconds from the source's start; None for a photo
    fps: float | None = None  # frames per second of the source; None if unknown
    total: int | None = None  # number of frames of the source; None if unknown


def find_sources(arguments: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The sources of command-line arguments, in order.

    A number is a camera, and an argument with ``://`` a stream. A folder means all photos and videos in and below it, a
    pattern (``*``, ``?``, ``[...]``, ``**``) all matching files. Everything else is a file.

    Raises:
        DataError: a folder without photos and videos, or a pattern without matching files.
    """
    sources: list[Source] = []
    for argument in map(os.fspath, arguments):
        there = os.path.exists(argument)
        if (argument.isdecimal() and not there) or "://" in argument:
            sources.append(Source(argument, "live"))
            continue
        found: Sequence[str | Path] = [argument]
        if os.path.isdir(argument):
            found, others = find_files(Path(argument), PHOTO_SUFFIXES + VIDEO_SUFFIXES)
            if others:
                text = "%s: %d files left out, which are no photos and no videos; the first: %s"
                logger.warning(text, argument, len(others), others[0])
            if not found:
                raise DataError(f"{argument}: no picture in this folder; name photos, or a folder that holds some")
        elif glob.has_magic(argument) and not there:
            found = list(filter(os.path.isfile, sorted(glob.glob(argument, recursive=True))))
            if not found:
                raise DataError(f"{argument}: no file fits this pattern; look at its folder and its capitals")
        for path in found:
            kind = "video" if Path(path).suffix.lower() in VIDEO_SUFFIXES else "photo"
            sources.append(Source(os.fspath(path), kind))
    return sources


def read_frames(source: Source, stride: int = 1) -> Iterator[Frame | DataError]:
    """Yield the frames of a source, one in memory at a time; a frame that cannot be read is yielded as an error.

    A lost live stream is reopened until it is back, and each attempt is logged. Only a failure of the first attempt
    ends it.

    Args:
        stride: yield every ``stride``-th frame of a video or live stream, from the first on; at least 1.

    Raises:
        EarlyExitError: a stride below 1, or a video or stream where OpenCV is not installed.
    """
    if stride < 1:
        raise EarlyExitError(f"stride is {stride}, expected 1 (every frame) or more")
    if source.kind != "photo":
        yield from _read_video(source, stride)
        return
    try:
        yield Frame(read_image(source.name), source)
    except DataError as error:
        yield error


def opencv() -> ModuleType:
    """Import OpenCV, which only videos and cameras need; an EarlyExitError if it is not installed."""
    try:
        import cv2
    except ImportError:
        raise EarlyExitError(
            "videos and cameras need OpenCV, which is not installed; pip install opencv-python-headless"
        ) from None
    return cv2


def _read_video(source: Source, stride: int) -> Iterator[Frame | DataError]:
    cv2 = opencv()
    live, place = source.kind == "live", int(source.name) if source.name.isdecimal() else source.name
    if not live and not os.path.isfile(source.name):
        yield DataError(f"{source.title}: no such video")
        return
    capture = cv2.VideoCapture(place)
    try:
        if not capture.isOpened():
            fix = "check the address, the cable and who else uses it" if live else "convert it to MP4 (H.264)"
            yield DataError(f"{source.title}: {'camera or stream' if live else 'video'} cannot be opened; {fix}")
            return
        if live:
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # what waits in a buffer is old
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 0 < fps < 1000 else None
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        endless = live and total <= 0  # the address of a file has an end
        start, wait = time.monotonic(), 1.0
        for index in itertools.count():
            while not capture.grab():
                if not endless:
                    if index < total - SHORT:
                        yield DataError(f"{source.title}: ends after {index} of {total} frames; it is cut or damaged")
                    return
                logger.warning("%s: no frame comes; trying again in %.0f s", source.title, wait)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
                capture.release()
                capture.open(place)
            if index % stride:
                continue
            taken, image = capture.retrieve()
            if not taken or image is None or image.size == 0:
                yield DataError(f"{source.title} frame {index}: cannot be decoded")
                continue
            if wait > 1:
                logger.warning("%s: back again", source.title)
                wait = 1.0
            seconds = time.monotonic() - start if endless else index / fps if fps else None
            rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.ndim == 3 else cv2.COLOR_GRAY2RGB)
            yield Frame(rgb, source, index, seconds, fps, None if endless or total <= 0 else total)
    finally:
        capture.release()

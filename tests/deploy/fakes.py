"""Detectors without a file, and videos without a decoder. PyTorch is not imported, since new processes import this."""

import functools
import os
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest

from earlyexit_ssd.deploy import Detections, sources

RED = (220, 30, 30)


class RedBox:
    """A detector that finds a red area in a frame, with a fixed score. Its two exits alternate."""

    classes = ("lamp", "ball")
    exit_names = ("exit8", "full")
    certificate = None

    def __init__(self, score: float = 0.9) -> None:
        self.score, self.calls = score, 0

    def __call__(self, image: np.ndarray) -> Detections:
        self.calls += 1
        y, x = np.nonzero((image[..., 0] > 150) & (image[..., 1] < 90))
        boxes = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]] if x.size else np.zeros((0, 4)), np.float32)
        count, index = len(boxes), self.calls % 2
        scores, labels = np.full(count, self.score, np.float32), np.full(count, 2, np.int64)
        return Detections(boxes, labels, ["ball"] * count, scores, index, self.exit_names[index], 0.75, 4.0)


@dataclass(frozen=True)
class Waiter:
    """A detector that sleeps. Dark photos leave at its second exit and dim photos at its third, if it is ``routed``."""

    name: str
    runtime: str = "here"
    ms: float = 1.0
    routed: bool = True
    dies: bool = False

    def open(self, threads: int, score: float) -> Callable:
        def detect(photos):
            if self.dies:
                os._exit(1)
            time.sleep(self.ms * len(photos) / 1000)
            exits = [1 if photo.mean() < 50 else 2 if photo.mean() < 100 else None for photo in photos]
            return exits if self.routed else [None] * len(photos)

        return detect


def scene(x: float | None = None, y: int = 20, side: int = 16, level: float = 90, size: tuple[int, int] = (64, 96)):
    """A grey frame uint8 [H, W, 3] with a red square at ``x``. ``level`` is rounded."""
    frame = np.full((*size, 3), level, np.float32)
    if x is not None:
        frame[y : y + side, max(0, round(x)) : max(0, round(x) + side)] = RED
    return frame.clip(0, 255).round().astype(np.uint8)


class FakeCapture:
    """A cv2.VideoCapture with RGB frames. A frame None cannot be grabbed, and "broken" cannot be decoded."""

    def __init__(self, frames: Iterable, total: int, fps: float, opens: bool) -> None:
        self.frames, self.total, self.fps, self.opens = iter(frames), total, fps, opens
        self.reopened, self.released = 0, 0
        self.settings: dict[int, float] = {}

    def isOpened(self) -> bool:
        return self.opens

    def get(self, key: int) -> float:
        return {5: self.fps, 7: self.total}[key]

    def set(self, key: int, value: float) -> None:
        self.settings[key] = value

    def grab(self) -> bool:
        self.frame = next(self.frames, None)
        return self.frame is not None

    def retrieve(self):
        return (False, None) if isinstance(self.frame, str) else (True, self.frame[..., ::-1])

    def open(self, place: object) -> None:
        self.reopened += 1
        self.settings = {}

    def release(self) -> None:
        self.released += 1


def play_instead(
    monkeypatch: pytest.MonkeyPatch, frames: Iterable, total: int = -1, fps: float = 25.0, opens: bool = True
) -> FakeCapture:
    """Let every video and camera give ``frames``. The rest of OpenCV is unchanged."""
    import cv2

    capture = FakeCapture(frames, total, fps, opens)
    library = types.SimpleNamespace(**{name: getattr(cv2, name) for name in dir(cv2) if name[0] != "_"})
    library.VideoCapture = lambda place: capture
    monkeypatch.setattr(sources, "opencv", lambda: library)
    return capture


@pytest.fixture
def fake_video(monkeypatch) -> Callable[..., FakeCapture]:
    """`play_instead` until the end of the test."""
    pytest.importorskip("cv2")
    return functools.partial(play_instead, monkeypatch)

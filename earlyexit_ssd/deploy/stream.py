"""The temporal exit for videos and cameras: a frame that differs little from an earlier one repeats its detections.

A frame is compared with the last frame that the detector computed, so that slow changes add up. The threshold is
calibrated on unlabelled frames of the camera, by comparing repeated detections with the detector's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from PIL import Image

from earlyexit_ssd.bounds import betting_p_value, fixed_sequence_test, photos_needed, upper_bound
from earlyexit_ssd.deploy.predictor import Detections
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_json
from earlyexit_ssd.plain import build, check_fields, read_json
from earlyexit_ssd.progress import progress

Detector = Callable[[np.ndarray], Detections]  # a `Predictor`, or a function with the same call

REPEATED = "repeated"  # ``exit_name`` of repeated detections; their ``exit_index`` is -1
CELLS = 32  # cells of the small picture along the longer side: a cell is 10 px wide for an input of 320 px
ROWS = 8  # least number of frame rows averaged per cell (smaller cells: all rows), to average out sensor noise
CLOSE = 0.1
"""A detection is a close call if its score is nearer than this to the score threshold: noise may add or remove it."""
CLOSE_WEIGHT = 2.0  # factor of the change if the last answer has a close call
THRESHOLDS = tuple(0.25 * 2 ** (step / 4) for step in range(25))
"""Tested thresholds in grey levels, rising from 0.25 to 16; fixed in advance, as fixed-sequence testing needs it."""
MOST_REPEATS = 10
"""Default of the largest number of repeated frames in a row; it limits how late a missed change is seen."""
FEW_EVENTS = 10  # with fewer changes of the detections in the calibration frames, a rule is poorly tested
SAME_IOU = 0.5
FORMAT = "earlyexit_ssd stream rule/1"
ADVICE = "write one with earlyexit predict --calibrate-stream"

Share = Annotated[float, 0, 1]


def small_picture(image: np.ndarray) -> np.ndarray:
    """Shrink a frame uint8 [H, W, 3] to means of square cells, `CELLS` along the longer side: uint8 [h, w, 3]."""
    cell = max(1, max(image.shape[:2]) // CELLS)
    step = max(1, cell // ROWS)
    return np.asarray(Image.fromarray(image[::step]).reduce((cell, max(1, cell // step))))


def change(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two small pictures of the same shape, in grey levels 0 to 255."""
    difference = np.subtract(one, other, dtype=np.float32).ravel()
    return math.sqrt(float(difference @ difference) / difference.size)


@dataclass(frozen=True)
class Answer:
    """The part of a frame's detections that is compared: those that reach the score threshold."""

    boxes: np.ndarray  # [n, 4] xyxy
    labels: np.ndarray  # [n]
    close: bool  # whether a detection, with a score above or below the threshold, is a close call (`CLOSE`)

    @classmethod
    def of(cls, found: Detections, score: float) -> Answer:
        """The answer of the detections ``found``, with the score threshold ``score``."""
        keep = found.scores >= score
        return cls(found.boxes[keep], found.labels[keep], bool((np.abs(found.scores - score) < CLOSE).any()))


def same_answer(one: Answer, other: Answer) -> bool:
    """Whether both have the same number of objects of each class and all boxes match one to one at IoU 0.5."""
    if len(one.labels) != len(other.labels) or (np.sort(one.labels) != np.sort(other.labels)).any():
        return False
    overlap = np.where(one.labels[:, None] == other.labels, _iou(one.boxes, other.boxes), 0.0)
    for _ in range(len(overlap)):
        best = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[best] < SAME_IOU:
            return False
        overlap[best[0], :] = overlap[:, best[1]] = -1.0
    return True


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes xyxy [n, 4] and [m, 4]."""
    sides = np.minimum(one[:, None, 2:], other[None, :, 2:]) - np.maximum(one[:, None, :2], other[None, :, :2])
    shared = sides.clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """Figures of a rule on its calibration frames.

    Attributes:
        frames, block, blocks: number of frames, frames per block (one independent draw), and number of blocks.
        share, delta: largest share of changed answers that was asked for, and failure probability (None: no guarantee).
        events: number of frames whose own detections differ from those of the frame before.
        changed: share of frames whose answer differs from what the detector would have given.
        bound: upper bound of that share with probability 1 - delta; None without a guarantee.
        computed: share of frames that are computed.
        speedup: time with every frame computed, divided by the time with the rule, comparisons included.
        every_nth_changed: share of changed answers if every n-th frame is computed instead, at the same speed-up.
    """

    frames: Annotated[int, 1, 2**63]
    block: Annotated[int, 1, 2**31]
    blocks: Annotated[int, 0, 2**63]
    share: Share
    delta: Share | None
    events: Annotated[int, 0, 2**63]
    changed: Share
    bound: Share | None
    computed: Share
    speedup: float
    every_nth_changed: Share

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def wins(self) -> bool:
        """Whether fewer answers changed than with every n-th frame at the same cost."""
        return self.changed < self.every_nth_changed

    def __str__(self) -> str:
        promise = "nothing promised"
        if self.bound is not None:
            promise = f"at most {self.bound:.1%} with probability {1 - self.delta:g}, {self.blocks} blocks"
        return (
            f"{self.frames} frames, {self.computed:.1%} computed, {self.speedup:.1f} times as fast; {self.changed:.1%} "
            f"of the answers changed ({promise}); every n-th frame at the same cost: {self.every_nth_changed:.1%}; "
            f"the detector's own answer changed {self.events} times"
        )


@dataclass(frozen=True, kw_only=True)
class StreamRule:
    """Rule of a temporal exit, for one camera and one detector.

    Attributes:
        threshold: largest change (see :func:`change`) at which the last answer is repeated, grey levels.
        score: score threshold of the compared answers; use the rule with it only.
        most_repeats: largest number of repeats in a row.
        classes: the detector's classes.
        figures: figures of the calibration; None for a rule set by hand.
    """

    threshold: Annotated[float, 0, 255]
    score: Share
    most_repeats: Annotated[int, 0, 2**31]
    classes: tuple[str, ...]
    figures: StreamFigures | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})


def load_stream_rule(path: str | os.PathLike[str]) -> StreamRule:
    """Read a file of :meth:`StreamRule.save`; an EarlyExitError if there is none, or it is no rule."""
    content = read_json(path, "stream rule", ADVICE)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise EarlyExitError(f"{path}: expected a stream rule of format {FORMAT!r}; {ADVICE}")
    try:
        return build(StreamRule, content)
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}; {ADVICE}") from None


class TemporalExit:
    """A detector with a temporal exit; call it with the frames of one camera in order.

    Raises:
        EarlyExitError: the rule is for other classes, or for another score threshold than ``score`` (None: the rule's).
    """

    def __init__(self, detector: Detector, rule: StreamRule, score: float | None = None) -> None:
        classes = tuple(getattr(detector, "classes", rule.classes))
        if classes != rule.classes:
            raise EarlyExitError(
                f"the stream rule is for the classes {', '.join(rule.classes)[:80]}, the detector has "
                f"{', '.join(classes)[:80]}; calibrate a rule for this detector"
            )
        if score is not None and score != rule.score:
            raise EarlyExitError(
                f"the stream rule is for a score threshold of {rule.score:g}, not {score:g}; calibrate anew"
            )
        self.detector, self.rule = detector, rule
        self.reset()

    def reset(self) -> None:
        """Forget the last frame, before frames of another camera."""
        self._last: tuple[np.ndarray, Detections] | None = None  # small picture and detections of the computed frame
        self._close, self._repeats = False, 0

    def __call__(self, image: np.ndarray) -> Detections:
        """Detections of the next frame, uint8 [H, W, 3] RGB. Repeated ones have the ``exit_name`` `REPEATED`, the
        ``exit_index`` -1 and as ``ms`` the time of the comparison."""
        start, picture = time.perf_counter(), small_picture(image)
        if self._last is not None and self._repeats < self.rule.most_repeats:
            before, found = self._last
            if _little_changed(picture, before, self._close, self.rule.threshold):
                self._repeats += 1
                ms = 1000 * (time.perf_counter() - start)
                return dataclasses.replace(found, exit_index=-1, exit_name=REPEATED, exit_confidence=None, ms=ms)
        found = self.detector(image)
        self._last, self._close, self._repeats = (picture, found), Answer.of(found, self.rule.score).close, 0
        return dataclasses.replace(found, ms=1000 * (time.perf_counter() - start))


def _little_changed(picture: np.ndarray, last: np.ndarray, close: bool, threshold: float) -> bool:
    """Whether a rule repeats the answer of the frame ``last``. ``close``: the answer has a close call."""
    return picture.shape == last.shape and (CLOSE_WEIGHT if close else 1.0) * change(picture, last) <= threshold


@dataclass
class Recording:
    """A detector's answers and the small pictures of a video's frames. Any rule can be evaluated from them."""

    score: float  # score threshold of the answers
    classes: tuple[str, ...]
    pictures: list[np.ndarray] = field(default_factory=list)  # small picture per frame
    answers: list[Answer] = field(default_factory=list)
    ms: float = 0.0  # mean milliseconds of a detection
    ms_compared: float = 0.0  # mean milliseconds of a small picture with its comparison
    _same: dict[tuple[int, int], bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, detector: Any, frames: Iterable[np.ndarray], score: float, total: int | None = None) -> Recording:
        """Run ``detector`` on ``frames`` (uint8 [H, W, 3] RGB); ``total``: number of frames for the progress bar."""
        recording = cls(score, tuple(detector.classes))
        for image in progress(frames, desc="watch", total=total, unit="frame"):
            found = detector(image)
            start = time.perf_counter()
            picture = small_picture(image)
            if recording.pictures and recording.pictures[-1].shape == picture.shape:
                change(picture, recording.pictures[-1])
            recording.ms_compared += 1000 * (time.perf_counter() - start)
            recording.ms += found.ms
            recording.pictures.append(picture)
            recording.answers.append(Answer.of(found, score))
        recording.ms /= max(1, len(recording))
        recording.ms_compared /= max(1, len(recording))
        return recording

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, start: int, stop: int) -> Recording:
        """Frames ``start`` to ``stop - 1``."""
        inside = slice(start, stop)
        return dataclasses.replace(self, pictures=self.pictures[inside], answers=self.answers[inside], _same={})

    def with_rule(self, threshold: float, most_repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Which frames a rule computes, and at which frames its answer differs from the detector's: bool [n] each."""
        computed, last = np.zeros(len(self), bool), 0
        for index, picture in enumerate(self.pictures):
            if 0 < index <= last + most_repeats and _little_changed(
                picture, self.pictures[last], self.answers[last].close, threshold
            ):
                continue
            computed[index], last = True, index
        return computed, self.changed(computed)

    def changed(self, computed: np.ndarray) -> np.ndarray:
        """Where answers differ from the detector's if only ``computed`` frames (bool [n]) are computed: bool [n]."""
        last = np.maximum.accumulate(np.where(computed, np.arange(len(self)), 0))
        return np.array([not self._equal(int(one), index) for index, one in enumerate(last)], bool)

    def _equal(self, one: int, other: int) -> bool:
        key = (one, other)
        if key not in self._same:
            self._same[key] = one == other or same_answer(self.answers[one], self.answers[other])
        return self._same[key]

    def speedup(self, computed: np.ndarray) -> float:
        """Time of computing all frames divided by the time of computing ``computed``; 1.0 without timing."""
        spent = self.ms_compared * len(self) + self.ms * computed.sum()
        return float(self.ms * len(self) / spent) if spent else 1.0

    def nth_frames(self, speedup: float, offsets: int = 8) -> list[np.ndarray]:
        """``offsets`` masks bool [n]. Each has every n-th frame for n = ``speedup``, from another start."""
        frames, chosen = np.arange(len(self)), []
        for offset in range(offsets):
            turn = np.floor(frames / max(1.0, speedup) + offset / offsets)
            chosen.append(np.concatenate([[True], turn[1:] > turn[:-1]]))
        return chosen

    def every_nth(self, speedup: float, offsets: int = 8) -> float:
        """Share of changed answers if only :meth:`nth_frames` are computed, mean over the offsets."""
        return float(np.mean([self.changed(computed).mean() for computed in self.nth_frames(speedup, offsets)]))

    def figures(
        self, threshold: float, most_repeats: int, share: float, delta: float | None, block: int
    ) -> StreamFigures:
        """The figures of a rule on this recording; arguments as of `calibrate_stream`."""
        computed, changed = self.with_rule(threshold, most_repeats)
        blocks, speedup = block_means(changed, block), self.speedup(computed)
        return StreamFigures(
            frames=len(self),
            block=block,
            blocks=len(blocks),
            share=share,
            delta=delta,
            events=sum(not self._equal(index, index + 1) for index in range(len(self) - 1)),
            changed=float(changed.mean()),
            bound=None if delta is None else upper_bound(blocks, delta, _p_value_at(delta)),
            computed=float(computed.mean()),
            speedup=speedup,
            every_nth_changed=self.every_nth(speedup),
        )


def _p_value_at(delta: float) -> Callable[[np.ndarray, float], float]:
    return functools.partial(betting_p_value, delta=delta)


def block_means(changed: np.ndarray, block: int) -> np.ndarray:
    """Share of changed answers per ``block`` consecutive frames, in a seeded random order; an incomplete last block is
    dropped."""
    whole = len(changed) // block * block
    means = changed[:whole].reshape(-1, block).mean(1)
    return np.random.default_rng(0).permutation(means)


def calibrate_stream(
    detector: Any,
    frames: Iterable[np.ndarray] | Recording,
    share: float = 0.05,
    delta: float | None = 0.05,
    block: int = 150,
    score: float = 0.5,
    most_repeats: int = MOST_REPEATS,
    total: int | None = None,
) -> StreamRule:
    """The rule with the largest threshold that changes at most ``share`` of the answers, from a camera's frames.

    Thresholds are tested in increasing order. With ``delta``, each is tested on blocks of frames by betting (see
    `earlyexit_ssd.bounds`), until the first failure. The last one that passes changes at most ``share`` of the answers
    with probability 1 - ``delta``, if blocks and future frames of the camera are independent draws of one distribution.
    An answer is changed if it differs from the detector's own in the sense of `same_answer`.

    Args:
        detector: a `Predictor`. Its ``score_thresh`` should be ``score`` - 0.1 (`CLOSE`) or lower, so that it returns
            close calls below ``score`` too.
        frames: uint8 [H, W, 3] RGB in order, of one camera, at the frame rate of use; or a `Recording`.
        delta: failure probability; None: choose by the measured share, without a guarantee.
        block: consecutive frames per draw; it should be longer than any event in front of the camera.
        score: score threshold of the answers; a `Recording` has its own.
        most_repeats: largest number of repeats in a row.
        total: number of frames, for the progress bar.

    Raises:
        EarlyExitError: a number out of its range, no frames, or too few frames for the guarantee.
    """
    for name, value in (("share", share), ("delta", 0.5 if delta is None else delta)):
        if not 0 < value < 1:
            raise EarlyExitError(f"{name} is {value}, expected a number in (0, 1), such as 0.05")
    if block < 1 or most_repeats < 0:
        raise EarlyExitError(f"block is {block} and most_repeats {most_repeats}, expected at least 1 and 0")
    recording = frames if isinstance(frames, Recording) else Recording.of(detector, frames, score, total)
    if not len(recording):
        raise EarlyExitError("no frame to calibrate on; name a video, a camera or a folder of frames")

    def losses(threshold: float) -> np.ndarray:
        changed = recording.with_rule(threshold, most_repeats)[1]
        return changed if delta is None else block_means(changed, block)

    if delta is None:
        passed = len(list(itertools.takewhile(lambda one: losses(one).mean() <= share, THRESHOLDS)))
    else:
        p_values = (betting_p_value(losses(one), share, delta=delta) for one in THRESHOLDS)
        passed = fixed_sequence_test(p_values, delta)
    if not passed:
        raise _no_rule(recording, losses(THRESHOLDS[0]), share, delta, block)
    threshold = THRESHOLDS[passed - 1]
    figures = recording.figures(threshold, most_repeats, share, delta, block)
    settings = {"score": recording.score, "most_repeats": most_repeats, "classes": recording.classes}
    return StreamRule(threshold=threshold, **settings, figures=figures)


def _no_rule(recording: Recording, losses: np.ndarray, share: float, delta: float | None, block: int) -> EarlyExitError:
    changed = float(losses.mean()) if losses.size else 0.0
    if delta is None or changed >= share:
        return EarlyExitError(
            f"even the safest rule changes {changed:.1%} of the answers, allowed are {share:.1%}: the detector "
            "itself flickers; ask for a larger share, or run it on every frame"
        )
    needed = photos_needed(losses if losses.size else np.zeros(1), share, delta, _p_value_at(delta))
    about = "" if needed is None else f", about {needed} are needed ({needed * block} frames)"
    return EarlyExitError(
        f"{len(recording)} frames are {losses.size} blocks of {block}, too few to promise {share:.1%} at delta "
        f"{delta:g}{about}; give more frames, a larger share or a shorter block, or promise nothing (delta none)"
    )

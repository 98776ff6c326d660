"""The temporal exit for videos and cameras: frames that have changed little get the detections of an earlier frame.

A *computed* frame is one on which the detector runs. Every frame is compared with the last computed frame, so slow
changes add up. The threshold is calibrated on unlabelled frames of the camera.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Annotated, Any

import numpy as np
from PIL import Image

from earlyexit_ssd.bounds import betting_p_value, photos_needed, upper_bound
from earlyexit_ssd.console import progress
from earlyexit_ssd.deploy.predictor import Detections, as_photo
from earlyexit_ssd.errors import EarlyExitError, shown, suggest_keywords
from earlyexit_ssd.files import write_json
from earlyexit_ssd.plain import build, check_fields, read_json

logger = logging.getLogger(__name__)

REPEATED = "repeated"  # ``exit_name`` of repeated detections; their ``exit_index`` is -1
CELLS = 32  # about the number of cells along the longer side of a thumbnail
ROWS = 8
"""Of a cell with more rows, only every n-th row is read, for speed, but at least this number of rows."""
CLOSE_MARGIN = 0.1
"""A detection is a *close call* if its score is within this distance of the score threshold. Noise can add or remove
it."""
CLOSE_WEIGHT = 2.0  # factor of the change if the last answer has a close call
THRESHOLDS = tuple(0.25 * 2 ** (step / 4) for step in range(25))
"""Tested thresholds in grey levels, from 0.25 to 16. Fixed-sequence testing needs thresholds fixed in advance."""
MOST_REPEATS = 10
"""Default of the largest number of repeats in a row. It limits how late a missed change is detected."""
FEW_EVENTS = 10  # calibration frames with fewer changes of the detections are a weak test of a rule
OFFSETS = 8  # number of offsets at which every n-th frame is tried
SAME_IOU = 0.5
FORMAT = "earlyexit_ssd stream rule/1"
ADVICE = "write a rule with earlyexit predict --calibrate-stream"

Share = Annotated[float, 0, 1]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink a frame uint8 [H, W, 3] to means of cells, about `CELLS` along the longer side: uint8 [h, w, 3]."""
    cell = max(1, max(image.shape[:2]) // CELLS)
    step = max(1, cell // ROWS)
    return np.asarray(Image.fromarray(image[::step]).reduce((cell, max(1, cell // step))))


def change(first: np.ndarray, second: np.ndarray) -> float:
    """Return the root mean square difference of two thumbnails of the same shape, in grey levels 0 to 255."""
    difference = np.subtract(first, second, dtype=np.float32).ravel()
    return math.sqrt(float(difference @ difference) / difference.size)


@dataclass(frozen=True)
class Answer:
    """The detections of a frame that reach the score threshold. Answers of frames are compared."""

    boxes: np.ndarray  # [n, 4] xyxy
    labels: np.ndarray  # [n]
    close_call: bool  # whether a detection is a close call (`CLOSE_MARGIN`), above or below the score threshold

    @classmethod
    def of(cls, detections: Detections, score: float) -> Answer:
        """Select the detections with at least the score threshold ``score``."""
        keep, close_call = detections.scores >= score, np.abs(detections.scores - score) < CLOSE_MARGIN
        return cls(detections.boxes[keep], detections.labels[keep], bool(close_call.any()))


def same_answer(first: Answer, second: Answer) -> bool:
    """Return whether both have equally many objects of each class, and all boxes match one to one at IoU 0.5."""
    if len(first.labels) != len(second.labels) or (np.sort(first.labels) != np.sort(second.labels)).any():
        return False
    iou = np.where(first.labels[:, None] == second.labels, _iou(first.boxes, second.boxes), 0.0)
    for _ in range(len(iou)):
        best = np.unravel_index(iou.argmax(), iou.shape)
        if iou[best] < SAME_IOU:
            return False
        iou[best[0], :] = iou[:, best[1]] = -1.0
    return True


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU [n, m] of boxes xyxy [n, 4] and [m, 4]."""
    sides = np.minimum(first[:, None, 2:], second[None, :, 2:]) - np.maximum(first[:, None, :2], second[None, :, :2])
    intersection = sides.clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return intersection / np.maximum(areas[0][:, None] + areas[1][None] - intersection, 1e-9)


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """Figures of a rule on its calibration frames."""

    frames: Annotated[int, 1, 2**63]  # number of frames
    block: Annotated[int, 1, 2**31]  # number of frames per block, which counts as one independent draw
    blocks: Annotated[int, 0, 2**63]  # number of blocks
    share: Share  # largest share of changed answers that is allowed
    delta: Share | None  # failure probability of the bound; None: no guarantee
    events: Annotated[int, 0, 2**63]  # frames on which the detector's answer differs from that on the frame before
    changed: Share  # share of frames whose answer with the rule differs from the detector's
    bound: Share | None  # upper bound of ``changed`` with probability 1 - delta; None without a guarantee
    computed: Share  # share of frames that are computed
    speedup: float  # time with every frame computed / time with the rule, comparisons included
    every_nth_changed: Share  # share of changed answers if every n-th frame is computed instead, at the same speed-up

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def wins(self) -> bool:
        """Whether fewer answers change than with every n-th frame at the same cost."""
        return self.changed < self.every_nth_changed

    def __str__(self) -> str:
        guarantee = "no guarantee"
        if self.bound is not None:
            guarantee = f"at most {self.bound:.1%} with probability {1 - self.delta:g}, {self.blocks} blocks"
        return (
            f"{self.frames} frames, {self.computed:.1%} computed, {self.speedup:.1f} times as fast; {self.changed:.1%} "
            f"of the answers changed ({guarantee}); every n-th frame at the same cost: {self.every_nth_changed:.1%}; "
            f"the detector's answer changed {self.events} times"
        )


@dataclass(frozen=True, kw_only=True)
class StreamRule:
    """Rule of a temporal exit, for one camera and one detector.

    Attributes:
        threshold: largest change (see :func:`change`) at which the last answer is repeated, in grey levels.
        score: score threshold of the compared answers. The rule holds for this score threshold only.
        most_repeats: largest number of repeats in a row.
        classes: classes of the detector.
        figures: figures of the calibration; None for a rule without calibration.
        stride: the rule holds if every ``stride``-th frame is used.
        detector: ``digest`` of the detector; None: not known.
        frame_size: (height, width) of the calibration's frames, pixels; None: not known. Frames of another size are
            never repeated.
    """

    threshold: Annotated[float, 0, 255]
    score: Share
    most_repeats: Annotated[int, 0, 2**31]
    classes: tuple[str, ...]
    figures: StreamFigures | None = None
    stride: Annotated[int, 1, 2**31] = 1
    detector: str | None = None
    frame_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.frame_size is not None and len(self.frame_size) != 2:
            raise EarlyExitError(f"frame_size is {list(self.frame_size)}, expected [height, width]")

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})


def load_stream_rule(path: str | os.PathLike[str]) -> StreamRule:
    """Read a file of :meth:`StreamRule.save`. Raise an EarlyExitError if it is missing or has no valid rule."""
    content = read_json(path, "stream rule", ADVICE)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise EarlyExitError(f"{path}: expected a stream rule of format {FORMAT!r}; {ADVICE}")
    try:
        return build(StreamRule, content)
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}; {ADVICE}") from None


class TemporalExit:
    """A detector with a temporal exit. Call it with the frames of one camera, in order.

    ``detector`` is a `Predictor`, or a function with the same call. Raise EarlyExitError if the rule is for another
    detector, or for another score threshold than ``score`` (None: any).
    """

    def __init__(
        self, detector: Callable[[np.ndarray], Detections], rule: StreamRule, score: float | None = None
    ) -> None:
        classes, fix = tuple(getattr(detector, "classes", rule.classes)), "calibrate a rule for this detector"
        if classes != rule.classes:
            own, others = (shorten(", ".join(names), 80) for names in (rule.classes, classes))
            raise EarlyExitError(f"the stream rule is for the classes {own}, the detector has {others}; {fix}")
        if rule.detector is not None and (digest := getattr(detector, "digest", rule.detector)) != rule.detector:
            hashes = f"the detector with the SHA-256 {rule.detector:.12}, this one has {digest:.12}"
            raise EarlyExitError(f"the stream rule is for {hashes}; {fix}")
        if score is not None and score != rule.score:
            scores = f"a score threshold of {rule.score:g}, not {score:g}"
            raise EarlyExitError(f"the stream rule is for {scores}; calibrate a rule for it")
        stored = getattr(detector, "stored_score_thresh", None)
        if stored is not None and (detector.score_thresh > np.maximum(stored, rule.score)).any():
            highest = f"score_thresh of the detector is up to {detector.score_thresh.max():g}"
            lower = f"{highest}; lower it to {rule.score - CLOSE_MARGIN:g}"
            raise EarlyExitError(f"the stream rule is for a score threshold of {rule.score:g}, {lower}")
        self.detector, self.rule, self._warned = detector, rule, False
        self.reset()

    def reset(self) -> None:
        """Forget the last frame. Call it before the frames of another camera."""
        # thumbnail and detections of the last computed frame, and whether its answer has a close call
        self._last: tuple[np.ndarray, Detections, bool] | None = None
        self._repeats = 0

    def __call__(self, image: np.ndarray) -> Detections:
        """Return the detections of a frame, an image for :meth:`Predictor.__call__`. Repeated detections have the
        ``exit_name`` `REPEATED` and the ``exit_index`` -1, and their ``ms`` is the time of the comparison."""
        start, image = time.perf_counter(), as_photo(image, "frame")
        small, size = thumbnail(image), image.shape[:2]
        fits = self.rule.frame_size in (None, size)
        if not fits and not self._warned:
            text = "the stream rule is for frames of %d x %d pixels; all of %d x %d are computed, so calibrate again"
            logger.warning(text, *self.rule.frame_size[::-1], *size[::-1])
            self._warned = True
        if fits and self._last is not None and self._repeats < self.rule.most_repeats:
            last, detections, close_call = self._last
            if _is_repeat(small, last, close_call, self.rule.threshold):
                self._repeats += 1
                ms = 1000 * (time.perf_counter() - start)
                detections = copy.deepcopy(detections)  # the caller may change its arrays
                return dataclasses.replace(detections, exit_index=-1, exit_name=REPEATED, exit_confidence=None, ms=ms)
        detections = self.detector(image)
        close_call = Answer.of(detections, self.rule.score).close_call
        self._last, self._repeats = (small, copy.deepcopy(detections), close_call), 0
        return dataclasses.replace(detections, ms=1000 * (time.perf_counter() - start))


def _is_repeat(small: np.ndarray, last: np.ndarray, close_call: bool, threshold: float) -> bool:
    """Return whether a thumbnail has changed little since that of the ``last`` computed frame, whose answer has a close
    call if ``close_call`` is true."""
    return small.shape == last.shape and (CLOSE_WEIGHT if close_call else 1.0) * change(small, last) <= threshold


@dataclass
class StreamRecording:
    """A detector's answers on all frames, and the frames' thumbnails. Any rule can be evaluated on it."""

    score: float  # score threshold of the answers
    classes: tuple[str, ...]
    thumbnails: list[np.ndarray] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    ms: float = 0.0  # mean milliseconds of a detection
    ms_compared: float = 0.0  # mean milliseconds of a thumbnail and its comparison
    detector: str | None = None  # ``digest`` of the detector
    frame_size: tuple[int, int] | None = None  # (height, width) of the first frame
    _same: dict[tuple[int, int], bool] = field(default_factory=dict, repr=False)  # results of `same_answer`

    @classmethod
    def of(cls, detector: Any, frames: Iterable[np.ndarray], score: float) -> StreamRecording:
        """Run a detector with ``classes`` on frames uint8 [H, W, 3] RGB."""
        recording = cls(score, tuple(detector.classes), detector=getattr(detector, "digest", None))
        for image in progress(frames, desc="record", unit="frame"):
            detections = detector(image)
            start = time.perf_counter()
            small = thumbnail(image)
            if recording.thumbnails and recording.thumbnails[-1].shape == small.shape:
                change(small, recording.thumbnails[-1])  # only to measure its time
            recording.ms_compared += 1000 * (time.perf_counter() - start)
            recording.ms += detections.ms
            recording.frame_size = recording.frame_size or image.shape[:2]
            recording.thumbnails.append(small)
            recording.answers.append(Answer.of(detections, score))
        recording.ms /= max(1, len(recording))
        recording.ms_compared /= max(1, len(recording))
        return recording

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, start: int, stop: int) -> StreamRecording:
        """Return the frames ``start`` to ``stop - 1``."""
        frames = slice(start, stop)
        return dataclasses.replace(self, thumbnails=self.thumbnails[frames], answers=self.answers[frames], _same={})

    def apply_rule(self, threshold: float, most_repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks, bool [n]: frames that a rule computes, and frames on which it changes the answer."""
        computed, last = np.zeros(len(self), bool), 0
        for index, small in enumerate(self.thumbnails):
            if 0 < index <= last + most_repeats and _is_repeat(
                small, self.thumbnails[last], self.answers[last].close_call, threshold
            ):
                continue
            computed[index], last = True, index
        return computed, self.changed(computed)

    def changed(self, computed: np.ndarray) -> np.ndarray:
        """Return the frames with changed answers, bool [n], if only ``computed`` frames (bool [n]) are computed."""
        last = np.maximum.accumulate(np.where(computed, np.arange(len(self)), 0))
        return np.array([not self._is_same(int(source), index) for index, source in enumerate(last)], bool)

    def _is_same(self, first: int, second: int) -> bool:
        """Return whether two frames have the same answer."""
        key = (first, second)
        if key not in self._same:
            self._same[key] = first == second or same_answer(self.answers[first], self.answers[second])
        return self._same[key]

    def speedup(self, computed: np.ndarray) -> float:
        """Return the time with all frames computed, divided by that with ``computed`` frames; 1.0 without timing."""
        ms = self.ms_compared * len(self) + self.ms * computed.sum()
        return float(self.ms * len(self) / ms) if ms else 1.0

    def nth_frames(self, speedup: float) -> list[np.ndarray]:
        """Return `OFFSETS` masks, bool [n]. Each has every n-th frame for n = ``speedup``, with another offset."""
        positions = np.arange(len(self)) / max(1.0, speedup)
        groups = (np.floor(positions + offset / OFFSETS) for offset in range(OFFSETS))
        return [np.concatenate([[True], group[1:] > group[:-1]]) for group in groups]

    def figures(
        self, threshold: float, most_repeats: int, share: float, delta: float | None, block: int
    ) -> StreamFigures:
        """Return the figures of a rule on this recording. For the arguments see `calibrate_stream`."""
        computed, changed = self.apply_rule(threshold, most_repeats)
        blocks, speedup, bound = block_means(changed, block), self.speedup(computed), None
        if delta is not None:
            bound = upper_bound(blocks, delta, functools.partial(betting_p_value, delta=delta))
        every_nth_changed = [self.changed(frames).mean() for frames in self.nth_frames(speedup)]
        return StreamFigures(
            frames=len(self),
            block=block,
            blocks=len(blocks),
            share=share,
            delta=delta,
            events=sum(not self._is_same(index, index + 1) for index in range(len(self) - 1)),
            changed=float(changed.mean()),
            bound=bound,
            computed=float(computed.mean()),
            speedup=speedup,
            every_nth_changed=float(np.mean(every_nth_changed)),
        )


def block_means(changed: np.ndarray, block: int) -> np.ndarray:
    """Return the share of changed answers per complete block of consecutive frames, in a seeded random order, since
    `betting_p_value` depends on the order."""
    frames = len(changed) // block * block
    means = changed[:frames].reshape(-1, block).mean(1)
    return np.random.default_rng(0).permutation(means)


@suggest_keywords
def calibrate_stream(
    detector: Any,
    frames: Iterable[np.ndarray] | StreamRecording,
    share: float = 0.05,
    delta: float | None = 0.05,
    block: int = 150,
    score: float = 0.5,
    most_repeats: int = MOST_REPEATS,
    most_frames: int | None = None,
) -> StreamRule:
    """Find the largest threshold of a temporal exit that changes at most ``share`` of the answers.

    Thresholds are tested in increasing order, until the first failure. With ``delta``, each is tested on blocks of
    frames by betting (see `earlyexit_ssd.bounds`). The last threshold that passes changes at most ``share`` of the
    answers with probability 1 - ``delta``, if blocks and future frames of the camera are independent draws of one
    distribution. An answer is changed if `same_answer` finds it different from the detector's.

    Args:
        detector: a `Predictor`. Its ``score_thresh`` should be ``score`` - 0.1 (`CLOSE_MARGIN`) or lower, so that it
            returns close calls below ``score`` too.
        frames: frames uint8 [H, W, 3] RGB of one camera, in order, at the frame rate of use; or a `StreamRecording`.
        share: largest share of changed answers, in (0, 1).
        delta: failure probability, in (0, 1); None: use the measured share, without a guarantee.
        block: number of consecutive frames per block. A block should be longer than any event in front of the camera.
        score: score threshold of the answers. A `StreamRecording` has its own.
        most_repeats: largest number of repeats in a row.
        most_frames: largest number of ``frames``, to refuse too few before they are recorded; None: not known.

    Raises:
        EarlyExitError: a number is out of its range, there is no frame, no threshold passes, or there are too few
            frames for the guarantee.
    """
    for name, value in (("share", share), ("delta", 0.5 if delta is None else delta)):
        if not 0 < value < 1:
            raise EarlyExitError(f"{name} is {value}, expected a number in (0, 1), such as 0.05")
    if not all(type(value) is int for value in (block, most_repeats)) or block < 1 or most_repeats < 0:
        whole = "expected whole numbers, at least 1 and 0"
        raise EarlyExitError(f"block is {shown(block)} and most_repeats {shown(most_repeats)}, {whole}")
    if delta is not None:
        least = photos_needed(np.zeros(1), share, delta, functools.partial(betting_p_value, delta=delta))
        if least is not None and most_frames is not None and most_frames < least * block:
            raise _too_few(most_frames, most_frames // block, share, delta, block, least)
        if least is not None:
            text = "a guarantee of %.1f %% takes at least %d frames (%d blocks)"
            logger.info(text, 100 * share, least * block, least)
    recording = frames if isinstance(frames, StreamRecording) else StreamRecording.of(detector, frames, score)
    if not len(recording):
        raise EarlyExitError("no frame to calibrate on; name a video, a camera or a folder of frames")

    def losses(threshold: float) -> np.ndarray:
        _, changed = recording.apply_rule(threshold, most_repeats)
        return changed if delta is None else block_means(changed, block)

    def passes(threshold: float) -> bool:
        if delta is None:
            return losses(threshold).mean() <= share
        return betting_p_value(losses(threshold), share, delta=delta) <= delta

    passed = list(itertools.takewhile(passes, THRESHOLDS))  # fixed-sequence testing
    if not passed:
        raise _no_rule(len(recording), losses(THRESHOLDS[0]), share, delta, block)
    return StreamRule(
        threshold=passed[-1],
        score=recording.score,
        most_repeats=most_repeats,
        classes=recording.classes,
        detector=recording.detector,
        frame_size=recording.frame_size,
        figures=recording.figures(passed[-1], most_repeats, share, delta, block),
    )


def _no_rule(frames: int, losses: np.ndarray, share: float, delta: float | None, block: int) -> EarlyExitError:
    """Return the error for the case that the smallest threshold does not pass. ``losses`` are its losses."""
    changed = float(losses.mean()) if losses.size else 0.0
    if delta is None or changed >= share:
        return EarlyExitError(
            f"even the smallest threshold changes {changed:.1%} of the answers, expected at most {share:.1%}, since "
            "detections flicker between similar frames; allow a larger share, or run the detector on every frame"
        )
    p_value = functools.partial(betting_p_value, delta=delta)
    needed = photos_needed(losses if losses.size else np.zeros(1), share, delta, p_value)
    return _too_few(frames, losses.size, share, delta, block, needed)


def _too_few(frames: int, blocks: int, share: float, delta: float, block: int, needed: int | None) -> EarlyExitError:
    about = "" if needed is None else f"; about {needed} blocks are needed ({needed * block} frames)"
    return EarlyExitError(
        f"{frames} frames are {blocks} blocks of {block}, too few to guarantee {share:.1%} at delta "
        f"{delta:g}{about}; give more frames, a larger share, a shorter block, or no guarantee (delta none)"
    )

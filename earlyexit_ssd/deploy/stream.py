"""The temporal exit of a video or a camera: where little has changed, the last answer is given again.

A frame is compared with the last one that was computed, never with the one before it, so that what changes slowly adds
up. What counts as little is calibrated on the camera's own frames, which nobody labels: the detector's own answers on
them say how many a rule would have changed.
"""

from __future__ import annotations

import dataclasses
import json
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

Detector = Callable[[np.ndarray], Detections]
"""A `Predictor`, or what is called like one."""

REPEATED = "repeated"
"""``exit_name`` of an answer that is given again; its ``exit_index`` is -1."""
CELLS = 32
"""Of the small picture along the longer side. An object that fills one is 10 px wide in a detector's input of 320."""
ROWS = 8
"""Of the frame that are averaged in a cell, at most; all their pixels are, so that sensor noise nearly vanishes."""
CLOSE = 0.1
"""A detection this near to the least score is a close call: a little noise adds it or takes it away."""
CLOSE_WEIGHT = 2.0
"""Changes count so many times where the last answer holds a close call."""
THRESHOLDS = tuple(0.25 * 2 ** (step / 4) for step in range(25))
"""Grey levels from safe to bold, 0.25 to 16; fixed before any frame is seen, so that they can be tested in turn."""
MOST_REPEATS = 10
"""Whatever a calibration did not see, what comes in is seen so many frames later at the latest."""
FEW_EVENTS = 10
"""Fewer changes of the answer say little about a rule."""
SAME_IOU = 0.5
FORMAT = "earlyexit_ssd stream rule/1"
ADVICE = "write one with earlyexit predict --calibrate-stream"

Share = Annotated[float, 0, 1]


def small_picture(image: np.ndarray) -> np.ndarray:
    """A frame uint8 [H, W, 3] as means of square cells, `CELLS` along its longer side: uint8 [h, w, 3]."""
    cell = max(1, max(image.shape[:2]) // CELLS)
    step = max(1, cell // ROWS)
    return np.asarray(Image.fromarray(image[::step]).reduce((cell, max(1, cell // step))))


def change(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two small pictures of one shape, grey levels in 0 to 255."""
    difference = np.subtract(one, other, dtype=np.float32).ravel()
    return math.sqrt(float(difference @ difference) / difference.size)


@dataclass(frozen=True)
class Answer:
    """Of a detector, as a user with a least score sees it: boxes [n, 4] xyxy and labels [n], and whether a detection,
    seen or not, is a close call."""

    boxes: np.ndarray
    labels: np.ndarray
    close: bool

    @classmethod
    def of(cls, found: Detections, score: float) -> Answer:
        """What is left at a least score of ``score``."""
        keep = found.scores >= score
        return cls(found.boxes[keep], found.labels[keep], bool((np.abs(found.scores - score) < CLOSE).any()))


def same_answer(one: Answer, other: Answer) -> bool:
    """Whether both hold as many objects of each class, and each box has one of its own in the other at IoU 0.5."""
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
    """Of boxes xyxy [n, 4] and [m, 4]: [n, m]."""
    sides = np.minimum(one[:, None, 2:], other[None, :, 2:]) - np.maximum(one[:, None, :2], other[None, :, :2])
    shared = sides.clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """What was measured on the frames that calibrated a rule.

    Attributes:
        frames, block, blocks: frames in all, frames that count as one draw, and how many such draws there were.
        share: of changed answers that was asked for; delta: of the promise, None where there is none.
        events: how often the detector's own answer differed from that to the frame before: what there was to miss.
        changed: share of the frames whose answer differed from the detector's own.
        bound: what that share does not exceed with probability 1 - delta; None without a promise.
        computed: share of the frames that were computed.
        speedup: milliseconds of all frames computed, through those with the rule, comparisons included.
        every_nth_changed: the share of changed answers where every n-th frame is computed, at the same speed-up.
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
    """When the last answer is given again, for one camera and one detector.

    Attributes:
        threshold: the largest change (see :func:`change`) at which it is, grey levels.
        score: least score at which answers were compared; score, like the classes, is to be that of use.
        most_repeats: an answer is given again so many times in a row at most.
        classes: of the detector.
        figures: of the calibration; None for a rule that was set by hand.
    """

    threshold: Annotated[float, 0, 255]
    score: Share
    most_repeats: Annotated[int, 0, 2**31]
    classes: tuple[str, ...]
    figures: StreamFigures | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write_json(path, {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))})


def load_stream_rule(path: str | os.PathLike[str]) -> StreamRule:
    """Read what :meth:`StreamRule.save` has written.

    Raises:
        EarlyExitError: no such file, or not a rule.
    """
    content = read_json(path, "stream rule", ADVICE)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EarlyExitError(f"{path}: expected a stream rule of format {FORMAT!r}; {ADVICE}")
    try:
        return build(StreamRule, {key: value for key, value in content.items() if key != "format"})
    except EarlyExitError as error:
        raise EarlyExitError(f"{path}: {error}; {ADVICE}") from None


class TemporalExit:
    """A detector for the frames of one camera in turn: where little has changed, its last answer again.

    Raises:
        EarlyExitError: the rule is for other classes, or for another least score than ``score`` (None: the rule's).
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
                f"the stream rule is for a least score of {rule.score:g}, not {score:g}; calibrate anew"
            )
        self.detector, self.rule = detector, rule
        self.reset()

    def reset(self) -> None:
        """Forget the last answer: another camera comes."""
        self._picture: np.ndarray | None = None
        self._found: Detections | None = None
        self._weight, self._repeats = 1.0, 0

    def __call__(self, image: np.ndarray) -> Detections:
        """Detect in the next frame, uint8 [H, W, 3] RGB; ``exit_name`` `REPEATED` and ``exit_index`` -1 tell an answer
        that is given again, whose ``ms`` is that of the comparison."""
        start = time.perf_counter()
        picture = small_picture(image)
        if (
            self._picture is not None
            and self._repeats < self.rule.most_repeats
            and self._picture.shape == picture.shape
            and self._weight * change(picture, self._picture) <= self.rule.threshold
        ):
            self._repeats += 1
            ms = 1000 * (time.perf_counter() - start)
            return dataclasses.replace(self._found, exit_index=-1, exit_name=REPEATED, exit_confidence=None, ms=ms)
        found = self.detector(image)
        self._picture, self._found, self._repeats = picture, found, 0
        self._weight = CLOSE_WEIGHT if Answer.of(found, self.rule.score).close else 1.0
        return dataclasses.replace(found, ms=1000 * (time.perf_counter() - start))


@dataclass
class Recording:
    """What a detector says to every frame of a video, and the small pictures: enough to try any rule.

    Attributes:
        pictures: of the frames in turn; answers: at the least score ``score``.
        ms: of a frame that is computed, mean; ms_compared: of a small picture and its comparison, mean.
    """

    score: float
    classes: tuple[str, ...]
    pictures: list[np.ndarray] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    ms: float = 0.0
    ms_compared: float = 0.0
    _same: dict[tuple[int, int], bool] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, detector: Any, frames: Iterable[np.ndarray], score: float, total: int | None = None) -> Recording:
        """Run ``detector`` on all ``frames`` (uint8 [H, W, 3] RGB); ``total`` is for the progress bar."""
        recording = cls(score, tuple(detector.classes))
        ms, compared = [], []
        for image in progress(frames, desc="watch", total=total, unit="frame"):
            found = detector(image)
            start = time.perf_counter()
            picture = small_picture(image)
            if recording.pictures and recording.pictures[-1].shape == picture.shape:
                change(picture, recording.pictures[-1])
            compared.append(1000 * (time.perf_counter() - start))
            ms.append(found.ms)
            recording.pictures.append(picture)
            recording.answers.append(Answer.of(found, score))
        if ms:
            recording.ms, recording.ms_compared = float(np.mean(ms)), float(np.mean(compared))
        return recording

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, start: int, stop: int) -> Recording:
        """Frames ``start`` to ``stop``, the latter left out."""
        inside = slice(start, stop)
        return dataclasses.replace(self, pictures=self.pictures[inside], answers=self.answers[inside], _same={})

    def with_rule(self, threshold: float, most_repeats: int) -> tuple[np.ndarray, np.ndarray]:
        """Which frames a rule would compute, and which answers it would change: bool [n] each."""
        computed, last = np.zeros(len(self), bool), 0
        for index, picture in enumerate(self.pictures):
            weight = CLOSE_WEIGHT if self.answers[last].close else 1.0
            computed[index] = (
                index == 0
                or index - last > most_repeats
                or picture.shape != self.pictures[last].shape
                or weight * change(picture, self.pictures[last]) > threshold
            )
            last = index if computed[index] else last
        return computed, self.changed(computed)

    def changed(self, computed: np.ndarray) -> np.ndarray:
        """Which answers differ from the detector's own where only the frames ``computed`` (bool [n]) are: bool [n]."""
        last = np.maximum.accumulate(np.where(computed, np.arange(len(self)), 0))
        return np.array([not self._equal(int(one), index) for index, one in enumerate(last)], bool)

    def _equal(self, one: int, other: int) -> bool:
        if one == other:
            return True
        key = (one, other)
        if key not in self._same:
            self._same[key] = same_answer(self.answers[one], self.answers[other])
        return self._same[key]

    def speedup(self, computed: np.ndarray) -> float:
        """Milliseconds of all frames through those with the rule; 1.0 where nothing was timed."""
        spent = self.ms_compared * len(self) + self.ms * computed.sum()
        return float(self.ms * len(self) / spent) if spent else 1.0

    def nth_frames(self, speedup: float, phases: int = 8) -> list[np.ndarray]:
        """Frames at even distances, ``speedup`` times fewer than all, from so many starts: bool [n] each."""
        frames, chosen = np.arange(len(self)), []
        for phase in range(phases):
            turn = np.floor(frames / max(1.0, speedup) + phase / phases)
            chosen.append(np.concatenate([[True], turn[1:] > turn[:-1]]))
        return chosen

    def every_nth(self, speedup: float, phases: int = 8) -> float:
        """The share of changed answers where only :meth:`nth_frames` are computed, mean over the starts."""
        return float(np.mean([self.changed(computed).mean() for computed in self.nth_frames(speedup, phases)]))

    def figures(
        self, threshold: float, most_repeats: int, share: float, delta: float | None, block: int
    ) -> StreamFigures:
        """What a rule does on these frames."""
        computed, changed = self.with_rule(threshold, most_repeats)
        blocks, speedup = block_means(changed, block), self.speedup(computed)
        bound = None
        if delta is not None:
            bound = upper_bound(blocks, delta, lambda losses, epsilon: betting_p_value(losses, epsilon, delta=delta))
        return StreamFigures(
            frames=len(self),
            block=block,
            blocks=len(blocks),
            share=share,
            delta=delta,
            events=sum(not self._equal(index, index + 1) for index in range(len(self) - 1)),
            changed=float(changed.mean()),
            bound=bound,
            computed=float(computed.mean()),
            speedup=speedup,
            every_nth_changed=self.every_nth(speedup),
        )


def block_means(changed: np.ndarray, block: int) -> np.ndarray:
    """The share of changed answers in each ``block`` consecutive frames, in a seeded random order; frames behind the
    last whole block are left out."""
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
    """The boldest rule that changes at most ``share`` of the answers, from a camera's own frames.

    Thresholds are tried from safe to bold. With ``delta``, each is tested on blocks of frames by betting (see
    `earlyexit_ssd.bounds`), and the last one before the first that fails is taken: its share of changed answers is at
    most ``share`` with probability 1 - ``delta``, if blocks are independent draws of what the camera will see. An
    answer is changed where the number of objects of a class differs from the detector's own, or a box does not meet
    one of its own at IoU 0.5.

    Args:
        detector: a `Predictor`, best with a ``score_thresh`` that is 0.1 below ``score``, so that close calls are seen.
        frames: uint8 [H, W, 3] RGB in turn, all of one camera, at the rate at which it will run; or a `Recording`.
        delta: None tests nothing: the measured share alone decides, and nothing is promised.
        block: consecutive frames that count as one draw; longer than what happens before the camera lasts.
        score: least score of a detection that counts.
        most_repeats: an answer is given again so many times in a row at most.
        total: number of frames, for the progress bar.

    Raises:
        EarlyExitError: a number out of its range, no frames, or too few to promise that.
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
        passed = fixed_sequence_test((float(losses(one).mean() > share) for one in THRESHOLDS), 0.5)
    else:
        p_values = (betting_p_value(losses(one), share, delta=delta) for one in THRESHOLDS)
        passed = fixed_sequence_test(p_values, delta)
    if not passed:
        raise _too_few(recording, losses(THRESHOLDS[0]), share, delta, block)
    threshold = THRESHOLDS[passed - 1]
    figures = recording.figures(threshold, most_repeats, share, delta, block)
    return StreamRule(
        threshold=threshold,
        score=recording.score,
        most_repeats=most_repeats,
        classes=recording.classes,
        figures=figures,
    )


def _too_few(recording: Recording, losses: np.ndarray, share: float, delta: float | None, block: int) -> EarlyExitError:
    changed = float(losses.mean()) if losses.size else 0.0
    if delta is None or changed >= share:
        return EarlyExitError(
            f"even the safest rule changes {changed:.1%} of the answers, asked were {share:.1%} at most: the detector "
            "itself flickers; ask for a larger share, or run it on every frame"
        )
    model = losses if losses.size else np.zeros(1)
    needed = photos_needed(model, share, delta, lambda values, epsilon: betting_p_value(values, epsilon, delta=delta))
    about = "" if needed is None else f", about {needed} are needed ({needed * block} frames)"
    return EarlyExitError(
        f"{len(recording)} frames are {losses.size} blocks of {block}, too few to promise {share:.1%} at delta "
        f"{delta:g}{about}; give more frames, a larger share or a shorter block, or promise nothing (delta none)"
    )

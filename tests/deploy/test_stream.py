"""The temporal exit on drawn scenes, whose correct detections are known."""

import dataclasses
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest

from earlyexit_ssd.deploy.stream import (
    REPEATED,
    Answer,
    StreamRecording,
    StreamRule,
    TemporalExit,
    block_means,
    calibrate_stream,
    change,
    load_stream_rule,
    same_answer,
    thumbnail,
)
from earlyexit_ssd.errors import EarlyExitError
from tests.deploy.fakes import RedBox, scene

RULE = StreamRule(threshold=2.0, score=0.5, most_repeats=10**6, classes=RedBox.classes)


def run(frames, rule=RULE, detector=None):
    """Run a temporal exit. Return two masks: frames that were computed, and frames with the detector's answer."""
    detector = detector or RedBox()
    temporal_exit, reference = TemporalExit(detector, rule), RedBox(detector.score)
    computed, right = [], []
    for frame in frames:
        detections = temporal_exit(frame)
        computed.append(detections.exit_name != REPEATED)
        right.append(same_answer(Answer.of(detections, rule.score), Answer.of(reference(frame), rule.score)))
    return np.array(computed), np.array(right)


def noisy(frames, deviation, seed=0):
    """Add sensor noise with this standard deviation in grey levels."""
    random = np.random.default_rng(seed)
    for frame in frames:
        yield (frame + random.normal(0, deviation, frame.shape)).clip(0, 255).round().astype(np.uint8)


def test_the_change_of_two_pictures_by_hand():
    black, other = np.zeros((2, 2, 2, 3), np.uint8)
    other[0, 0] = 8
    assert change(black, other) == change(other, black) == 4.0  # sqrt(8 ** 2 / 4)
    assert change(black, black) == 0.0


@pytest.mark.parametrize("size", [(360, 640), (1080, 1920), (48, 40), (5, 7), (1, 1), (1, 4000)])
def test_the_thumbnail_has_the_frame_s_means(size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = thumbnail(frame)
    assert picture.dtype == np.uint8 and max(picture.shape[:2]) <= 64 and picture.shape[2] == 3
    assert picture.mean() == pytest.approx(frame.mean(), abs=12)


def test_repeated_detections_are_marked():
    detector = RedBox()
    detect = TemporalExit(detector, RULE)
    first, *_, last = [detect(scene(30)) for _ in range(50)]
    assert (last.exit_name, last.exit_index, last.exit_confidence) == ("repeated", -1, None)
    assert (last.boxes == first.boxes).all() and last.ms < 4.0 and detector.calls == 1
    assert detect(scene(30) / 255).exit_name == REPEATED  # floats in [0, 1] are frames too
    for answer in (first, last):
        answer.boxes[:] = 0  # the caller's own copy
    assert detect(scene(30)).boxes.any()
    detect.reset()
    assert detect(scene(30)).exit_name != REPEATED


def test_a_rule_refuses_a_detector_whose_answers_may_be_left_out():
    detector = RedBox()
    detector.stored_score_thresh = np.array([0.001, 0.7])
    for raised, refused in (([0.5, 0.7], False), ([0.5, 0.8], True), ([0.6, 0.7], True)):
        detector.score_thresh = np.array(raised)
        with pytest.raises(EarlyExitError, match="for a score threshold of 0.5") if refused else nullcontext():
            TemporalExit(detector, RULE)


def test_frames_of_another_size_are_computed(caplog):
    rule = dataclasses.replace(RULE, frame_size=scene().shape[:2])
    frames = [scene(size=(60, 80))] * 3
    assert run(frames, rule)[0].all() and len(caplog.messages) == 1
    assert run([scene()] * 3, rule)[0].tolist() == [True, False, False]
    assert calibrate_stream(RedBox(), [scene()] * 9, 0.1, None).frame_size == scene().shape[:2]


def test_slow_drift_adds_up():
    """Light rises by 0.01 grey levels per frame, so no frame differs from the frame before."""
    computed, _ = run([scene(level=60 + index * 0.01) for index in range(3000)])
    assert 8 <= computed.sum() <= 20
    assert max(np.diff(np.flatnonzero(computed))) < 400


def test_an_object_that_stands_still_is_still_detected():
    """It moves in, stands for 500 frames, and moves out."""
    path = [*range(-16, 40), *[40] * 500, *range(40, 97)]
    computed, right = run([scene(x) for x in path])
    standing = slice(56, 556)
    assert right[standing].all() and computed[standing].sum() <= 1
    assert right.mean() > 0.99


LARGE = (360, 640)


@pytest.mark.parametrize(
    ("scenes", "deviation", "repeats", "computed"),
    [
        # a new object of a twentieth of the frame's width
        ([scene(size=LARGE), scene(300, 200, 32, size=LARGE)], 0, 20, [0, 20]),
        # sensor noise at night is no change, a new object is
        ([scene(level=25, size=LARGE), scene(300, 200, 48, level=25, size=LARGE)], 12, 20, [0, 20]),
        # cuts
        ([scene(10), scene(70, level=160), scene(10)], 0, 10, [0, 10, 20]),
        # another size
        ([scene(10), scene(10, size=(96, 64))], 0, 2, [0, 2]),
    ],
)
def test_only_the_first_frame_of_each_scene_is_computed(scenes, deviation, repeats, computed):
    frames = noisy([frame for frame in scenes for _ in range(repeats)], deviation)
    found, right = run(frames)
    assert np.flatnonzero(found).tolist() == computed and right.all()


def test_repeats_in_a_row_are_limited():
    computed, _ = run([scene(10)] * 9, dataclasses.replace(RULE, most_repeats=3))
    assert np.flatnonzero(computed).tolist() == [0, 4, 8]


def test_a_close_call_is_repeated_at_half_the_change():
    frames = [scene(30), scene(30, level=91.6)]  # 1.6 grey levels or a little less
    assert not run(frames, detector=RedBox(0.9))[0][1]
    assert run(frames, detector=RedBox(0.55))[0][1] and run(frames, detector=RedBox(0.42))[0][1]


def answer(*boxes, labels=None):
    labels = [1] * len(boxes) if labels is None else labels
    return Answer(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), False)


LEFT, RIGHT = (0, 0, 10, 10), (20, 0, 30, 10)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (answer(), answer(), True),
        (answer(LEFT), answer(), False),
        (answer(LEFT), answer(LEFT, labels=[2]), False),
        (answer(LEFT), answer((0, 0, 10, 5)), True),  # IoU 0.5
        (answer(LEFT), answer((0, 0, 10, 4.9)), False),
        (answer(LEFT, RIGHT), answer(RIGHT, LEFT), True),
        (answer(LEFT, LEFT), answer(LEFT, RIGHT), False),  # one box, two partners
        (answer(LEFT, RIGHT, labels=[1, 2]), answer(LEFT, RIGHT, labels=[2, 1]), False),
    ],
)
def test_the_same_answer(one, other, same):
    assert same_answer(one, other) is same and same_answer(other, one) is same


def comings(blocks, length=40, every=10):
    """A scene with light that flickers a little. In every tenth block a ball passes."""
    random = np.random.default_rng(1)
    for block in range(blocks):
        for place in range(length):
            yield scene(place * 3 - 16 if block % every == 0 else None, level=90 + random.uniform(-0.5, 0.5))


def test_calibration_keeps_the_share_and_saves_time():
    rule = calibrate_stream(RedBox(), comings(100), 0.05, 0.05, block=40)
    figures = rule.figures
    assert (figures.frames, figures.blocks, figures.events) == (4000, 100, 30)
    assert figures.changed <= figures.bound <= 0.05
    assert figures.computed < 0.2 and figures.wins
    assert sorted(block_means(np.array([1, 1, 0, 0, 1, 0, 1]), 2)) == [0.0, 0.5, 1.0]  # the last block is incomplete
    computed, right = run(comings(30), rule)
    assert computed.mean() < 0.2 and right.mean() > 0.95


def test_a_larger_share_gives_a_larger_threshold():
    recording = StreamRecording.of(RedBox(), comings(60), 0.5)
    small, large = (calibrate_stream(None, recording, share, None, 40) for share in (0.001, 0.1))
    assert small.threshold < large.threshold and small.figures.computed > large.figures.computed
    assert small.figures.changed <= 0.001 and large.figures.changed <= 0.1
    assert small.figures.bound is None and "no guarantee" in str(small.figures)


def test_a_recording_predicts_the_temporal_exit():
    frames = list(comings(30))
    recording = StreamRecording.of(RedBox(), frames, 0.5)
    for threshold, most_repeats in ((0.5, 5), (4.0, 1000)):
        rule = dataclasses.replace(RULE, threshold=threshold, most_repeats=most_repeats)
        computed, changed = recording.apply_rule(threshold, most_repeats)
        expected, right = run(frames, rule)
        assert computed.tolist() == expected.tolist() and changed.tolist() == (~right).tolist()


def test_every_nth_frame_by_hand():
    """A ball jumps every four frames, so computing frames 0, 4, 8, ... changes no answer."""
    recording = StreamRecording.of(RedBox(), [scene(20 * (index // 4)) for index in range(16)], 0.5)
    assert not any(recording.changed(frames).any() for frames in recording.nth_frames(1.0))
    computed = np.arange(16) % 4 == 0
    assert not recording.changed(computed).any()
    assert recording.changed(np.arange(16) == 0).tolist() == [False] * 4 + [True] * 12
    assert np.flatnonzero(recording.nth_frames(16.0)[0]).tolist() == [0]
    # with offset 1/8, floor(frame / 16 + 1/8) rises at frame 14
    assert np.flatnonzero(recording.nth_frames(16.0)[1]).tolist() == [0, 14]
    recording.ms, recording.ms_compared = 10.0, 1.0
    assert recording.speedup(computed) == pytest.approx(160 / (16 * 1 + 4 * 10))


def test_the_error_for_too_few_frames_has_the_number_needed(caplog):
    caplog.set_level("INFO")
    message = (
        r"400 frames are 10 blocks of 40, too few to guarantee 5\.0% at delta 0\.05; about (\d+) blocks .*delta none"
    )
    with pytest.raises(EarlyExitError, match=message) as error:
        calibrate_stream(RedBox(), comings(10, every=100), 0.05, 0.05, block=40)
    needed = int(re.search(message, str(error.value))[1])
    assert 60 < needed < 120
    with pytest.raises(EarlyExitError, match=r"^400 frames are 10 blocks of 40, too few .* are needed"):
        calibrate_stream(None, None, 0.05, 0.05, block=40, most_frames=400)
    assert caplog.messages[0] == f"a guarantee of 5.0 % takes at least {40 * needed} frames ({needed} blocks)"
    assert calibrate_stream(RedBox(), comings(needed, every=1000), 0.05, 0.05, block=40).figures.bound <= 0.05


def test_a_detector_that_flickers_is_an_error():
    class Flicker(RedBox):
        def __call__(self, image):
            self.score = 0.8 - self.score
            return super().__call__(image)

    with pytest.raises(EarlyExitError, match="even the smallest threshold changes .* detections flicker"):
        calibrate_stream(Flicker(0.0), [scene(20)] * 100, 0.05, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "share is 0, expected"),
        ({"delta": 1.0}, "delta is 1.0, expected"),
        ({"block": 0}, "block is 0"),
        ({"most_repeats": -1}, "most_repeats -1, expected whole numbers, at least 1 and 0"),
        ({"frames": []}, "no frame to calibrate on"),
    ],
)
def test_invalid_settings_are_errors(settings, message):
    with pytest.raises(EarlyExitError, match=message):
        calibrate_stream(RedBox(), **{"frames": [scene()], **settings})


def test_a_rule_is_saved_and_loaded(tmp_path):
    path = tmp_path / "rule.json"
    for rule in (calibrate_stream(RedBox(), comings(20), 0.05, None, block=40), RULE):
        rule.save(path)
        assert load_stream_rule(path) == rule
    content = json.loads(path.read_text())
    for changes, message in (
        ({"format": "x"}, "expected a stream rule of format"),
        ({"threshold": -1}, "threshold is -1, expected 0 to 255"),
        ({"speed": 3}, "the key 'speed' is unknown"),
        ({"classes": "lamp"}, "classes is 'lamp', expected a list"),
        ({"frame_size": [360]}, r"frame_size is \[360\], expected \[height, width\]"),
    ):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(EarlyExitError, match=f"rule.json: {message}"):
            load_stream_rule(path)


def test_a_rule_of_another_detector_or_score():
    detector = RedBox()
    detector.digest = "ab" * 32
    rule = calibrate_stream(detector, comings(20), 0.05, None, block=40)
    TemporalExit(detector, rule)
    TemporalExit(lambda image: detector(image), rule)  # without a digest nothing is known
    detector.digest = "cd" * 32
    with pytest.raises(EarlyExitError, match="the SHA-256 abababababab, this one has cdcdcdcdcdcd"):
        TemporalExit(detector, rule)
    with pytest.raises(EarlyExitError, match=r"for the classes cup, (cup, )+\[...\], the detector has lamp, ball;"):
        TemporalExit(RedBox(), dataclasses.replace(RULE, classes=("cup",) * 50))
    with pytest.raises(EarlyExitError, match="for a score threshold of 0.5, not 0.3"):
        TemporalExit(RedBox(), RULE, 0.3)

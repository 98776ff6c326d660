import numpy as np
import pytest

from benchmarks import temporal_exit
from benchmarks.temporal_exit import OnlyClasses, report
from earlyexit_ssd.deploy.stream import StreamRecording, StreamRule
from earlyexit_ssd.errors import EarlyExitError
from tests.deploy.fakes import RedBox, scene

RULE = StreamRule(threshold=2.0, score=0.5, most_repeats=9, classes=RedBox.classes)


def test_speedup_of_a_still_scene_by_hand():
    recording = StreamRecording.of(RedBox(), [scene(30)] * 100, 0.5)
    recording.ms, recording.ms_compared = 10.0, 0.0
    row = report(recording, RULE, 10)
    assert row.speedup == pytest.approx((10, 10, 10)) and row.agreement == (1, 1, 1) and row.gain == (0, 0, 0)
    assert row.frames == 100 and row.events == 0


def test_rule_agrees_with_the_detector_more_often_than_every_nth_frame():
    recording = StreamRecording.of(RedBox(), [scene(20 * (index // 25 % 4)) for index in range(400)], 0.5)
    row = report(recording, RULE, 25)
    assert row.agreement == (1, 1, 1)
    assert row.gain[0] > 0.05 and row.gain[1] > 0


def test_other_classes_are_left_out():
    detector = RedBox()
    assert len(OnlyClasses(detector, ["lamp"])(scene(30))) == 0
    detections = OnlyClasses(detector, ["ball"])(scene(30))
    assert detections.class_names == ["ball"] and detections.labels.tolist() == [2]
    assert OnlyClasses(detector, []).classes == ("lamp", "ball")
    message = r"--classes has 'bal', expected classes of the detector \(did you mean 'ball'\?\)"
    with pytest.raises(EarlyExitError, match=message):
        OnlyClasses(detector, ["bal"])


def test_command_prints_a_table(tmp_path, monkeypatch, capsys):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (96, 64))
    for index in range(120):
        writer.write(np.ascontiguousarray(scene(20 * (index // 10 % 4))[..., ::-1]))
    writer.release()
    monkeypatch.setattr(temporal_exit, "open_predictor", lambda *_: RedBox())
    arguments = [str(tmp_path / "a.mp4"), "--weights", "x.onnx", "--share", "0.2", "--block", "10"]
    assert temporal_exit.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "no guarantee" in printed and "\n| 60 | " in printed

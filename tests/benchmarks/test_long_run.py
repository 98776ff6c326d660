import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from benchmarks import long_run
from earlyexit_ssd.deploy import Predictor
from tests.deploy.conftest import folder, model, onnx_file, photos  # noqa: F401

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc/self/fd of Linux")


def test_memory_open_files_and_detections_stay_constant(onnx_file, photos):  # noqa: F811
    rows = list(long_run.long_run(Predictor(onnx_file), photos, frames=200))
    assert [row.frames for row in rows] == list(range(20, 201, 20))
    assert len({row.files for row in rows}) == 1 and rows[-1].changed == 0
    assert rows[-1].memory_mb - rows[1].memory_mb < 2  # a leak of each photo or output would exceed this


def test_changed_detections_are_counted(onnx_file, photos):  # noqa: F811
    predictor, calls = Predictor(onnx_file), iter(range(10))

    def changing_predictor(image):
        detections = predictor(image)
        return dataclasses.replace(detections, scores=detections.scores + (next(calls) >= 7))

    photo = next(photo for photo in photos if len(predictor(photo)))
    assert [row.changed for row in long_run.long_run(changing_predictor, [photo], 10, rows=2)] == [0, 3]


def test_command_prints_a_table(tmp_path, onnx_file, capsys):  # noqa: F811
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    assert long_run.main([str(onnx_file), str(tmp_path / "a.png"), "--frames", "20"]) == 0
    printed = capsys.readouterr().out
    assert "frames, repeated" in printed and "\n| 20 | " in printed
    assert long_run.main([str(onnx_file), str(tmp_path / "none.png")]) == 2

"""The command that exports, from a model file to a file that runs."""

import numpy as np
import pytest
import torch

from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.modeling.trunk import build_ssdlite
from tests.deploy.conftest import build_model
from tools import export


def test_a_model_file_becomes_one_that_runs_without_pytorch(tmp_path, capsys):
    build_model().save(tmp_path / "model.pth")
    out = str(tmp_path / "detector.onnx")
    assert export.main([str(tmp_path / "model.pth"), "--out", out, "--full"]) == 0
    said = capsys.readouterr().out
    assert "detections in 8 photos are the model's" in said and f"Predictor({out!r})(photo)" in said
    assert Predictor(out)(np.zeros((20, 30, 3), np.uint8)).exit_name == "full"


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    assert export.main([str(tmp_path / "none.pth"), "--out", str(tmp_path / "a.onnx")]) == 2
    assert "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--int8"], "--int8 needs one folder of photos"),
        (["--int8", "--photos", "a", "b"], "--int8 needs one folder of photos"),
        (["--int8", "--photos", "nowhere"], "nowhere: it does not exist; --photos takes a folder"),
        (
            ["--int8", "--photos", ".", "--annotations", "no.json"],
            "no.json: it does not exist; --annotations takes a COCO",
        ),
        (["--int8", "--photos", ".", "--ap-drop", "7"], "--ap-drop is 7, expected a number in [0, 1]"),
        (["--annotations", "no.json"], "--annotations is for --int8; leave it out, or add --int8"),
    ],
)
def test_mistakes_about_8_bits_are_one_line(tmp_path, capsys, flags, message):
    assert export.main(["voc_animals", "--out", str(tmp_path / "a.onnx"), *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_checkpoint_s_full_path_is_written_without_a_word_about_exits(tmp_path, capsys):
    torch.save(build_ssdlite(num_classes=3).state_dict(), tmp_path / "plain.pth")
    out = str(tmp_path / "full.onnx")
    assert export.main([str(tmp_path / "plain.pth"), "--out", out, "--full"]) == 0
    assert "exits; those of" not in capsys.readouterr().err
    assert Predictor(out).exit_names == ("full",)

"""``tools/export.py``: from a model file to a file that runs without PyTorch."""

import functools
from shlex import quote

import numpy as np
import pytest
import torch

from earlyexit_ssd.deploy import Predictor
from earlyexit_ssd.modeling.trunk import build_ssdlite
from earlyexit_ssd.pipeline.export import open_any
from tests.deploy.conftest import build_model
from tools import export


def test_exported_file_runs_without_pytorch(tmp_path, capsys):
    build_model().save(tmp_path / "model.pth")
    torch.save(build_ssdlite(num_classes=3).state_dict(), tmp_path / "plain.pth")
    for name in ("model", "plain"):
        out = str(tmp_path / f"{name}.onnx")
        assert export.main([str(tmp_path / f"{name}.pth"), "--out", out, "--full"]) == 0
        printed = capsys.readouterr()
        assert (
            "detections in 8 photos are the model's" in printed.out and f"--weights {quote(out)} PHOTO" in printed.out
        )
        assert "exits; those of" not in printed.err
        assert Predictor(out)(np.zeros((20, 30, 3), np.uint8)).exit_name == "full"


open_once = functools.cache(open_any)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.pth", "weights 'none.pth': no such file"),
        ("a.onnx", "{out}: the result would replace this input"),
        ("voc_animals --int8", "--int8 needs one folder of photos"),
        ("voc_animals --int8 --photos a b", "--int8 needs one folder of photos"),
        ("voc_animals --int8 --photos nowhere", "nowhere: it does not exist; --photos takes a folder"),
        ("voc_animals --int8 --photos . --annotations no.json", "no.json: it does not exist; --annotations takes"),
        ("voc_animals --int8 --photos . --ap-drop 7", "--ap-drop is 7, expected a number in [0, 1]"),
        ("voc_animals --annotations no.json", "--annotations is for --int8; leave it out, or add --int8"),
        ("voc_animals --photos street.mp4", "--photos street.mp4 has no photo; name photos or their folder"),
        ("voc_animals --ap-drop 0.02", "--ap-drop is for --int8; leave it out, or add --int8"),
    ],
)
def test_bad_input_is_a_one_line_error(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("earlyexit_ssd.pipeline.export.open_any", open_once)
    monkeypatch.chdir(tmp_path)
    assert export.main([*arguments.split(), "--out", str(tmp_path / "a.onnx")]) == 2
    assert f"error: {message.format(out=tmp_path / 'a.onnx')}" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )

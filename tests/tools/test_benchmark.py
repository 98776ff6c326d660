"""The command on small detectors, in ONNX Runtime and in PyTorch."""

import json

import pytest
from PIL import Image

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.pipeline.predictor import Rival, TorchModel
from tests.deploy.conftest import build_photos, folder, model, onnx_file, photos, staged_folder  # noqa: F401
from tools.benchmark import main


@pytest.fixture(scope="module")
def model_file(model, folder):  # noqa: F811
    model.save(folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("photos")
    for place, photo in enumerate(build_photos(6)):
        Image.fromarray(photo).save(where / f"{place}.png")
    return where


def test_figures_are_written_and_printed(tmp_path, onnx_file, staged_folder, photo_folder, capsys):  # noqa: F811
    out = tmp_path / "new" / "figures.json"
    words = [
        onnx_file,
        staged_folder,
        "--photos",
        photo_folder,
        "--most",
        5,
        "--threads",
        1,
        "--batch",
        1,
        "--out",
        out,
    ]
    assert main(list(map(str, words))) == 0
    figures, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert figures["settings"]["photos"] == 5 and figures["machine"]["versions"]["torch"]
    first, second = figures["rows"][:2]
    assert (first["name"], second["name"], second["runtime"]) == ("detector.onnx", "staged", "ONNX Runtime")
    assert second["against"]["name"] == "detector.onnx" and second["calls"] == 5
    assert "threads 1, batch 1, 5 photos as they come, 5 calls" in printed and str(out) in printed


def test_a_missing_model_file_is_named():
    with pytest.raises(EarlyExitError, match=r"none\.pth"):
        TorchModel("none.pth").open(1, 0.5)


def test_a_model_in_pytorch_leaves_where_its_file_does(model_file):
    exits = TorchModel(str(model_file)).open(1, 0.5)(build_photos(6))
    assert sorted(map(str, exits)) == ["0", "0", "1", "1", "None", "None"]
    assert TorchModel("a/b.pth", compiled=True).runtime == "torch.compile"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.onnx"], "none.onnx: no such file"),
        (["yolov99:some.onnx"], "some.onnx: format 'yolov99': expected one of compile, yolox, boxes, nanodet, picodet"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, photo_folder, words, message, capsys):
    out = ["--photos", str(photo_folder), "--threads", "1", "--batch", "1", "--out", str(tmp_path / "figures.json")]
    assert main([*words, *out]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line and not (tmp_path / "figures.json").exists()


def test_a_rival_computes_all_of_it():
    assert (Rival("a/nano.onnx", "yolox").name, Rival("a/nano.onnx", "yolox").runtime) == ("nano.onnx", "ONNX Runtime")

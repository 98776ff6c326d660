"""``tools/benchmark.py`` on small detectors, in ONNX Runtime and in PyTorch."""

import json

import pytest

from earlyexit_ssd.errors import CannotWrite, EarlyExitError
from earlyexit_ssd.pipeline.predictor import RivalFile, TorchModel
from tests.deploy.conftest import build_photos, folder, model, onnx_file, photos, save_photos, staged_folder  # noqa: F401
from tools.benchmark import main

QUICK = ["--threads", "1", "--batch", "1"]


@pytest.fixture(scope="module")
def model_file(model, folder):  # noqa: F811
    model.save(folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), 6)


def test_figures_are_written_and_printed(tmp_path, onnx_file, staged_folder, photo_folder, capsys):  # noqa: F811
    out = tmp_path / "new" / "figures.json"
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    mixed = [*sorted(photo_folder.iterdir())[:5], tmp_path / "broken.jpg", tmp_path / "none"]
    paths = [onnx_file, staged_folder, "--photos", *mixed, "--out", out]
    assert main([*map(str, paths), *QUICK]) == 0
    figures, (printed, errors) = json.loads(out.read_text()), capsys.readouterr()
    assert f"left out: {tmp_path / 'broken.jpg'}: not a readable photo" in errors
    assert f"left out: {tmp_path / 'none'}: no such photo" in errors
    assert figures["settings"]["photos"] == 5 and figures["machine"]["versions"]["torch"]
    first, second = figures["rows"][:2]
    assert (first["name"], second["name"], second["runtime"]) == ("detector.onnx", "staged", "ONNX Runtime")
    assert second["against"]["name"] == "detector.onnx" and second["calls"] == 5
    assert "threads 1, batch 1, 5 photos as they come, 5 calls" in printed and str(out) in printed


def test_figures_are_printed_although_the_file_cannot_be_written(
    tmp_path,
    onnx_file,  # noqa: F811
    photo_folder,
    capsys,
    monkeypatch,
):
    def refuse(path, _):
        raise CannotWrite(f"{path}: cannot be written")

    monkeypatch.setattr("earlyexit_ssd.files.write_json", refuse)
    out = str(tmp_path / "figures.json")
    assert main([str(onnx_file), "--photos", str(photo_folder), "--out", out, *QUICK, "--most", "2"]) == 2
    printed = capsys.readouterr()
    assert "detector.onnx" in printed.out and "cannot be written" in printed.err


def test_unusable_output_is_refused_before_the_benchmark(tmp_path, onnx_file, photo_folder, capsys):  # noqa: F811
    (tmp_path / "a.json").write_bytes(onnx_file.read_bytes())
    for out, message in (
        (tmp_path, "expected a JSON file, such as benchmark.json"),
        (onnx_file, "expected a JSON file, such as benchmark.json"),
        (tmp_path / "a.json", "a.json: the result would replace this input"),
    ):
        assert main([str(onnx_file), str(tmp_path / "a.json"), "--photos", str(photo_folder), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_missing_model_file_is_named_in_the_error():
    with pytest.raises(EarlyExitError, match=r"none\.pth"):
        TorchModel("none.pth").open(1, 0.5)


def test_pytorch_model_takes_the_expected_exits(model_file):
    exits = TorchModel(str(model_file)).open(1, 0.5)(build_photos(6))
    assert sorted(map(str, exits)) == ["0", "0", "1", "1", "None", "None"]
    assert TorchModel("a/b.pth", compiled=True).runtime == "torch.compile"


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("none.onnx", "none.onnx: no such file"),
        ("yolov99:some.onnx", "some.onnx: format 'yolov99': expected one of compile, yolox, boxes, nanodet, picodet"),
    ],
)
def test_unusable_detector_is_a_one_line_error(tmp_path, photo_folder, detector, message, capsys):
    out = tmp_path / "figures.json"
    assert main([detector, "--photos", str(photo_folder), "--out", str(out), *QUICK]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line and not out.exists()


def test_the_folder_of_the_results_is_checked_first(tmp_path, photo_folder, capsys):
    (tmp_path / "file").touch()
    assert main(["none.onnx", "--photos", str(photo_folder), "--out", str(tmp_path / "file/a.json"), *QUICK]) == 2
    assert "file: cannot be a folder of results" in capsys.readouterr().err


def test_rival_has_the_name_of_its_file():
    rival = RivalFile("a/nano.onnx", "yolox")
    assert (rival.name, rival.runtime) == ("nano.onnx", "ONNX Runtime")

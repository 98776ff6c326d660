from pathlib import Path

import pytest
from PIL import Image

from earlyexit_ssd.pipeline.export import export_detector
from tests.deploy.conftest import build_model
from tests.tools.conftest import ROOT, run_command
from tools import predict


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("grey.png", (128, 128, 128)), ("blue.jpg", (20, 30, 200))):
        Image.new("RGB", (120, 90), color).save(folder / name)
    return folder


def test_shipped_weights_on_a_folder(photos, tmp_path, capsys):
    assert predict.main([str(photos), "--weights", "chair", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert [line.split(":")[0] for line in lines] == [str(photos / "blue.jpg"), str(photos / "grey.png")]
    assert all(" confidence " in line and " ms, " in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["blue.png", "grey.png"]


def test_script_runs_alone(photos, tmp_path):
    """With an exported detector, since importing PyTorch takes seconds."""
    exported = export_detector(build_model(exit_layers=()), tmp_path / "detector.onnx").path
    command = [str(ROOT / "tools" / "predict.py"), str(photos / "grey.png"), "--weights", str(exported)]
    result = run_command([*command, "--out", str(tmp_path / "out"), "--save", "counts, pictures"])
    assert "grey.png: " in result.stdout and f"results: {tmp_path / 'out'}/ (counts.csv)" in result.stdout
    assert Image.open(tmp_path / "out" / "grey.png").size == (120, 90)


def test_default_weights_and_all_exits(photos, tmp_path, capsys):
    assert predict.main([str(photos / "grey.png"), "--all-exits", "--out", str(tmp_path / "out")]) == 0
    assert "grey.png: " in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "grey.png").width == 3 * 328


def test_bad_photos_are_skipped(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "blue.jpg").read_bytes()[:200])
    arguments = [str(tmp_path / "none.jpg"), str(photos), "--weights", "chair", "--out", str(tmp_path / "out")]
    assert predict.main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[2].split(" (")[0] for error in errors[:2]] == ["no such photo", "not a readable photo"]
    assert errors[2:] == ["error: 2 of the photos, frames or sources could not be used, see above"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["blue.png", "grey.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "chiar"], "did you mean 'chair'"),
        (["--score", "7"], "score 7.0: expected a number in [0, 1]"),
        (["--save", "jason"], "--save 'jason': expected some of pictures, json, csv, counts, labels, or none"),
        (["--stream", "none.json"], "none.json: no such stream rule; write a rule with earlyexit predict"),
        (["--calibrate-stream", "0.1"], "name its file with --stream"),
        (["0", "--calibrate-stream", "0.1", "--stream", "a.json"], "on a camera needs --frames: the number of frames"),
        (["--calibrate-stream", "0.1", "--stream", f"{__file__}/a.json"], "cannot be a folder of results"),
        (["--stride", "0", "--calibrate-stream", "0.1", "--stream", "a.json"], "--stride 0: expected 1 to"),
        (["--most-repeats", "3"], "--most-repeats is for --calibrate-stream; leave it out"),
        (["--threads", "0"], "--threads 0: expected 1 to 1024"),
        (["--threads", "9" * 20], "expected 1 to 1024"),
        (["--config", ""], "config is empty (an unset shell variable?)"),
        ([""], "sources is empty (an unset shell variable?)"),
        (["--calibrate-stream", "0.1", "--stream", "{photos}/grey.png"], "the result would replace this input"),
        (["--weights", "none.onnx"], "none.onnx: no such file"),
        (["--weights", "chair", "--runtime", "openvino"], "chair runs in PyTorch; for OpenVINO write a file"),
    ],
)
def test_bad_input_is_a_one_line_error(photos, tmp_path, capsys, more, message):
    more = [text.replace("{photos}", str(photos)) for text in more]
    assert predict.main([str(photos), "--out", str(tmp_path / "out"), *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line

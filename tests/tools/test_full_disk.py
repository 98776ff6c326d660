"""Tools on a full disk: a one-line error, complete files stay, and a run can be resumed."""

import pytest

from benchmarks import routing_policies
from tests.tools.conftest import final_weights
from tools import calibrate, eval_exits, train_net


def error_line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(line) < 300
    return line


def test_training_resumes(tiny, trained, tmp_path, capsys, small_files, without_evaluation):
    with small_files(1_500_000):  # smaller than a checkpoint, larger than the pictures
        assert train_net.main(tiny("run", "--force")) == 2
    expected = "last.pth: cannot be written (File too large); make room and go on with --resume"
    assert error_line(capsys).endswith(expected)
    assert train_net.main(tiny("run", "--force", "--resume")) == 0
    assert final_weights(tmp_path / "run").keys() == final_weights(trained[0] / "run").keys()
    assert not list((tmp_path / "run").rglob("*.partial*"))


@pytest.mark.parametrize(
    ("tool", "size", "more"),
    [
        (eval_exits, 1000, []),
        (calibrate, 1000, ["--speedup", "1.0001", "CALIBRATION.COST", "mmacs"]),
        (routing_policies, 0, ["--policies", "margin"]),
    ],
)
def test_tools(trained, tmp_path, capsys, small_files, tool, size, more):
    with small_files(size):
        assert tool.main([*more, *trained[1], "--out", str(tmp_path / "out")]) == 2
    assert error_line(capsys).endswith("cannot be written (File too large); make room and run it again")


def test_output_folder_below_a_file(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert eval_exits.main([*trained[1], "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be a folder of results (Not a directory); name another one" in error_line(capsys)

"""A run that was stopped, killed, damaged or failed a gate, and goes on."""

import os
import signal
import subprocess
import time

import pytest
import torch
import yaml

from earlyexit_ssd.data.shapes import FOLDER
from tests.tools.conftest import ROOT, final_weights, log, run_command, train_command
from tools import train_net


def test_a_failed_exits_phase_goes_on_with_other_exits(tiny, tmp_path, capsys):
    lenient = ("BASELINE.GATE.AP50", "0.0", "BASELINE.GATE.PRECISION", "0.0", "BASELINE.GATE.RECALL", "0.0")
    # Whatever the full path finds, an exit is asked for more.
    assert train_net.main(tiny("run", "--force", "PHASES", "[baseline]", *lenient)) == 0
    baseline = torch.load(tmp_path / "run" / "baseline" / "model.pth", weights_only=True)["model"]
    assert train_net.main(tiny("run", "--resume", "PHASES", "[baseline, exits]", *lenient)) == 3
    assert "move the exit deeper (EXITS.LAYERS)" in capsys.readouterr().err
    again = ("PHASES", "[baseline, exits]", "EXITS.LAYERS", "[10, 14]", *lenient)
    assert train_net.main(tiny("run", "--resume", "--force", *again)) == 0
    weights = final_weights(tmp_path / "run")
    assert any(key.startswith("branches.exit14.") for key in weights)
    assert all(torch.equal(weights[key], baseline[key]) for key in weights if not key.startswith("branches."))
    assert train_net.main(tiny("run", "--resume", *again, "BASELINE.LR", "0.5")) == 2
    assert "the run to resume has BASELINE.LR" in capsys.readouterr().err


def test_a_resume_that_cannot_start_leaves_the_run_alone(tiny, tmp_path, capsys):
    assert train_net.main(tiny("run")) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train_net.main(tiny("run", "--resume", "BASELINE.EPOCHS", "3", "DATA.TEST", "[voc_2012_val]")) == 2
    assert train_net.main(tiny("run", "--resume", "BASELINE.EPOCHS", "3", "MODEL.WEIGHTS_BACKBONE", "x")) == 2
    assert train_net.main(tiny("run", "--resume", "BASELINE.EPOCHS", "3", "EVAL.SCORE", "2")) == 2
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / FOLDER).write_text("in the way")
    more = ("BASELINE.EPOCHS", "3", "DATA.ROOT", str(tmp_path / "elsewhere"))
    assert train_net.main(tiny("run", "--resume", *more)) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "config.yaml: not what a run has written"),
        ("baseline/gate.json", "gate.json: not valid YAML"),
        ("baseline/last.pth", "last.pth: not a file of weights that can be read safely"),
        ("baseline/model.pth", "model.pth: not a file of weights that can be read safely"),
    ],
)
def test_a_run_folder_that_someone_damaged_is_one_line(tiny, tmp_path, capsys, file, message):
    forced = ("--force",) if file.endswith("model.pth") else ()
    train_net.main(tiny("run", *forced, "PHASES", "[baseline]"))
    damaged = tmp_path / "run" / file
    damaged.write_bytes(damaged.read_bytes()[:7])
    capsys.readouterr()
    assert train_net.main(tiny("run", "--resume", "PHASES", "[baseline]")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_second_run_in_the_same_folder_is_refused(tiny, tmp_path, capsys):
    train_net.main(tiny("run"))
    written = (tmp_path / "run" / "baseline" / "model.pth").stat().st_mtime_ns
    assert train_net.main(tiny("run")) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert train_net.main(tiny("run", "--resume", "SEED", "5")) == 2
    assert "the run to resume has SEED = 0, now it is 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "baseline" / "model.pth").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        ({"baseline": 5, "exits": 3, "joint": 3}, ("PHASES", "[baseline, exits, joint]", "JOINT.EPOCHS", "2")),
        ({"exits": 3}, ("BASELINE.EMA", "0.9", "EXITS_PHASE.EMA", "0.9")),
    ],
)
def test_killed_run_resumes_to_the_same_weights(tiny, tmp_path, kills, more):
    more = ("--force", *more)
    run_command([*train_command(), *tiny("whole", *more)])
    for phase, step in kills.items():
        folder = tmp_path / f"killed_in_{phase}"
        command = [*train_command(), *tiny(folder.name, *more)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 100
            while time.monotonic() < deadline and process.poll() is None:
                path = folder / phase / "log.jsonl"
                if path.is_file() and len(path.read_bytes().splitlines()) >= step:
                    break
                time.sleep(0.005)
            process.kill()
        assert not (folder / "model.pth").exists()
        result = run_command([*command[:2], "--resume", *command[2:]])
        assert ("cache taps" in result.stderr) == (phase == "baseline"), "a whole cache is used again"
        expected, found = final_weights(tmp_path / "whole"), final_weights(folder)
        assert all(torch.equal(expected[key], found[key]) for key in expected), phase
        assert [entry["step"] for entry in log(folder, phase)] == list(range(1, 13))
        assert without_time(log(folder, phase)) == without_time(log(tmp_path / "whole", phase)), "its curves too"


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(tiny, tmp_path, number):
    command = [*train_command(), *tiny("run", "--force", "BASELINE.EPOCHS", "500")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        path = tmp_path / "run" / "baseline" / "log.jsonl"
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (path.is_file() and path.stat().st_size > 500):
            time.sleep(0.05)
        os.kill(process.pid, number)
        error = process.stderr.read()
    assert process.returncode == 130
    assert f"{number.name}: saved step" in error
    assert "--resume" in error
    assert torch.load(tmp_path / "run" / "baseline" / "last.pth", weights_only=True)["step"] > 0


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_folder_in_use_is_refused(tiny, tmp_path, flags, capsys):
    """By a run that has only just started, or is in the middle."""
    command = [*train_command(), *tiny("run", "--force", "BASELINE.EPOCHS", "500")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        path = tmp_path / "run" / ("baseline/last.pth" if flags else ".lock")
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (path.is_file() and path.read_bytes()):
            time.sleep(0.05)
        assert train_net.main(tiny("run", "--force", *flags, "BASELINE.EPOCHS", "500")) == 2
        assert f"{tmp_path / 'run'} is in use by process {process.pid}; wait" in capsys.readouterr().err
        process.kill()
    assert train_net.main(tiny("run", "--force", "--resume", "BASELINE.EPOCHS", "1", "PHASES", "[baseline]")) == 0
    steps = [entry["step"] for entry in log(tmp_path / "run", "baseline")]
    assert steps == list(range(1, 7))


def test_run_of_an_older_version_goes_on(tiny, tmp_path):
    """Keys that came since had their defaults; another value of such a key is a change like any other."""
    assert train_net.main(tiny("run", "--force", "PHASES", "[baseline]")) == 0
    path = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["BASELINE"]["FREEZE_NORM"], stored["ROUTING"]["HYBRID"]
    path.write_text(yaml.safe_dump(stored))
    assert train_net.main(tiny("run", "--resume", "PHASES", "[baseline]", "BASELINE.FREEZE_NORM", "True")) == 2
    assert train_net.main(tiny("run", "--resume", "--force", "PHASES", "[baseline]")) == 0

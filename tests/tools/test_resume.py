"""Resume a run that was stopped, killed or damaged, or failed a gate."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
import yaml

from earlyexit_ssd.data.shapes import FOLDER
from tests.tools.conftest import TINY, final_weights, log, start_training
from tools import train_net

ONLY_BASELINE = ("PHASES", "[baseline]")


@pytest.fixture(scope="module")
def failed(tmp_path_factory, data_root):
    """Run with a failed gate of the phase baseline."""
    root = tmp_path_factory.mktemp("failed")
    (root / "tiny.yaml").write_text(TINY)
    overrides = ("OUTPUT_DIR", str(root / "run"), "DATA.ROOT", str(data_root))
    assert train_net.main(["--config", str(root / "tiny.yaml"), *overrides, *ONLY_BASELINE]) == 3
    return root / "run"


def force_gate(run):
    """Change the failed gate to a forced one."""
    path = run / "baseline" / "gate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "forced": True}))


def test_failed_exits_phase_resumes_with_other_exits(tiny, failed, tmp_path, capsys, without_evaluation):
    shutil.copytree(failed, tmp_path / "run")
    force_gate(tmp_path / "run")
    baseline = torch.load(tmp_path / "run" / "baseline" / "model.pth", weights_only=True)["model"]
    assert train_net.main(tiny("run", "--resume")) == 3
    assert "move the exit deeper (EXITS.LAYERS)" in capsys.readouterr().err
    assert train_net.main(tiny("run", "--resume", "--force", "EXITS.LAYERS", "[10, 14]")) == 0
    weights = final_weights(tmp_path / "run")
    assert any(key.startswith("branches.exit14.") for key in weights)
    assert all(torch.equal(weights[key], baseline[key]) for key in weights if not key.startswith("branches."))
    assert train_net.main(tiny("run", "--resume", "EXITS.LAYERS", "[10, 14]", "BASELINE.LR", "0.5")) == 2
    assert "the run to resume has BASELINE.LR" in capsys.readouterr().err


def test_trained_baseline_resumes_with_other_exits(tiny, failed, tmp_path, capsys):
    shutil.copytree(failed, tmp_path / "run")
    assert train_net.main(tiny("run", "--resume", *ONLY_BASELINE, "EXITS.LAYERS", "[10]")) == 3
    assert "gate of phase baseline failed" in capsys.readouterr().err
    assert len(log(tmp_path / "run", "baseline")) == 12 and not list((tmp_path / "run" / "baseline").glob("before_*"))


def test_resume_with_bad_input_does_not_change_the_run(tiny, failed, tmp_path, capsys):
    shutil.copytree(failed, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / FOLDER).write_text("a file instead of a folder")

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = times()
    for more in (
        ("DATA.TEST", "[voc_2012_val]"),
        ("MODEL.WEIGHTS_BACKBONE", "x"),
        ("EVAL.SCORE", "2"),
        ("DATA.ROOT", str(tmp_path / "elsewhere")),
    ):
        assert train_net.main(tiny("run", "--resume", "BASELINE.EPOCHS", "3", *more)) == 2
    assert times() == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.yaml", "config.yaml: expected a dict written by a run"),
        ("baseline/gate.json", "gate.json: not valid YAML"),
        ("baseline/last.pth", "last.pth: not a file of weights that can be read safely"),
        ("baseline/model.pth", "model.pth: not a file of weights that can be read safely"),
    ],
)
def test_damaged_run_is_a_one_line_error(tiny, failed, tmp_path, capsys, file, message):
    shutil.copytree(failed, tmp_path / "run")
    if file.endswith("model.pth"):  # which is read if its phase is finished
        force_gate(tmp_path / "run")
    damaged = tmp_path / "run" / file
    damaged.write_bytes(damaged.read_bytes()[:7])
    assert train_net.main(tiny("run", "--resume", *ONLY_BASELINE)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_second_run_in_the_same_folder_is_refused(tiny, failed, tmp_path, capsys):
    shutil.copytree(failed, tmp_path / "run")
    written = (tmp_path / "run" / "baseline" / "model.pth").stat().st_mtime_ns
    assert train_net.main(tiny("run")) == 2
    assert "already holds a run" in capsys.readouterr().err
    for key, name, message in (
        ("EXITS.BRANCH", "[lite]", "did you mean 'light'"),
        ("ROUTING.POLICY", "max_forground", "did you mean 'max_foreground'"),
    ):
        assert train_net.main(tiny("run", key, name)) == 2
        assert message in capsys.readouterr().err
    assert train_net.main(tiny("run", "--resume", "SEED", "5")) == 2
    assert "the run to resume has SEED = 0, now it is 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "baseline" / "model.pth").stat().st_mtime_ns == written


def test_killed_run_resumes_to_the_same_weights(tiny, tmp_path, capsys, without_evaluation):
    """Kill the run once in each phase. Two phases have averaged weights."""
    kills = {"baseline": 5, "exits": 3, "joint": 3}  # phase -> step
    more = ("--force", "ENGINE.CHECKPOINT_PERIOD", "2", "PHASES", "[baseline, exits, joint]", "JOINT.EPOCHS", "2")
    more += ("BASELINE.EMA", "0.9", "EXITS_PHASE.EMA", "0.9")
    assert train_net.main(tiny("whole", *more)) == 0
    folder, cached = tmp_path / "killed", []
    for number, (phase, step) in enumerate(kills.items()):
        flags = ("--resume",) if number else ()
        process = start_training(tiny("killed", *flags, *more), stderr=tmp_path / phase)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.is_alive():
            path = folder / phase / "log.jsonl"
            if path.is_file() and len(path.read_bytes().splitlines()) >= step:
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, phase
        cached.append("cache taps" in (tmp_path / phase).read_text())
    assert not (folder / "model.pth").exists()
    capsys.readouterr()
    assert train_net.main(tiny("killed", "--resume", *more)) == 0
    cached.append("cache taps" in capsys.readouterr().err)
    assert cached == [phase == "exits" for phase in (*kills, "")], "a complete cache is reused"
    expected, found = final_weights(tmp_path / "whole"), final_weights(folder)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    for phase in kills:
        assert [entry["step"] for entry in log(folder, phase)] == list(range(1, 13))
        assert without_time(log(folder, phase)) == without_time(log(tmp_path / "whole", phase))


def without_time(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_folder_in_use_is_an_error_and_a_signal_saves_the_state(tiny, tmp_path, capsys, without_evaluation):
    """The other run has just started, or is in the middle."""
    endless = ("--force", "BASELINE.EPOCHS", "500")
    process = start_training(tiny("run", *endless), stderr=tmp_path / "stderr")
    deadline = time.monotonic() + 100
    for flags, name in (((), ".lock"), (("--resume",), "baseline/last.pth")):
        path = tmp_path / "run" / name
        while time.monotonic() < deadline and not (path.is_file() and path.read_bytes()):
            time.sleep(0.05)
        assert train_net.main(tiny("run", *endless, *flags)) == 2
        assert f"{tmp_path / 'run'} is in use by process {process.pid}; wait" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 130
    error = (tmp_path / "stderr").read_text()
    assert "SIGTERM: saved step" in error and "--resume" in error
    assert torch.load(tmp_path / "run" / "baseline" / "last.pth", weights_only=True)["step"] > 0
    assert train_net.main(tiny("run", "--force", "--resume", "BASELINE.EPOCHS", "1", *ONLY_BASELINE)) == 0
    assert [entry["step"] for entry in log(tmp_path / "run", "baseline")] == list(range(1, 7))


def test_run_of_an_older_version_resumes(tiny, failed, tmp_path, without_evaluation):
    """Keys that the stored configuration lacks have their defaults."""
    shutil.copytree(failed, tmp_path / "run")
    force_gate(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["BASELINE"]["FREEZE_NORM"], stored["ROUTING"]["HYBRID"]
    path.write_text(yaml.safe_dump(stored))
    assert train_net.main(tiny("run", "--resume", *ONLY_BASELINE, "BASELINE.FREEZE_NORM", "True")) == 2
    assert train_net.main(tiny("run", "--resume", "--force", *ONLY_BASELINE)) == 0

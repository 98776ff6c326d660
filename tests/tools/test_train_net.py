import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
import yaml

from earlyexit_ssd.data.synthetic.dataset import FOLDER
from earlyexit_ssd.pipeline import phases
from tests.tools.conftest import ROOT, run_command, train_command
from tools import eval_exits, train_net


def final_weights(folder):
    return torch.load(folder / "model.pth", weights_only=True)["model"]


def log(folder, phase):
    return [json.loads(line) for line in (folder / phase / "log.jsonl").read_text().splitlines()]


def test_main_job_leaves_everything(tiny, tmp_path, capsys):
    assert train_net.main(tiny("run", "--force", "PHASES", "[baseline, exits, joint]")) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "run.json", "metrics.json", "table.txt", "detections.png", "model.pth"} <= names
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["name"] for entry in metrics["exits"]] == ["exit8", "exit12", "full"]
    assert sum(metrics["routed"]["exit_share"].values()) == pytest.approx(1)
    assert any("--force" in line for line in metrics["verdict"]["lines"])
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == 0
    assert run["torch"] == torch.__version__
    assert "verdict" in capsys.readouterr().out
    # The weights say that a gate was forced, so a later evaluation says it too.
    arguments = tiny("run")
    assert eval_exits.main([*arguments[:2], "--out", str(tmp_path / "again"), *arguments[2:]]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["context"]["forced"]
    assert [entry["AP50"] for entry in again["exits"]] == [entry["AP50"] for entry in metrics["exits"]]


def test_failed_gate_ends_with_3_and_says_what_to_try(tiny, tmp_path, capsys):
    assert train_net.main(tiny("run")) == 3
    error = capsys.readouterr().err
    assert "gate of phase baseline failed: AP50" in error
    assert "try: more epochs" in error
    assert not (tmp_path / "run" / "exits").exists()
    # The advice can be followed: the phase starts afresh with more epochs, later phases with what they like.
    more = ("BASELINE.EPOCHS", "3", "BASELINE.GATE.AP50", "0.0", "BASELINE.GATE.PRECISION", "0.0")
    more += ("BASELINE.GATE.RECALL", "0.0", "EXITS.LAYERS", "[10]")
    train_net.main(tiny("run", "--resume", "--force", *more))
    assert "phase baseline starts afresh, since BASELINE.EPOCHS has changed" in capsys.readouterr().err
    assert len(log(tmp_path / "run", "baseline")) == 18
    # What was trained before is set aside, not lost.
    assert len(log(tmp_path / "run", "baseline/before_1")) == 12
    assert (tmp_path / "run" / "baseline" / "before_1" / "last.pth").is_file()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [entry["name"] for entry in metrics["exits"]] == ["exit10", "full"]


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


def test_flags_and_keys_in_any_order(tiny, tmp_path):
    config, overrides = tiny("run")[:2], tiny("run")[2:]
    assert train_net.main([*overrides, "--force", "PHASES", "[baseline]", *config, "SEED", "1"]) == 0


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
        ("baseline/gate.json", "gate.json: not what a run has written"),
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
    ("more", "message"),
    [
        (["EXITS.LAYER", "8"], "did you mean 'LAYERS'"),
        (["DATA.TRAIN", "synthetic_chair_train"], "did you mean 'synthetic_chairs_train'"),
        (["DATA.CLASSES", "chiar"], "did you mean 'chair'"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth: no such file"),
        (["DEVICE", "cuda:77"], "DEVICE 'cuda:77' is not to be had here"),
        (["BASELINE.GATE.RELATIVE", "0.9"], "expected 0 without BASELINE.GATE.REFERENCE"),
        (["BASELINE.GATE.RELATIVE", "0.9", "BASELINE.GATE.REFERENCE", "none.pth"], "none.pth: no such file"),
        (["MODEL.WEIGHTS_BACKBONE", "IMAGENET_V1"], "did you mean 'IMAGENET1K_V1'"),
        (["EVAL.RIVALS.ONNX", "yolox:none.onnx"], "EVAL.RIVALS.ONNX has none.onnx: no such file"),
        (["DATA.TEST", "nowhere"], "no data set is named 'nowhere'"),
        (["EXITS_PHASE.CACHE_GIB", "1e-6"], "EXITS_PHASE.CACHE_GIB allows"),
    ],
)
def test_mistakes_end_with_2_and_one_line(tiny, capsys, more, message):
    assert train_net.main(tiny("run", "BASELINE.EPOCHS", "0", *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_photos_without_boxes_teach_through_the_full_path(tiny, trained, data_root, tmp_path, capsys):
    """The photos of the training split, their boxes taken away."""
    tree = json.loads((data_root / FOLDER / "annotations" / "instances_train.json").read_text())
    (data_root / "no_boxes.json").write_text(json.dumps({**tree, "annotations": []}))
    own = ["DATA.DATASETS", f"[[mine, no_boxes.json, {FOLDER}/train]]", "DATA.TRAIN", "mine"]
    own += ["MODEL.WEIGHTS", str(trained[0] / "run" / "baseline" / "model.pth"), "BASELINE.EPOCHS", "0"]
    assert train_net.main(tiny("labels", "--force", *own)) == 2
    assert "mine: no box of chair in 24 photos; nothing can be learnt" in capsys.readouterr().err
    assert train_net.main(tiny("teacher", "--force", *own, "LOSS.SUPERVISION", "teacher")) == 0
    entries = log(tmp_path / "teacher", "exits")
    assert "exit8_distillation" in entries[0] and "exit8_classification" not in entries[0]
    assert entries[-1]["exit8_distillation"] < entries[0]["exit8_distillation"]


def test_changed_full_path_is_found(tiny, monkeypatch, capsys):
    fit = phases.fit

    def spoil(run, name, losses, loader):
        fit(run, name, losses, loader)
        if name == "exits":
            with torch.no_grad():
                next(run.model.backbone.parameters()).mul_(1 + 1e-6)

    monkeypatch.setattr(phases, "fit", spoil)
    assert train_net.main(tiny("run", "--force")) == 2
    assert "the exits phase changed the full path" in capsys.readouterr().err


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


def test_mixed_precision_trains_every_phase(tiny, tmp_path):
    epochs = ("BASELINE.EPOCHS", "1", "EXITS_PHASE.EPOCHS", "1")
    assert train_net.main(tiny("run", "--force", "ENGINE.AMP", "bf16", *epochs)) == 0
    for phase in ("baseline", "exits"):
        assert all(math.isfinite(entry["loss"]) for entry in log(tmp_path / "run", phase))


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


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_end_with_one_model(tiny, tmp_path):
    """BatchNorm's statistics are each process's own until the phase ends; the next one checks that they are one."""
    more = ("--force", "BASELINE.EPOCHS", "1", "EXITS_PHASE.EPOCHS", "1", "EXITS_PHASE.CACHE", "false")
    run_command([*train_command(*LAUNCHER), *tiny("two", *more)])
    assert (tmp_path / "two" / "metrics.json").is_file()


def test_two_processes_have_the_losses_of_one(tiny, tmp_path):
    # BatchNorm's statistics are per process, so they are frozen here.
    more = ("--force", "BASELINE.FREEZE_NORM", "true", "BASELINE.EPOCHS", "1", "PHASES", "[baseline]")
    run_command([*train_command(), *tiny("one", *more)])
    run_command([*train_command(*LAUNCHER), *tiny("two", *more)])
    one, two = log(tmp_path / "one", "baseline"), log(tmp_path / "two", "baseline")
    assert len(one) == len(two) == 6
    for mine, theirs in zip(one, two, strict=True):
        for key in ("bbox_regression", "classification"):
            assert theirs[key] == pytest.approx(mine[key], abs=1e-4)


def test_run_of_an_older_version_goes_on(tiny, tmp_path):
    """Keys that came since had their defaults; another value of such a key is a change like any other."""
    assert train_net.main(tiny("run", "--force", "PHASES", "[baseline]")) == 0
    path = tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["BASELINE"]["FREEZE_NORM"], stored["ROUTING"]["HYBRID"]
    path.write_text(yaml.safe_dump(stored))
    assert train_net.main(tiny("run", "--resume", "PHASES", "[baseline]", "BASELINE.FREEZE_NORM", "True")) == 2
    assert train_net.main(tiny("run", "--resume", "--force", "PHASES", "[baseline]")) == 0

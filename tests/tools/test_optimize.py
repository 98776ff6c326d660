import json

import pytest

from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import Timing, count_mmacs
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling import load_model
from earlyexit_ssd.pipeline.optimize import CandidateSearch, Goal
from tools import optimize

FAST = ("EVAL.RIVALS.SIZES", "[96]", "EXITS.GLANCES", "[[32, 12]]")


def command(trained, out, *flags):
    root, arguments = trained
    weights = ["--weights", str(root / "run" / "model.pth")]
    return [*arguments, *weights, "--out", str(out), "--runtime", "eager", *flags]


def by_operations(networks, examples, runtime, runs, threads):
    """Timing that does not depend on the load of the machine: 1 ms per million multiplications."""
    milliseconds = [0.1 + count_mmacs(*given) for given in zip(networks, examples, strict=True)]
    return [Timing(ms, [ms, ms]) for ms in milliseconds]


@pytest.fixture
def chosen_only(monkeypatch):
    """The search ends when the chosen model is written, without its export and its evaluation on test photos."""
    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.export_detector", fail)


@pytest.fixture
def detects(monkeypatch):
    """Accept the detector of so short a training, and count operations instead of timing."""
    monkeypatch.setattr("earlyexit_ssd.pipeline.calibrate.DETECTS_AP50", 0.0)
    monkeypatch.setattr("earlyexit_ssd.evaluation.cost.time_in_runtime", by_operations)


def test_stopped_search_resumes_and_writes_its_results(trained, tmp_path, capsys, detects):
    out = tmp_path / "what was found"
    write_text(out / "detector.xml", "of an earlier search in OpenVINO")
    assert optimize.main([*command(trained, out, "--ap-drop", "1.0", "--budget-minutes", "0.0001"), *FAST]) == 0
    stopped = json.loads((out / "candidates.json").read_text())
    assert len(stopped["candidates"]) == 1  # the time was over at once
    assert optimize.main([*command(trained, out, "--ap-drop", "1.0"), *FAST]) == 0
    assert json.loads((out / "candidates.json").read_text())["key"] == stopped["key"]
    found = json.loads((out / "optimize.json").read_text())
    names = [candidate["name"] for candidate in found["candidates"]]
    assert names[0] == "the detector as it is" and "96 px" in names
    assert found["base"]["speedup"] == pytest.approx(1) and found["base"]["lost"] == 0
    chosen = found["chosen"]
    with_open_exits = [item for item in found["candidates"][1:] if not item["exits"] or min(item["thresholds"]) < 2]
    assert chosen["speedup"] == max(item["speedup"] for item in with_open_exits if item["holds"])
    assert found["test"]["photos"] == 8 and "The choice is uncertain" not in found["summary"]
    printed = capsys.readouterr().out
    words = "run it: " if found["ship"] else "try it, but do not ship it: "
    assert f"{words}earlyexit predict --weights '{out}/detector.onnx' PHOTO" in printed
    assert found["summary"] in printed and found["summary"] == (out / "summary.txt").read_text().strip()
    assert not (out / "detector.xml").exists() and (out / "detector.onnx").is_file()
    assert (out / "candidates.png").stat().st_size > 0
    assert (out / "report.html").is_file() and (out / "test" / "report.html").is_file()
    model, architecture, info = load_model(out / "model.pth")
    assert architecture.image_size == chosen["image_size"]
    assert list(model.exit_names[:-1]) == chosen["exits"]
    if chosen["exits"]:
        assert info["certificate"]["target"]["value"] == 1.0
    assert EarlyExitSSDLite.from_pretrained(out / "model.pth").exit_names == model.exit_names
    metrics = json.loads((out / "test" / "metrics.json").read_text())
    assert metrics["routed"]["AP50"] == found["test"]["AP50"]


def test_a_search_with_other_settings_starts_anew(trained, tmp_path):
    def key(*settings, ap_drop=1.0, minutes=None):
        cfg = load_config(trained[1][1], [*trained[1][2:], *FAST, *settings])
        return CandidateSearch(
            cfg, trained[0] / "run" / "model.pth", Goal(ap_drop=ap_drop, minutes=minutes), tmp_path
        ).key

    assert key("DATA.WORKERS", "0", "OUTPUT_DIR", "elsewhere", minutes=5.0) == key()
    assert len({key(), key(ap_drop=0.5), key("ROUTING.POLICY", "entropy")}) == 3


def test_fine_tuned_models_are_candidates_and_are_trained_once(trained, tmp_path, monkeypatch, detects, chosen_only):
    monkeypatch.setattr(CandidateSearch, "has_empty_photos", False)  # so that no glance is tried
    out = tmp_path / "tuned"
    flags = ["--train", "--ap-drop", "1.0", *FAST, "FINE_TUNING.EPOCHS", "1", "ENGINE.CURVE_PERIOD", "0"]
    assert optimize.main(command(trained, out, *flags)) == 2
    found = json.loads((out / "candidates.json").read_text())["candidates"].values()
    tuned = [(item["name"], item["image_size"]) for item in found if item["fine_tuned"]]
    assert ("96 px, fine-tuned", 96) in tuned
    (folder,) = (out / "fine_tuned").iterdir()
    before = load_model(trained[0] / "run" / "model.pth")[0].state_dict()
    after = load_model(folder / "model.pth")[0].state_dict()
    learnt = [key for key in after if key.endswith("weight") and not before[key].equal(after[key])]
    assert any(key.startswith("backbone") for key in learnt) and any(key.startswith("head") for key in learnt)
    log = (folder / "fine_tuning" / "log.jsonl").read_text()
    assert "loss/distillation" in log and "loss/classification" in log

    monkeypatch.setattr("earlyexit_ssd.pipeline.phases.fit", lambda *_: pytest.fail("it was trained again"))
    cfg = load_config(trained[1][1], [*trained[1][2:], *flags[3:]])
    search = CandidateSearch(cfg, trained[0] / "run" / "model.pth", Goal(ap_drop=1.0, train=True), out)
    _, state = search._fine_tuned
    assert all(value.equal(after[key]) for key, value in state.items())


def test_joint_phase_is_a_candidate(trained, tmp_path, monkeypatch, detects, chosen_only):
    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.fine_tune", lambda *_: None)
    monkeypatch.setattr("earlyexit_ssd.pipeline.candidates.SHARES", (1.0,))
    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.choose_candidate", lambda measured, goal: measured[-1])
    out, trainings = tmp_path / "joint", []

    def train_phases(cfg):
        trainings.append((cfg.OUTPUT_DIR, tuple(cfg.PHASES), cfg.CALIBRATION.TARGET))
        return trained[0] / "run" / "model.pth"

    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.train_phases", train_phases)
    flags = ["--train", "--ap-drop", "1.0", "EVAL.RIVALS.SIZES", "[64]", "EXITS.GLANCES", "[[32, 12]]"]
    assert optimize.main(command(trained, out, *flags, "PHASES", "[baseline, exits, joint]")) == 2
    assert trainings == [(str(out / "joint"), ("baseline", "exits", "joint"), "")]
    found = [*json.loads((out / "candidates.json").read_text())["candidates"].values()]
    names = [candidate["name"] for candidate in found if candidate["joint"]]
    assert names[0] == "jointly trained" and any("exit" in name for name in names)
    assert found[-1]["joint"] and load_model(out / "model.pth")[1].exits[-1].layer == 12


def test_original_detector_is_kept_if_no_candidate_holds(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.choose_candidate", lambda *_: None)
    out = tmp_path / "nothing"
    out.mkdir()
    for name in ("model.pth", "detector.xml"):
        (out / name).write_text("earlier")
    limits = ["--budget-minutes", "0.0001", "--coco-ap-drop", "0.1"]
    assert optimize.main([*command(trained, out, *limits), *FAST]) == 0
    printed = capsys.readouterr().out
    assert "ship the detector as it is" in printed and "(report.html, summary.txt, optimize.json)" in printed
    found = json.loads((out / "optimize.json").read_text())
    assert found["ship"] is False and found["base"]["AP_lost_bound"] == 0
    assert "The choice is uncertain: the calib split has only 8 photos, where your detector finds" in found["summary"]
    assert found["summary"].endswith("objects; a budget of 0.01 needs at least 299 photos.")
    assert not (out / "model.pth").exists() and not (out / "detector.xml").exists()
    assert (out / "former_model.pth").read_text() == "earlier"


def test_a_search_does_not_replace_the_weights_that_it_starts_from(trained, capsys):
    weights = trained[0] / "run" / "model.pth"
    before = weights.read_bytes()
    assert optimize.main(command(trained, weights.parent)) == 2
    assert "would replace this input" in capsys.readouterr().err and weights.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "delta", "runtime"),
    [
        ([], 0.05, "onnxruntime"),
        (["CALIBRATION.DELTA", "0.2", "EVAL.RUNTIME", "openvino"], 0.2, "openvino"),
        (
            ["--delta", "0.1", "--runtime", "eager", "CALIBRATION.DELTA", "0.2", "EVAL.RUNTIME", "openvino"],
            0.1,
            "eager",
        ),
    ],
)
def test_the_configuration_has_the_defaults(trained, tmp_path, monkeypatch, words, delta, runtime):
    searches = []
    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize.optimize", lambda *given: searches.append(given) or fail())
    unset = [word for word in command(trained, tmp_path) if word not in ("--runtime", "eager")]
    assert optimize.main([*unset, *words]) == 2
    ((cfg, goal, out, _),) = searches
    assert (goal.delta, cfg.EVAL.RUNTIME, out) == (delta, runtime, tmp_path)


def fail(*_):
    raise EarlyExitError("enough")


def test_photos_of_a_block_are_drawn_together(trained, tmp_path, monkeypatch, capsys):
    assert optimize.main(command(trained, tmp_path, "--block", "500")) == 2
    error = capsys.readouterr().err
    assert "--block 500: all" in error and "photos of DATA.TEST are in one block; use shorter blocks" in error
    blocks = []

    def stop(search, *_):
        blocks.append((search.blocks, search.goal.budget.block))
        assert search.few_draws.startswith("the calib split has only 4 blocks of 2 photos, ")
        assert search.few_draws.endswith(" needs at least 299 blocks")
        raise EarlyExitError("enough")

    monkeypatch.setattr("earlyexit_ssd.pipeline.optimize._measure_candidates", stop)
    assert optimize.main(command(trained, tmp_path, "--block", "1s", "--fps", "2")) == 2
    ((numbers, length),) = blocks
    assert length == 2 and numbers.tolist() == [photo // 2 for photo in range(len(numbers))]


def test_8_bits_need_a_runtime_that_has_them(trained, tmp_path, capsys):
    assert optimize.main(command(trained, tmp_path / "x", "--int8")) == 2
    assert "8 bits do not run in eager; add --runtime onnxruntime" in capsys.readouterr().err

import json

from earlyexit_ssd import EarlyExitSSDLite
from tools import eval_exits, export_weights, train_net


def test_from_a_run_to_figures_of_the_shipped_file(tiny, tmp_path, capsys):
    """A forced run is refused, so this one has gates that anything passes."""
    gates = [f"BASELINE.GATE.{key}" for key in ("AP50", "PRECISION", "RECALL")]
    gates += [f"EXITS_PHASE.GATE.{key}" for key in ("FIRST_EXIT_AP50", "DEEPEST_SHARE")]
    run = tiny("run", *[word for gate in gates for word in (gate, "0.0")])
    assert train_net.main(run) == 0
    config, overrides = run[:2], run[2:]
    capsys.readouterr()
    command = [str(tmp_path / "run" / "model.pth"), "--name", "toy", *config, "--out", str(tmp_path / "weights")]
    assert export_weights.main(command) == 0
    printed = capsys.readouterr().out
    entry = json.loads((tmp_path / "weights" / "toy.json").read_text())
    assert f"{entry['bytes']} bytes, sha256 {entry['sha256']}" in printed
    weights = str(tmp_path / "weights" / "toy.pth")
    assert eval_exits.main([*config, "--weights", weights, "--out", str(tmp_path / "out"), *overrides]) == 0
    assert export_weights.main([*command, "--metrics", str(tmp_path / "out" / "metrics.json")]) == 0
    assert list(json.loads((tmp_path / "weights" / "toy.json").read_text())["metrics"]) == ["synthetic_chairs_test"]
    assert EarlyExitSSDLite.from_pretrained(weights).router is not None


def test_mistakes_end_with_2_and_one_line(tiny, tmp_path, capsys):
    config = tiny("run")[:2]
    assert export_weights.main([str(tmp_path / "none.pth"), "--name", "toy", *config]) == 2
    assert "none.pth: no such file of weights" in capsys.readouterr().err

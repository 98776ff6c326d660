import json

import pytest
import torch

from earlyexit_ssd.files import sha256
from tools import eval_exits


def test_differences_between_configuration_and_weights_are_warnings(trained, tmp_path, capsys):
    root, arguments = trained
    more = ["MODEL.NMS_THRESH", "0.1", "EXITS.LAYERS", "[4]"]
    assert eval_exits.main([*arguments, "--out", str(tmp_path / "out"), *more]) == 0
    error = capsys.readouterr().err
    assert "nms_thresh: the configuration has 0.1, but the weights were made with 0.55, which is used" in error
    assert "exit_layers: the configuration has [4], but the weights were made with [8, 12]" in error
    assert "width:" not in error
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [entry["layer"] for entry in metrics["exits"]] == [8, 12, 16]
    assert metrics["context"]["weights_sha256"] == sha256(root / "run" / "model.pth")


def test_missing_and_foreign_weights(tiny, tmp_path, capsys):
    arguments = [*tiny("run"), "--out", str(tmp_path / "results")]
    assert eval_exits.main(arguments) == 2
    assert "model.pth: no such file of weights; train one" in capsys.readouterr().err
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pth")
    assert eval_exits.main([*arguments, "--weights", str(tmp_path / "foreign.pth")]) == 2
    assert "foreign.pth: expected a state dict of tensors of torchvision's SSDLite" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_rivals_are_evaluated(trained, tmp_path, capsys):
    root, arguments = trained
    more = ["EVAL.RIVALS.ENABLED", "true", "EVAL.RIVALS.SIZES", "[80]", "EVAL.RUNTIME", "onnxruntime"]
    more += ["EVAL.RIVALS.FULL_PATHS", str(root / "run" / "baseline" / "model.pth"), "ROUTING.THRESHOLDS", "[0.5]"]
    assert eval_exits.main([*arguments, "--out", str(tmp_path / "out"), *more]) == 0
    assert (tmp_path / "out" / "ap_against_cost.png").is_file()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rivals = metrics["rivals"]
    names = ["exit8 alone", "exit12 alone", "plain 80", "plain 64, baseline"]
    assert [rival["name"] for rival in rivals] == names
    exit8, exit12, larger, baseline = rivals
    assert exit8["AP50"] == metrics["exits"][0]["AP50"] and exit12["AP50"] == metrics["exits"][1]["AP50"]
    assert exit12["mmacs"] < metrics["exits"][1]["mmacs"]  # without the first branch
    assert baseline["AP50"] == pytest.approx(metrics["exits"][-1]["AP50"], abs=1e-6)
    assert baseline["mmacs"] == metrics["without_exits"]["mmacs"] < larger["mmacs"]
    assert {rival["runtime"] for rival in rivals} == {metrics["context"]["runtime"]} == {"onnxruntime"}
    printed = capsys.readouterr().out
    assert "exit8 alone" in printed and "plain 80" in printed and "in ONNX Runtime on cpu" in printed

import json

import pytest
import torch

from earlyexit_ssd.files import sha256
from tools import eval_exits


def test_says_what_of_the_configuration_the_weights_overrule(trained, tmp_path, capsys):
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
    config, overrides = tiny("run")[:2], tiny("run")[2:]
    out = ["--out", str(tmp_path / "results")]
    assert eval_exits.main([*config, *out, *overrides]) == 2
    assert "model.pth: no such file of weights; train one" in capsys.readouterr().err
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pth")
    assert eval_exits.main([*config, *out, "--weights", str(tmp_path / "foreign.pth"), *overrides]) == 2
    assert "foreign.pth: expected a state dict of tensors of torchvision's SSDLite" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_static_rivals_stand_beside_the_exits(trained, tmp_path, capsys):
    root, arguments = trained
    rivals = [
        "EVAL.RIVALS.ENABLED",
        "true",
        "ROUTING.THRESHOLDS",
        "[0.5]",
        "EVAL.RIVALS.SIZES",
        "[80]",
        "EVAL.RIVALS.FULL_PATHS",
        str(root / "run" / "baseline" / "model.pth"),
    ]
    assert eval_exits.main([*arguments, "--out", str(tmp_path / "out"), *rivals, "EVAL.RUNTIME", "onnxruntime"]) == 0
    assert (tmp_path / "out" / "ap_against_cost.png").is_file()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    alone, second, larger, baseline = metrics["rivals"]
    assert [one["name"] for one in metrics["rivals"]] == [
        "exit8 alone",
        "exit12 alone",
        "plain 80",
        "plain 64, baseline",
    ]
    assert alone["AP50"] == metrics["exits"][0]["AP50"] and second["AP50"] == metrics["exits"][1]["AP50"]
    assert second["mmacs"] < metrics["exits"][1]["mmacs"]  # the first branch is not in it
    assert baseline["AP50"] == pytest.approx(metrics["exits"][-1]["AP50"], abs=1e-6)
    assert baseline["mmacs"] == metrics["without_exits"]["mmacs"] < larger["mmacs"]
    assert {one["runtime"] for one in metrics["rivals"]} == {metrics["context"]["runtime"]} == {"onnxruntime"}
    printed = capsys.readouterr().out
    assert "exit8 alone" in printed and "plain 80" in printed and "in ONNX Runtime on cpu" in printed

import torch

from tools import eval_exits


def test_missing_and_foreign_weights(tiny, tmp_path, capsys):
    config, overrides = tiny("run")[:2], tiny("run")[2:]
    out = ["--out", str(tmp_path / "results")]
    assert eval_exits.main([*config, *out, *overrides]) == 2
    assert "model.pth: no such file of weights; train one" in capsys.readouterr().err
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pth")
    assert eval_exits.main([*config, *out, "--weights", str(tmp_path / "foreign.pth"), *overrides]) == 2
    assert "expected a model of format" in capsys.readouterr().err
    assert list((tmp_path / "results").iterdir()) == []

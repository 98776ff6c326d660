import math
from argparse import Namespace

from benchmarks import quantisation_steps
from tests.deploy.conftest import build_model, save_photos


def test_every_quantisation_has_a_row(tmp_path, monkeypatch, capsys):
    folder = save_photos(tmp_path / "photos", 2)
    build_model(exit_layers=()).save(tmp_path / "model.pth")
    monkeypatch.setattr(quantisation_steps, "_by_nncf", lambda: lambda model, *_: model)  # 32 bits, for time
    monkeypatch.setattr(quantisation_steps, "_by_onnx_runtime", lambda model, *_: model)
    quantisation_steps.main(Namespace(model=tmp_path / "model.pth", photos=folder, test_photos=folder))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = {name: float(error) for name, _, error in rows[1:]}
    alone = errors.pop("ONNX Runtime's quantiser alone")
    assert 0 < alone < math.inf and [*errors.values()] == [0] * 8

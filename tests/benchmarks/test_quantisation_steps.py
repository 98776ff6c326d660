import math
from argparse import Namespace

from PIL import Image

from benchmarks import quantisation_steps
from tests.deploy.conftest import build_model, build_photos


def test_every_quantisation_has_a_row(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, photo in enumerate(build_photos(2)):
        Image.fromarray(photo).save(folder / f"{place}.png")
    build_model(exit_layers=()).save(tmp_path / "model.pth")
    for name, in_32_bits in (
        ("_by_nncf", lambda: lambda model, *_: model),
        ("_by_onnx_runtime", lambda model, *_: model),
    ):
        monkeypatch.setattr(quantisation_steps, name, in_32_bits)  # for time
    quantisation_steps.main(Namespace(model=tmp_path / "model.pth", photos=folder, test_photos=folder))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = {name: float(error) for name, _, error in rows[1:]}
    alone = errors.pop("ONNX Runtime's quantiser alone")
    assert 0 < alone < math.inf and [*errors.values()] == [0] * 8

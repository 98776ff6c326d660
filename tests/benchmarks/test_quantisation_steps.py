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
    monkeypatch.setattr(quantisation_steps, "_by_nncf", lambda: lambda model, *_: model)  # in 32 bits
    quantisation_steps.main(Namespace(model=tmp_path / "model.pth", photos=folder, test_photos=folder))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = {name: float(error) for name, _, error in rows[1:]}
    assert len(errors) == 8 and errors["NNCF"] == 0
    assert all(0 < error < 5 for name, error in errors.items() if name != "NNCF")

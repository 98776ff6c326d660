import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, load_model, save_model
from tests.modeling.conftest import SMALL


def test_a_saved_model_comes_back(tmp_path, images):
    architecture = Architecture(**{**SMALL, "head_outputs": 4, "folded_rows": (1, 3)})
    model = architecture.build().eval()
    model.router = ExitRouter(2)
    save_model(tmp_path / "model.pth", model, architecture, {"note": 1})
    again, described, info = load_model(tmp_path / "model.pth")
    assert (described, info) == (architecture, {"note": 1})
    assert torch.equal(
        again.exit_outputs(images).heads[0]["cls_logits"], model.exit_outputs(images).heads[0]["cls_logits"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_foreign_and_missing_files(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(EarlyExitError, match="expected a model of format"):
        load_model(tmp_path / "other.pth")
    torch.save({"format": "earlyexit_ssd/1", "model": {}, "info": None}, tmp_path / "half.pth")
    with pytest.raises(EarlyExitError, match="the file lacks 'architecture'"):
        load_model(tmp_path / "half.pth")
    with pytest.raises(EarlyExitError, match="no such file of weights"):
        load_model(tmp_path / "none.pth")


def test_unknown_key_in_the_description():
    with pytest.raises(EarlyExitError, match="did you mean 'width'"):
        Architecture.from_dict({**Architecture(**SMALL).to_dict(), "widht": 1.0})


def test_branches_of_new_layers_are_refused_by_name(tmp_path):
    """Files of before had ``attention``, ``copy`` 0 where a branch had layers of its own, and a ``cascade``."""
    described = {**Architecture(**SMALL).to_dict(), "attention": True, "cascade": False}
    assert Architecture.from_dict(described) == Architecture(**SMALL)
    with pytest.raises(EarlyExitError, match="a cascade from exit to exit"):
        Architecture.from_dict({**described, "exit_layers": [8, 12], "cascade": True})
    one = Architecture.from_dict({**described, "exit_layers": [8, 12], "cascade": True, "empty": [8]})
    assert one.exit_layers == (8, 12)
    content = {"architecture": {**described, "copy": [0.5, 0.0]}, "model": {}, "info": {}}
    torch.save({"format": "earlyexit_ssd/1", **content}, tmp_path / "old.pth")
    with pytest.raises(EarlyExitError, match=r"old.pth: its branches have layers .* train the exits again"):
        load_model(tmp_path / "old.pth")

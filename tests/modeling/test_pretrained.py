"""Models loaded by name or path, with their routing."""

import pytest

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, load_model, save_model
from tests.modeling.conftest import SMALL, small_model


def save(path, router):
    save_model(path, small_model(), Architecture(**SMALL), {"router": router})
    return path


def test_model_file_has_its_routing(tmp_path, images):
    stored = ExitRouter(2, policy="mean_foreground", thresholds=[0.25, 0.75], temperatures=[1.5, 2.0]).to_dict()
    path = save(tmp_path / "model.pth", stored)
    model = EarlyExitSSDLite.from_pretrained(path)
    assert model.router.to_dict() == stored
    assert not model.training
    assert "exit_index" in model(images)[0]
    plain = EarlyExitSSDLite.from_pretrained(str(path), router=False)
    assert plain.router is None
    assert set(plain(images)[0]) == {"boxes", "scores", "labels"}


def test_forced_training_is_still_known_after_saving_again(tmp_path):
    save_model(tmp_path / "model.pth", small_model(), Architecture(**SMALL), {"forced": True})
    EarlyExitSSDLite.from_pretrained(tmp_path / "model.pth").save(tmp_path / "again.pth")
    assert load_model(tmp_path / "again.pth")[2]["forced"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_exits": 2, "policy": "max_forground"}, r"\(.*\); load it with router=False"),
        ({"num_exits": 2, "treshold": 0.5}, ".*'thresholds'"),
        (ExitRouter(5).to_dict(), ".the router is for 5 early exits"),
        ({"num_exits": 2, "temperature_bounds": [1.0]}, ".temperature_bounds"),
    ],
)
def test_routing_that_cannot_be_used_is_named(tmp_path, settings, message):
    with pytest.raises(EarlyExitError, match=rf"model\.pth: its routing cannot be used {message}"):
        EarlyExitSSDLite.from_pretrained(save(tmp_path / "model.pth", settings))

"""Models loaded by name or path, with their routing."""

import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite, EarlyExitSSDLite_Weights, ExitRouter
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


def test_file_without_routing_is_loaded(tmp_path):
    assert EarlyExitSSDLite.from_pretrained(save(tmp_path / "model.pth", None)).router is None


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


def test_damaged_files_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(EarlyExitError, match=r"broken\.pth: not a file of weights"):
        EarlyExitSSDLite.from_pretrained(tmp_path / "broken.pth")
    with pytest.raises(EarlyExitError, match=r"did you mean 'chair'\?"):
        EarlyExitSSDLite.from_pretrained("chairs")


@pytest.mark.parametrize("member", list(EarlyExitSSDLite_Weights), ids=lambda member: member.name)
def test_shipped_weights_detect_with_their_routing(member):
    model = EarlyExitSSDLite.from_pretrained(member.name.lower())
    assert model.router is not None
    assert all(value.dtype == torch.float32 for value in model.parameters())
    (detection,) = model([torch.rand(3, 240, 320)])
    assert int(detection["exit_index"]) < len(member.meta["exits"])
    assert detection["labels"].max() < len(member.meta["categories"])

import copy
import json
import pickle

import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite_Weights
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import load_model, weights
from earlyexit_ssd.modeling.weights import describe, find_weights, weights_path

ENTRY = {
    "classes": ["cat", "dog"],
    "exits": ["exit8", "full"],
    "num_params": 5,
    "bytes": 2_097_152,
    "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    "recipe": "python tools/train_net.py --config pets.yaml",
    "routing": {},
    "metrics": {"pets_test": {"images": 3, "exits": {"full": {"AP50": 0.5}}}},
}
MEMBERS = list(EarlyExitSSDLite_Weights)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A member PETS whose file holds other bytes than it should."""
    (tmp_path / "pets.json").write_text(json.dumps(ENTRY))
    members = weights.ShippedWeights("EarlyExitSSDLite_Weights", {"PETS": describe(tmp_path / "pets.json")})
    monkeypatch.setattr(weights, "EarlyExitSSDLite_Weights", members)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return members.PETS


def test_meta_comes_from_the_description(pets):
    assert pets.meta == {
        "categories": ["__background__", "cat", "dog"],
        "exits": ["exit8", "full"],
        "num_params": 5,
        "min_size": (1, 1),
        "recipe": "python tools/train_net.py --config pets.yaml",
        "sha256": ENTRY["sha256"],
        "bytes": 2_097_152,
        "_file_size": 2.0,
        "_metrics": {"pets_test": {"full": {"AP50": 0.5}}},
        "_docs": "SSDLite320 MobileNetV3-Large with early exits for cat, dog; weights in fp16.",
    }
    photo = pets.transforms()(torch.full((3, 4, 5), 255, dtype=torch.uint8))
    assert torch.equal(photo, torch.ones(3, 4, 5))


def test_the_file_is_compared_with_its_digest(pets):
    with pytest.raises(EarlyExitError, match=r"pets\.pth: the weights pets are missing; install the package again"):
        weights_path("pets")
    pets.path.write_bytes(b"abd")
    line = r"pets\.pth: damaged \(3 bytes with sha256 a52d159f, expected 2097152 with ba7816bf\); install"
    with pytest.raises(EarlyExitError, match=line):
        weights_path(pets)
    pets.path.write_bytes(b"abc")
    assert weights_path("PETS") == pets.path


@pytest.mark.parametrize("name", ["pets", "Pets", "EarlyExitSSDLite_Weights.PETS"])
def test_names(pets, name):
    assert find_weights(name) is find_weights(pets) is pets
    assert find_weights("./pets") is None


def test_neither_a_name_nor_a_file(pets, tmp_path):
    with pytest.raises(EarlyExitError, match=r"^weights 'pet': no such file, .* \(pets\) \(did you mean 'pets'\?\)$"):
        weights_path("pet")
    with pytest.raises(EarlyExitError, match="no such file"):
        weights_path(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"classes": 3}'])
def test_a_damaged_description_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EarlyExitError, match=r"x\.json: not (JSON|a description of).*; install the package again$"):
        describe(tmp_path / "x.json")


def test_something_is_shipped():
    assert "CHAIR" in EarlyExitSSDLite_Weights.__members__


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_shipped_weights_are_what_their_description_says(member):
    member.check()
    assert member.path.stat().st_size == member.meta["bytes"] < 12_000_000
    model, _, info = load_model(member.path)
    entry = json.loads(member.path.with_suffix(".json").read_text())
    assert ["__background__", *model.classes] == member.meta["categories"]
    assert list(model.exit_names) == member.meta["exits"]
    assert sum(parameter.numel() for parameter in model.parameters()) == member.meta["num_params"]
    assert info["router"] == entry["routing"]
    assert not info["forced"]
    assert all(value.dtype != torch.float32 for value in member.get_state_dict(progress=True).values())


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_members_are_copied_and_pickled_as_torchvision_s(member):
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member

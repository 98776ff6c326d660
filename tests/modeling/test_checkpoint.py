"""Model files, and the weights that come with the package."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite_Weights, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, load_model, save_model
from earlyexit_ssd.modeling import checkpoint as weights
from earlyexit_ssd.modeling.checkpoint import find_weights, half_file, half_state, read_description, weights_path
from earlyexit_ssd.modeling.retrofit import read_weights
from tests.modeling.conftest import SMALL, small_model

KEY = "head.regression_head.module_list.0.1.bias"


def test_saved_model_is_loaded(tmp_path, images):
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


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a file of a small model holds."""
    path, architecture = tmp_path_factory.mktemp("whole") / "model.pth", Architecture(**SMALL)
    save_model(path, architecture.build(), architecture)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "damage",
    [
        {"copy": "x"}, {"image_size": -1}, {"classes": None}, {"score_thresh": None}, {"nms_thresh": "0.5"},
        {"detections_per_img": 2.5}, {"topk_candidates": True}, {"width": float("nan")}, {"width": 1e9},
        {"channels": 10**9}, {"classes": [1, 2]}, {"classes": []}, {"folded_rows": [1]}, {"head_outputs": 9},
        {"exit_layers": "8"}, {7: 8},
    ],
)  # fmt: skip
def test_a_damaged_description_is_one_line(tmp_path, content, damage):
    torch.save({**content, "architecture": content["architecture"] | damage}, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: "):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize("routing", ["x", {"num_exits": "2"}, {"num_exits": 2, "thresholds": [None]}, [1]])
def test_routing_of_another_type_is_refused(tmp_path, content, routing):
    torch.save({**content, "info": {"router": routing}}, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: info\.router.* is .*, expected"):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, 7: torch.zeros(1)}, "expected names and tensors, got 7: Tensor"),
        (lambda state: {**state, KEY: None}, "expected names and tensors, got 'head.*': NoneType"),
        (lambda state: {**state, KEY: state[KEY].to_sparse()}, "expected a dense tensor"),
        (lambda state: {**state, KEY: state[KEY].to("meta")}, "expected a dense tensor"),
        (lambda state: {**state, KEY: state[KEY].to(torch.complex64)}, "expected a dense tensor"),
        (lambda state: {**state, KEY: torch.quantize_per_tensor(state[KEY], 1, 0, torch.qint8)}, "a dense tensor"),
        (lambda state: {**state, KEY: state[KEY].long()}, "is torch.int64, expected torch.float32"),
        (lambda state: {**state, KEY: state[KEY] * float("nan")}, "has NaN or infinity"),
        (lambda state: {}, "expected a state dict of tensors"),
    ],
)
def test_invalid_state_dict_is_one_line(tmp_path, content, change, message):
    torch.save({**content, "model": change(content["model"])}, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=rf"model\.pth: .*{message}"):
        load_model(tmp_path / "model.pth")


def test_deeply_shared_lists_are_refused_at_once(tmp_path):
    knot = [1]
    for _ in range(200):
        knot = [knot, knot]
    torch.save(
        {"format": "earlyexit_ssd/1", "architecture": {"classes": knot}, "model": {}, "info": {}}, tmp_path / "x"
    )
    with pytest.raises(EarlyExitError, match="more than 2000000 values, not a file of weights"):
        load_model(tmp_path / "x")


def test_architecture_of_another_model_is_refused(tmp_path):
    model = Architecture(**SMALL).build()
    for wrong in ({"classes": ("a", "b")}, {"exit_layers": (6, 12)}):
        with pytest.raises(EarlyExitError, match="the architecture has .*; pass Architecture.of"):
            save_model(tmp_path / "model.pth", model, Architecture(**{**SMALL, **wrong}))
    assert not list(tmp_path.iterdir())


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


# Half precision.


def test_values_shapes_and_order():
    state = {
        "a.weight": torch.tensor([[1.0, 1 + 2**-11], [-3.5, 1e-9]]),  # 1 + 2^-11 lies between two numbers of fp16
        "a.num_batches_tracked": torch.tensor(70000),
        "b.running_var": torch.tensor([1e-30, 22.5]),
    }
    half = half_state(state)
    assert list(half) == list(state)
    assert half["a.weight"].dtype == torch.float16
    assert half["a.weight"].tolist() == [[1.0, 1.0], [-3.5, 0.0]]
    assert half["b.running_var"].tolist() == [0.0, 22.5]
    assert half["a.num_batches_tracked"].dtype == torch.int64
    assert half["a.num_batches_tracked"].shape == ()
    assert half["a.num_batches_tracked"].item() == 70000
    assert half["a.weight"].untyped_storage().data_ptr() == half["b.running_var"].untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf")])
def test_values_outside_fp16_are_refused(value):
    with pytest.raises(EarlyExitError, match=r"^head\.bias has a value above fp16's largest"):
        half_state({"fine": torch.ones(2), "head.bias": torch.tensor([0.0, value])})


def test_the_file_loads_as_fp32_and_repeats_its_bytes(tmp_path):
    model = small_model()
    save_model(tmp_path / "model.pth", model, Architecture(**SMALL), {"phase": "exits"})
    content = half_file(read_weights(tmp_path / "model.pth"))
    assert content == half_file(read_weights(tmp_path / "model.pth"))
    assert len(content) < 0.55 * (tmp_path / "model.pth").stat().st_size
    (tmp_path / "half.pth").write_bytes(content)
    again, architecture, info = load_model(tmp_path / "half.pth")
    assert (architecture, info) == (Architecture(**SMALL), {"phase": "exits"})
    expected, found = model.state_dict(), again.state_dict()
    assert all(found[key].dtype == value.dtype for key, value in expected.items())
    assert all(torch.equal(found[key], value.half().to(value.dtype)) for key, value in expected.items())


def test_nothing_in_the_file_needs_unpickling():
    content = {"format": "earlyexit_ssd/1", "architecture": {}, "info": {}, "model": small_model().state_dict()}
    assert set(torch.load(io.BytesIO(half_file(content)), weights_only=True)) == set(content)


# The weights that come with the package.

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
    members = weights.ShippedWeights("EarlyExitSSDLite_Weights", {"PETS": read_description(tmp_path / "pets.json")})
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
def test_a_damaged_description_is_one_line_of_test_weights(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EarlyExitError, match=r"x\.json: not (JSON|a description of).*; install the package again$"):
        read_description(tmp_path / "x.json")


def test_chair_weights_are_shipped():
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

"""Model files, and the weights shipped with the package."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from earlyexit_ssd import EarlyExitSSDLite, EarlyExitSSDLite_Weights, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, Exit, load_model, save_model
from earlyexit_ssd.modeling import checkpoint as weights
from earlyexit_ssd.modeling.checkpoint import find_weights, half_file, half_state, read_description, weights_path
from earlyexit_ssd.modeling.retrofit import read_weights
from tests.modeling.conftest import SMALL, assert_equal

KEY = "head.regression_head.module_list.0.1.bias"
VARIANCE = "backbone.features.0.0.1.running_var"


def test_settings_from_numpy_are_saved_as_plain_numbers(tmp_path):
    """The file could not be read with them."""
    layer, score, classes = np.int64(8), np.float64(0.3), tuple(np.array(["cup", "cat"]))
    exits = (Exit(layer, "empty", pixels=np.int64(32)), Exit(layer))
    model = Architecture(classes, image_size=96, width=0.25, exits=exits, nms_thresh=score).build()
    model.score_thresh, model.router = score, ExitRouter(2, temperature_bounds=np.array([0.5, 3.0]))
    model.save(tmp_path / "model.pth")
    loaded = type(model).from_pretrained(tmp_path / "model.pth")
    assert (loaded.classes, loaded.exit_names) == (classes, ("glance32", "exit8", "full"))
    assert (loaded.score_thresh, loaded.nms_thresh, loaded.router.temperature_bounds) == (0.3, 0.3, (0.5, 3.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1)}, "expected a model of format"),
        ({"format": "earlyexit_ssd/1", "model": {}, "info": None}, "the file lacks 'architecture'"),
        (None, "no such file of weights"),
    ],
)
def test_other_and_missing_files_are_refused(tmp_path, content, message):
    if content is not None:
        torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=message):
        load_model(tmp_path / "model.pth")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The content of a small model's file."""
    path, architecture = tmp_path_factory.mktemp("whole") / "model.pth", Architecture(**SMALL)
    save_model(path, architecture.build(), architecture)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "damage",
    [
        {"copy": "x"}, {"image_size": -1}, {"classes": None}, {"score_thresh": None}, {"nms_thresh": "0.5"},
        {"detections_per_img": 2.5}, {"topk_candidates": True}, {"width": float("nan")}, {"width": 1e9},
        {"channels": 10**9}, {"classes": [1, 2]}, {"classes": []}, {"folded_rows": [1]}, {"head_outputs": 9},
        {"exit_layers": "8"}, {7: 8}, {"widht": 1.0}, {"router": "x"}, {"router": {"num_exits": "2"}}, {"router": [1]},
        {"router": {"num_exits": 2, "thresholds": [None]}},
    ],
)  # fmt: skip
def test_damaged_architecture_and_routing_are_refused(tmp_path, content, damage):
    routing, architecture = {"info": damage}, {"architecture": content["architecture"] | damage}
    torch.save({**content, **(routing if "router" in damage else architecture)}, tmp_path / "model.pth")
    message = r"info\.router.* is .*, expected" if "router" in damage else ""
    with pytest.raises(EarlyExitError, match=rf"model\.pth: {message}"):
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
        (lambda state: {**state, VARIANCE: state[VARIANCE] - 2}, "running_var has a negative variance"),
        (lambda state: {}, "expected a state dict of tensors"),
    ],
)
def test_invalid_state_dict_is_refused(tmp_path, content, change, message):
    torch.save({**content, "model": change(content["model"])}, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=rf"model\.pth: .*{message}"):
        load_model(tmp_path / "model.pth")


def test_deeply_shared_lists_are_refused_at_once(tmp_path, content):
    shared = [1]
    for _ in range(200):
        shared = [shared, shared]
    torch.save({**content, "architecture": {"classes": shared}}, tmp_path / "x")
    with pytest.raises(EarlyExitError, match="more than 2000000 values, not a file of weights"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize("changes", [{"classes": ("a", "b")}, {"exit_layers": (6, 12)}])
def test_architecture_of_another_model_is_not_saved(tmp_path, model, changes):
    with pytest.raises(EarlyExitError, match="the architecture has .*; pass Architecture.of"):
        save_model(tmp_path / "model.pth", model, Architecture(**{**SMALL, **changes}))
    assert not list(tmp_path.iterdir())


def test_branches_of_older_versions_are_refused(tmp_path, content):
    """Older files have ``attention`` and ``cascade``. Those without layers of that kind are read."""
    described = {**content["architecture"], "attention": True, "cascade": True}
    assert Architecture.from_dict(described) == Architecture(**SMALL)
    state = {**content["model"], "branches.exit12.cascade.0.weight": torch.zeros(1)}
    torch.save({**content, "architecture": described, "model": state}, tmp_path / "old.pth")
    with pytest.raises(EarlyExitError, match=r"old.pth does not fit .*cascade.* train the exits again"):
        load_model(tmp_path / "old.pth")


# Half precision.


def test_half_precision_rounds_values_and_keeps_the_order():
    state = {
        "a.weight": torch.tensor([[1.0, 1 + 2**-11], [-3.5, 1e-9]]),  # 1 + 2^-11 is between two fp16 numbers
        "a.num_batches_tracked": torch.tensor(70000),
        "b.running_var": torch.tensor([1e-30, 22.5]),
    }
    half = half_state(state)
    assert list(half) == list(state)
    expected = {
        "a.weight": torch.tensor([[1.0, 1.0], [-3.5, 0.0]], dtype=torch.float16),
        "a.num_batches_tracked": torch.tensor(70000),
        "b.running_var": torch.tensor([0.0, 22.5], dtype=torch.float16),
    }
    assert_equal(half, expected)
    assert half["a.weight"].untyped_storage().data_ptr() == half["b.running_var"].untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf")])
def test_values_outside_fp16_are_refused(value):
    with pytest.raises(EarlyExitError, match=r"^head\.bias has a value above fp16's largest"):
        half_state({"fine": torch.ones(2), "head.bias": torch.tensor([0.0, value])})


def test_half_file_is_reproducible_and_loads_as_fp32(tmp_path, model):
    save_model(tmp_path / "model.pth", model, Architecture(**SMALL), {"phase": "exits"})
    content = half_file(read_weights(tmp_path / "model.pth"))
    assert content == half_file(read_weights(tmp_path / "model.pth"))
    assert len(content) < 0.55 * (tmp_path / "model.pth").stat().st_size
    (tmp_path / "half.pth").write_bytes(content)
    loaded, architecture, info = load_model(tmp_path / "half.pth")
    assert (architecture, info) == (Architecture(**SMALL), {"phase": "exits"})
    rounded = {key: value.half().to(value.dtype) for key, value in model.state_dict().items()}
    assert_equal(dict(loaded.state_dict()), rounded)


# The weights shipped with the package.

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
SHIPPED = pytest.mark.parametrize("member", EarlyExitSSDLite_Weights, ids=lambda member: member.name)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A member PETS without a file."""
    (tmp_path / "pets.json").write_text(json.dumps(ENTRY))
    members = weights.ShippedWeights("EarlyExitSSDLite_Weights", {"PETS": read_description(tmp_path / "pets.json")})
    monkeypatch.setattr(weights, "EarlyExitSSDLite_Weights", members)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return members.PETS


def test_meta_has_the_description(pets):
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


def test_missing_and_damaged_weights_are_refused(pets):
    with pytest.raises(EarlyExitError, match=r"pets\.pth: the weights pets are missing; install the package again"):
        weights_path("pets")
    pets.path.write_bytes(b"abd")
    message = r"pets\.pth: damaged \(3 bytes with sha256 a52d159f, expected 2097152 with ba7816bf\); install"
    with pytest.raises(EarlyExitError, match=message):
        weights_path(pets)
    pets.path.write_bytes(b"abc")
    assert weights_path("PETS") == pets.path


@pytest.mark.parametrize("name", ["pets", "Pets", "EarlyExitSSDLite_Weights.PETS"])
def test_weights_are_found_by_name(pets, name):
    assert find_weights(name) is find_weights(pets) is pets
    assert find_weights("./pets") is None


def test_unknown_names_and_folders_are_refused(pets, tmp_path):
    with pytest.raises(EarlyExitError, match=r"^weights 'pet': no such file, .* \(pets\) \(did you mean 'pets'\?\)$"):
        weights_path("pet")
    with pytest.raises(EarlyExitError, match="no such file"):
        weights_path(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"classes": 3}'])
def test_damaged_description_of_weights_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EarlyExitError, match=r"x\.json: not (JSON|a description of).*; install the package again$"):
        read_description(tmp_path / "x.json")


@SHIPPED
def test_shipped_weights_match_their_description_and_route(member):
    assert member.path.stat().st_size == member.meta["bytes"] < 12_000_000
    model = EarlyExitSSDLite.from_pretrained(member.name.lower())
    assert ["__background__", *model.classes] == member.meta["categories"]
    assert list(model.exit_names) == member.meta["exits"]
    assert sum(parameter.numel() for parameter in model.parameters()) == member.meta["num_params"]
    entry = json.loads(member.path.with_suffix(".json").read_text())
    assert model.router.to_dict() == ExitRouter(**entry["routing"]).to_dict() and not model.forced
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert all(value.dtype != torch.float32 for value in member.get_state_dict(progress=True).values())
    (detection,) = model([torch.rand(3, 240, 320)])
    assert int(detection["exit_index"]) < len(model.exit_names)
    assert detection["labels"].max() < len(member.meta["categories"])


@SHIPPED
def test_members_are_copied_and_pickled(member):
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member

import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, load_model, save_model
from tests.modeling.conftest import SMALL

KEY = "head.regression_head.module_list.0.1.bias"


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


@pytest.mark.parametrize(
    "damage",
    [
        {"copy": "x"}, {"image_size": -1}, {"classes": None}, {"score_thresh": None}, {"nms_thresh": "0.5"},
        {"detections_per_img": 2.5}, {"topk_candidates": True}, {"width": float("nan")}, {"width": 1e9},
        {"channels": 10**9}, {"classes": [1, 2]}, {"classes": []}, {"folded_rows": [1]}, {"head_outputs": 9},
        {"exit_layers": "8"}, {7: 8},
    ],
)  # fmt: skip
def test_a_damaged_description_is_one_line(tmp_path, damage):
    architecture = Architecture(**SMALL)
    save_model(tmp_path / "model.pth", architecture.build(), architecture)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["architecture"] |= damage
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: "):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize("routing", ["x", {"num_exits": "2"}, {"num_exits": 2, "thresholds": [None]}, [1]])
def test_routing_of_another_type_is_refused(tmp_path, routing):
    architecture = Architecture(**SMALL)
    save_model(tmp_path / "model.pth", architecture.build(), architecture, {"router": routing})
    with pytest.raises(EarlyExitError, match=r"model\.pth: info\.router.* is .*, expected"):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, 7: torch.zeros(1)}, "expected names and tensors, got 7: Tensor"),
        (lambda state: {**state, KEY: None}, "expected names and tensors, got 'head.*': NoneType"),
        (lambda state: {**state, KEY: state[KEY].to_sparse()}, "expected an ordinary tensor"),
        (lambda state: {**state, KEY: state[KEY].to("meta")}, "expected an ordinary tensor"),
        (lambda state: {**state, KEY: state[KEY].to(torch.complex64)}, "expected an ordinary tensor"),
        (lambda state: {**state, KEY: torch.quantize_per_tensor(state[KEY], 1, 0, torch.qint8)}, "an ordinary tensor"),
        (lambda state: {**state, KEY: state[KEY].long()}, "is torch.int64, the model has torch.float32"),
        (lambda state: {**state, KEY: state[KEY] * float("nan")}, "has NaN or infinity"),
        (lambda state: {}, "expected a state dict of tensors"),
    ],
)
def test_what_is_no_state_dict_is_one_line(tmp_path, change, message):
    architecture = Architecture(**SMALL)
    save_model(tmp_path / "model.pth", architecture.build(), architecture)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    torch.save({**content, "model": change(content["model"])}, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=rf"model\.pth: .*{message}"):
        load_model(tmp_path / "model.pth")


def test_tangled_values_are_refused_at_once(tmp_path):
    knot = [1]
    for _ in range(200):
        knot = [knot, knot]
    torch.save(
        {"format": "earlyexit_ssd/1", "architecture": {"classes": knot}, "model": {}, "info": {}}, tmp_path / "x"
    )
    with pytest.raises(EarlyExitError, match="more than 2000000 values, no file of weights has that"):
        load_model(tmp_path / "x")


def test_another_model_s_description_is_not_written(tmp_path):
    model = Architecture(**SMALL).build()
    for wrong in ({"classes": ("a", "b")}, {"exit_layers": (6, 12)}):
        with pytest.raises(EarlyExitError, match="the architecture says .*; give its own"):
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

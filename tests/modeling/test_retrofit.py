"""Checkpoints of other programs, changed classes and input sizes."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VGG16_Weights, get_model
from torchvision.models.detection import (
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.image_list import ImageList

from earlyexit_ssd import EarlyExitSSDLite, EarlyExitSSDLite_Weights, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, load_model, retrofit, save_model
from earlyexit_ssd.modeling.retrofit import load_full_path, read_weights, require_weights, resize_detector
from tests.modeling.conftest import SMALL, small_model

NAME = "earlyexit_ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(4)
    return dict(Architecture(**SMALL).build_detector().state_dict())


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def as_train_py_writes(state):
    """``references/detection/train.py`` stores its arguments, an ``argparse.Namespace``, beside the weights."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22])
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": argparse.Namespace(lr=0.1, data_path="coco", lr_steps=[16, 22], amp=False, resume=None),
        "epoch": 25,
    }


def same(found, state):
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "wrap",
    [
        as_train_py_writes,
        lambda state: prefixed(state, "module."),
        lambda state: {"model": prefixed(state, "_orig_mod.module.")},
        lambda state: {"epoch": 3, "state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(3)}},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}},
        lambda state: {"ema": {"n_averaged": torch.tensor(7), **prefixed(state, "ema_model.module._orig_mod.")}},
        lambda state: {"training": {"best": {"state_dict": prefixed(state, "net.module.")}}},
        lambda state: {
            key.replace("backbone.features.0", "backbone._orig_mod.features.0"): state[key] for key in state
        },
    ],
    ids=["train.py", "ddp", "compiled", "lightning", "ema", "ema_model", "deep", "compiled backbone"],
)
def test_keys_of_wrapped_models_are_found(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "c.pth")
    found, own = load_full_path(tmp_path / "c.pth")
    assert own is None and same(found, state)


def test_averaged_model_of_pytorch(tmp_path, state):
    model = Architecture(**SMALL).build_detector()
    model.load_state_dict(state)
    torch.save(AveragedModel(model).state_dict(), tmp_path / "c.pth")
    assert same(load_full_path(tmp_path / "c.pth")[0], state)


def test_weights_are_preferred_to_their_average(tmp_path, state, caplog):
    average = {key: value + 1 for key, value in state.items()}
    for name, content in (
        ("two dicts", {"model_ema": prefixed(average, "module."), "model": state}),
        ("one dict", {"state_dict": {**prefixed(average, "ema_model.module."), **prefixed(state, "model.")}}),
    ):
        caplog.clear()
        torch.save(content, tmp_path / f"{name}.pth")
        assert same(load_full_path(tmp_path / f"{name}.pth")[0], state), name
        assert "and ignores" in caplog.text
    torch.save({"student": state, "pupil": average}, tmp_path / "c.pth")
    with pytest.raises(EarlyExitError, match=r"has several detectors \(student, pupil\)"):
        load_full_path(tmp_path / "c.pth")
    torch.save({**state, **prefixed(state, "module.")}, tmp_path / "c.pth")
    with pytest.raises(EarlyExitError, match="with and without a wrapper's prefix"):
        load_full_path(tmp_path / "c.pth")


def test_other_detectors_are_refused(tmp_path):
    torch.save({"model": {"backbone.body.conv1.weight": torch.zeros(1)}, "epoch": 1}, tmp_path / "c.pth")
    with pytest.raises(
        EarlyExitError, match=r"expected a state dict of tensors of torchvision's SSDLite .* got keys model, epoch"
    ):
        load_full_path(tmp_path / "c.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_code_is_refused_anywhere_in_the_file(tmp_path, state, place):
    content = as_train_py_writes(state)
    content["args" if place == "beside" else "more"] = Evil()
    if place == "inside":
        content["args"].transform = content.pop("more")
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(EarlyExitError, match=r"evil\.pth: .* it contains posix\.system") as error:
        load_full_path(tmp_path / "evil.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    torch.save({"model": state}, tmp_path / "plain.pth")
    read_weights(tmp_path / "plain.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # only while we read
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"args": Evil()}, protocol=2))
    with pytest.raises(EarlyExitError, match="not a file of weights"):
        load_full_path(tmp_path / "old.pth")


SMALL_ARGUMENTS = {key: value for key, value in SMALL.items() if key != "classes"}


def trained(tmp_path, **changes):
    """A model with exits, and the checkpoint that train.py writes of it."""
    model = small_model(**changes).eval()
    for parameter in model.branches.parameters():
        parameter.data.mul_(1.5)
    torch.save(as_train_py_writes(model.state_dict()), tmp_path / "checkpoint.pth")
    return model, tmp_path / "checkpoint.pth"


def test_checkpoint_with_exits(tmp_path, images):
    model, path = trained(tmp_path, exit_layers=(6, 12))
    again = get_model(NAME, weights=path, exit_layers=[6, 12], classes=["chair", "table"], **SMALL_ARGUMENTS)
    assert again.training and again.classes == ("chair", "table")
    assert same(again.state_dict(), model.state_dict())
    assert same(load_full_path(path)[0], {k: v for k, v in model.state_dict().items() if "branches" not in k})
    with pytest.raises(EarlyExitError, match=r"its exits are exit6, exit12, expected exit8, exit12; set .*\[6, 12\]"):
        get_model(NAME, weights=path, **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match=r"checkpoint\.pth has 3 outputs, num_classes is 5"):
        get_model(NAME, weights=path, num_classes=5, exit_layers=[6, 12], **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match=r"branches\.exit6.* check EXITS"):
        get_model(NAME, weights=path, exit_layers=[6, 12], **{**SMALL_ARGUMENTS, "depth": (2,)})


def test_info_has_the_trained_temperatures(tmp_path):
    model = small_model()
    model.router = ExitRouter(2, temperatures=[1.5, 2.0], learn_temperatures=True)
    torch.save(prefixed(model.state_dict(), "module."), tmp_path / "c.pth")
    again, _, info = load_model(tmp_path / "c.pth", lambda *_: Architecture(**SMALL))
    assert info == {"exits": True, "temperatures": [1.5, 2.0]} and again.router is None


def test_a_plain_detector_gets_untrained_exits(tmp_path, caplog):
    plain = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = EarlyExitSSDLite.from_pretrained(tmp_path / "plain.pth")
    assert model.classes == ("class_1", "class_2", "class_3") and model.router is None and not model.training
    assert "pass classes=[...]" in caplog.text and "has no exits" in caplog.text
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    tail = model.branches["exit8"].tail.last.state_dict()
    assert same(tail, plain.backbone.features[1][3].state_dict())  # exits start from this full path
    named = EarlyExitSSDLite.from_pretrained(tmp_path / "plain.pth", classes=["cup", "bowl", "fork"])
    assert named.classes == ("cup", "bowl", "fork")
    with pytest.raises(EarlyExitError, match=r"plain\.pth: its head has 4 outputs, so 3 classes .* \['cup'\]"):
        EarlyExitSSDLite.from_pretrained(tmp_path / "plain.pth", classes=["cup"])
    with pytest.raises(EarlyExitError, match="its classes are chair; leave classes out"):
        EarlyExitSSDLite.from_pretrained("chair", classes=["cup"])
    by_builder = get_model(NAME, weights=str(tmp_path / "plain.pth"), exit_layers=[4], router=ExitRouter(1))
    assert by_builder.exit_names == ("exit4", "full") and by_builder.router is not None
    with pytest.raises(EarlyExitError, match="use model.freeze_full_path"):
        get_model(NAME, weights=str(tmp_path / "plain.pth"), trainable_backbone_layers=2)
    with pytest.raises(EarlyExitError, match="no such file"):
        get_model(NAME, weights=str(tmp_path / "none.pth"))


def test_a_head_with_91_outputs_gets_coco_classes(tmp_path):
    plain = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=91)
    torch.save({"model": plain.state_dict()}, tmp_path / "coco.pth")
    assert EarlyExitSSDLite.from_pretrained(tmp_path / "coco.pth").classes == COCO_CLASSES


def test_get_model_takes_model_files_and_shipped_weights(tmp_path):
    small_model(exit_layers=(6,)).save(tmp_path / "model.pth")
    model = get_model(NAME, weights=tmp_path / "model.pth", nms_thresh=0.3)
    assert (model.exit_layers, model.classes, model.nms_thresh) == ((6, 16), ("chair", "table"), 0.3)
    with pytest.raises(EarlyExitError, match=r"was built with exit_layers \(6,\), the argument is \(4,\)"):
        get_model(NAME, weights=tmp_path / "model.pth", exit_layers=[4])
    assert get_model(NAME, weights=EarlyExitSSDLite_Weights.CHAIR).classes == ("chair",)


# Other classes.

SOURCE = ("person", "chair", "couch")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    detector = Architecture(**{**SMALL, "classes": SOURCE}).build_detector()
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    return detector.eval(), str(tmp_path / "detector.pth")


def test_same_classes_same_detections(checkpoint, images):
    detector, path = checkpoint
    found, architecture, change = retrofit(Architecture(**{**SMALL, "classes": SOURCE}), path)
    assert change is None
    model = architecture.add_exits(found).eval()
    for one, expected in zip(model(images), detector(images), strict=True):
        assert all(torch.equal(one[key], expected[key]) for key in expected)


def test_exact_fold_keeps_scores_of_the_wanted_class(checkpoint, images):
    detector, path = checkpoint
    found, architecture, change = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), path, SOURCE)
    assert (architecture.head_outputs, architecture.folded_rows, change.unwanted) == (4, (2,), 2)
    model = architecture.add_exits(found).eval()
    for one, expected in zip(model(images), detector(images), strict=True):
        chair = expected["labels"] == 2
        assert torch.allclose(one["scores"][: chair.sum()], expected["scores"][chair], atol=1e-6)


def test_fold_rows_cuts_the_head(checkpoint):
    _, path = checkpoint
    found, architecture, _ = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), path, SOURCE, "rows")
    assert found.head.classification_head.module_list[0][1].out_channels == 6 * 2
    assert architecture.head_outputs == 0
    # The same architecture builds a model that the weights fit.
    architecture.build_detector().load_state_dict(found.state_dict())


def test_exact_fold_cannot_add_a_class(checkpoint):
    with pytest.raises(EarlyExitError, match="set MODEL.FOLD to 'rows'"):
        retrofit(Architecture(**{**SMALL, "classes": ("chair", "lamp")}), checkpoint[1], SOURCE)


def test_wrong_class_count_is_one_line(checkpoint):
    with pytest.raises(EarlyExitError, match="does not fit the model: .*differences") as error:
        retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), checkpoint[1])
    assert "\n" not in str(error.value)


def test_a_model_of_this_project_gives_its_full_path(checkpoint, tmp_path, images):
    wanted = Architecture(**{**SMALL, "classes": ("chair",), "exit_layers": (6,)})
    found, architecture, _ = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), checkpoint[1], SOURCE)
    first = architecture.add_exits(found).eval()
    save_model(tmp_path / "model.pth", first, architecture)
    again, described, change = retrofit(wanted, tmp_path / "model.pth")
    assert (change, described.folded_rows, described.exit_layers) == (None, (2,), (6,))
    second = described.add_exits(again).eval()
    for one, expected in zip(second(images), first(images), strict=True):
        assert all(torch.equal(one[key], expected[key]) for key in expected)
    with pytest.raises(EarlyExitError, match=r"its classes \(chair\) were folded before"):
        retrofit(Architecture(**{**SMALL, "classes": ("person",)}), tmp_path / "model.pth")


def test_the_full_path_under_branches_of_an_older_version(checkpoint, tmp_path):
    wanted = Architecture(**{**SMALL, "classes": ("chair",)})
    found, architecture, _ = retrofit(wanted, checkpoint[1], SOURCE)
    save_model(tmp_path / "model.pth", architecture.add_exits(found), architecture)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["architecture"] |= {"attention": False, "copy": [0.0, 0.0]}
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: .* train the exits again from its full path"):
        load_model(tmp_path / "model.pth")
    again, _, _ = retrofit(wanted, tmp_path / "model.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in found.state_dict().items())
    content["architecture"]["widht"] = 1.0
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: the key 'widht' is unknown"):
        retrofit(wanted, tmp_path / "model.pth")


@pytest.mark.parametrize(
    "weights",
    [
        SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
        "SSDLite320_MobileNet_V3_Large_Weights.COCO_V1",
        "COCO_V1",
    ],
)
def test_torchvision_s_names(monkeypatch, weights):
    state = {"a": torch.zeros(1)}
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    assert load_full_path(weights) == (state, None)


@pytest.mark.parametrize("content", [b"hello", b".", b"", b"\x80\x02."])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(EarlyExitError, match="bad.pth: not a file of weights .* download or train it again") as error:
        load_full_path(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)


def test_a_file_with_a_tensor_instead_of_a_dict(tmp_path):
    torch.save({"model": torch.zeros(2)}, tmp_path / "odd.pth")
    with pytest.raises(EarlyExitError, match="expected a state dict of tensors"):
        load_full_path(tmp_path / "odd.pth")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(EarlyExitError, match="did you mean 'COCO_V1'"):
        load_full_path("COCO_V2")


def test_weights_of_another_detector():
    require_weights("SSD300_VGG16_Weights.COCO_V1", SSD300_VGG16_Weights)
    with pytest.raises(EarlyExitError, match="weights SSD300_VGG16_Weights.COCO_V1: no such file"):
        require_weights("SSD300_VGG16_Weights.COCO_V1")
    with pytest.raises(EarlyExitError, match="no such file; torchvision's weights are IMAGENET1K_V1"):
        require_weights("x.pth", VGG16_Weights)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(EarlyExitError, match="evil.pth: not a file of weights that can be read safely"):
        load_full_path(path)


def test_failed_download_names_the_fix(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(EarlyExitError, match="set MODEL.WEIGHTS to the file's path"):
        load_full_path("COCO_V1")


@pytest.mark.shared
def test_coco_weights_give_torchvision_s_detections(shared_root):
    path = str(shared_root / "weights" / "ssdlite320_mobilenet_v3_large_coco.pth")
    state = torch.load(path, weights_only=True)
    assert len(state) == 476
    reference = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    reference.load_state_dict(state)
    detector, architecture, _ = retrofit(Architecture(classes=COCO_CLASSES), path)
    model = architecture.add_exits(detector).eval()
    image = [torch.rand(3, 240, 320)]
    found, expected = model(image)[0], reference.eval()(image)[0]
    assert max((found[key] - expected[key]).abs().max().item() for key in expected) == 0


# The plain detector at other sizes.

ARCHITECTURE = Architecture(**SMALL)


def boxes_of(generator, size: int) -> list[torch.Tensor]:
    """Default boxes of each grid, [side, side, boxes per cell, 4]."""
    sides = [side for side, _ in small_model(image_size=size).grids]
    maps = [torch.zeros(1, 1, side, side) for side in sides]
    (boxes,) = generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)
    parts = boxes.split([6 * side * side for side in sides])
    return [part.reshape(side, side, 6, 4) for part, side in zip(parts, sides, strict=True)]


@pytest.mark.parametrize("size", [64, 160])
def test_default_boxes_keep_their_pixels(model, size):
    own = boxes_of(model.anchor_generator, 96)
    others = boxes_of(resize_detector(model, ARCHITECTURE, size).anchor_generator, size)
    for mine, theirs in zip(own, others, strict=True):
        both = min(len(mine), len(theirs))
        assert torch.allclose(mine[:both, :both], theirs[:both, :both], atol=1e-3)


def test_at_its_own_size_it_is_the_full_path(model, images):
    model.eval()
    with torch.no_grad():
        expected, found = model(images), resize_detector(model, ARCHITECTURE, 96)(images)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine["boxes"], theirs["boxes"], atol=1e-3)
        assert torch.equal(mine["labels"], theirs["labels"])


def test_weights_are_the_model_s_and_the_model_is_left_alone(model, images):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    detector = resize_detector(model, ARCHITECTURE, 64)
    assert not detector.training
    with torch.no_grad():
        detector(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())

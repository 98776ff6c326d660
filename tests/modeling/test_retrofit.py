"""Checkpoints of other programs, changed classes and input sizes."""

import argparse
import dataclasses
import os
import pickle

import pytest
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VGG16_Weights, get_model
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import (
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.image_list import ImageList

from earlyexit_ssd import EarlyExitSSDLite, EarlyExitSSDLite_Weights, ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, load_model, retrofit, save_model
from earlyexit_ssd.modeling.detector import FullPathLosses, default_boxes_of_image
from earlyexit_ssd.modeling.retrofit import load_every_key, load_full_path, read_weights, resize_detector
from tests.modeling.conftest import SMALL, assert_equal, copy_state, small_model

NAME = "earlyexit_ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(4)
    return dict(Architecture(**SMALL).build_detector().state_dict())


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def train_py_checkpoint(state):
    """Return a checkpoint of ``references/detection/train.py``, which stores its arguments as argparse.Namespace."""
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


def save(content, path):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        train_py_checkpoint,
        lambda state: prefixed(state, "module."),
        lambda state: {"model": prefixed(state, "_orig_mod.module.")},
        lambda state: {"epoch": 3, "state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(3)}},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}},
        lambda state: {"ema": {"n_averaged": torch.tensor(7), **prefixed(state, "ema_model.module._orig_mod.")}},
        lambda state: {"training": {"best": {"state_dict": prefixed(state, "net.module.")}}},
        lambda state: {key.replace("backbone.", "backbone._orig_mod.", 1): value for key, value in state.items()},
        lambda state: {"best": state, "last": state},
        lambda state: averaged_model(state).state_dict(),
    ],
    ids=["train.py", "ddp", "compiled", "lightning", "ema", "ema_model", "deep", "compiled part", "twice", "averaged"],
)
def test_state_dicts_of_wrapped_models_are_found(tmp_path, state, wrap):
    loaded, architecture = load_full_path(save(wrap(state), tmp_path / "c.pth"))
    assert architecture is None
    assert_equal(loaded, state)


def averaged_model(state):
    detector = Architecture(**SMALL).build_detector()
    detector.load_state_dict(state)
    return AveragedModel(detector)


def one_added(state):
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_ema": prefixed(one_added(state), "module."), "model": state},
        lambda state: {"state_dict": {**prefixed(one_added(state), "ema_model.module."), **prefixed(state, "model.")}},
        lambda state: {"pupil": one_added(state), "model": state},
    ],
    ids=["two dicts", "one dict", "usual key"],
)
def test_trained_weights_and_usual_keys_are_preferred(tmp_path, state, caplog, wrap):
    loaded, _ = load_full_path(save(wrap(state), tmp_path / "c.pth"))
    assert_equal(loaded, state)
    assert "and ignores" in caplog.text


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda state: {"student": state, "pupil": one_added(state)}, r"has several detectors \(student, pupil\)"),
        (lambda state: {**state, **prefixed(state, "module.")}, "with and without a wrapper's prefix"),
        (
            lambda _: {"model": {"backbone.body.conv1.weight": torch.zeros(1)}, "epoch": 1},
            "expected a state dict of tensors of torchvision's SSDLite .* got keys model, epoch",
        ),
        (lambda _: {"model": torch.zeros(2)}, "expected a state dict of tensors"),
    ],
)
def test_other_files_of_tensors_are_refused(tmp_path, state, wrap, message):
    with pytest.raises(EarlyExitError, match=message):
        load_full_path(save(wrap(state), tmp_path / "c.pth"))


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_code_is_refused_everywhere_in_a_file(tmp_path, state, place):
    content = train_py_checkpoint(state)
    content["args" if place == "beside" else "more"] = Evil()
    if place == "inside":
        content["args"].transform = content.pop("more")
    with pytest.raises(EarlyExitError, match=r"evil\.pth: .* it contains posix\.system.* save model\.state_dict"):
        load_full_path(save(content, tmp_path / "evil.pth"))
    read_weights(save({"model": state}, tmp_path / "plain.pth"))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"args": Evil()}, protocol=2))
    with pytest.raises(EarlyExitError, match="not a file of weights"):
        load_full_path(tmp_path / "old.pth")


SMALL_ARGUMENTS = {key: value for key, value in SMALL.items() if key != "classes"}


def test_checkpoint_with_exits(tmp_path):
    model = small_model(exit_layers=(6, 12)).eval()
    for parameter in model.branches.parameters():
        parameter.data.mul_(1.5)
    path = save(train_py_checkpoint(model.state_dict()), tmp_path / "checkpoint.pth")
    loaded = get_model(NAME, weights=path, exit_layers=[6, 12], classes=["chair", "table"], **SMALL_ARGUMENTS)
    assert loaded.training and loaded.classes == ("chair", "table")
    assert_equal(loaded.state_dict(), model.state_dict())
    full_path = {key: value for key, value in model.state_dict().items() if "branches" not in key}
    assert_equal(load_full_path(path)[0], full_path)
    with pytest.raises(EarlyExitError, match=r"its exits are exit6, exit12, expected exit8, exit12; set .*\[6, 12\]"):
        get_model(NAME, weights=path, **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match=r"exits is \[6, 12\], expected exits; write exit_layers="):
        get_model(NAME, weights=path, exits=[6, 12], **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match="classes has 'cup' twice"):
        get_model(NAME, weights=path, exit_layers=[6, 12], classes=["cup", "cup"], **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match=r"checkpoint\.pth has 3 outputs, num_classes is 5"):
        get_model(NAME, weights=path, num_classes=5, exit_layers=[6, 12], **SMALL_ARGUMENTS)
    with pytest.raises(EarlyExitError, match=r"branches\.exit6.* check EXITS"):
        get_model(NAME, weights=path, exit_layers=[6, 12], **{**SMALL_ARGUMENTS, "depth": (2,)})


def test_info_has_the_trained_temperatures(tmp_path):
    model = small_model()
    model.router = ExitRouter(2, temperatures=[1.5, 2.0], learn_temperatures=True)
    path = save(prefixed(model.state_dict(), "module."), tmp_path / "c.pth")
    loaded, _, info = load_model(path, lambda *_: Architecture(**SMALL))
    assert info == {"exits": True, "temperatures": [1.5, 2.0]} and loaded.router is None


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A torchvision detector with 4 outputs and its checkpoint."""
    detector = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    return detector, save(detector.state_dict(), tmp_path_factory.mktemp("plain") / "plain.pth")


def test_checkpoint_without_exits_gets_untrained_exits(plain, caplog):
    detector, path = plain
    model = EarlyExitSSDLite.from_pretrained(path)
    assert model.classes == ("class_1", "class_2", "class_3") and model.router is None and not model.training
    assert "pass classes=[...]" in caplog.text and "has no exits" in caplog.text
    assert_equal({key: model.state_dict()[key] for key in detector.state_dict()}, dict(detector.state_dict()))
    assert_equal(model.branches["exit8"].tail.last.state_dict(), detector.backbone.features[1][3].state_dict())
    model = get_model(NAME, weights=str(path), exit_layers=[4], router=ExitRouter(1))
    assert model.exit_names == ("exit4", "full") and model.router is not None


def test_class_names_of_checkpoints(plain, tmp_path):
    _, path = plain
    assert EarlyExitSSDLite.from_pretrained(path, classes=["cup", "bowl", "fork"]).classes == ("cup", "bowl", "fork")
    with pytest.raises(EarlyExitError, match=r"plain\.pth: its head has 4 outputs, so 3 classes .* \['cup'\]"):
        EarlyExitSSDLite.from_pretrained(path, classes=["cup"])
    with pytest.raises(EarlyExitError, match="its classes are chair; leave classes out"):
        EarlyExitSSDLite.from_pretrained("chair", classes=["cup"])
    detector = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=91)
    path = save({"model": detector.state_dict()}, tmp_path / "coco.pth")
    assert EarlyExitSSDLite.from_pretrained(path).classes == COCO_CLASSES


def test_builder_loads_model_files_and_shipped_weights(tmp_path):
    small_model(exit_layers=(6,)).save(tmp_path / "model.pth")
    model = get_model(NAME, weights=tmp_path / "model.pth", nms_thresh=0.3)
    assert (model.exit_layers, model.classes, model.nms_thresh) == ((6, 16), ("chair", "table"), 0.3)
    for wrong, message in (
        ({"exit_layers": [4]}, r"was built with exit_layers \(6,\), the argument is \(4,\)"),
        ({"trainable_backbone_layers": 2}, "use model.freeze_full_path"),
    ):
        with pytest.raises(EarlyExitError, match=message):
            get_model(NAME, weights=tmp_path / "model.pth", **wrong)
    with pytest.raises(EarlyExitError, match="no such file"):
        get_model(NAME, weights=str(tmp_path / "none.pth"))
    assert get_model(NAME, weights=EarlyExitSSDLite_Weights.CHAIR).classes == ("chair",)


# Other classes.

SOURCE = ("person", "chair", "couch")


def wanted(*classes, **changes):
    return Architecture(**{**SMALL, "classes": classes, **changes})


@pytest.fixture
def checkpoint(tmp_path):
    """A detector of SOURCE and its checkpoint."""
    torch.manual_seed(3)
    detector = wanted(*SOURCE).build_detector().eval()
    return detector, str(save(detector.state_dict(), tmp_path / "detector.pth"))


def test_unchanged_classes_keep_the_detections(checkpoint, images):
    detector, path = checkpoint
    loaded, architecture, change = retrofit(wanted(*SOURCE), path)
    assert change is None
    assert_equal(architecture.add_exits(loaded).eval()(images), detector(images))


def test_exact_fold_keeps_the_scores_of_the_wanted_class(checkpoint, images):
    detector, path = checkpoint
    loaded, architecture, change = retrofit(wanted("chair"), path, SOURCE)
    assert (architecture.head_outputs, architecture.folded_rows, change.unwanted) == (4, (2,), 2)
    model = architecture.add_exits(loaded).eval()
    for detection, expected in zip(model(images), detector(images), strict=True):
        chair = expected["labels"] == 2
        assert torch.allclose(detection["scores"][: chair.sum()], expected["scores"][chair], atol=1e-6)


def test_fold_rows_cuts_the_head(checkpoint):
    loaded, architecture, _ = retrofit(wanted("chair"), checkpoint[1], SOURCE, "rows")
    assert loaded.head.classification_head.module_list[0][1].out_channels == 6 * 2
    assert architecture.head_outputs == 0
    architecture.build_detector().load_state_dict(loaded.state_dict())


def test_another_number_of_classes_is_refused(checkpoint):
    fix = f"check the classes: list the {len(SOURCE)} of the checkpoint in MODEL.WEIGHTS_CLASSES"
    with pytest.raises(EarlyExitError, match=rf"does not fit the model: .*differences\); {fix} \(the model has 1\)"):
        retrofit(wanted("chair"), checkpoint[1])


@pytest.mark.parametrize("bias", [None, torch.tensor(0.0)])
def test_a_damaged_head_is_no_other_number_of_classes(checkpoint, bias):
    detector, state = checkpoint[0], dict(checkpoint[0].state_dict())
    del state[key := "head.classification_head.module_list.0.1.bias"]
    with pytest.raises(EarlyExitError, match=r"1.bias.*; check MODEL.WIDTH, MODEL.WEIGHTS_CLASSES and the number"):
        load_every_key(detector, state if bias is None else {**state, key: bias}, "x.pth")


def test_full_path_of_a_model_file_is_loaded(checkpoint, tmp_path, images):
    loaded, architecture, _ = retrofit(wanted("chair"), checkpoint[1], SOURCE)
    first = architecture.add_exits(loaded).eval()
    save_model(tmp_path / "model.pth", first, architecture)
    again, described, change = retrofit(wanted("chair", exit_layers=(6,)), tmp_path / "model.pth")
    assert (change, described.folded_rows, described.exit_layers) == (None, (2,), (6,))
    assert_equal(described.add_exits(again).eval()(images), first(images))
    with pytest.raises(EarlyExitError, match=r"its classes \(chair\) were folded before"):
        retrofit(wanted("person"), tmp_path / "model.pth")


def test_full_path_of_a_model_file_with_unsupported_branches_is_loaded(checkpoint, tmp_path):
    loaded, architecture, _ = retrofit(wanted("chair"), checkpoint[1], SOURCE)
    path = tmp_path / "model.pth"
    save_model(path, architecture.add_exits(loaded), architecture)
    content = torch.load(path, weights_only=True)
    content["architecture"] |= {"attention": False, "copy": [0.0, 0.0]}
    torch.save(content, path)
    with pytest.raises(EarlyExitError, match=r"model\.pth: copy is 0"):
        load_model(path)
    assert_equal(retrofit(wanted("chair"), path)[0].state_dict(), loaded.state_dict())
    content["architecture"]["widht"] = 1.0
    torch.save(content, path)
    with pytest.raises(EarlyExitError, match=r"model\.pth: the key 'widht' is unknown"):
        retrofit(wanted("chair"), path)


@pytest.mark.parametrize(
    "weights",
    [SSDLite320_MobileNet_V3_Large_Weights.COCO_V1, "SSDLite320_MobileNet_V3_Large_Weights.COCO_V1", "COCO_V1"],
)
def test_torchvision_s_weights_are_found_by_name(monkeypatch, weights):
    state = {"a": torch.zeros(1)}
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    assert load_full_path(weights) == (state, None)


def offline(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("weights", "enum", "message"),
    [
        ("COCO_V1", SSDLite320_MobileNet_V3_Large_Weights, "set MODEL.WEIGHTS to the file's path"),
        ("COCO_V2", SSDLite320_MobileNet_V3_Large_Weights, "did you mean 'COCO_V1'"),
        ("SSD300_VGG16_Weights.COCO_V1", SSDLite320_MobileNet_V3_Large_Weights, "Weights.COCO_V1: no such file"),
        ("SSD300_VGG16_Weights.COCO_V1", SSD300_VGG16_Weights, "set MODEL.WEIGHTS to the file's path"),
        ("x.pth", VGG16_Weights, "no such file; torchvision's weights are IMAGENET1K_V1"),
        ("COCO_V1", WeightsEnum, "weights COCO_V1: no such file; torchvision's weights are none"),
    ],
)
def test_weights_that_cannot_be_loaded_are_named(monkeypatch, weights, enum, message):
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(EarlyExitError, match=message):
        load_full_path(weights, enum)


@pytest.mark.parametrize("content", [b"hello", b".", b"", b"\x80\x02."])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(EarlyExitError, match="bad.pth: not a file of weights .* name a checkpoint or model.pth, or"):
        load_full_path(tmp_path / "bad.pth")


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
    assert_equal(model(image), reference.eval()(image))


# The plain detector at other sizes.

ARCHITECTURE = Architecture(**SMALL)


def boxes_of(generator, size: int) -> list[torch.Tensor]:
    """Return the default boxes of each grid, [side, side, boxes per cell, 4]."""
    sides = [side for side, _ in small_model(image_size=size).grids]
    maps = [torch.zeros(1, 1, side, side) for side in sides]
    (boxes,) = generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)
    parts = boxes.split([6 * side * side for side in sides])
    return [part.reshape(side, side, 6, 4) for part, side in zip(parts, sides, strict=True)]


def test_model_file_of_a_resized_detector_keeps_its_default_boxes(tmp_path, images):
    described = wanted(*SOURCE, trained_size=128)
    first = described.build().eval()
    save_model(tmp_path / "model.pth", first, described)
    for classes in (SOURCE, ("chair",)):
        loaded, architecture, _ = retrofit(wanted(*classes), tmp_path / "model.pth")
        assert architecture.trained_size == 128
        assert repr(loaded.anchor_generator) == repr(first.anchor_generator)
    again, architecture, _ = retrofit(wanted(*SOURCE), tmp_path / "model.pth")
    assert_equal(architecture.add_exits(again).eval()(images), first(images))


def test_training_at_several_sizes_keeps_the_default_boxes_of_a_resized_detector():
    resized = wanted(*SOURCE, trained_size=128)
    boxes, labels = torch.tensor([[10.0, 10, 60, 60]]), torch.tensor([1])
    targets = [{"boxes": boxes, "labels": labels, "image_id": number} for number in (1, 2)]
    batch = FullPathLosses(resized.build(), [64]).compute([torch.rand(3, 96, 96)] * 2, targets)
    expected = default_boxes_of_image(dataclasses.replace(resized, image_size=64).build(), torch.device("cpu"))
    assert torch.allclose(batch.anchors[0], expected)


@pytest.mark.parametrize("size", [64, 160])
def test_default_boxes_keep_their_size_in_pixels(model, size):
    own = boxes_of(model.anchor_generator, 96)
    resized = boxes_of(resize_detector(model, ARCHITECTURE, size).anchor_generator, size)
    for boxes, expected in zip(resized, own, strict=True):
        side = min(len(boxes), len(expected))
        assert torch.allclose(boxes[:side, :side], expected[:side, :side], atol=1e-3)


def test_resized_detector_is_a_copy_of_the_full_path(model, images):
    before, resized = copy_state(model.train()), resize_detector(model, ARCHITECTURE, 96)
    assert not resized.training
    with torch.no_grad():
        torch.testing.assert_close(resized(images), model.eval()(images), rtol=0, atol=1e-3)
    resized.backbone.features[0][0][0].weight.data.zero_()
    assert_equal(copy_state(model), before)

import pytest
import torch
from PIL import Image
from torchvision.models import VGG16_Weights

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.files import write_image
from earlyexit_ssd.modeling import Architecture, EarlyExitDetector, EarlyExitSSDLite, Exit, save_model
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.pipeline.build import (
    backbone_weights,
    build_architecture,
    build_device,
    build_exits,
    build_model,
    build_router,
    evaluation_device,
    open_model,
)


def test_thresholds_must_fit_the_number_of_exits():
    cfg = load_config(None, ["ROUTING.THRESHOLDS", "[0.4, 0.5]"])
    assert build_router(cfg, {"num_exits": 2}).thresholds.tolist() == pytest.approx([0.4, 0.5])
    assert build_router(cfg, {"num_exits": 0}).num_exits == 0
    with pytest.raises(ConfigError, match="ROUTING.THRESHOLDS has 2 numbers, but the model has 3 early exits; give on"):
        build_router(cfg, {"num_exits": 3})


def test_auto_is_the_cpu_unless_the_runtime_is_eager(monkeypatch):
    monkeypatch.setattr(build, "_device", lambda cfg, name: name)
    onnx = ["EVAL.RUNTIME", "onnxruntime"]
    for keys, device in (([], "auto"), (onnx, "cpu"), ([*onnx, "DEVICE", "cuda"], "cuda")):
        assert evaluation_device(load_config(None, keys)) == device


def test_mixed_precision_is_checked_for_training_only():
    cfg = load_config(None, ["ENGINE.AMP", "fp16", "DEVICE", "cpu"])
    assert evaluation_device(cfg).type == "cpu"
    with pytest.raises(ConfigError, match="ENGINE.AMP 'fp16' needs CUDA, but DEVICE is cpu; use bf16 or off"):
        build_device(cfg)


def test_the_exits_section_describes_the_exits():
    keys = ["EXITS.LAYERS", "[6, 8, 12]", "EXITS.EMPTY", "[6]", "EXITS.BRANCH", "['copied', 'light', 'copied']"]
    cfg = load_config(None, [*keys, "EXITS.COPY", "[0.5, 0.5, 0.25]", "EXITS.CONTEXT", "False"])
    assert build_exits(cfg) == (
        Exit(6, "empty"),
        Exit(8, "light", {"context": False}),
        Exit(12, "copied", {"copy": 0.25}),
    )
    architecture = build_architecture(cfg, ("chair",))
    assert architecture.exits == build_exits(cfg) and architecture.detector == "ssdlite320_mobilenet_v3_large"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("EXITS.BRANCH", "['lihgt']", "EXITS: branch is 'lihgt', expected one of copied, light, empty"),
        ("MODEL.NAME", "ssd300_vgg17", "MODEL.NAME. is 'ssd300_vgg17', expected one .* .did you mean 'ssd300_vgg16'"),
    ],
)
def test_unknown_branches_and_detectors_are_errors(key, value, message):
    with pytest.raises(EarlyExitError, match=message):
        build_architecture(load_config(None, [key, value]), ("chair",))


def test_imagenet_weights_are_those_of_the_detector():
    cfg = load_config(None, ["MODEL.NAME", "ssd300_vgg16", "MODEL.WEIGHTS_BACKBONE", "IMAGENET1K_FEATURES"])
    assert backbone_weights(cfg) is VGG16_Weights.IMAGENET1K_FEATURES
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS_BACKBONE is 'IMAGENET1K_V9', expected one of IMAGENET1K_V1"):
        backbone_weights(load_config(None, ["MODEL.WEIGHTS_BACKBONE", "IMAGENET1K_V9"]))


def test_a_detector_may_have_no_imagenet_weights(monkeypatch):
    monkeypatch.setattr(EarlyExitSSDLite, "backbone_weights", EarlyExitDetector.backbone_weights)
    with pytest.raises(
        ConfigError, match="MODEL.WEIGHTS_BACKBONE is 'IMAGENET1K_V1', expected '' with this MODEL.NAME"
    ):
        backbone_weights(load_config(None, ["MODEL.WEIGHTS_BACKBONE", "IMAGENET1K_V1"]))


def test_a_compact_head_needs_no_boxes(tmp_path, monkeypatch):
    """The model predicts background 0.1, couch 0.4, chair 0.2, bench 0.2, bed 0.1 everywhere."""
    source = Architecture(classes=("couch", "chair", "bench", "bed"), image_size=96, width=0.25, exit_layers=(8,))
    model = source.build()
    with torch.no_grad():
        for block in model.head.classification_head.module_list:
            block[1].weight.zero_()
            block[1].bias.copy_(torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log().repeat(6))
    save_model(tmp_path / "model.pth", model)
    for number in range(4):
        write_image(tmp_path / "street" / f"{number}.png", Image.new("RGB", (60, 40), (40 * number,) * 3))
    keys = ["DATA.ROOT", str(tmp_path), "DATA.DATASETS", '[["street", "", "street"]]', "DATA.TRAIN", "[street]"]
    keys += ["DATA.WORKERS", "0", "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.IMAGE_SIZE", "96"]
    keys += ["MODEL.WIDTH", "0.25", "MODEL.FOLD", "compact", "MODEL.COMPACT_TOLERANCE", "0.05"]
    monkeypatch.setattr(build, "COMPACT_PHOTOS", 3)
    batches = []
    monkeypatch.setattr(build, "progress", lambda loader, _: batches.extend(loader) or batches)
    compact, architecture = build_model(load_config(None, keys), ("chair",))
    assert [list(images[0].shape) for images, _ in batches] == [[3, 40, 60]] * 3
    assert architecture.competing == ("couch", "bench") and compact.classes == ("chair",)
    assert [branch.head.classification_head.num_columns for branch in compact.branches.values()] == [4, 4]
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: pytest.fail("no photo is needed"))
    _, architecture = build_model(load_config(None, keys), source.classes)
    assert architecture.head_outputs == 0


def test_a_checkpoint_with_own_classes_is_cut_to_some_of_them(tmp_path):
    path, names = tmp_path / "plain.pth", ("couch", "chair", "bed")
    torch.save(Architecture(classes=names, image_size=96, width=0.25).build_detector().state_dict(), path)
    keys = ["MODEL.WEIGHTS", str(path), "MODEL.IMAGE_SIZE", "96", "MODEL.WIDTH", "0.25"]
    model, architecture = build_model(load_config(None, [*keys, "MODEL.WEIGHTS_CLASSES", "couch, chair,bed"]), ("bed",))
    assert model.classes == ("bed",) and (architecture.head_outputs, architecture.folded_rows) == (4, (3,))
    with pytest.raises(ConfigError, match="WEIGHTS_CLASSES is 'coc', expected '', 'coco', or names of classes"):
        load_config(None, ["MODEL.WEIGHTS_CLASSES", "coc"])


def test_shipped_weights_are_opened_by_name():
    model, architecture, info = open_model(load_config(), "chair")
    assert architecture.classes == ("chair",) and info["router"]["num_exits"] == model.num_early_exits == 2
    with pytest.raises(EarlyExitError, match="not one of the shipped weights .*chair"):
        open_model(load_config(), "chairs")

"""The tools on a checkpoint of torchvision's train.py, with exits."""

import argparse
import json

import pytest
import torch
from PIL import Image
from torchvision.models import get_model

import earlyexit_ssd  # noqa: F401 - registers the builder
from earlyexit_ssd.calibration.certificate import load_certificate
from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling import COCO_CLASSES
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.pipeline.build import open_model
from tests.tools.conftest import final_weights
from tools import calibrate, eval_exits, predict


@pytest.fixture(scope="module")
def checkpoint(trained):
    """Weights of a run in a file as train.py writes it, and arguments for the tools."""
    root, arguments = trained
    state = {f"module.{key}": value for key, value in final_weights(root / "run").items()}
    path = root / "model_25.pth"
    torch.save({"model": state, "epoch": 25, "args": argparse.Namespace(dataset="coco", lr=0.01)}, path)
    return str(path), arguments


def ap_figures(folder):
    exits = json.loads((folder / "metrics.json").read_text())["exits"]
    return [{key: value for key, value in row.items() if key.startswith("AP")} for row in exits]


def test_evaluation_and_calibration_equal_those_of_the_run(checkpoint, trained, tmp_path):
    path, arguments = checkpoint
    assert eval_exits.main([*arguments, "--weights", path, "--out", str(tmp_path / "foreign")]) == 0
    own = ap_figures(trained[0] / "run")
    assert own == ap_figures(tmp_path / "foreign") and len(own) == 3
    target = ["--speedup", "1.01", "--out", str(tmp_path / "cal"), "CALIBRATION.COST", "mmacs"]
    assert calibrate.main([*arguments, "--weights", path, *target]) == 0
    model, _, _ = open_model(load_config(arguments[1], arguments[2:]), path)
    load_certificate(tmp_path / "cal" / "certificate.json").router_for(model)  # an error for other weights


def test_predict_needs_the_configuration(checkpoint, tmp_path, capsys):
    path, arguments = checkpoint
    config = arguments[arguments.index("--config") + 1]
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "photo.png")
    shown = [str(tmp_path / "photo.png"), "--weights", path, "--out", str(tmp_path / "out")]
    assert predict.main([*shown, "--config", config]) == 0
    assert ", confidence " in capsys.readouterr().out
    assert predict.main(shown) == 2  # a checkpoint does not hold input size and width
    assert "does not fit the model" in capsys.readouterr().err


def test_configuration_of_another_model_is_a_one_line_error(checkpoint, tmp_path, capsys):
    path, arguments = checkpoint
    for more, message in (
        (["EXITS.LAYERS", "[6]"], "its exits are exit8, exit12, expected exit6; set EXITS.LAYERS"),
        (["EXITS.CHANNELS", "24"], "check EXITS"),
        (["MODEL.WIDTH", "0.5"], "check MODEL.WIDTH"),
        (["DATA.CLASSES", "[chair, lamp]"], "its head has 2 outputs, for 1 classes and background, but the config"),
    ):
        assert eval_exits.main([*arguments, "--weights", path, "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err
    plain = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=2)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    assert eval_exits.main([*arguments, "--weights", str(tmp_path / "plain.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "plain.pth: the detector has no exits; add them: earlyexit train or optimize" in capsys.readouterr().err


@pytest.mark.parametrize("weights_classes", ["", "coco"])
def test_empty_exits_are_added_to_a_checkpoint(tmp_path, weights_classes):
    """They need no training. Calibration and evaluation open equal models, so a certificate fits."""
    plain = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=91)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    keys = ["DATA.CLASSES", "[chair]", "MODEL.FOLD", "exact", "MODEL.WEIGHTS_CLASSES", weights_classes]
    exits = ["EXITS.LAYERS", "[4]", "EXITS.EMPTY", "[4]", "EXITS.GLANCES", "[[64, 12]]"]
    cfg = load_config(None, [*keys, *exits])
    (model, architecture, info), (again, _, _) = (open_model(cfg, tmp_path / "plain.pth") for _ in range(2))
    assert model.exit_names == ("glance64", "exit4", "full") and info["taken_over"] and not model.training
    assert architecture.folded_rows == (COCO_CLASSES.index("chair") + 1,) and model.classes == ("chair",)
    assert weights_hash(model) == weights_hash(again)
    assert open_model(cfg, tmp_path / "plain.pth", need_exits=False)[0].exit_names == ("full",)


def test_coco_head_is_reduced_to_the_classes_of_the_configuration(tmp_path):
    small = {"image_size": 96, "width": 0.25, "channels": 16, "depth": (1,), "exit_layers": (4, 8), "empty": (4,)}
    whole = get_model("earlyexit_ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, **small).eval()
    for module in whole.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save({"model": whole.state_dict()}, tmp_path / "coco.pth")
    write_text(
        tmp_path / "c.yaml",
        "DATA: {CLASSES: [chair, person]}\nMODEL: {IMAGE_SIZE: 96, WIDTH: 0.25}\n"
        "EXITS: {LAYERS: [4, 8], EMPTY: [4], CHANNELS: 16, DEPTH: 1}\n",
    )
    cfg = load_config(tmp_path / "c.yaml")
    model, architecture, _ = open_model(cfg, tmp_path / "coco.pth")
    assert model.classes == ("chair", "person") and architecture.folded_branches
    rows = [COCO_CLASSES.index(name) + 1 for name in model.classes]
    photo = [torch.rand(3, 96, 96)]
    with torch.no_grad():
        pairs = zip(model.exit_outputs(photo).heads, whole.exit_outputs(photo).heads, strict=True)
        for reduced, complete in pairs:
            expected = complete["cls_logits"].softmax(-1)[..., rows]
            assert torch.allclose(reduced["cls_logits"].softmax(-1)[..., 1:], expected, atol=1e-6)
    model.save(tmp_path / "model.pth")
    assert open_model(cfg, tmp_path / "model.pth")[1] == architecture
    cfg.defrost()
    cfg.DATA.CLASSES = ("chair", "unicorn")
    with pytest.raises(EarlyExitError, match=r"coco\.pth: its head has COCO's classes.*unicorn"):
        open_model(cfg, tmp_path / "coco.pth")

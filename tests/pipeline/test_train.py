"""Which trainings need labels, the check of the runtime, and the report page of a training."""

import importlib
import json
from unittest.mock import Mock

import pytest
import torch

from earlyexit_ssd.config import load_config
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.files import write_text
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.pipeline.evaluate import read_training
from earlyexit_ssd.pipeline.train import learns_from_labels, write_training_page

module = importlib.import_module("earlyexit_ssd.pipeline.train")  # the folder's ``train`` is the function
TEACHER = ("LOSS.SUPERVISION", "teacher", "LOSS.TEACHER", "full", "BASELINE.EPOCHS", "0")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), True),
        (("PHASES", "[exits]"), True),
        (TEACHER, False),
        ((*TEACHER, "BASELINE.EPOCHS", "1"), True),
        ((*TEACHER, "BASELINE.EPOCHS", "1", "PHASES", "[exits]"), False),
        ((*TEACHER, "PHASES", "[exits, joint]"), True),
        ((*TEACHER, "PHASES", "[exits, joint]", "JOINT.EPOCHS", "0"), False),
    ],
)
def test_labels_are_needed_unless_the_teacher_supervises_all_phases(keys, expected):
    assert learns_from_labels(load_config(None, ["MODEL.WEIGHTS", "model.pth", *keys])) is expected


@pytest.mark.parametrize("key", ["BASELINE.SIZES", "JOINT.SIZES", "EVAL.RIVALS.SIZES"])
def test_sizes_are_refused_for_a_detector_of_one_size(key):
    cfg = load_config(None, ["MODEL.NAME", "ssd300_vgg16", "EXITS.BRANCH", "light", key, "[256]"])
    with pytest.raises(ConfigError, match=rf"{key} is \(256,\), expected \[\]: ssd300_vgg16 has only one input size"):
        module.prepare(cfg, None, torch.device("cpu"))


@pytest.mark.parametrize(("names", "message"), [("cup, plate", "none of the classes chair"), ("''", "list the 2 of")])
def test_weights_of_other_classes_are_refused_before_the_photos_are_read(monkeypatch, tmp_path, names, message):
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: pytest.fail("no photo is needed"))
    path = tmp_path / "plain.pth"
    torch.save(Architecture(("cup", "plate"), image_size=96, width=0.25).build_detector().state_dict(), path)
    keys = ["MODEL.WEIGHTS", str(path), "MODEL.IMAGE_SIZE", "96", "MODEL.WIDTH", "0.25", "DATA.CLASSES", "[chair]"]
    with pytest.raises(EarlyExitError, match=message):
        module.prepare(load_config(None, [*keys, "MODEL.WEIGHTS_CLASSES", names]), None, torch.device("cpu"))


def test_the_runtime_is_checked_on_the_device_of_the_evaluation(monkeypatch):
    """A training on a GPU ends with an evaluation on the CPU, where ONNX Runtime measures."""
    monkeypatch.setattr(module, "check_rivals", check := Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        module.prepare(load_config(None, ["EVAL.RUNTIME", "onnxruntime"]), None, torch.device("cuda"))
    assert check.call_args.args[1].type == "cpu"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["EXITS.LAYERS", "[3, 5, 7, 9, 11, 13]"], "the model has 6 early exits, expected at most 5"),
        (["EXITS.LAYERS", "[12]", "EXITS.EMPTY", "[12]"], "all exits of the configuration are empty"),
        (["EXITS.LAYERS", "[12]", "EXITS.EMPTY", "[12]", "ROUTING.POLICY", "foreseen_emptiness"], None),
    ],
)
def test_a_calibration_that_would_fail_is_refused_before_the_training(monkeypatch, keys, message):
    monkeypatch.setattr(module, "check_rivals", Mock(side_effect=EarlyExitError("no file")))  # the next check
    for target, expected in (("speedup", message or "no file"), ("", "no file")):
        with pytest.raises(EarlyExitError, match=expected):
            calibration = ["CALIBRATION.TARGET", target, "CALIBRATION.VALUE", "1.4"]
            module.prepare(load_config(None, [*keys, *calibration]), None, torch.device("cpu"))


def test_a_training_has_a_page_once_a_gate_is_checked(tmp_path):
    assert read_training(tmp_path, (0.5, 3.0)) == (None, [])
    write_training_page(tmp_path, load_config())
    assert not (tmp_path / "report.html").exists()
    check = {"name": "AP50", "value": 0.1, "limit": 0.4, "of": "", "passed": False}
    gate = {"phase": "baseline", "passed": False, "forced": False, "checks": [check]}
    write_text(tmp_path / "baseline" / "gate.json", json.dumps(gate))
    write_training_page(tmp_path, load_config())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<h1 id="verdict">The gate of phase baseline failed: AP50 0.100 &lt; 0.400.</h1>' in page

"""Whether photos without a label may teach."""

from __future__ import annotations

import importlib

import pytest
import torch

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.train import learns_from_labels

train_module = importlib.import_module("earlyexit_ssd.pipeline.train")  # the package has a function of that name
TEACHER = ("LOSS.SUPERVISION", "teacher", "LOSS.TEACHER", "full", "BASELINE.EPOCHS", "0")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), True),
        (TEACHER, False),
        ((*TEACHER, "BASELINE.EPOCHS", "1"), True),
        ((*TEACHER, "BASELINE.EPOCHS", "1", "PHASES", "[exits]"), False),
        ((*TEACHER, "PHASES", "[exits, joint]"), True),
        ((*TEACHER, "PHASES", "[exits, joint]", "JOINT.EPOCHS", "0"), False),
    ],
)
def test_who_learns_from_labels(keys, expected):
    assert learns_from_labels(load_config(None, keys)) is expected


def test_the_runtime_is_checked_where_it_will_evaluate(monkeypatch):
    """A training on a GPU ends with an evaluation on the CPU, where ONNX Runtime measures."""

    class Checked(Exception):
        pass

    def check_rivals(cfg, device):
        raise Checked(device.type)

    monkeypatch.setattr(train_module, "check_rivals", check_rivals)
    cfg = load_config(None, ["EVAL.RUNTIME", "onnxruntime"])
    with pytest.raises(Checked, match="^cpu$"):
        train_module.prepare(cfg, None, torch.device("cuda"))

"""The data of the report page."""

from __future__ import annotations

import json

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.evaluate import calibrate_command, read_training
from earlyexit_ssd.pipeline.train import write_training_page


def test_the_command_of_a_calibration_has_the_keys_of_the_evaluation():
    given = ["earlyexit", "evaluate", "--config", "my set.yaml", "--out", "x", "DATA.ROOT", "d", "SEED", "3"]
    assert calibrate_command([*given, "ROUTING.CERTIFICATE", "c.json"], "model.pth") == (
        "earlyexit calibrate --config 'my set.yaml' --weights model.pth --out calibrated {target} DATA.ROOT d SEED 3"
    )
    assert calibrate_command(["pytest"], "model.pth") == ""


def test_a_folder_of_a_run_has_a_page_as_soon_as_a_gate_was_checked(tmp_path):
    assert read_training(tmp_path, (0.5, 3.0)) == (None, [])
    write_training_page(tmp_path, load_config())
    assert not (tmp_path / "report.html").exists()
    check = {"name": "AP50", "value": 0.1, "limit": 0.4, "of": "", "passed": False}
    gate = {"phase": "baseline", "passed": False, "forced": False, "checks": [check]}
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "gate.json").write_text(json.dumps(gate))
    write_training_page(tmp_path, load_config())
    assert "<h1 id=\"verdict\">The gate of phase baseline failed: AP50 0.100 &lt; 0.400.</h1>" in (
        tmp_path / "report.html"
    ).read_text(encoding="utf-8")  # fmt: skip

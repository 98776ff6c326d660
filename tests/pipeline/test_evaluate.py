"""Certificates, drift and rivals of an evaluation, and the command on its report page."""

from types import SimpleNamespace

import pytest
import torch

from earlyexit_ssd.calibration.certificate import Certificate, CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.config import load_config
from earlyexit_ssd.drift import DriftReference
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.cost import export_onnx, mmacs_to_exit
from earlyexit_ssd.modeling import Architecture, PathToExit, save_model
from earlyexit_ssd.pipeline.build import open_router
from earlyexit_ssd.pipeline.evaluate import (
    _warn_of_differences,
    build_rivals,
    calibrate_command,
    check_rivals,
    drift_of,
    require_usable_certificate,
    smaller_sizes,
)
from earlyexit_ssd.routing import ExitRouter


def certificate(kind="risk", score=0.5, block=None, **costs):
    reference = DriftReference.from_decisions(("exit8", "full"), [0] * 150 + [1] * 150, [[0.75] * 300])
    numbers = {"value": 2.0, "epsilon": 0.02, "delta": 0.05, "bound": "betting"}
    return Certificate(
        router=ExitRouter(1).to_dict(),
        target=CertifiedTarget(kind=kind, score=score, iou=0.5, reference="full", block=block, **numbers),
        measured=Measured(),
        cost_model=CertifiedCosts(**costs),
        weights_sha256="",
        photos_sha256=(),
        photo_list_sha256="",
        drift=reference,
        versions={},
    )


def test_settings_of_a_certificate_are_compared(caplog):
    def check(checked, runtime="eager"):
        cfg = load_config(None, ["EVAL.SCORE", "0.5", "EVAL.IOU", "0.5", "EVAL.RUNTIME", runtime])
        require_usable_certificate(cfg, checked, SimpleNamespace(records=[]), "certificate.json")

    check(certificate())
    in_onnx = certificate("speedup", measured={"runtime": "onnxruntime"})
    check(in_onnx, "onnxruntime")
    with pytest.raises(ConfigError, match="holds for score 0.3 and IoU 0.5, but EVAL has 0.5 and 0.5; set EVAL.SCORE"):
        check(certificate(score=0.3))
    assert caplog.text == ""
    check(certificate("speedup", score=0.3))
    assert "holds for score 0.3" in caplog.text
    check(in_onnx)
    assert "speed-up is in onnxruntime, but EVAL.RUNTIME is eager; set it to onnxruntime" in caplog.text


def test_source_of_the_router(monkeypatch, tmp_path):
    """The configured certificate is used first, then the model file's, then ROUTING with trained temperatures."""
    monkeypatch.setattr(Certificate, "router_for", lambda self, model: self.target.score)
    certificate(score=0.3).save(tmp_path / "certificate.json")
    cfg, model = load_config(), SimpleNamespace(num_early_exits=1)
    named = load_config(None, ["ROUTING.CERTIFICATE", str(tmp_path / "certificate.json")])
    info = {"router": {"temperatures": [1.5]}}
    calibrated = {**info, "certificate": certificate(score=0.4).to_dict()}
    assert open_router(named, model, calibrated, "model.pth") == 0.3
    assert open_router(cfg, model, calibrated, "model.pth") == 0.4
    assert open_router(cfg, model, info, "model.pth").temperatures.tolist() == [1.5]


def test_photos_unlike_the_calibration_photos_are_reported(caplog):
    collected = SimpleNamespace(confidences=[torch.full((300,), 0.75), torch.zeros(300)])
    alike = drift_of(certificate(), collected, [0, 1] * 150)
    assert alike.warnings == [] and alike.window == 200 and alike.shares == {"exit8": 0.5, "full": 0.5}
    changed = drift_of(certificate(), collected, [1] * 300)
    assert len(changed.warnings) >= 1 and "exit8 took 0 % of the last 200 photos" in changed.warnings[0]
    assert "calibrate again" in caplog.text
    assert drift_of(certificate(), collected, [0, 1, 0]).window == 3  # few photos are compared in one window
    assert drift_of(certificate(), collected, []).shares is None


def test_drift_of_frames_counts_blocks(caplog):
    """The reference is 300 frames, 150 at each exit. In two blocks of 150 frames, the last 200 frames prove nothing."""
    collected = SimpleNamespace(confidences=[torch.full((300,), 0.75), torch.zeros(300)])
    alike = drift_of(certificate(block=150), collected, [0] * 150 + [1] * 150)
    assert (alike.window, alike.warnings, alike.shares) == (2, [], {"exit8": 0.5, "full": 0.5})
    assert caplog.text == ""
    changed = drift_of(certificate(block=5), collected, [1] * 300)
    assert changed.window == 60 and len(changed.warnings) == 1 and changed.warnings[0] in caplog.text


def test_settings_without_a_key_are_no_difference(caplog):
    keys = ["MODEL.WIDTH", "0.25", "MODEL.IMAGE_SIZE", "64", "EXITS.CHANNELS", "16", "EXITS.DEPTH", "[1]"]
    _warn_of_differences(load_config(None, keys), architecture(trained_size=96))
    (message,) = caplog.messages
    assert message.startswith("image_size: the configuration has 64, but the weights were made with 96")


# Rivals from the configuration, on small untrained models.

CPU = torch.device("cpu")


def architecture(**changes) -> Architecture:
    small = {"classes": ("chair", "table"), "image_size": 96, "width": 0.25, "channels": 16, "depth": (1,)}
    return Architecture(**{**small, **changes})


def rivals(*overrides: str, **changes):
    described = architecture(**changes)
    return build_rivals(load_config(None, overrides), described.build().eval(), described)


@pytest.fixture
def file(tmp_path):
    """A function that writes a model file into the folder of a run and returns its path."""

    def write(folder: str = "run", **changes) -> str:
        described = architecture(**changes)
        save_model(tmp_path / folder / "model.pth", described.build(), described)
        return str(tmp_path / folder / "model.pth")

    return write


@pytest.mark.parametrize(
    ("size", "sizes"), [(320, (256, 224, 192)), (512, (416, 352, 320)), (160, (128, 112, 96)), (96, (80, 64)), (64, ())]
)
def test_smaller_sizes(size, sizes):
    assert smaller_sizes(size) == sizes


def test_plain_detectors_of_the_configured_sizes():
    built = rivals("EVAL.RIVALS.SIZES", "[64, 96, 128, 64]")
    # 96 px is the detector without exits
    assert [(rival.name, rival.example.shape[-1]) for rival in built] == [("plain 64", 64), ("plain 128", 128)]
    assert built[0].mmacs < built[1].mmacs
    with torch.no_grad():
        assert all(rival.detector([torch.rand(3, 50, 70)])[0]["boxes"].shape[1] == 4 for rival in built)


def test_a_folded_head_is_also_cut():
    built = rivals("EVAL.RIVALS.SIZES", "[64]", head_outputs=9, folded_rows=(3, 5))
    names = [("plain 64", "plain"), ("plain 96, cut head", "cut_head"), ("plain 64, cut head", "cut_head")]
    assert [(rival.name, rival.kind) for rival in built] == names and built[2].mmacs < built[0].mmacs
    with torch.no_grad():
        assert set(built[2].detector([torch.rand(3, 50, 70)])[0]["labels"].tolist()) <= {1, 2}


def test_the_full_path_of_another_run(file):
    path = file("small_run", image_size=64, classes=("table", "lamp", "chair"))
    built = rivals("EVAL.RIVALS.FULL_PATHS", path, "EVAL.RIVALS.SIZES", "[64]")
    assert [(rival.name, rival.kind, rival.source) for rival in built] == [
        ("plain 64", "plain", None),
        ("plain 64, small_run", "plain", path),
    ]
    with torch.no_grad():
        assert set(built[1].detector([torch.rand(3, 64, 64)])[0]["labels"].tolist()) <= {1, 2}


def test_every_photo_leaves_at_a_single_exit_before_later_layers(file, monkeypatch):
    path = file("twelve", exit_layers=(12,))
    (*_, rival) = rivals("EVAL.RIVALS.SINGLE_EXITS", path)
    assert (rival.name, rival.kind, rival.source) == ("exit12 alone, twelve", "single_exit", path)
    assert isinstance(rival.network, PathToExit)
    model = rival.detector.detector
    assert rival.mmacs == pytest.approx(mmacs_to_exit(model)[0])
    photos = [torch.rand(3, 96, 96)]
    expected = model.detections(model.exit_outputs(photos), 0)[0]
    monkeypatch.setattr(model.head, "forward", None)  # the full path would fail
    with torch.no_grad():
        detections = rival.detector(photos)[0]
        assert model(photos)[0]["exit_index"].item() == 0
    assert torch.allclose(detections["boxes"], expected["boxes"], atol=1e-3)
    assert torch.equal(detections["labels"], expected["labels"])


def test_a_model_with_two_exits_is_no_single_exit(file):
    with pytest.raises(EarlyExitError, match=r"one early exit and its branch, but it has exit8, exit12; train"):
        rivals("EVAL.RIVALS.SINGLE_EXITS", file())
    with pytest.raises(EarlyExitError, match=r"one early exit and its branch, but it has exit12; train"):
        rivals("EVAL.RIVALS.SINGLE_EXITS", file(exit_layers=(12,), empty=(12,)))


def test_an_exported_detector(tmp_path):
    class Boxes(torch.nn.Module):
        def forward(self, x):
            corner = x.mean()
            return torch.stack([corner, corner, corner + 9, corner + 9])[None], corner[None], torch.ones(1).long() * 62

    (tmp_path / "box.onnx").write_bytes(export_onnx(Boxes(), torch.zeros(1, 3, 64, 64)))
    (*_, rival) = rivals("EVAL.RIVALS.ONNX", f"boxes:{tmp_path}/box.onnx")
    assert (rival.name, rival.kind, rival.mmacs) == ("box", "onnx", 0.0)
    detections = rival.detector([torch.zeros(3, 64, 128)])[0]
    assert detections["boxes"].tolist() == [[0, 0, 18, 9]]
    assert detections["labels"].tolist() == [1]  # COCO's chair is the first of the wanted classes
    (tmp_path / "net.onnx").write_bytes(export_onnx(torch.nn.ReLU(), torch.zeros(1, 3, 64, 64)))
    with pytest.raises(EarlyExitError, match="net.onnx: format boxes: expected boxes"):
        rivals("EVAL.RIVALS.ONNX", f"boxes:{tmp_path}/net.onnx")


@pytest.mark.parametrize("key", ["FULL_PATHS", "SINGLE_EXITS", "ONNX"])
def test_missing_files_are_found_early(key):
    value = "boxes:none.file" if key == "ONNX" else "none.file"
    with pytest.raises(ConfigError, match=f"EVAL.RIVALS.{key} has none.file: no such file"):
        check_rivals(load_config(None, [f"EVAL.RIVALS.{key}", value]), CPU)
    disabled = [f"EVAL.RIVALS.{key}", value, "EVAL.RIVALS.ENABLED", "false"]
    check_rivals(load_config(None, disabled), CPU)
    assert rivals(*disabled) == []


def test_onnx_runtime_measures_the_cpu():
    cfg = load_config(None, ["EVAL.RUNTIME", "onnxruntime"])
    check_rivals(cfg, CPU)
    with pytest.raises(ConfigError, match="DEVICE is cuda; set DEVICE to cpu"):
        check_rivals(cfg, torch.device("cuda"))


def test_rivals_from_onnx_files_need_onnx_runtime(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").touch()
    needed = []
    monkeypatch.setattr("earlyexit_ssd.pipeline.evaluate.import_package", needed.append)
    keys = ["EVAL.RUNTIME", "openvino", "EVAL.RIVALS.ONNX", f"boxes:{tmp_path}/net.onnx"]
    check_rivals(load_config(None, keys), CPU)
    assert needed == ["onnx", "onnxruntime", "openvino"]


def test_the_command_of_a_calibration_has_the_keys_of_the_evaluation():
    given = ["earlyexit", "evaluate", "--config", "my set.yaml", "--out", "x", "MODEL.WEIGHTS", "COCO_V1", "SEED", "3"]
    assert calibrate_command([*given, "ROUTING.CERTIFICATE", "c.json"], "model.pth") == (
        "earlyexit calibrate --config 'my set.yaml' --weights model.pth --out calibrated {target} "
        "MODEL.WEIGHTS COCO_V1 SEED 3"
    )
    assert calibrate_command(["pytest"], "model.pth") == ""

"""Calibration on unlabelled frames of a camera, and the calibrated model."""

import json
import shutil

import pytest
import torch
from PIL import Image

from benchmarks import check_guarantee
from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.calibration import thresholds
from earlyexit_ssd.calibration.certificate import load_certificate
from earlyexit_ssd.errors import EarlyExitError
from tools import calibrate, eval_exits, predict

QUICK = ["CALIBRATION.COST", "mmacs", "EVAL.PICTURES", "1", "EVAL.TIMING_RUNS", "1"]


@pytest.fixture(scope="module")
def camera(trained, data_root, tmp_path_factory):
    """Folders of frames without boxes (``learn``, ``test``, and ``calib`` with 8 frames, three copies of each), and
    arguments for the tools."""
    root = tmp_path_factory.mktemp("camera")
    for name, split in (("learn", "train"), ("calib", "calib"), ("test", "test")):
        (root / name).mkdir()
        for path in sorted((data_root / "synthetic_chairs").rglob("*")):
            if split in str(path.relative_to(data_root)) and path.suffix in (".png", ".jpg"):
                shutil.copy(path, root / name / path.name)
    for path in sorted((root / "calib").iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem}_copy{path.suffix}"))
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_name(f"{path.stem}_again.jpg"), quality=92)
    folders = str([[name, "", str(root / name)] for name in ("learn", "calib", "test")])
    sets = ["DATA.DATASETS", folders, "DATA.TRAIN", "[learn]", "DATA.CALIB", "[calib]", "DATA.TEST", "[test]"]
    weights = ["--weights", str(trained[0] / "run" / "model.pth")]
    return root, [*trained[1], *sets, *QUICK, *weights]


@pytest.fixture(scope="module")
def sped_up(camera):
    """Folder of a calibration for a speed-up."""
    root, arguments = camera
    assert calibrate.main([*arguments, "--speedup", "1.05", "--out", str(root / "speed")]) == 0
    return root / "speed"


@pytest.mark.parametrize("policy", ["ambiguous_mass", "balanced_ambiguity"])
def test_risk_on_frames_without_boxes(camera, policy, capsys):
    root, arguments = camera
    out = root / policy
    command = ["--risk", "0.9", "--delta", "0.3", "--out", str(out), "ROUTING.POLICY", policy]
    assert calibrate.main([*arguments, *command]) == 0
    captured = capsys.readouterr()
    counts = "8 calibration photos (8 copies and 8 photos that look equal left out: each photo counts once)"
    assert counts in captured.out
    assert "AP is not known" in captured.out and "agreement with the full path at score 0.02: " in captured.out
    measured = load_certificate(out / "certificate.json").measured
    assert measured.AP50 is None and measured.labelled is False and measured.photos == 8
    agreed = measured.agreement
    assert 0 <= agreed["kept"] <= agreed["objects"] and agreed["objects"] > 0
    assert len(load_certificate(out / "certificate.json").photos_sha256) == 16  # with those that only look equal


def test_speedup_on_frames_and_the_calibrated_model(camera, sped_up, trained, capsys, tmp_path):
    (root, arguments), out = camera, sped_up
    certificate = load_certificate(out / "certificate.json")
    model = EarlyExitSSDLite.from_pretrained(out / "model.pth")
    assert model.router.thresholds.tolist() == pytest.approx(certificate.router["thresholds"])
    assert model.router.certificate == certificate
    capsys.readouterr()

    use = [*arguments[:-1], str(out / "model.pth"), "--out", str(tmp_path / "results")]
    assert eval_exits.main(use) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["routed"]["thresholds"] == certificate.router["thresholds"] and "drift" in metrics
    assert metrics["routed"]["per_class"]["chair"] == {"AP": None, "AP50": None}
    assert metrics["routed"]["AP50"] is None and metrics["context"]["labelled"] is False
    assert metrics["exits"][-1]["recall"] in (1.0, None) and not metrics["verdict"]["ship"]
    assert "agreement with what the full path finds; AP is not known" in printed
    assert "nobody labelled these photos: routing keeps" in printed
    assert "the certificate was asked for a speed-up of " in printed

    assert eval_exits.main([*use, "DATA.TEST", "[calib]", "DATA.CALIB", "[test]"]) == 2
    assert "is in the certificate's calibration list" in capsys.readouterr().err
    photo = next((root / "calib").glob("*_again.jpg"))
    assert predict.main([str(photo), "--weights", str(out / "model.pth"), "--out", str(tmp_path / "demo")]) == 0
    assert "is in the certificate's calibration list" in capsys.readouterr().err

    content = torch.load(out / "model.pth", weights_only=True)
    key = next(iter(content["model"]))
    content["model"][key] = content["model"][key] + 1
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(EarlyExitError, match="the certificate is for weights"):
        EarlyExitSSDLite.from_pretrained(tmp_path / "other.pth")
    assert EarlyExitSSDLite.from_pretrained(tmp_path / "other.pth", router=False).router is None
    assert eval_exits.main([*use[:-3], str(tmp_path / "other.pth"), *use[-2:]]) == 2
    assert "the certificate is for weights" in capsys.readouterr().err


def test_model_file_keeps_the_temperatures_of_the_training(camera, sped_up):
    (root, arguments), first = camera, sped_up
    again = root / "fitted_again"
    trained_info, info = (torch.load(path, weights_only=True)["info"] for path in (arguments[-1], first / "model.pth"))
    assert info["trained_temperatures"] == trained_info["router"]["temperatures"] != info["router"]["temperatures"]
    risk = [*arguments[:-1], str(first / "model.pth"), "--risk", "0.9", "--delta", "0.3", "--out", str(again)]
    assert calibrate.main(risk) == 0
    assert load_certificate(again / "certificate.json").router["temperatures"] == info["trained_temperatures"]


def test_blocks_and_learnt_thresholds(camera, capsys, monkeypatch):
    root, arguments = camera
    out = root / "blocks"
    monkeypatch.setattr(thresholds, "BUDGETS", 2)
    monkeypatch.setattr(thresholds, "STEPS", 10)
    command = ["--risk", "0.9", "--delta", "0.5", "--block", "2s", "--fps", "2", "--learned", "--out", str(out)]
    assert calibrate.main([*arguments, *command]) == 0
    certificate = load_certificate(out / "certificate.json")
    assert certificate.target.block == 4 and certificate.target.learned is True
    assert certificate.measured.photos == 16 and certificate.measured.blocks == 4  # near-duplicates count
    assert "over the draw of the 4 blocks of 4 calibration photos" in capsys.readouterr().out or certificate.closed
    assert EarlyExitSSDLite.from_pretrained(out / "model.pth").router.certificate == certificate


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--ap-drop 0.01", "--ap-drop needs boxes, but DATA.CALIB (calib) has unlabelled photos; use --risk"),
        ("--risk 0.1 CALIBRATION.REFERENCE labels", "CALIBRATION.REFERENCE is labels, but DATA.CALIB (calib)"),
        ("--risk 0.1 --block 5s", "give --fps"),
        ("--risk 0.1 --fps 5", "--fps is for --block in seconds"),
        ("--speedup 1.1 --block 5", "--block is for --risk and --ap-drop"),
        ("--risk 0.1 ROUTING.POLICY entropi", "ROUTING.POLICY: routing policy is 'entropi', expected"),
    ],
)
def test_unsuitable_targets_are_one_line_errors(camera, more, message, capsys):
    assert calibrate.main([*camera[1], *more.split(), "--out", str(camera[0] / "wrong")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and len(line) < 300


def test_ap_drop_on_few_photos_warns(trained, capsys):
    root, arguments = trained
    assert calibrate.main([*arguments, *QUICK, "--ap-drop", "0.01", "--out", str(root / "few")]) == 0
    captured = capsys.readouterr()
    warning = "8 calibration photos are too few for at most 0.01 AP50 lost in 0.95 of the bootstrap draws; use at least"
    assert f"{warning} 299" in captured.err
    assert "these are few for that: at least 299 are needed" in captured.out
    assert load_certificate(root / "few" / "certificate.json").measured.photos_needed == 299


def test_check_of_the_guarantee_uses_distinct_frames(camera):
    root, arguments = camera
    assert check_guarantee.main([*arguments, "--splits", "3", "--out", str(root / "guarantee")]) == 0
    context = json.loads((root / "guarantee" / "guarantee.json").read_text())["context"]
    assert context["calibration_photos"] == 8 and context["photos"] == 16

import json

import numpy as np
import torch
from PIL import Image

from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.calibration.certificate import load_certificate
from tools import calibrate, eval_exits, train_net

DETECTS = "earlyexit_ssd.pipeline.calibrate.DETECTS_AP50"


def test_risk(trained, capsys):
    root, arguments = trained
    out = root / "risk"
    target = ["--out", str(out), "--risk", "0.9", "--delta", "0.2", "CALIBRATION.COST", "mmacs"]
    assert calibrate.main([*arguments, *target, "ROUTING.POLICY", "learned_gain"]) == 0
    printed = capsys.readouterr().out
    assert "policy learned_gain, 8 calibration photos" in printed and "with probability 0.8" in printed
    certificate = load_certificate(out / "certificate.json")
    assert certificate.target.epsilon == 0.9 and certificate.measured.loss <= 0.9
    assert certificate.measured.loss_bound <= 0.9 + 1e-6
    assert len(certificate.photos_sha256) == 8
    assert "The full path does not detect" in (out / "report.html").read_text(encoding="utf-8")
    with Image.open(out / "reliability.png") as picture:
        assert np.asarray(picture).std() > 5


def test_certificate_in_evaluation(trained, capsys, monkeypatch):
    root, arguments = trained
    monkeypatch.setattr(DETECTS, 0.0)  # so short a training does not reach it
    out = root / "drop"
    assert calibrate.main([*arguments, "--out", str(out), "--ap-drop", "1.0", "CALIBRATION.COST", "mmacs"]) == 0
    certificate = load_certificate(out / "certificate.json")
    assert certificate.target.delta == 0.05
    assert "in 95% of bootstrap draws of the calibration photos at most" in capsys.readouterr().out
    assert certificate.measured.exit_share["exit8"] == 1.0  # any loss is allowed, so the cheapest exit is taken
    use = ["ROUTING.CERTIFICATE", str(out / "certificate.json")]
    assert eval_exits.main([*arguments, "--out", str(root / "results"), *use]) == 0
    metrics = json.loads((root / "results" / "metrics.json").read_text())
    assert metrics["certificate"]["target"]["value"] == 1.0 and metrics["certificate"]["kept"] is True
    assert metrics["routed"]["thresholds"] == certificate.router["thresholds"]
    assert metrics["routed"]["exit_share"]["exit8"] == 1.0
    assert metrics["drift"]["shares"]["exit8"] == metrics["drift"]["calibration_shares"]["exit8"] == 1.0
    capsys.readouterr()
    assert calibrate.main([*arguments, "--out", str(out), "--ap-drop", "1.0", *use]) == 2
    assert "tools/eval_exits.py uses a certificate" in capsys.readouterr().err
    swapped = ["DATA.TEST", "[synthetic_chairs_calib]", "DATA.CALIB", "[synthetic_chairs_test]"]
    assert eval_exits.main([*arguments, "--out", str(root / "results"), *use, *swapped]) == 2
    assert "is in the certificate's calibration list" in capsys.readouterr().err
    model = EarlyExitSSDLite.from_pretrained(root / "run" / "model.pth")
    model.router = certificate.router_for(model)
    with torch.inference_mode():
        assert int(model([torch.rand(3, 64, 64)])[0]["exit_index"]) == 0
    other = ["--weights", str(root / "run" / "baseline" / "model.pth")]
    assert eval_exits.main([*arguments, "--out", str(root / "results"), *use, *other]) == 2
    assert "calibrate again" in capsys.readouterr().err


def test_recordings_are_reused(trained, capsys, monkeypatch):
    root, arguments = trained
    command = [*arguments, "--out", str(root / "drop"), "--ap-drop", "0.5", "CALIBRATION.COST", "mmacs"]
    assert calibrate.main([*command, "CALIBRATION.DELTA", "0.2"]) == 0
    assert load_certificate(root / "drop" / "certificate.json").target.delta == 0.2
    capsys.readouterr()
    assert calibrate.main(command) == 0
    assert "record exits" not in capsys.readouterr().err
    monkeypatch.setattr(DETECTS, 1.01)
    assert calibrate.main(command) == 0
    assert "the full path does not detect (AP50 0." in capsys.readouterr().err
    assert load_certificate(root / "drop" / "certificate.json").closed


def test_unreachable_speedup_and_too_few_photos(trained, capsys):
    root, arguments = trained
    target = ["--out", str(root / "fast"), "--speedup", "50", "CALIBRATION.COST", "mmacs"]
    assert calibrate.main([*arguments, *target]) == 2
    assert "a speed-up of 50 is out of reach: the cheapest thresholds give " in capsys.readouterr().err
    assert calibrate.main([*arguments, *target, "--delta", "0.1"]) == 2
    assert "--delta is for --risk and --ap-drop" in capsys.readouterr().err
    assert calibrate.main([*arguments, "--out", str(root / "closed"), "--risk", "0.001", "CALIBRATION.COST", "ms"]) == 0
    captured = capsys.readouterr()
    assert "all exits stay closed" in captured.err and "no exit opens, so nothing is lost" in captured.out
    assert load_certificate(root / "closed" / "certificate.json").closed


def test_empty_exits_are_calibrated_without_training(trained, capsys, monkeypatch):
    root, arguments = trained
    monkeypatch.setattr(DETECTS, 0.0)
    out, config = root / "empty", arguments[:2]
    own = [*arguments[2:], "EXITS.EMPTY", "[8, 12]", "OUTPUT_DIR", str(out), "EVAL.RIVALS.ENABLED", "true"]
    own += ["MODEL.WEIGHTS", str(root / "run" / "baseline" / "model.pth"), "BASELINE.EPOCHS", "0"]
    # no calibration has fitted the policy yet, so the exits stay closed
    assert train_net.main([*config, "--force", *own, "ROUTING.POLICY", "foreseen_emptiness"]) == 0
    assert "there is no branch to train" in capsys.readouterr().err
    routed = json.loads((out / "metrics.json").read_text())["routed"]
    assert (routed["policy"], routed["exit_share"]["full"]) == ("ambiguous_mass", 1)
    assert calibrate.main([*config, "--ap-drop", "1.0", *own, "--out", str(out)]) == 2
    assert "model.pth: the result would replace this input" in capsys.readouterr().err
    assert calibrate.main([*config, "--ap-drop", "1.0", *own]) == 2
    assert "policy 'ambiguous_mass' reads logits, but all exits of" in capsys.readouterr().err
    more = ["ROUTING.POLICY", "foreseen_emptiness", "CALIBRATION.COST", "mmacs"]
    assert calibrate.main([*config, "--ap-drop", "1.0", *own, *more]) == 0
    certificate = load_certificate(out / "calibration" / "certificate.json")
    assert certificate.measured.exit_share["exit8"] == 1.0
    use = ["ROUTING.CERTIFICATE", str(out / "calibration" / "certificate.json")]
    assert eval_exits.main([*config, "--out", str(out / "results"), *own, *use]) == 0
    metrics = json.loads((out / "results" / "metrics.json").read_text())
    assert [exit.get("empty") for exit in metrics["exits"]] == [True, True, None]
    assert metrics["routed"]["policy"] == "foreseen_emptiness"
    assert metrics["routed"]["mmacs"] < metrics["without_exits"]["mmacs"]
    assert not any("alone" in rival["name"] for rival in metrics["rivals"])

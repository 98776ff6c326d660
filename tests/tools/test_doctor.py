"""``tools/doctor.py`` on rendered scenes and a model that does not detect."""

import json

import torch

from tools import doctor


def test_model_that_does_not_detect_has_bad_findings(trained, tmp_path, capsys):
    _, arguments = trained
    assert doctor.main(["model", *arguments, "--photos", "8", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "BAD  low_ap50" in printed and "what to do: " in printed
    findings = json.loads((tmp_path / "doctor.json").read_text())["diagnosis"]["findings"]
    by_name = {(finding["check"], finding["subject"]): finding for finding in findings}
    assert by_name["low_ap50", "full"]["bad"] and by_name["low_ap50", "full"]["least"] == 0.05
    assert not by_name["ap_never_computed", "run"]["bad"]  # the gates are in the run's folder
    assert not [key for key in by_name if key[0] == "exit_above_full"]  # 8 photos are too few for an interval


def test_plain_torchvision_checkpoint_is_accepted(trained, tmp_path, capsys):
    root, arguments = trained
    state = torch.load(root / "run" / "model.pth", weights_only=True)["model"]
    plain = {key: value for key, value in state.items() if key.startswith(("backbone.", "head."))}
    torch.save(plain, tmp_path / "plain.pth")
    assert doctor.main(["model", *arguments, "--photos", "8", "--weights", str(tmp_path / "plain.pth")]) == 1
    assert "exit8" not in capsys.readouterr().out


def test_data_check(trained, tmp_path, capsys):
    _, arguments = trained
    assert doctor.main(["data", *arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "TRAIN: 24 photos" in printed and "BAD  few_photos" in printed
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert [split["split"] for split in report["splits"]] == ["TRAIN", "CALIB", "TEST"]
    assert "copies_across_splits" not in {item["check"] for item in report["diagnosis"]["findings"] if item["bad"]}


def test_bad_input_is_a_one_line_error(trained, capsys):
    _, arguments = trained
    assert doctor.main(["model", *arguments, "--weights", "none.pth"]) == 2
    assert "none.pth" in capsys.readouterr().err
    for flag in (["--weights", "none.pth"], ["--photos", "8"]):
        assert doctor.main(["data", *arguments, *flag]) == 2
        assert f"{' '.join(flag)}: is for doctor model" in capsys.readouterr().err

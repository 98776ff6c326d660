"""tools/doctor.py as a user runs it, on rendered scenes and a training of seconds that does not detect."""

from __future__ import annotations

import json

import torch

from tools import doctor


def test_a_model_that_does_not_detect_is_found_out(trained, tmp_path, capsys):
    _, arguments = trained
    assert doctor.main(["model", *arguments, "--photos", "8", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "BAD  low_ap50" in printed and "what to do: " in printed
    found = json.loads((tmp_path / "doctor.json").read_text())["diagnosis"]
    by_name = {(one["check"], one["subject"]): one for one in found["findings"]}
    assert by_name["low_ap50", "full"]["bad"] and by_name["low_ap50", "full"]["least"] == 0.05
    assert not by_name["ap_never_computed", "run"]["bad"]  # the gates are in the run's folder


def test_a_plain_torchvision_checkpoint_is_taken(trained, tmp_path, capsys):
    root, arguments = trained
    state = torch.load(root / "run" / "model.pth", weights_only=True)["model"]
    plain = {key: value for key, value in state.items() if key.startswith(("backbone.", "head."))}
    torch.save(plain, tmp_path / "plain.pth")
    assert doctor.main(["model", *arguments, "--photos", "8", "--weights", str(tmp_path / "plain.pth")]) == 1
    assert "exit8" not in capsys.readouterr().out


def test_data_are_checked(trained, tmp_path, capsys):
    _, arguments = trained
    assert doctor.main(["data", *arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "TRAIN: 24 photos" in printed and "BAD  few_photos" in printed
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert [one["split"] for one in found["splits"]] == ["TRAIN", "CALIB", "TEST"]
    assert not [one for one in found["diagnosis"]["findings"] if one["check"] == "copies_across_splits" and one["bad"]]


def test_bad_input_is_one_line(trained, capsys):
    _, arguments = trained
    assert doctor.main(["model", *arguments, "--weights", "none.pth"]) == 2
    assert "none.pth" in capsys.readouterr().err

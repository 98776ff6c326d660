import json

import pytest
from PIL import Image

from tools import check_guarantee, eval_routing


def test_policies_are_held_against_coin_and_oracle(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    policies = ["--policies", "ambiguous_mass,learned_gain"]
    assert eval_routing.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    results = json.loads((root / "routing" / "routing.json").read_text())
    assert list(results["policies"]) == ["ambiguous_mass", "learned_gain", "max_foreground"]
    assert [entry["name"] for entry in results["exits"]] == ["exit8", "exit12", "full"]
    costs, plain = results["context"]["cost_model"]["exits"], results["context"]["cost_model"]["plain"]
    for found in results["policies"].values():
        assert len(found["budgets"]) == 5 and len(found["msdnet"]) == 25
        for entry in found["budgets"]:
            assert min(costs[0], plain) < entry["budget"] < max(costs[0], plain)
            assert entry["coin"]["cost"] == entry["cost"]
            assert entry["oracle"]["cost"] <= entry["cost"] + 1e-9
            assert sum(entry["exit_share"].values()) == pytest.approx(1.0)
    printed = capsys.readouterr().out
    assert set(results["scoring_ms"]) == set(results["policies"]) and min(results["scoring_ms"].values()) > 0
    assert "| policy |" in printed and "coin at the cost of" in printed and "oracle at the cost of" in printed
    with Image.open(root / "routing" / "routing.png") as picture:
        assert picture.size[0] > 300
    assert len(results["throughput"]) == 5 and all(speed["share_of_ideal"] > 0 for speed in results["throughput"])
    # deterministic but for times, and the second time without the network
    before = results["policies"]
    assert eval_routing.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    assert "record exits" not in capsys.readouterr().err
    assert json.loads((root / "routing" / "routing.json").read_text())["policies"] == before


def test_unknown_policy(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    assert eval_routing.main([*arguments, "--out", str(root / "wrong"), "--policies", "marginn"]) == 2
    assert "did you mean 'margin'" in capsys.readouterr().err
    assert eval_routing.main([*arguments, "--out", str(root / "wrong"), "--policies", "margin,"]) == 2
    assert "unknown routing policy ''; there are" in capsys.readouterr().err


def test_guarantee_on_the_same_recordings(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    command = [*arguments, "--out", str(root / "routing"), "--splits", "20", "--delta", "0.2"]
    assert check_guarantee.main([*command, "ROUTING.POLICY", "ambiguous_mass"]) == 0
    printed = capsys.readouterr().out
    assert "Policy ambiguous_mass, bound betting, loss against full: 8 of 16 photos calibrate" in printed
    found = json.loads((root / "routing" / "guarantee.json").read_text())["resplits"]
    assert [one["epsilon"] for one in found] == [0.01, 0.02, 0.05]
    assert all(one["speedup"] <= one["best_speedup"] + 1e-9 and one["splits"] == 20 for one in found)

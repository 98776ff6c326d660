import json

import pytest
from PIL import Image

from tools import check_guarantee, eval_routing, train_net


def test_policies_are_held_against_coin_and_oracle(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    policies = ["--policies", "ambiguous_mass,learned_gain"]
    assert eval_routing.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    results = json.loads((root / "routing" / "routing.json").read_text())
    assert list(results["policies"]) == ["max_foreground", "ambiguous_mass", "learned_gain"]
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


def retrofitted(trained, tiny, name, *keys):
    """Arguments of the tools for a model on the full path that ``trained`` has, with exits that nothing has taught."""
    weights = str(trained[0] / "run" / "model.pth")
    keys = ("MODEL.WEIGHTS", weights, "BASELINE.EPOCHS", "0", "EXITS_PHASE.EPOCHS", "0", *keys)
    assert train_net.main(tiny(name, "--force", "EVAL.PICTURES", "0", "EVAL.RIVALS.ENABLED", "false", *keys)) == 0
    return tiny(name, "EVAL.SCORE", "0.02", "CALIBRATION.COST", "mmacs", *keys)


def test_empty_exits_have_the_policies_that_foresee(trained, tiny, tmp_path, capsys):
    arguments = retrofitted(trained, tiny, "empty", "EXITS.EMPTY", "[8, 12]")
    assert eval_routing.main([*arguments, "--out", str(tmp_path / "routing")]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert set(results["policies"]) == {"foreseen_emptiness", "learned_gain"}
    capsys.readouterr()
    assert eval_routing.main([*arguments, "--out", str(tmp_path / "routing"), "--policies", "margin"]) == 2
    assert "policy 'margin' looks at logits, which the empty exits of" in capsys.readouterr().err


def test_budgets_begin_where_every_policy_may_let_photos_leave(trained, tiny, tmp_path):
    arguments = retrofitted(trained, tiny, "mixed", "EXITS.LAYERS", "[4, 8, 12]", "EXITS.EMPTY", "[4]")
    policies = ["--policies", "margin,foreseen_emptiness"]
    assert eval_routing.main([*arguments, "--out", str(tmp_path / "routing"), *policies]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    costs, plain = results["context"]["cost_model"]["exits"], results["context"]["cost_model"]["plain"]
    for found in results["policies"].values():
        assert all(min(costs[1], plain) < entry["budget"] < max(costs[1], plain) for entry in found["budgets"])
    assert all(entry["exit_share"]["exit4"] == 0 for entry in results["policies"]["margin"]["budgets"])


def test_guarantee_on_the_same_recordings(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    command = [*arguments, "--out", str(root / "routing"), "--splits", "20", "--delta", "0.2"]
    assert check_guarantee.main([*command, "ROUTING.POLICY", "ambiguous_mass"]) == 0
    printed = capsys.readouterr().out
    assert "Policy ambiguous_mass, bound betting, loss against full: 8 of 16 photos calibrate" in printed
    found = json.loads((root / "routing" / "guarantee.json").read_text())["resplits"]
    assert [one["epsilon"] for one in found] == [0.01, 0.02, 0.05]
    assert all(one["speedup"] <= one["best_speedup"] + 1e-9 and one["splits"] == 20 for one in found)

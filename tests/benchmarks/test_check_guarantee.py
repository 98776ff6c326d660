import json

import pytest

from benchmarks import check_guarantee
from benchmarks.check_guarantee import check_certificates, guarantee_report
from earlyexit_ssd.calibration import risk
from tests.calibration.test_risk import photos, same_costs


@pytest.fixture(scope="module")
def case():
    return risk.threshold_path(*photos(400, 0), same_costs), *photos(900, 1)


def check(case, **changes):
    path, confidences, losses = case
    settings = {"calibration": 400, "epsilon": 0.1, "delta": 0.1, "method": "betting", "splits": 60, **changes}
    return check_certificates(path, confidences, losses, same_costs(path), 3.0, **settings)


def test_guarantee_holds_and_speedup_is_near_the_best(case):
    resplits = check(case)
    assert resplits.exceeded <= resplits.tolerance
    assert 0.1 < resplits.tolerance < 0.2
    assert resplits.opened == 1.0
    assert 0.85 * resplits.best_speedup < resplits.speedup < resplits.best_speedup
    assert check(case) == resplits != check(case, seed=1)


def test_invalid_bound_exceeds_the_tolerance(case, monkeypatch):
    """The p-value uses the mean only, so the test photos exceed epsilon in about half of the splits."""
    monkeypatch.setitem(risk.BOUNDS, "naive", lambda losses, epsilon: float(losses.mean() > epsilon))
    assert check(case, method="naive").exceeded > 2 * check(case).tolerance


def test_report_has_a_line_per_epsilon():
    context = {"policy": "entropy", "bound": "betting", "reference": "full", "calibration_photos": 40, "photos": 100}
    fields = {"epsilon": 0.05, "exceeded": 0.034, "tolerance": 0.064, "opened": 1.0, "speedup": 1.08}
    resplits = {**fields, "best_speedup": 1.17, "delta": 0.05, "splits": 1000}
    lines = guarantee_report({"context": {**context, "seed": 3}, "resplits": [resplits]}).splitlines()
    assert "40 of 100 photos calibrate" in lines[0] and "1000 random splits, seed 3" in lines[0]
    assert lines[-1] == "| 0.05 | 3.4 % | 6.4 % | 100 % | 1.08 | 1.17 |"


def test_command_on_a_tiny_model(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    command = [*arguments, "--out", str(root / "guarantee"), "--splits", "5", "--delta", "0.2"]
    assert check_guarantee.main([*command, "ROUTING.POLICY", "ambiguous_mass"]) == 0
    printed = capsys.readouterr().out
    assert "Policy ambiguous_mass, bound betting, loss against full: 8 of 16 photos calibrate" in printed
    rows = json.loads((root / "guarantee" / "guarantee.json").read_text())["resplits"]
    assert [row["epsilon"] for row in rows] == [0.01, 0.02, 0.05]
    assert all(row["speedup"] <= row["best_speedup"] + 1e-9 and row["splits"] == 5 for row in rows)

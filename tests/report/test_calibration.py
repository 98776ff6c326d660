from types import SimpleNamespace

from earlyexit_ssd.report.calibration import calibration_report
from earlyexit_ssd.routing.temperature import FittedTemperature, Reliability


def test_the_temperature_is_the_router_s_own():
    """A risk target keeps those of the training; what was fitted stands beside them."""
    before, after = (Reliability((), (), (), error) for error in (0.2, 0.1))
    certificate = SimpleNamespace(
        router={"policy": "entropy", "thresholds": [0.5], "temperatures": [1.0]},
        measured={
            "photos": 9, "exit_share": {"exit8": 0.25, "full": 0.75}, "AP50": 0.5, "AP50_full": 0.6,
            "loss": 0.01, "loss_bound": 0.02, "cost": 3.0, "speedup": 1.5, "steps": 3,
        },
        target={"kind": "risk", "epsilon": 0.05, "bound": "betting", "delta": 0.05, "reference": "full"},
        cost_model={"unit": "mmacs", "exits": [2.0, 4.0]},
        closed=False,
    )  # fmt: skip
    lines = calibration_report(certificate, [FittedTemperature("exit8", 1.7, before, after)]).splitlines()
    row = next(line for line in lines if line.startswith("exit8"))
    assert row.split() == ["exit8", "0.5000", "25.0", "%", "2.0", "1.00", "1.70", "0.200", "0.100"]

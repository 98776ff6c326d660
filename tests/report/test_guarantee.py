from dataclasses import asdict

from earlyexit_ssd.evaluation.resplits import Resplits
from earlyexit_ssd.report.guarantee import guarantee_report


def test_a_line_per_epsilon():
    context = {"policy": "entropy", "bound": "betting", "reference": "full", "calibration_photos": 40, "photos": 100}
    fields = {"epsilon": 0.05, "exceeded": 0.034, "tolerance": 0.064, "opened": 1.0, "speedup": 1.08}
    one = Resplits(
        **{**dict.fromkeys(Resplits.__dataclass_fields__, 0), **fields, "best_speedup": 1.17, "splits": 1000}
    )
    lines = guarantee_report({"context": {**context, "seed": 3}, "resplits": [asdict(one)]}).splitlines()
    assert "40 of 100 photos calibrate" in lines[0] and "1000 random splits, seed 3" in lines[0]
    assert lines[-1] == "| 0.05 | 3.4 % | 6.4 % | 100 % | 1.08 | 1.17 |"

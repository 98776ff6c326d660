import numpy as np
import pytest

from earlyexit_ssd.evaluation.reference_lines import Line
from earlyexit_ssd.pipeline.policy_evaluation import Lines, best_policy


def test_the_test_split_does_not_choose_the_policy():
    flattered = {"gap_closed": 0.9, "pooled_gap": 0.9, "calib_pooled_gap": 0.2}
    chosen = {"gap_closed": 0.1, "pooled_gap": 0.1, "calib_pooled_gap": 0.4}
    unknown = {"gap_closed": 0.95, "pooled_gap": 0.9, "calib_pooled_gap": None}
    assert best_policy({"a": flattered, "b": chosen, "c": unknown}) == "b"


def test_leads_over_a_coin_by_ap50_and_by_ap():
    oracle = np.zeros(1, int), Line(1.0, 0.46, 0.72)
    lines = Lines(np.zeros(1, int), Line(1.0, 0.45, 0.69), Line(1.0, 0.41, 0.65), {"best_oracle": oracle})
    assert lines.leads("best_oracle") == pytest.approx((0.04, 0.07))
    assert lines.leads("best_oracle", "AP") == pytest.approx((0.04, 0.05))
    nothing = Lines(np.zeros(1, int), Line(1.0, None, None), lines.chance, lines.oracles)
    assert np.isnan(nothing.leads("best_oracle", "AP")[0])

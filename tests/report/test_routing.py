from earlyexit_ssd.report.routing import _gap_cells


def test_gap_with_its_interval_or_without():
    pooled, best = {"value": 0.25, "interval": [0.1, 0.4]}, {"value": 0.2, "interval": None}
    found = {"gap_closed": 0.5, "pooled_gap": pooled, "pooled_gap_of_best_oracle": best}
    found |= {"pooled_gap_by_AP": 0.7, "calib_pooled_gap": 0.3}
    assert _gap_cells(found) == ["0.50", "0.25 [0.10, 0.40]", "0.20", "0.70", "0.30"]
    nothing = {"value": None, "interval": None}
    found = {"gap_closed": None, "pooled_gap": nothing, "pooled_gap_of_best_oracle": nothing}
    found |= {"pooled_gap_by_AP": None, "calib_pooled_gap": None}
    assert _gap_cells(found) == ["-", "-", "-", "-", "-"]

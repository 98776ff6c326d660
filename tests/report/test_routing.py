from earlyexit_ssd.report.routing import _gap_cells


def test_gap_with_its_interval_or_without():
    found = {"gap_closed": 0.5, "pooled_gap": 0.25, "pooled_gap_interval": [0.1, 0.4]}
    assert _gap_cells(found) == "0.50 | 0.25 [0.10, 0.40]"
    assert _gap_cells({**found, "pooled_gap_interval": None}) == "0.50 | 0.25 [nan, nan]"
    assert _gap_cells({"gap_closed": None}) == "- | -"

from earlyexit_ssd.report.reference_lines import reference_lines_table, with_interval


def line(ap, ap50, **more):
    return {"AP": ap, "AP50": ap50, "AP_interval": [ap - 0.1, ap + 0.1], "AP50_interval": None, **more}


def test_a_row_per_line_and_figure():
    entry = line(0.4, 0.6, budget=300.0, coin=line(0.3, 0.5), oracle=line(0.5, 0.7), best_oracle=line(0.6, 0.8))
    other = {"budgets": [line(0.2, 0.4, budget=300.0)]}
    bare = {"budgets": [{"AP": 0.1, "AP50": 0.2}]}
    table = reference_lines_table({"other": other, "bare": bare, "chosen": {"budgets": [entry]}}, "chosen")
    assert table.splitlines() == [
        "| line | figure | budget 300.0 |",
        "| --- | --- | ---: |",
        "| chosen | AP | 0.400 [0.300, 0.500] |",
        "| chosen | AP50 | 0.600 |",
        "| coin | AP | 0.300 [0.200, 0.400] |",
        "| coin | AP50 | 0.500 |",
        "| oracle | AP | 0.500 [0.400, 0.600] |",
        "| oracle | AP50 | 0.700 |",
        "| best oracle | AP | 0.600 [0.500, 0.700] |",
        "| best oracle | AP50 | 0.800 |",
        "| other | AP | 0.200 [0.100, 0.300] |",
        "| other | AP50 | 0.400 |",
    ]


def test_nothing_to_find_is_a_dash():
    assert with_interval({"AP": None, "AP_interval": None}, "AP") == "-"

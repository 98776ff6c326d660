"""The table as text and as Markdown."""

from earlyexit_ssd.report.table import markdown_table, text_report, text_table

ROUTED_CELLS = ["routed", "-", "0.390", "0.650", "0.800", "0.500", "0.615", "0.25", "0.12", "0.210", "-", "300", "30.0"]


def test_rows_and_cells(metrics):
    header, line, *rows = text_table(metrics).splitlines()
    expected = "exit layer AP AP50 P R F1 FP/img FP/empty loc.err confidence MMAC ms share"
    assert " ".join(header.split()) == expected
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["exit8", "exit12", "full", "routed"]
    assert rows[-1].split()[:13] == ROUTED_CELLS
    assert "0.61 ± 0.20" in rows[0]
    assert rows[0].endswith("50.0 %")


def test_undefined_is_a_dash(metrics):
    assert text_table(metrics).splitlines()[2].split()[8] == "-"


def test_columns_are_aligned(metrics):
    metrics["exits"][0]["mmacs"] = 123456.0
    lines = text_table(metrics).splitlines()
    assert len({len(line) for line in lines[1:5]}) == 1
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines[2:5], ["123456", "350", "480"], strict=True)]
    assert len(set(ends)) == 1


def test_markdown(metrics):
    lines = markdown_table(metrics).splitlines()
    assert lines[1].startswith("| :-- | --: |")
    assert {line.count("|") for line in lines} == {15}
    assert lines[-1].startswith("| routed | - | 0.390 | 0.650 |")


def test_report_says_what_and_how_and_the_verdict(metrics):
    text = text_report(metrics)
    assert "toy_test: 614 photos, 0 of them without an object" in text
    assert "score 0.5 and IoU 0.5" in text
    assert text_table(metrics) in text
    assert "without exits: 405 MMAC, 43.0 ms" in text
    assert "verdict: ship the exits\n  - exit8: AP50" in text
    metrics["verdict"]["ship"] = False
    assert "do not ship these exits" in text_report(metrics)

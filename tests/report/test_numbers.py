from earlyexit_ssd.report.numbers import figure


def test_three_decimals_or_a_dash():
    assert (figure(0.12345), figure(0.0), figure(None)) == ("0.123", "0.000", "-")

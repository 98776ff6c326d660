import random

import pytest

from earlyexit_ssd.errors import DataError, EarlyExitError, shown


def test_start_and_end_of_a_long_message_survive():
    error = DataError(f"photos/train.json: annotation 7 has {'x' * 10_000}; correct it, or set DATA.ON_BAD to skip")
    assert len(str(error)) == 299
    assert str(error).startswith("photos/train.json: annotation 7 has xxx")
    assert str(error).endswith("xxx; correct it, or set DATA.ON_BAD to skip")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb\r\n  c", "a b c"),
        ("class 'a\0b\x1b[31m'", r"class 'a\x00b\x1b[31m'"),
        ("\udc80.jpg", r"\udc80.jpg"),
        ("two  blanks.jpg: 猫", "two  blanks.jpg: 猫"),
    ],
)
def test_one_line_without_control_characters(message, line):
    assert str(EarlyExitError(message)) == line


def test_values_of_any_size_are_shown_at_once():
    knot = [1]
    for _ in range(200):
        knot = [knot, knot]
    knot.append(knot)
    for value in (knot, "x" * 10**7, 10**5000, {random.random(): knot for _ in range(1000)}, [10**5000]):
        assert len(shown(value)) <= 100
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"

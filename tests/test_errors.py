"""A message is one line under 300 characters, whatever is put into it."""

from __future__ import annotations

import pickle
import sys

import pytest

from earlyexit_ssd.errors import DataError, EarlyExitError, import_package, shown, suggest_keywords


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.json: bad; fix it", "a.json: bad; fix it"),
        ("class 'a\nb'\r\n  is bad", "class 'a b' is bad"),
        ("two  blanks.jpg: 猫", "two  blanks.jpg: 猫"),
        ("\x1b[31m\ud800\0", "\\x1b[31m\\ud800\\x00"),
    ],
)
def test_a_message_is_one_line_that_any_console_shows(text, message):
    assert str(EarlyExitError(text)) == message


def test_a_long_path_keeps_its_end_and_a_long_message_both_ends():
    path = "/" + "folder/" * 60 + "a.json"
    assert str(DataError(f"{path}: bad; fix it")) == f"...{path[-56:]}: bad; fix it"
    message = str(DataError("a.json: " + "very " * 500 + "bad; fix it"))
    assert message.startswith("a.json: very") and message.endswith("bad; fix it") and len(message) == 299


def test_an_error_of_a_loaders_worker_is_its_last_line():
    """As torch raises it again: the same class, with the traceback as its message."""
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert str(DataError(f"{text}earlyexit_ssd.errors.DataError: a.jpg: no such photo\n")) == "a.jpg: no such photo"


def test_errors_pickle():
    assert str(pickle.loads(pickle.dumps(DataError("a.jpg: no such photo")))) == "a.jpg: no such photo"


def test_values_of_any_size_are_shown_at_once():
    knot = [1]
    for _ in range(200):
        knot = [knot, knot]
    knot.append(knot)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (knot, deep, "x" * 10**7, 10**5000, {number: knot for number in range(1000)}, [10**5000]):
        assert len(shown(value)) <= 100
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EarlyExitError, match=r"the package onnx is missing \(.*\): pip install onnx$"):
        import_package("onnx")


@suggest_keywords
def add(first: int, *, second: int = 1) -> int:
    """Sum."""
    return first + second


def test_known_keywords_pass_and_the_function_keeps_its_name():
    assert add(1, second=2) == 3
    assert add.__name__ == "add"


def test_unknown_keywords_name_the_nearest_or_all():
    with pytest.raises(TypeError, match="add got an unknown keyword argument 'secnod' \\(did you mean 'second'"):
        add(1, secnod=2)
    with pytest.raises(TypeError, match="it takes first, second"):
        add(1, zzz=2)

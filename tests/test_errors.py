"""Error messages are one line under 300 characters. Also: values in messages, missing packages, unknown keywords."""

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
def test_message_is_one_printable_line(text, message):
    assert str(EarlyExitError(text)) == message


def test_long_paths_and_long_messages_are_shortened():
    path = "/" + "folder/" * 60 + "a.json"
    assert str(DataError(f"{path}: bad; fix it")) == f"...{path[-56:]}: bad; fix it"
    message = str(DataError("a.json: " + "very " * 500 + "bad; fix it"))
    assert message.startswith("a.json: very") and message.endswith("bad; fix it") and len(message) == 299


def test_error_of_a_loader_worker_is_the_last_line_of_its_traceback():
    """torch raises the same class again, with the traceback as the message."""
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert str(DataError(f"{text}earlyexit_ssd.errors.DataError: a.jpg: no such photo\n")) == "a.jpg: no such photo"


def test_errors_can_be_pickled():
    assert str(pickle.loads(pickle.dumps(DataError("a.jpg: no such photo")))) == "a.jpg: no such photo"


def test_values_of_any_size_are_shortened_quickly():
    cyclic = [1]
    for _ in range(200):
        cyclic = [cyclic, cyclic]
    cyclic.append(cyclic)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (cyclic, deep, "x" * 10**7, 10**5000, {number: cyclic for number in range(1000)}, [10**5000]):
        assert len(shown(value)) <= 100
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"


def test_missing_package_is_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EarlyExitError, match=r"the package onnx is missing \(.*\): pip install onnx$"):
        import_package("onnx")


@suggest_keywords
def add(first: int, *, second: int = 1) -> int:
    """Return the sum."""
    return first + second


def test_valid_keywords_are_passed_and_the_name_is_kept():
    assert add(1, second=2) == 3
    assert add.__name__ == "add"


def test_unknown_keyword_suggests_the_nearest_or_all():
    with pytest.raises(TypeError, match="add got an unknown keyword argument 'secnod' \\(did you mean 'second'"):
        add(1, secnod=2)
    with pytest.raises(TypeError, match="it takes first, second"):
        add(1, zzz=2)

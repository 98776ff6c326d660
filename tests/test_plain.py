from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest

from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.plain import build, read_json, typed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "x.json: not JSON .the key 'a' is given twice.; write it anew"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("[" * 100_000, "not JSON"),
        (f"[1{'0' * 30}]", "a whole number of more than 64 bits"),
        ("\ufeff[", "not JSON"),
    ],
)
def test_invalid_json_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "x.json", "list", "write it anew", DataError)


class Settings(TypedDict, total=False):
    name: str
    share: Annotated[float, 0, 1]


@dataclass(frozen=True)
class Model:
    classes: tuple[str, ...]
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    settings: Settings | None = None
    flag: bool = False


def test_lists_become_tuples():
    values = {"classes": ["x"], "settings": {"share": 1, "more": [None]}, "limit": 2}
    assert build(Model, values) == Model(("x",), "a", 2, {"share": 1, "more": [None]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the key 'classes' is missing"),
        ({"classes": [], "flg": True}, r"the key 'flg' is unknown \(did you mean 'flag'\?\)"),
        ({"classes": "ab"}, "classes is 'ab', expected a list"),
        ({"classes": ["a", None]}, r"classes\[1\] is None, expected text"),
        ({"classes": [], "flag": 1}, "flag is 1, expected true or false"),
        ({"classes": [], "limit": True}, "limit is True, expected a finite number"),
        ({"classes": [], "limit": float("inf")}, "limit is inf, expected a finite number"),
        ({"classes": [], "kind": []}, r"kind is \[\], expected one of a, b"),
        ({"classes": [], "settings": {"share": 1.5}}, "settings.share is 1.5, expected 0 to 1"),
        ({"classes": [], "settings": {1: 2}}, "expected keys that are text"),
        (None, "Model is None, expected keys and values"),
    ],
)
def test_values_of_another_type_are_named_in_the_message(values: Any, message: str):
    with pytest.raises(EarlyExitError, match=message):
        build(Model, values)


def test_bools_are_not_numbers():
    assert typed(list[int], [1, 2], "x") == [1, 2]
    with pytest.raises(EarlyExitError, match=r"x\[1\] is False, expected a whole number"):
        typed(list[int], [1, False], "x")

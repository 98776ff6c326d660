import pytest

from earlyexit_ssd.keywords import suggest_keywords


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

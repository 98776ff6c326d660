import pytest

from earlyexit_ssd.files import atomic_path, write_json, write_text


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a" / "notes.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [one.name for one in path.parent.iterdir()] == ["notes.txt"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"AP": float("nan")})
    assert list(tmp_path.iterdir()) == []

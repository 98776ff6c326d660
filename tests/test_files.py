import pytest

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import atomic_path, make_folder, sha256, stored_key, write_bytes, write_json, write_text


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


def test_folder_of_results_is_tried_first(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EarlyExitError, match="cannot be a folder of results"):
            make_folder(path)


def test_bytes_and_their_digest(tmp_path):
    write_bytes(tmp_path / "a" / "abc", b"abc")  # the first example of FIPS 180-2
    assert sha256(tmp_path / "a" / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("content", ["", "[1]", "{}", "null"])
def test_a_key_that_is_not_known(tmp_path, content):
    assert stored_key(tmp_path / "missing.json") is None
    (tmp_path / "a.json").write_text(content)
    assert stored_key(tmp_path / "a.json") is None
    write_json(tmp_path / "a.json", {"key": "abc"})
    assert stored_key(tmp_path / "a.json") == "abc"

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd import files
from earlyexit_ssd.errors import CannotWrite, EarlyExitError
from earlyexit_ssd.files import (
    ArrayStore,
    append_text,
    atomic_path,
    lock,
    locked_folder,
    make_folder,
    new_array,
    require_not_input,
    sha256,
    write_bytes,
    write_image,
    write_json,
    write_text,
    write_torch,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
WRITERS = {
    "a.txt": lambda path: write_text(path, "x" * 2000),
    "a.json": lambda path: write_json(path, ["x"] * 2000),
    "a.bin": lambda path: write_bytes(path, b"x" * 2000),
    "a.png": lambda path: write_image(path, PICTURE),
    "a.jpg": lambda path: write_image(path, PICTURE, quality=90),
    "a.pth": lambda path: write_torch(path, torch.zeros(2000)),
    "a.jsonl": lambda path: append_text(path, "x" * 2000),
    "a.npy": lambda path: new_array(path, np.dtype("float32"), (100, 20)),
}


def test_old_file_is_kept_after_a_failure(tmp_path):
    path = tmp_path / "a" / "notes.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(path, {"AP": float("nan")})
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["notes.txt"]


def test_result_must_not_replace_an_input(tmp_path):
    (tmp_path / "model.pth").touch()
    (tmp_path / "link.pth").symlink_to("model.pth")
    require_not_input(tmp_path / "other.pth", [tmp_path / "model.pth"])
    for name in ("model.pth", "link.pth", "a/../model.pth"):
        with pytest.raises(EarlyExitError, match="model.pth: the result would replace this input"):
            require_not_input(tmp_path / "model.pth", [tmp_path / "other.pth", tmp_path / name])


def test_path_below_a_file_cannot_be_a_folder(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EarlyExitError, match="cannot be a folder of results"):
            make_folder(path)


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the first example of FIPS 180-2
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def store(folder, contents="these photos"):
    row = {"taps": np.zeros((1, 2), "float16"), "labels": np.zeros((1,), "int16")}
    return ArrayStore(folder, "cache", contents, 3, row)


def fill(array_store):
    array_store.create("a test", "make room")
    array_store.open()
    array_store.arrays["taps"][1] = [0.5, 2]
    array_store.arrays["labels"][:] = [7, 8, 9]
    array_store.flush()
    array_store.finish({"ids": [4, 5, 6]})


def test_store_is_complete_when_finished(tmp_path):
    written = store(tmp_path / "new")
    assert not written.is_complete()
    written.create("a test", "make room")
    assert not written.is_complete()
    fill(written)
    again = store(tmp_path / "new")
    assert again.is_complete()
    assert again.arrays["taps"].tolist() == [[0, 0], [0.5, 2], [0, 0]] and again.arrays["taps"].dtype == np.float16
    assert again.rest == {"ids": [4, 5, 6]}
    assert not store(tmp_path / "new", "other photos").is_complete()
    written.create("a test", "make room")  # replaced, but not finished
    assert not written.is_complete()
    assert again.arrays["labels"].tolist() == [7, 8, 9]  # a reader keeps the old files


@pytest.mark.parametrize("name", ["taps.npy", "labels.npy", "rest.pt", "cache.key"])
def test_damaged_store_is_not_complete(tmp_path, name, caplog):
    fill(store(tmp_path))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert not store(tmp_path).is_complete()
    assert (f"{tmp_path}: the cache is damaged" in caplog.text) == (name != "cache.key")
    (tmp_path / name).unlink()
    assert not store(tmp_path).is_complete()


def test_too_small_disk_is_an_error_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=18))  # 3 rows of 2 * 2 + 2 bytes: all
    with pytest.raises(EarlyExitError, match=r"the taps: 0.0 GiB needed, 0.0 GiB free; set fewer views"):
        store(tmp_path).create("the taps", "set fewer views")


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_a_one_line_error_and_leaves_no_partial_file(tmp_path, small_files, name):
    (tmp_path / "a.png").write_bytes(b"old")
    with small_files(1000), pytest.raises(CannotWrite) as caught:
        WRITERS[name](tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: cannot be written (File too large); make room"
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", "a.jsonl"}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_leave_only_their_file(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size >= 1000
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_path_below_a_file_is_a_one_line_error(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"cannot be written \((Not a directory|File exists)\); name another folder"):
        WRITERS[name](tmp_path / "file" / name)


def test_long_paths_in_errors_are_shortened(tmp_path):
    with pytest.raises(CannotWrite) as caught:
        write_text(tmp_path / ("x" * 300), "")
    assert len(str(caught.value)) < 250 and "File name too long" in str(caught.value)


def test_text_that_is_not_utf_8_is_escaped(tmp_path):
    write_text(tmp_path / "a.txt", "caf\udce9 \u043a")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 \u043a"


def start_holder(folder, seconds: float, forks: bool = False) -> multiprocessing.Process:
    """Start a process that has locked the folder when this function returns. If it ``forks``, its child sleeps too."""

    def hold(ready):
        files._held.clear()  # the fork inherits the set, but not the locks
        with locked_folder(folder):
            child = os.fork() if forks else 0
            if child or not forks:
                ready.send(child)
            time.sleep(seconds)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(there,))
    process.start()
    there.close()
    process.child = here.recv()  # EOFError if the folder is locked
    return process


def test_folder_is_locked_until_its_process_is_killed(tmp_path):
    other = start_holder(tmp_path, 60)
    with pytest.raises(EarlyExitError) as caught, locked_folder(tmp_path):
        pass
    message = f"{tmp_path} is in use by process {other.pid}; wait until it has ended, or name another folder"
    assert str(caught.value) == message
    other.kill()
    other.join()
    with locked_folder(tmp_path), locked_folder(tmp_path):  # a process may lock a folder twice
        pass
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_keep_the_lock_of_a_killed_process(tmp_path):
    process = start_holder(tmp_path, 60, forks=True)
    process.kill()
    process.join()
    try:
        with locked_folder(tmp_path):
            pass
    finally:
        os.kill(process.child, signal.SIGKILL)


def test_waiting_for_a_lock(tmp_path):
    start_holder(tmp_path, 0.5)
    start = time.monotonic()
    with lock(tmp_path / ".lock", "it", wait=True):
        assert 0.3 < time.monotonic() - start < 60
        with pytest.raises(EOFError):  # this process holds the lock
            start_holder(tmp_path, 0)


def test_empty_new_folder_is_removed(tmp_path):
    with pytest.raises(ValueError, match="wrong"), locked_folder(tmp_path / "new"):
        raise ValueError("wrong")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with locked_folder(tmp_path / "old"):
        pass
    with locked_folder(tmp_path / "kept"):
        (tmp_path / "kept" / "result.txt").touch()
    assert (tmp_path / "old").is_dir() and (tmp_path / "kept" / "result.txt").is_file()

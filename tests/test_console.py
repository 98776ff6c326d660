import errno
import io
import logging
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from torch.utils.data import DataLoader, Dataset

from earlyexit_ssd.console import run_tool
from earlyexit_ssd.errors import CannotWrite, DataError


class Broken(Dataset):
    """A data set whose photo cannot be decoded."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it")


@pytest.fixture(autouse=True)
def _restored_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_invalid_input_is_a_one_line_error_also_in_a_worker(capsys, workers):
    assert run_tool(lambda: list(DataLoader(Broken(), num_workers=workers))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it"


def test_signal_ends_with_exit_code_130(capsys):
    stopped = partial(os.kill, os.getpid(), signal.SIGTERM)
    assert run_tool(stopped) == run_tool(stopped, after_a_stop="go on with --resume") == 130
    assert capsys.readouterr().err.splitlines() == ["stopped; run it again", "stopped; go on with --resume"]


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CannotWrite("a.png: cannot be written (x); make room"), "a.png: cannot be written (x); make room and go on"),
        (OSError(errno.ENOSPC, "No space left on device", "b"), "b: cannot be written (No space left on device); make"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "e"), "e: cannot be written (Disk quota exceeded); make room"),
        (
            OSError(errno.EPIPE, "Broken pipe"),
            "standard output: cannot be written (Broken pipe); check the program that reads it",
        ),
        (OSError("image file is truncated"), "image file is truncated; fix the cause and go on"),
        (OSError(errno.EROFS, "Read-only file system", "c"), "c: cannot be written (Read-only file system); name"),
        (PermissionError(errno.EACCES, "Permission denied", "d.jpg"), "d.jpg: Permission denied; check the path"),
    ],
)
def test_os_error_is_a_one_line_error(capsys, error, line):
    assert run_tool(lambda: fail(error), after_a_stop="go on with --resume") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: {line}") and message.endswith(" and go on with --resume")


def print_and_log():
    logging.getLogger("x").info("log caf\udce9 \u043a")
    print("found caf\udce9 \u043a \u00b1")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16", "latin-1"])
def test_output_is_escaped_for_the_encoding_of_the_console(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert run_tool(print_and_log) == 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values() if not stream.flush())
    assert out.startswith("found caf\\udce9 ")
    assert "log caf\\udce9" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full of Linux")
def test_full_standard_output_is_a_one_line_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_tool(print_and_log) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: standard output: cannot be written (No space left on device); make room")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full of Linux")
def test_python_does_not_fail_at_exit_with_full_streams():
    job = "import sys; from earlyexit_ssd.console import run_tool; sys.exit(run_tool(lambda: print('found')))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", job], stdout=full, stderr=full)
    assert done.returncode == 2


def test_string_streams_are_not_changed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_tool(lambda: print("\u043a")) == 0
    assert sys.stdout.getvalue() == "\u043a\n"

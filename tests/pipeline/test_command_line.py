import errno
import io
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from torch.utils.data import DataLoader, Dataset

from earlyexit_ssd.errors import CannotWrite, DataError
from earlyexit_ssd.pipeline.command_line import run_tool


class Broken(Dataset):
    """Its photo cannot be decoded."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it")


@pytest.fixture(autouse=True)
def _handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_one_line_also_from_a_worker(capsys, workers):
    assert run_tool(lambda: list(DataLoader(Broken(), num_workers=workers))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: train.json: photo cat.jpg (id 3): Error: cannot be decoded; replace it"


def test_a_signal_ends_with_130_wherever_it_comes(capsys):
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
            "standard output: cannot be written (Broken pipe); look at what reads it",
        ),
        (OSError("image file is truncated"), "image file is truncated; mend it and go on"),
        (OSError(errno.EROFS, "Read-only file system", "c"), "c: cannot be written (Read-only file system); name"),
        (PermissionError(errno.EACCES, "Permission denied", "d.jpg"), "d.jpg: Permission denied; mend it and go on"),
    ],
)
def test_an_error_of_the_system_is_one_line(capsys, error, line):
    assert run_tool(lambda: fail(error), after_a_stop="go on with --resume") == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"error: {line}") and found.endswith(" and go on with --resume")


SAY = r"""
import logging, sys
from earlyexit_ssd.pipeline.command_line import run_tool
def job():
    logging.getLogger("x").info("log caf\udce9 \u043a")
    print("found caf\udce9 \u043a \u00b1")
sys.exit(run_tool(job))
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8:strict", "utf-16", "latin-1:strict"])
def test_any_console_shows_any_name(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", SAY], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    code = encoding.partition(":")[0]
    assert result.stdout.decode(code).startswith("found caf\\udce9 ")
    assert "log caf\\udce9" in result.stderr.decode(code)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-W", "ignore", "-c", SAY], stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 2
        lines = result.stderr.decode().splitlines()
        assert lines[-1].startswith("error: standard output: cannot be written (No space left on device); make room")
        both = subprocess.run([sys.executable, "-W", "ignore", "-c", SAY], stdout=full, stderr=full)
        assert both.returncode == 2


def test_streams_that_are_no_files_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_tool(lambda: print("\u043a")) == 0
    assert sys.stdout.getvalue() == "\u043a\n"

"""What commands print: progress bars, log lines above them, and errors in one line, with exit codes."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from earlyexit_ssd.errors import CannotWrite, EarlyExitError, GateFailed, Interrupted
from earlyexit_ssd.files import NO_ROOM, cannot_write

EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INTERRUPTED = 2, 3, 130


def is_first_process() -> bool:
    """Return True in the process that prints. It works before torchrun's group is joined, too."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(
    iterable: Iterable | None = None, desc: str | None = "", total: int | None = None, unit: str = "it"
) -> tqdm:
    """Return a tqdm bar on stderr. It is live on a terminal, prints a line every 30 seconds into a log file, and is
    silent on ranks above 0, and if ``desc`` is None."""
    silent, interval = desc is None or not is_first_process(), 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, desc=desc, total=total, unit=unit, mininterval=interval, disable=silent, dynamic_ncols=True)


def write_line(text: str) -> None:
    """Write a line to stderr, above a running progress bar."""
    tqdm.write(text, file=sys.stderr)


def run_tool(job: Callable[[], int | None], after_a_stop: str = "run it again") -> int:
    """Run ``job``, print its errors in one line, and return its exit code (None is 0), or 2 after bad input, 3 after a
    failed gate, 130 after a signal. ``after_a_stop`` is advice to the user after a signal or a full disk."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print file names that the console cannot encode
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if is_first_process() else logging.ERROR  # other processes log the same
    logging.basicConfig(level=level, format="%(levelname).1s %(message)s", handlers=[_LineHandler()], force=True)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        code = job() or 0
        sys.stdout.flush()
        return code
    except GateFailed as error:
        return _end("\n".join([str(error), *error.advice]), EXIT_GATE_FAILED)
    except CannotWrite as error:
        return _end(f"{error} and {after_a_stop}", EXIT_BAD_INPUT)
    except EarlyExitError as error:
        return _end(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        return _end(f"{_describe(error)} and {after_a_stop}", EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as error:
        return _end(f"{str(error) or 'stopped'}; {after_a_stop}", EXIT_INTERRUPTED)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))  # prints above a progress bar


def _describe(error: OSError) -> str:
    # files.py adds the file's name, so a write error without a name is from print()
    if error.filename is None and error.errno in (*NO_ROOM, errno.EPIPE, errno.EIO):
        return str(cannot_write("standard output", error, "check the program that reads it"))
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if name and error.errno in (*NO_ROOM, errno.EROFS):
        return str(cannot_write(name, error))
    name = name if len(name) <= 120 else f"...{name[-117:]}"
    reason = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name}: {reason}; check the path and its permissions" if name else f"{reason}; fix the cause"


def _end(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
        if is_first_process():
            write_line(f"error: {message}" if code == EXIT_BAD_INPUT else message)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # redirect it to /dev/null, because Python flushes it again at exit and would fail
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                stream.flush()
    return code

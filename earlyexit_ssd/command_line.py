"""What all commands share: logging, errors in one line, exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable

from earlyexit_ssd.errors import CannotWrite, EarlyExitError, GateFailed, Interrupted
from earlyexit_ssd.files import NO_ROOM, cannot_write
from earlyexit_ssd.progress import is_first_process, write_line

EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INTERRUPTED = 2, 3, 130


def run_tool(job: Callable[[], int | None], after_a_stop: str = "run it again") -> int:
    """Run ``job``; returns the exit code: its own (0 for None), 2 for bad input, 3 for a failed gate, 130 for a signal.
    ``after_a_stop`` says what to do after a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name that the console cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if is_first_process() else logging.ERROR  # the others say the same
    logging.basicConfig(level=level, format="%(levelname).1s %(message)s", handlers=[_LineHandler()], force=True)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C; a training saves first
    try:
        code = job() or 0
        sys.stdout.flush()
        return code
    except GateFailed as error:
        return _stop("\n".join([str(error), *error.advice]), EXIT_GATE_FAILED)
    except CannotWrite as error:
        return _stop(f"{error} and {after_a_stop}", EXIT_BAD_INPUT)
    except EarlyExitError as error:
        return _stop(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        return _stop(f"{_told(error)} and {after_a_stop}", EXIT_BAD_INPUT)
    except Interrupted as error:
        return _stop(f"{error}; {after_a_stop}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _stop(f"stopped; {after_a_stop}", EXIT_INTERRUPTED)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))  # a progress bar does not run into it


def _told(error: OSError) -> str:
    """What the system says, and of which file: whoever writes one names it, so that print() is left."""
    if error.filename is None and error.errno in (*NO_ROOM, errno.EPIPE, errno.EIO):
        return str(cannot_write("standard output", error, "look at what reads it"))
    name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    if name and error.errno in (*NO_ROOM, errno.EROFS):
        return str(cannot_write(name[:-2], error))
    return f"{name}{error.strerror or ' '.join(str(error).split())[:200] or type(error).__name__}; mend it"


def _stop(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may lie on the full disk
        if is_first_process():
            write_line(f"error: {message}" if code == EXIT_BAD_INPUT else message)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # let it lead nowhere, or Python would stumble over it at its end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                stream.flush()
    return code

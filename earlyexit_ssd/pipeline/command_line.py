"""What the tools share: logging, errors in one line, exit codes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.pipeline.fit import Interrupted
from earlyexit_ssd.pipeline.gates import GateFailed
from earlyexit_ssd.progress import is_first_process, write_line

EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INTERRUPTED = 2, 3, 130


def run_tool(job: Callable[[], None], after_a_stop: str = "run it again") -> int:
    """Run ``job``; returns the exit code: 0, 2 for bad input, 3 for a failed gate, 130 for a signal.

    ``after_a_stop``: what the user reads when a signal has stopped the job.
    """
    handler = _LineHandler()
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", handlers=[handler], force=True)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C; a training saves first
    try:
        job()
    except GateFailed as error:
        return _stop("\n".join([str(error), *error.advice]), EXIT_GATE_FAILED)
    except EarlyExitError as error:
        return _stop(str(error), EXIT_BAD_INPUT)
    except Interrupted as error:
        return _stop(f"{error}; {after_a_stop}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _stop(f"stopped; {after_a_stop}", EXIT_INTERRUPTED)
    return 0


class _LineHandler(logging.Handler):
    """Log lines that a progress bar does not run into."""

    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))


def _stop(message: str, code: int) -> int:
    if is_first_process():
        write_line(f"error: {message}" if code == EXIT_BAD_INPUT else message)
    return code

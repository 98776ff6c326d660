"""The progress bar of everything that takes more than a few seconds, and lines that do not run into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this process talks to the user; also before torchrun's group is joined and after it is left."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(iterable: Iterable | None = None, desc: str | None = "", total: int | None = None) -> tqdm:
    """A tqdm bar on stderr: live on a terminal, a line every 30 seconds in a log file, silent on ranks above 0 and
    with ``desc`` None."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        mininterval=interval,
        disable=desc is None or not is_first_process(),
        dynamic_ncols=True,
    )


def write_line(text: str) -> None:
    """Write a line to stderr, above a bar that is being shown."""
    tqdm.write(text, file=sys.stderr)

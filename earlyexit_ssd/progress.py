"""The progress bar of everything that takes more than a few seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None) -> tqdm:
    """A tqdm bar on stderr: live on a terminal, a line every 30 seconds in a log file, silent on ranks above 0."""
    import sys

    silent = int(os.environ.get("RANK", "0")) > 0
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, desc=desc, total=total, mininterval=interval, disable=silent, dynamic_ncols=True)

"""Progress bars for everything that takes more than a few seconds, and log lines above them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator

try:
    from tqdm import tqdm
except ImportError:  # optional for `earlyexit_ssd.deploy`
    tqdm = None


def is_first_process() -> bool:
    """Return True in the process that prints. It works before torchrun's group is joined, too."""
    return int(os.environ.get("RANK", "0")) == 0


class PlainProgress(contextlib.AbstractContextManager):
    """The part of tqdm's interface that `deploy` uses, without tqdm: a line on stderr every ``interval`` seconds."""

    def __init__(self, iterable: Iterable | None, desc: str, total: int | None, unit: str, interval: float) -> None:
        self.iterable, self.desc, self.total, self.unit, self.interval = iterable, desc, total, unit, interval
        self.n = 0
        self.start = self.shown = time.monotonic()

    def __iter__(self) -> Iterator:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self) -> None:
        """Count an item, and print a line if ``interval`` seconds have passed."""
        self.n += 1
        now = time.monotonic()
        if now - self.shown >= self.interval:
            self.shown = now
            of = f"/{self.total}" if self.total else ""
            write_line(f"{self.desc}: {self.n}{of}, {self.n / (now - self.start):.1f} {self.unit}/s")

    def __exit__(self, *_: object) -> None:
        """Nothing to clear."""


def progress(
    iterable: Iterable | None = None, desc: str | None = "", total: int | None = None, unit: str = "it"
) -> tqdm | PlainProgress:
    """Return a tqdm bar on stderr, or `PlainProgress` without tqdm. It is live on a terminal, prints a line every 30
    seconds into a log file, and is silent on ranks above 0 or if ``desc`` is None."""
    silent = desc is None or not is_first_process()
    if tqdm is None:
        return PlainProgress(iterable, desc or "", total, unit, float("inf") if silent else 10.0)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, desc=desc, total=total, unit=unit, mininterval=interval, disable=silent, dynamic_ncols=True)


def write_line(text: str) -> None:
    """Write a line to stderr, above a running progress bar."""
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)

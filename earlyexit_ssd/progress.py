"""The progress bar of everything that takes more than a few seconds, and lines that do not run into it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator

try:
    from tqdm import tqdm
except ImportError:  # where only the runtime is installed
    tqdm = None


def is_first_process() -> bool:
    """Whether this process talks to the user; also before torchrun's group is joined and after it is left."""
    return int(os.environ.get("RANK", "0")) == 0


class PlainProgress(contextlib.AbstractContextManager):
    """A line on stderr every ``interval`` seconds: what there is without tqdm, of its interface what `deploy` uses."""

    def __init__(self, iterable: Iterable | None, desc: str, total: int | None, unit: str, interval: float) -> None:
        self.iterable, self.desc, self.total, self.unit, self.interval = iterable, desc, total, unit, interval
        self.n = 0
        self.start = self.shown = time.monotonic()

    def __iter__(self) -> Iterator:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self) -> None:
        """Count one more, and say so when it is time."""
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
    """A tqdm bar on stderr: live on a terminal, a line every 30 seconds in a log file, silent on ranks above 0 and
    with ``desc`` None. Without tqdm, lines."""
    silent = desc is None or not is_first_process()
    if tqdm is None:
        return PlainProgress(iterable, desc or "", total, unit, float("inf") if silent else 10.0)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, desc=desc, total=total, unit=unit, mininterval=interval, disable=silent, dynamic_ncols=True)


def write_line(text: str) -> None:
    """Write a line to stderr, above a bar that is being shown."""
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)

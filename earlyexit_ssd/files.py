"""Write files so that a reader never sees half of one: to a temporary name first, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from earlyexit_ssd.errors import EarlyExitError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it on success and is removed on failure.

    The temporary name keeps the suffix, since many writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder for results, before work is done that could not be written.

    Raises:
        EarlyExitError: it cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EarlyExitError(f"{path}: cannot be a folder of results ({error.strerror}); name another one") from None
    if not os.access(path, os.W_OK):
        raise EarlyExitError(f"{path}: cannot be written to; name another folder of results")


def require_space(folder: Path, size: int, what: str, fix: str) -> None:
    """Arrays are made sparse, and a full disk would end the process without a word.

    Args:
        folder: exists already; size: bytes that ``what`` takes there; fix: what to do where they are not free.

    Raises:
        EarlyExitError: they are not free.
    """
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise EarlyExitError(f"{folder}: {what} takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free; {fix}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_image(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a picture in the format of the path's suffix."""
    with atomic_path(path) as temporary:
        image.save(temporary)


def stored_key(path: Path) -> str | None:
    """What ``key`` is in a JSON file that says of what the files beside it were made; None where that is not known."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

"""Write files so that a reader never sees half of one, and folders so that no two processes write into one.

A file is written to a temporary name first, then renamed. What cannot be written is a `CannotWrite`, whoever writes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from earlyexit_ssd.errors import CannotWrite, EarlyExitError

logger = logging.getLogger(__name__)

P, R = ParamSpec("P"), TypeVar("R")

NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of an ``OSError`` inside that ``path`` cannot be written, why, and what to do.

    Raises:
        CannotWrite: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: str | os.PathLike[str], error: OSError, otherwise: str = "") -> CannotWrite:
    """The error for the user; long paths are cut at their front. ``otherwise``: what to do where no room is missing."""
    shown = os.fspath(path)
    shown = shown if len(shown) <= 120 else f"...{shown[-117:]}"
    otherwise = otherwise or "name another folder or make it writable"
    fix = "make room" if error.errno in NO_ROOM else otherwise
    return CannotWrite(f"{shown}: cannot be written ({error.strerror or type(error).__name__}); {fix}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it on success and is removed on failure.

    The temporary name keeps the suffix, since many writers choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder for results, before work is done that could not be written.

    Raises:
        CannotWrite: it cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise cannot_write(path, error) from None
        raise CannotWrite(f"{path}: cannot be a folder of results ({error.strerror}); name another one") from None
    if not os.access(path, os.W_OK):
        raise CannotWrite(f"{path}: cannot be written to; name another folder of results")


_held: set[Path] = set()
"""Lock files of this process."""


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the file ``path`` as a lock, which the system frees when this process ends, however it ends.

    Within a process it can be held any number of times. Processes that this one has forked do not hold it. A file
    system without locks gives none, with a warning.

    Args:
        path: made if missing, with the number of this process in it, and removed afterwards.
        what: that is in use, for the message.
        wait: until the others are done, rather than raise.

    Raises:
        EarlyExitError: another process holds it.
        CannotWrite: the file cannot be made.
    """
    path = Path(path).resolve()
    if path in _held:
        yield
        return
    with _locked_file(path, what, wait):
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def _locked_file(path: Path, what: str, wait: bool) -> io.FileIO:
    """Open and locked, with this process's number in it; closing it frees the lock."""
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _acquire(file, what, wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its holder has just removed it
                    with contextlib.suppress(OSError):  # a full disk can be locked all the same
                        file.truncate(0)
                        file.write(str(os.getpid()).encode())
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _acquire(file: io.FileIO, what: str, wait: bool) -> None:
    try:
        return _lock_file(file, wait=False)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s: this file system has no locks (%s); run one process at a time", what, error.strerror)
            return
    file.seek(0)
    owner = file.read(20).decode("ascii", "replace").strip() or "unknown"
    if not wait:
        raise EarlyExitError(f"{what} is in use by process {owner}; wait until it has ended, or name another folder")
    logger.info("%s is in use by process %s; waiting for it", what, owner)
    _lock_file(file, wait=True)


try:
    import fcntl

    def _mark(file: io.BufferedReader, alone: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)

    def _lock_file(file: io.FileIO, wait: bool) -> None:
        # of the process, not of the file: a forked worker that outlives this process does not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

except ImportError:  # Windows
    import msvcrt

    def _mark(file: io.BufferedReader, alone: bool) -> None:
        """Windows keeps an open file from being replaced."""

    def _lock_file(file: io.FileIO, wait: bool) -> None:
        file.seek(1 << 30)  # a byte far behind the content, so that others can read who holds it
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:  # LK_LOCK gives up after ten seconds
                    raise


_in_use: dict[Path, io.BufferedReader] = {}


def use_file(path: Path) -> None:
    """Mark a file as in use by this process until it ends; others may use it too, but should not replace it."""
    if path not in _in_use:
        _in_use[path] = open(path, "rb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            _mark(_in_use[path], alone=False)


def used_by_others(path: Path) -> bool:
    """Whether another process has marked the file with :func:`use_file`; this one no longer uses it."""
    if path in _in_use:
        _in_use.pop(path).close()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        try:
            _mark(file, alone=True)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder for results and hold it, so that two processes never write into one.

    Raises:
        CannotWrite: it cannot be made or written to.
        EarlyExitError: another process writes there.
    """
    made = not Path(folder).exists()
    make_folder(folder)
    try:
        with lock(Path(folder) / ".lock", str(folder)):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds results; an empty one goes again
                Path(folder).rmdir()


def locks_folder(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that writes into the folder of that ``parameter``: it holds it meanwhile."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with locked_folder(signature.bind(*args, **kwargs).arguments[parameter]):
                return function(*args, **kwargs)

        return locked

    return decorate


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


def new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros on disk, with room for all of it: where a disk is full, writing to a mapped file ends the
    process without a word.

    Raises:
        CannotWrite: there is no room.
    """
    with writing(path):
        try:
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                _reserve(path)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()  # it may be what has filled the disk
            raise
    return array


def _reserve(path: Path) -> None:
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8; what UTF-8 cannot hold, such as bytes of a file's name in another code, is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_text(path: Path, text: str) -> None:
    """Add ``text`` to a file of text."""
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_image(path: str | os.PathLike[str], image: Image.Image, **options: Any) -> None:
    """Write a picture in the format of the path's suffix; ``options`` are those of Pillow's writer."""
    path = Path(path)
    content = io.BytesIO()  # some of Pillow's writers do not say why they have failed
    image.save(content, format=Image.registered_extensions()[path.suffix.lower()], **options)
    write_bytes(path, content.getvalue())


def write_torch(path: str | os.PathLike[str], value: Any) -> None:
    """Write what `torch.save` takes."""
    import torch  # not there where only the runtime is installed

    content = io.BytesIO()  # on a full disk, torch.save says "unexpected pos"; no path in the file makes equal files
    torch.save(value, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def stored_key(path: Path) -> str | None:
    """What ``key`` is in a JSON file that says of what the files beside it were made; None where that is not known."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

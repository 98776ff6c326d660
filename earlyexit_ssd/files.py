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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from earlyexit_ssd.errors import CannotWrite, EarlyExitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

P, R = ParamSpec("P"), TypeVar("R")
PathLike = str | os.PathLike[str]

NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Raise an ``OSError`` inside as the `CannotWrite` of ``path``: why, and what to do."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: PathLike, error: OSError, otherwise: str = "") -> CannotWrite:
    """The error for the user; long paths are cut at their front. ``otherwise``: what to do where no room is missing."""
    shown = os.fspath(path)
    shown = shown if len(shown) <= 120 else f"...{shown[-117:]}"
    fix = "make room" if error.errno in NO_ROOM else otherwise or "name another folder or make it writable"
    return CannotWrite(f"{shown}: cannot be written ({error.strerror or type(error).__name__}); {fix}")


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
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


def make_folder(path: PathLike) -> None:
    """Make a folder for results, before work is done that could not be written; CannotWrite where it is impossible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise cannot_write(path, error) from None
        raise CannotWrite(f"{path}: cannot be a folder of results ({error.strerror}); name another one") from None
    if not os.access(path, os.W_OK):
        raise CannotWrite(f"{path}: cannot be written to; name another folder of results")


_held: set[Path] = set()  # lock files of this process


@contextlib.contextmanager
def lock(path: PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the file ``path`` as a lock, which the system frees when this process ends, however it ends.

    Within a process it can be held any number of times. Processes that this one has forked do not hold it. A file
    system (or Windows) without these locks gives none, with a warning. The file is made, holds the number of this
    process and is removed afterwards.

    Raises:
        EarlyExitError: another process holds it, unless this one is to ``wait``; ``what`` is in use, it says.
        CannotWrite: the file cannot be made.
    """
    path = Path(path).resolve()
    while path not in _held:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
        with file:
            _acquire(file, what, wait)
            try:
                removed = not os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                removed = True
            if removed:  # by its holder, just now
                continue
            with contextlib.suppress(OSError):  # a full disk can be locked all the same
                file.truncate(0)
                file.write(str(os.getpid()).encode())
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)
                with contextlib.suppress(OSError):
                    path.unlink()
            return
    yield


def _acquire(file: io.FileIO, what: str, wait: bool) -> None:
    # of the process, not of the file: a forked worker that outlives this process does not hold it
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no fcntl")
        return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s: this file system has no locks (%s); run one process at a time", what, error.strerror)
            return
    file.seek(0)
    owner = file.read(20).decode("ascii", "replace").strip() or "unknown"
    if not wait:
        raise EarlyExitError(f"{what} is in use by process {owner}; wait until it has ended, or name another folder")
    logger.info("%s is in use by process %s; waiting for it", what, owner)
    fcntl.lockf(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked_folder(folder: PathLike) -> Iterator[None]:
    """Make a folder for results and hold it, so that two processes never write into one; errors as of
    :func:`make_folder` and :func:`lock`."""
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


def new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros on disk, with room for all of it, else CannotWrite: where a disk is full, writing to a mapped
    file ends the process without a word."""
    array = None
    with writing(path):
        try:
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if array is None or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                path.unlink(missing_ok=True)  # it may be what has filled the disk
                raise
    return array


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` as UTF-8; what UTF-8 cannot hold, such as bytes of a file's name in another code, is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_text(path: Path, text: str) -> None:
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_bytes(path: PathLike, content: bytes | memoryview) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_image(path: PathLike, image: Image.Image, **options: Any) -> None:
    """Write a picture in the format of the path's suffix; ``options`` are those of Pillow's writer."""
    path = Path(path)
    content = io.BytesIO()  # some of Pillow's writers do not say why they have failed
    image.save(content, format=Image.registered_extensions()[path.suffix.lower()], **options)
    write_bytes(path, content.getvalue())


def write_torch(path: PathLike, value: Any) -> None:
    import torch  # not there where only the runtime is installed

    content = io.BytesIO()  # on a full disk, torch.save says "unexpected pos"; no path in the file makes equal files
    torch.save(value, content)
    write_bytes(path, content.getbuffer())


def sha256(path: PathLike) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class ArrayStore:
    """A folder of arrays with one row per record, and of what else was computed with them; it is written whole.

    ``<name>.key`` is written last and identifies the contents: without it, or with another, all is computed again.
    Processes that fill a store together each :meth:`open` its arrays.

    Args:
        name: name of the key's file, and of the store in messages, such as ``cache``.
        contents: text that identifies what the files are computed from.
        records: number of rows.
        row: array name -> the array [1, ...] of one record, for dtype and shape.

    Attributes:
        arrays: array name -> array [records, ...], on disk; there once the store is read or opened.
        rest: what :meth:`finish` was given; there once the store is read.
    """

    def __init__(self, folder: Path, name: str, contents: str, records: int, row: Mapping[str, np.ndarray]) -> None:
        self.folder, self.name, self.records, self.row = folder, name, records, row
        self._key, self._key_file = hashlib.sha256(contents.encode()).hexdigest(), folder / f"{name}.key"
        self._paths = {name: folder / f"{name}.npy" for name in row}

    def is_whole(self) -> bool:
        """Whether the store is complete and has these contents; one that is damaged (logged) is not."""
        try:
            if not self._key_file.exists() or self._key_file.read_bytes() != self._key.encode():
                return False
            self.read()
        except Exception as error:  # damaged arrays and archives raise any exception
            logger.warning("%s: the %s is damaged (%s); it is made anew", self.folder, self.name, type(error).__name__)
            return False
        return True

    def read(self) -> None:
        """Read a complete store; its arrays stay on disk."""
        import torch  # not there where only the runtime is installed

        self.open("r")
        self.rest: Any = torch.load(self.folder / "rest.pt", weights_only=True)

    def create(self, what: str, fix: str) -> None:
        """Begin a store of zeros in place of an old one. An EarlyExitError, in which ``what`` is stored and ``fix``
        says what to do, if the disk has no room for it."""
        make_folder(self.folder)
        with writing(self.folder):
            for path in (self._key_file, *self._paths.values()):  # a process that still reads an old array keeps it
                path.unlink(missing_ok=True)
        size, free = self.records * sum(one.nbytes for one in self.row.values()), shutil.disk_usage(self.folder).free
        if size > 0.95 * free:
            sizes = f"{size / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            raise EarlyExitError(f"{self.folder}: {what} takes {sizes}; {fix}")
        for name, one in self.row.items():
            new_array(self._paths[name], one.dtype, (self.records, *one.shape[1:]))

    def open(self, mode: str = "r+") -> None:
        """Open the arrays, to write into them by default."""
        self.arrays = {name: np.load(path, mmap_mode=mode) for name, path in self._paths.items()}

    def flush(self) -> None:
        """Write what this process has set in the arrays to the disk."""
        with writing(self.folder):
            for array in self.arrays.values():
                array.flush()

    def finish(self, rest: Any) -> None:
        """Complete the store, after every process's :meth:`flush`; `torch.load` must read ``rest`` as weights only."""
        write_torch(self.folder / "rest.pt", rest)
        write_text(self._key_file, self._key)

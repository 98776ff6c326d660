"""Write files completely or not at all, and lock folders so that only one process writes into each.

A file is written under a temporary name and then renamed. Every failure to write raises `CannotWrite`.
"""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    """Convert an ``OSError`` inside to a `CannotWrite` with ``path``, the reason and the fix."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: PathLike, error: OSError, fix: str = "name another folder or make it writable") -> CannotWrite:
    """Return the error for the user, with the end of a long path. On a full disk the fix is "make room"."""
    name = os.fspath(path)
    name = name if len(name) <= 120 else f"...{name[-117:]}"
    fix = "make room" if error.errno in NO_ROOM else fix
    return CannotWrite(f"{name}: cannot be written ({error.strerror or type(error).__name__}); {fix}")


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder. On success it is renamed to ``path``, on failure it is removed. It
    keeps the suffix, because many writers choose the format by it."""
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


def require_not_input(output: PathLike, inputs: Iterable[PathLike]) -> None:
    """Raise EarlyExitError if the file ``output`` is one of the ``inputs``, which it would replace."""
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise EarlyExitError(f"{output}: the result would replace this input; name another file or folder of results")


def make_folder(path: PathLike) -> None:
    """Make a folder for results. Raise CannotWrite if that is impossible. Call it before a long computation."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise cannot_write(path, error) from None
        raise CannotWrite(f"{path}: cannot be a folder of results ({error.strerror}); name another one") from None
    if not os.access(path, os.W_OK):
        raise CannotWrite(f"{path}: cannot be written to; name another folder of results")


_held: set[Path] = set()  # lock files that this process holds


@contextlib.contextmanager
def lock(path: PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock of this process on the file ``path``. The system releases it when the process ends or is killed.

    A process may hold it several times. Its forks do not hold it. The file is created, contains the process id, and is
    removed afterwards. On Windows and on file systems without locks there is a warning instead of a lock.

    ``what`` names the locked thing in messages. If another process holds the lock, wait for it if ``wait``, otherwise
    raise EarlyExitError. Raise CannotWrite if the file cannot be created.
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
            if removed:  # the previous holder removed it after it was opened here
                continue
            with contextlib.suppress(OSError):  # the process id is missing on a full disk, but the lock holds
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
    # lockf locks belong to the process: a forked worker that outlives this process does not hold the lock
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
    """Make a folder for results and lock it. Errors are those of :func:`make_folder` and :func:`lock`."""
    is_new = not Path(folder).exists()
    make_folder(folder)
    try:
        with lock(Path(folder) / ".lock", str(folder)):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # fails if it has results; an empty folder is removed
                Path(folder).rmdir()


def locks_folder(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it runs with the folder in its argument ``parameter`` locked."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with locked_folder(signature.bind(*args, **kwargs).arguments[parameter]):
                return function(*args, **kwargs)

        return locked

    return decorate


def new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Create an array of zeros on disk, and allocate all of it. Raise CannotWrite if the disk is full, because a later
    write to the mapped file would kill the process without a message."""
    array = None
    with writing(path):
        try:
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if array is None or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # else no fallocate
                path.unlink(missing_ok=True)  # it may have filled the disk
                raise
    return array


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` as UTF-8. Characters that UTF-8 cannot encode are escaped, such as bytes of a file name."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_text(path: Path, text: str) -> None:
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON. NaN and infinity raise ValueError, because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_bytes(path: PathLike, content: bytes | memoryview) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_image(path: PathLike, image: Image.Image, **options: Any) -> None:
    """Write a picture in the format of the path's suffix, with ``options`` for Pillow's writer."""
    path = Path(path)
    content = io.BytesIO()  # some of Pillow's writers lose the reason of a failure
    image.save(content, format=Image.registered_extensions()[path.suffix.lower()], **options)
    write_bytes(path, content.getvalue())


def write_torch(path: PathLike, value: Any) -> None:
    import torch  # not installed on a device that only runs exported files

    content = io.BytesIO()  # torch.save loses the reason of a failure, and would store the temporary file's name
    torch.save(value, content)
    write_bytes(path, content.getbuffer())


def sha256(path: PathLike) -> str:
    """Return the hash of a file's content in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@dataclass(eq=False, repr=False)
class ArrayStore:
    """A folder of arrays on disk, with one row per record, and of other values that were computed with them.

    The file ``<name>.key`` identifies the contents and is written last. A store without it, or with another key, is
    incomplete. To fill a store, one process calls :meth:`create`, all processes :meth:`open`, write into ``arrays`` and
    :meth:`flush`, and one process calls :meth:`finish`. ``arrays`` (name -> array [records, ...]) exist after
    :meth:`open` or :meth:`read`, and the argument of ``finish``, ``rest``, after :meth:`read`.
    """

    folder: Path
    name: str  # of the key file, and of the store in messages, such as "cache"
    contents: str  # text that identifies the data and the settings that the arrays are computed from
    records: int  # number of rows
    row: Mapping[str, np.ndarray]  # array name -> array [1, ...] with the dtype and shape of a record

    def __post_init__(self) -> None:
        self._key = hashlib.sha256(self.contents.encode()).hexdigest()
        self._key_file = self.folder / f"{self.name}.key"
        self._paths = {name: self.folder / f"{name}.npy" for name in self.row}

    def is_complete(self) -> bool:
        """Read the store, and return True, if it is complete and has these contents. Damage is logged."""
        try:
            if not self._key_file.exists() or self._key_file.read_bytes() != self._key.encode():
                return False
            self.read()
        except Exception as error:  # damaged arrays and archives raise any exception
            reason = type(error).__name__
            logger.warning("%s: the %s is damaged (%s); it is computed again", self.folder, self.name, reason)
            return False
        return True

    def read(self) -> None:
        """Open a complete store for reading."""
        import torch  # not installed on a device that only runs exported files

        self.open("r")
        self.rest: Any = torch.load(self.folder / "rest.pt", weights_only=True)

    def create(self, what: str, fix: str) -> None:
        """Replace the store by one of zeros. Raise EarlyExitError if the disk has no room, with ``what`` (the contents)
        and ``fix`` in the message."""
        make_folder(self.folder)
        with writing(self.folder):
            for path in (self._key_file, *self._paths.values()):  # a process that still reads an old array keeps it
                path.unlink(missing_ok=True)
        size = self.records * sum(array.nbytes for array in self.row.values())
        free = shutil.disk_usage(self.folder).free
        if size > 0.95 * free:
            sizes = f"{size / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free"
            raise EarlyExitError(f"{self.folder}: {what}: {sizes}; {fix}")
        for name, array in self.row.items():
            new_array(self._paths[name], array.dtype, (self.records, *array.shape[1:]))

    def open(self, mode: str = "r+") -> None:
        """Open the arrays, by default for writing."""
        self.arrays = {name: np.load(path, mmap_mode=mode) for name, path in self._paths.items()}

    def flush(self) -> None:
        """Write the arrays to the disk."""
        with writing(self.folder):
            for array in self.arrays.values():
                array.flush()

    def finish(self, rest: Any) -> None:
        """Complete the store, after :meth:`flush` in every process. ``rest`` must load with ``weights_only=True``."""
        write_torch(self.folder / "rest.pt", rest)
        write_text(self._key_file, self._key)

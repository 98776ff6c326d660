"""Fixtures shared by all tests."""

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from earlyexit_ssd.files import lock

SHARED = Path(__file__).resolve().parents[2] / "shared"
LONG = {Path(__file__).resolve().parent / name for name in ("tools", "benchmarks")}
gc.disable()  # while modules are imported


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave the imported modules out of all later garbage collections, which would take a tenth of the time."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long tests of the commands first, so no process is still running one at the end."""
    items.sort(key=lambda item: LONG.isdisjoint(item.path.parents))


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch  # here, since the process that starts the others does not need it

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: small tensors gain nothing from more, and results do not depend on the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_root() -> Path:
    """The folder of real photos and weights beside the checkout."""
    if not (SHARED / "weights").is_dir():
        pytest.skip(f"needs real photos and weights in {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function ``made_once(name, make)`` that returns a folder. ``make`` fills it once per test run.

    All processes read the folder, so a test that writes needs a copy.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with lock(root / f"{name}.lock", name, wait=True):
            if not (root / name).is_dir():
                unfinished = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=root))
                make(unfinished)
                unfinished.rename(root / name)
        return root / name

    return made


@pytest.fixture
def small_files() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Return a context manager that limits files to ``size`` bytes, to simulate a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited

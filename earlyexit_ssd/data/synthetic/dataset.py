"""Render the synthetic data set to disk as ordinary COCO JSON and JPEG."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from earlyexit_ssd.data.synthetic.scene import Box, render_scene
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import lock, make_folder, write_image, write_json, writing
from earlyexit_ssd.progress import progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = "synthetic_chairs"
SPLITS = ("train", "calib", "test")
CATEGORY = {"id": 62, "name": "chair", "supercategory": "furniture"}  # COCO's own id
QUALITY = 90  # of the JPEG files
VERSION = 1  # of the renderer; raise it when the same settings give other pictures
_STALE = 3600.0  # seconds after which an unfinished folder counts as left by a killed run

_logger = logging.getLogger(__name__)


def ensure_synthetic(
    root: Path, sizes: tuple[int, int, int], image_size: int, seed: int, workers: int | None = None
) -> None:
    """Render ``root``/synthetic_chairs unless it is there with the same settings.

    Pictures go to {train,calib,test}/NNNNNN.jpg, numbered through all splits, boxes to
    annotations/instances_{train,calib,test}.json. All is made in a temporary folder that is renamed at the
    end, so that an interrupted run leaves no half data set.

    Args:
        root: folder of the data sets; made if missing.
        sizes: pictures of the train, calib and test split.
        image_size: side of the square pictures, pixels.
        seed: of the renderer. A picture depends on (seed, split, its place in the split) and on nothing else.
        workers: processes that render; by default one per core that this process may use, at most 8.

    Raises:
        DataError: impossible settings, a folder of that name which this function has not made, or one of other
            settings that another process uses.
    """
    root = Path(root)
    settings = {"version": VERSION, "sizes": list(sizes), "image_size": image_size, "seed": seed}
    _check(sizes, image_size, seed)
    target = root / FOLDER
    while not (_settings_of(target) == settings and _hold(target, settings)):
        with lock(root / f".{FOLDER}.lock", f"{target} (it is being rendered)", wait=True):
            if _settings_of(target) != settings:  # another process may have made it meanwhile
                _require_unused(target)
                with _temporary_folder(root) as temporary:
                    _logger.info("rendering %d synthetic scenes into %s", sum(sizes), target)
                    made = temporary / FOLDER
                    _render_all(made, sizes, image_size, seed, workers or _cores())
                    write_json(made / "settings.json", settings)
                    with writing(target):
                        _put(made, target, settings)


_in_use: dict[Path, BinaryIO] = {}
"""Settings files that this process keeps locked, to its end: photos are read one by one."""


def _hold(target: Path, settings: dict[str, Any]) -> bool:
    """Keep other processes from replacing the folder by one of other settings; False: one just has."""
    if fcntl is not None and target not in _in_use:
        _in_use[target] = open(target / "settings.json", "rb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(_in_use[target], fcntl.LOCK_SH)
    return _settings_of(target) == settings


def _require_unused(target: Path) -> None:
    """Raise a DataError where another process takes photos from the folder."""
    if target in _in_use:
        _in_use.pop(target).close()
    if fcntl is None or not (target / "settings.json").is_file():
        return
    with open(target / "settings.json", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataError(
                    f"{target} is in use by another process, with other DATA.SYNTHETIC settings; "
                    "wait until it has ended, or set DATA.ROOT to another folder"
                ) from None


def _check(sizes: tuple[int, int, int], image_size: int, seed: int) -> None:
    if len(sizes) != 3 or any(size < 0 for size in sizes):
        raise DataError(f"DATA.SYNTHETIC.SIZES is {tuple(sizes)}; expected three numbers >= 0 (train, calib, test)")
    if image_size < 64:
        raise DataError(f"DATA.SYNTHETIC.IMAGE_SIZE is {image_size}; expected at least 64 pixels")
    if seed < 0:
        raise DataError(f"DATA.SYNTHETIC.SEED is {seed}; expected a number >= 0")


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """What ``folder`` was made with; None if it does not exist or is empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder} holds no readable settings.json, so the renderer has not made it; "
            "move it away or delete it, or set DATA.ROOT to another folder"
        ) from error


@contextlib.contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    """A new folder in ``root``, removed at the end whatever happens; those of killed runs go as well."""
    for other in root.glob(f".{FOLDER}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _STALE:
                shutil.rmtree(other)
    with writing(root):
        folder = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", suffix=".partial", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(made: Path, target: Path, settings: dict[str, Any]) -> None:
    """Move the folder ``made`` to ``target``; what was there goes to the temporary folder, and with it."""
    if _settings_of(target) == settings:
        return  # another process was faster; the pictures are the same
    with contextlib.suppress(FileNotFoundError):
        os.replace(target, made.with_name("outdated"))
    try:
        os.replace(made, target)
    except OSError:
        if _settings_of(target) != settings:
            raise


def _render_all(folder: Path, sizes: tuple[int, int, int], image_size: int, seed: int, workers: int) -> None:
    jobs = []
    for split, size in enumerate(sizes):
        make_folder(folder / SPLITS[split])
        jobs += [(sum(sizes[:split]) + index + 1, split, index) for index in range(size)]
    render = partial(_render_one, folder, image_size, seed)
    with _mapper(min(workers, len(jobs))) as mapper:
        results = list(progress(mapper(render, jobs), desc="rendering scenes", total=len(jobs)))
    for split, name in enumerate(SPLITS):
        chosen = [(job[0], boxes) for job, boxes in zip(jobs, results, strict=True) if job[1] == split]
        write_json(folder / "annotations" / f"instances_{name}.json", coco_json(chosen, image_size))


def _render_one(folder: Path, image_size: int, seed: int, job: tuple[int, int, int]) -> list[Box]:
    """Render and save one picture; ``job`` is (image id, split, place in the split)."""
    image_id, split, index = job
    image, boxes = render_scene(np.random.default_rng((seed, split, index)), image_size)
    write_image(folder / SPLITS[split] / file_name(image_id), image, quality=QUALITY)
    return boxes


def file_name(image_id: int) -> str:
    """Name of a picture's file within its split."""
    return f"{image_id:06d}.jpg"


def coco_json(scenes: Iterable[tuple[int, list[Box]]], image_size: int) -> dict[str, Any]:
    """COCO's instances format for pairs of image id and boxes (xyxy, absolute pixels)."""
    images, annotations = [], []
    for image_id, boxes in scenes:
        images.append({"id": image_id, "file_name": file_name(image_id), "width": image_size, "height": image_size})
        for place, (x1, y1, x2, y2) in enumerate(boxes):
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": image_id * 10 + place,  # at most four chairs in a scene
                    "image_id": image_id,
                    "category_id": CATEGORY["id"],
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    return {"images": images, "annotations": annotations, "categories": [CATEGORY]}


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """``map``, or the same over a pool of processes."""
    # Only forked processes start at once (others import PyTorch first), and only Linux forks safely.
    if workers < 2 or not sys.platform.startswith("linux"):
        yield map
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_follow, initargs=(os.getpid(),))
    try:
        yield partial(pool.map, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """Leave an interrupt to the process that started this one, and end with it even if it is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 8)

"""What a data set holds, as a number that changes with any of it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import sha256


def photo_hashes(dataset: DetectionDataset) -> list[tuple[Path, str]]:
    """Path and SHA-256 of every photo's file.

    Raises:
        DataError: a photo cannot be read.
    """
    digest = functools.cache(sha256)  # photos of rare classes occur several times
    try:
        return [(record.path, digest(record.path)) for record in dataset.records]
    except OSError as error:
        raise DataError(f"{error.filename}: no readable photo ({error.strerror}); put it there") from None


def fingerprint(dataset: DetectionDataset, hashes: Sequence[str] | None = None) -> str:
    """SHA-256 over the classes and, photo by photo in their order, the file's content, number, size and objects.

    Where the files lie has no part in it. Augmentation has none either: it is of the settings.

    Args:
        hashes: of the photos' files, where they are known already; see `photo_hashes`.

    Raises:
        DataError: a photo cannot be read.
    """
    digest = hashlib.sha256(repr(dataset.classes).encode())
    hashes = [content for _, content in photo_hashes(dataset)] if hashes is None else hashes
    for record, content in zip(dataset.records, hashes, strict=True):
        objects = [(one.box, one.label, one.ignore, one.area) for one in record.annotations]
        digest.update(repr((content, record.image_id, record.width, record.height, objects)).encode())
    return digest.hexdigest()

"""Photos that teach, choose and test must be different photos; that their sets have different names is not enough."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.photos import file_identity
from earlyexit_ssd.data.records import Record
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.files import sha256


def require_disjoint(**datasets: DetectionDataset) -> None:
    """Check that no photo is in two of the data sets, nor twice in one of them.

    Two sets share a photo if they name the same file, or files of the same bytes: copies under other names leak as
    much. Within one set only paths are compared. Only files of equal size are read.

    Raises:
        DataError: the sets, the first photo that they share, and how many there are; or a photo cannot be read.
    """
    digest = functools.cache(sha256)
    try:
        by_size = {name: _by_size(name, dataset) for name, dataset in datasets.items()}
        for (first, ours), (second, theirs) in itertools.combinations(by_size.items(), 2):
            sizes = [size for size in ours if size in theirs]
            known = {digest(path): path for size in sizes for path in ours[size]}
            shared = [(known[digest(p)], p) for size in sizes for p in theirs[size] if digest(p) in known]
            if shared:
                raise DataError(
                    f"{first} and {second} share photos ({len(shared)}), the first: {shared[0][0]} and {shared[0][1]}; "
                    "take them out of one of the two, since figures on photos that taught flatter"
                )
    except OSError as error:
        raise DataError(f"{error.filename}: no readable photo ({error.strerror}); put it there") from None


def require_unique(name: str, records: Iterable[Record]) -> None:
    """Check that no photo file is twice among the records of the set ``name``.

    Raises:
        DataError: the first that is.
    """
    seen = set()
    for record in records:
        identity = file_identity(record.path)
        if identity is not None and identity in seen:
            raise DataError(
                f"{name} has the photo {record.path} twice; name each file once, in one of the set's data sets"
            )
        seen.add(identity)


def _by_size(name: str, dataset: DetectionDataset) -> dict[int, list[Path]]:
    """Size in bytes -> the photos of that size."""
    require_unique(name, dataset.records)
    by_size: dict[int, list[Path]] = {}
    for record in dataset.records:
        path = record.path.resolve()
        by_size.setdefault(path.stat().st_size, []).append(path)
    return by_size

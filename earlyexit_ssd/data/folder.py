"""A plain folder of photos -> photos without boxes, for exits that learn from the full path alone."""

from __future__ import annotations

from pathlib import Path

from earlyexit_ssd.data.images import PHOTO_SUFFIXES, read_header
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset, Record
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.progress import progress


def read_photo_folder(name: str, folder: Path, problems: Problems) -> RawDataset:
    """Every photo in ``folder`` and the folders in it, in the order of their paths; hidden files are left out.

    Args:
        problems: takes what is wrong with single photos.

    Raises:
        DataError: not a folder, no photo there, or (mode "refuse") one that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: data set {name!r} is a file, expected a folder of photos; name its folder")
    paths = find_photos(folder)
    if not paths:
        raise DataError(f"{folder}: data set {name!r} has no photo ({', '.join(PHOTO_SUFFIXES)}) in it or below")
    records = []
    for number, path in enumerate(progress(paths, desc=f"read {name}"), start=1):
        try:
            width, height = read_header(path).size
        except DataError as error:
            problems.add("unreadable photo file", str(error), number)
            continue
        records.append(Record(number, path, width, height))
    return RawDataset(name, (), tuple(records), open_classes=True, labelled=False)


def find_photos(folder: Path) -> list[Path]:
    """Paths of the photos in and below ``folder``, sorted; hidden files and folders are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))

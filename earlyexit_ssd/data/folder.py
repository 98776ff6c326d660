"""Reader of a folder of photos without annotations, and the paths and lists of photos that other readers use."""

import os
from pathlib import Path

from earlyexit_ssd.console import progress
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset, Record, register_format
from earlyexit_ssd.errors import DataError
from earlyexit_ssd.images import PHOTO_SUFFIXES, find_files, read_header
from earlyexit_ssd.plain import read_bytes


def read_photo_folder(name: str, folder: Path, problems: Problems) -> RawDataset:
    """Read all photos in ``folder`` and its subfolders, sorted by path, without hidden files. The data set is not
    ``labelled``, so exits can learn from the full path alone. Raise DataError if ``folder`` is not a folder or has no
    photo, or (mode "refuse") a photo cannot be read."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: data set {name!r} is a file, expected a folder of photos; correct DATA.DATASETS")
    paths, others = find_files(folder, PHOTO_SUFFIXES)
    if not paths:
        expected = ", ".join(PHOTO_SUFFIXES)
        raise DataError(f"{folder}: data set {name!r} has no photo here or in a subfolder, expected {expected}")
    records = []
    for number, path in enumerate(progress(paths, desc=f"read {name}"), start=1):
        try:
            records.append(Record(number, path, *read_header(path).size))
        except DataError as error:
            problems.add("unreadable photo file", str(error), number)
    for path in others:
        problems.note("file of another kind", str(path))
    return RawDataset(name, (), tuple(records), open_classes=True, labelled=False)


register_format("photos", lambda annotations, path: not annotations)(
    lambda name, annotations, folder, problems, allow_outside: read_photo_folder(name, folder, problems)
)


def photo_path(folder: Path, name: str, allow_outside: bool) -> Path | None:
    """Return the path of the photo that an annotation file calls ``name``, or None if it is outside ``folder`` and not
    ``allow_outside``. Symbolic links inside the folder are not resolved, so they may point outside."""
    name = os.path.normpath(name)
    if os.path.isabs(name):
        outside = not Path(name).is_relative_to(os.path.abspath(folder))
    else:
        outside = name.split(os.sep)[0] == os.pardir
    return None if outside and not allow_outside else folder / name


def report_outside(problems: Problems, found: str, folder: Path, image_id: int | None = None) -> None:
    """Count a photo for which `photo_path` is None. ``found`` has the annotation file, the record and the path."""
    message = f"{found}, expected a path in {folder}, or DATA.ALLOW_OUTSIDE True"
    problems.add("photo outside the photo folder", message, image_id)


def read_list(listing: Path) -> list[str]:
    """Return the lines of a file that lists photos. Raise DataError if it cannot be read or is not in UTF-8."""
    try:
        return read_bytes(listing).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{listing}: cannot be read as a list of photos ({error}); save it as text in UTF-8") from None

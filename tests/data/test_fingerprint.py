"""What a data set holds has one number, wherever it lies."""

import dataclasses
import shutil

import pytest

from earlyexit_ssd.data import Annotation, DetectionDataset, Record
from earlyexit_ssd.data.fingerprint import fingerprint
from earlyexit_ssd.errors import DataError

BOX = Annotation((1.0, 2.0, 3.0, 4.0), 1)


@pytest.fixture
def record(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a photo")
    return Record(7, tmp_path / "a.jpg", 10, 20, (BOX,))


def of(*records, classes=("chair", "cat")):
    return fingerprint(DetectionDataset(records, classes))


def test_it_changes_with_all_that_teaches(record, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"another")
    changed = [
        dataclasses.replace(record, annotations=(dataclasses.replace(BOX, box=(1.0, 2.0, 3.0, 4.5)),)),
        dataclasses.replace(record, annotations=(dataclasses.replace(BOX, label=2),)),
        dataclasses.replace(record, annotations=(dataclasses.replace(BOX, ignore=True),)),
        dataclasses.replace(record, annotations=()),
        dataclasses.replace(record, path=tmp_path / "b.jpg"),
        dataclasses.replace(record, image_id=8),
    ]
    found = [
        of(record),
        of(record, changed[5]),
        of(record, classes=("cat", "chair")),
        *(of(other) for other in changed),
    ]
    assert len(set(found)) == len(found)


def test_the_place_of_the_files_does_not_matter(record, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(record.path, tmp_path / "elsewhere" / "c.jpg")
    assert of(record) == of(dataclasses.replace(record, path=tmp_path / moved))


def test_a_missing_photo_is_named(record):
    record.path.unlink()
    with pytest.raises(DataError, match=r"a.jpg: no readable photo"):
        of(record)

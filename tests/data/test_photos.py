"""Photo files are checked before training, in every mode."""

from __future__ import annotations

import logging

import cv2
import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.data.photos import check_photos, drop_repeated_files, resize_record
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record
from earlyexit_ssd.errors import DataError

CHAIR = Annotation((5, 6, 25, 36), 1, area=500.0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_files_that_cannot_be_used(photo_file, on_bad, damage):
    good, bad = photo_file("good.jpg"), photo_file("bad.jpg")
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:500] if damage == "truncated" else b"text")
    records = [Record(1, bad, 60, 40, (CHAIR,)), Record(2, good, 60, 40, (CHAIR,))]
    problems = Problems(on_bad)
    kind = "missing photo file" if damage == "missing" else "unreadable photo file"
    if on_bad == "refuse":
        with pytest.raises(DataError, match=kind) as error:
            check_photos(records, problems)
        assert "photo bad.jpg (id 1)" in str(error.value)
        assert "\n" not in str(error.value)
        return
    assert check_photos(records, problems) == records[1:]
    assert problems.counts == {kind: 1}


def test_photos_of_another_size(photo_file, on_bad):
    """A photo of 60 x 40, annotated at 120 x 20."""
    annotation = Annotation((10, 3, 50, 18), 1, area=500.0)
    record = Record(1, photo_file("a.jpg"), 120, 20, (annotation,))
    problems = Problems(on_bad)
    if on_bad == "refuse":
        with pytest.raises(DataError, match=r"photo a.jpg \(id 1\) is 60 x 40, annotated as 120 x 20"):
            check_photos([record], problems)
        return
    checked = check_photos([record], problems)
    assert problems.counts == {"photo of another size than annotated": 1}
    if on_bad == "skip":
        assert checked == []
        return
    assert (checked[0].width, checked[0].height) == (60, 40)
    assert checked[0].annotations[0].box == (5, 6, 25, 36)
    assert checked[0].annotations[0].area == 500.0


def test_swapped_sides(photo_file, on_bad):
    """Width and height in each other's place: the boxes are right as they are."""
    record = Record(1, photo_file("a.jpg"), 40, 60, (CHAIR,))
    problems = Problems(on_bad)
    kind = "photo with width and height swapped"
    if on_bad == "refuse":
        with pytest.raises(DataError, match=f"is 60 x 40, annotated as 40 x 60: {kind}"):
            check_photos([record], problems)
        return
    swapped = Record(1, record.path, 60, 40, (CHAIR,))
    assert check_photos([record], problems) == ([] if on_bad == "skip" else [swapped])
    assert problems.counts == {kind: 1}


def test_resize_keeps_unknown_areas_unknown(tmp_path):
    record = Record(1, tmp_path, 10, 10, (Annotation((1, 2, 3, 4), 1),))
    resized = resize_record(record, 20, 30)
    assert resized.annotations[0] == Annotation((2, 6, 6, 12), 1)


def test_resize_scales_annotated_areas(tmp_path):
    record = Record(1, tmp_path, 10, 10, (Annotation((1, 2, 3, 4), 1, area=3.0),))
    assert resize_record(record, 20, 30).annotations[0].area == 18.0


def test_good_photos_are_unchanged(photo_file):
    record = Record(1, photo_file("a.jpg"), 60, 40, (CHAIR,))
    assert check_photos([record], Problems("refuse")) == [record]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PECULIAR = {
    "grey.jpg": ("L", "grey photo", {}),
    "bits.png": ("1", "grey photo", {}),
    "alpha.png": ("RGBA", "photo with transparency", {}),
    "key.png": ("RGB", "photo with transparency", {"transparency": (0, 0, 0)}),
    "palette.png": ("P", "palette photo", {}),
    "deep.png": ("I;16", "photo of more than 8 bits", {}),
    "ink.jpg": ("CMYK", "CMYK photo", {}),
    "turned.jpg": ("RGB", "EXIF-rotated photo", {"exif": exif(6)}),
    "mirrored.png": ("RGB", "EXIF-rotated photo", {"exif": exif(2)}),
    "lab.tif": ("LAB", "photo of other colours", {}),
}


@pytest.mark.parametrize("name", PECULIAR)
def test_photos_that_are_not_plain_rgb(tmp_path, on_bad, name, caplog):
    mode, kind, options = PECULIAR[name]
    Image.new(mode, (60, 40)).save(tmp_path / name, **options)
    record = Record(1, tmp_path / name, 60, 40, (CHAIR,))
    problems = Problems(on_bad)
    if on_bad == "refuse":
        with pytest.raises(DataError, match=rf"photo {name} \(id 1\) has .*: {kind}"):
            check_photos([record], problems)
        return
    assert check_photos([record], problems) == ([record] if on_bad == "repair" else [])
    assert problems.counts == {kind: 1}
    with caplog.at_level(logging.WARNING):
        problems.log("set")
    assert f"set: 1 x {kind} (" in caplog.text


def test_16_bit_colour(tmp_path):
    """Pillow opens it as 8-bit RGB; only its decoder's name tells. cv2 writes it."""

    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 60, 3), 65535, np.uint16))
    problems = Problems()
    assert len(check_photos([Record(1, tmp_path / "a.png", 60, 40)], problems)) == 1
    assert problems.counts == {"photo of more than 8 bits": 1}


def test_one_file_under_two_ids(photo_file, on_bad):
    """Equal objects: a copy; others: nobody knows whose they are. Links to one file are that file."""
    copied, mixed, alone = (photo_file(f"{name}.png") for name in ("copied", "mixed", "alone"))
    link = mixed.with_name("link.png")
    link.symlink_to(mixed)
    paths = (copied, copied, mixed, alone, link, mixed.with_name("lost.png"), mixed.with_name("lost.png"))
    objects = {2: (CHAIR,), 4: ()}
    records = [Record(i, path, 60, 40, objects.get(i, ())) for i, path in enumerate(paths)]
    problems = Problems(on_bad)
    raw = RawDataset("set", ("chair",), tuple(records))
    if on_bad == "refuse":
        with pytest.raises(DataError, match=r"photo copied.png \(id 1\) is the file of id 0: one file under two ids"):
            drop_repeated_files(raw, problems)
        return
    assert [record.image_id for record in drop_repeated_files(raw, problems).records] == [0, 3, 5, 6]
    assert problems.counts == {"one file under two ids": 2}

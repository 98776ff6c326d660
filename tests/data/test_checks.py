"""Checks and repairs of boxes, flags, class names and photo files, in every mode."""

import dataclasses
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from earlyexit_ssd.data.checks import (
    any_flag_set,
    check_boxes,
    check_names,
    check_photos,
    check_unit,
    clip_boxes,
    drop_repeated_files,
    has_area,
    parse_flag,
)
from earlyexit_ssd.data.problems import REPAIRS, Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record
from earlyexit_ssd.errors import DataError
from tests.data.conftest import repaired_and_skipped

GOOD = Annotation((1, 2, 11, 12), 1, id=1)
BAD = {
    "zero width": ((5, 5, 5, 9), "box without area", []),
    "negative height": ((5, 9, 8, 5), "box without area", []),
    "not a number": ((5, math.nan, 8, 9), "box with NaN or infinity", []),
    "infinite": ((5, 5, math.inf, 9), "box with NaN or infinity", []),
    "partly outside": ((-10, 5, 20, 45), "box outside the photo", [(0, 5, 20, 40)]),
    "wholly outside": ((70, 5, 90, 15), "box outside the photo", []),
    "wholly outside, near": ((60.2, 5, 60.9, 15), "box outside the photo", []),
    "half a pixel outside": ((5, 5, 60.5, 30), "box outside the photo", [(5, 5, 60, 30)]),
}


def checked_records(raw: RawDataset, problems: Problems) -> list[Record]:
    """Check and clip the boxes, as load_dataset does."""
    return clip_boxes(check_boxes(raw, problems).records, problems)


def boxes_of(records: Iterable[Record]) -> list[list[tuple[float, ...]]]:
    return [[annotation.box for annotation in record.annotations] for record in records]


def dataset(annotation: Annotation) -> RawDataset:
    """Return a data set of two photos. The second has ``annotation`` as its second object."""
    source = Path("boxes.json")
    first = Record(1, Path("good.jpg"), 60, 40, (GOOD,), source)
    second = Record(2, Path("bad.jpg"), 60, 40, (GOOD, annotation), source)
    return RawDataset("set", ("chair", "cat"), (first, second))


@pytest.mark.parametrize("case", BAD)
def test_bad_boxes(case):
    box, kind, clipped = BAD[case]
    raw = dataset(Annotation(box, 2, id=77))
    values = ", ".join(f"{value:g}" for value in box)
    message = rf"^boxes.json: photo bad.jpg \(id 2\), annotation 77 has box .* = {values}, .*60 x 40 .*: {kind}"
    results = repaired_and_skipped(lambda problems: boxes_of(checked_records(raw, problems)), {kind: 1}, message)
    assert results == ([[GOOD.box], [GOOD.box, *clipped]], [[GOOD.box]])


@pytest.mark.parametrize("label", [0, 3, -1])
def test_labels_outside_the_classes(label):
    raw = dataset(Annotation((1, 1, 5, 5), label, id="a9"))
    message = f"annotation a9 has label {label}, expected 1 to 2: unknown label"
    results = repaired_and_skipped(lambda p: boxes_of(check_boxes(raw, p).records), {"unknown label": 1}, message)
    assert results == ([[GOOD.box], [GOOD.box]], [[GOOD.box]])


def test_rounding_at_the_border_is_not_counted():
    """COCO's files round to two decimals."""
    problems = Problems("refuse")
    checked = checked_records(dataset(Annotation((-0.01, 5, 50.01 + 10, 40.01), 1)), problems)
    assert checked[1].annotations[1].box == (0, 5, 60, 40)
    assert not problems.counts


def test_boxes_that_are_too_thin_after_scaling():
    """A photo of 60 x 40 that was annotated as one of 60,000 x 40,000, scaled."""
    record = Record(1, Path("a.jpg"), 60, 40, (Annotation((1, 1, 1.005, 9), 1),))
    kind = "box without area"
    assert repaired_and_skipped(lambda p: boxes_of(clip_boxes([record], p)), {kind: 1}, kind) == ([[]], [])


def test_good_records_are_unchanged(photo_file):
    raw = dataset(Annotation((0, 0, 60, 40), 2, True, 5.0))
    assert check_boxes(raw, Problems("refuse")) == raw
    assert clip_boxes(raw.records, Problems("refuse")) == list(raw.records)
    records = [dataclasses.replace(raw.records[1], path=photo_file("a.jpg"))]
    assert check_photos(records, Problems("refuse")) == records


def test_each_kind_has_one_warning_with_count_and_first_example(caplog):
    problems = Problems("repair")
    raw = dataset(Annotation((5, 5, 5, 9), 1, id=77))
    repeated = dataclasses.replace(raw, records=(raw.records[1], dataclasses.replace(raw.records[1], image_id=3)))
    check_boxes(repeated, problems)
    with caplog.at_level(logging.WARNING):
        problems.log("myset")
        problems.log("myset")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("myset: 2 x box without area (dropped); the first: boxes.json: photo")
    assert "annotation 77" in caplog.messages[0]


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-100, 100)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5), st.integers(1, 50), st.integers(1, 50))
def test_repaired_boxes_have_area_and_lie_inside_the_photo(boxes, width, height):
    record = Record(1, Path("p.jpg"), width, height, tuple(Annotation(box, 1) for box in boxes))
    checked = checked_records(RawDataset("set", ("chair",), (record,)), Problems("repair"))
    for x1, y1, x2, y2 in boxes_of(checked)[0]:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and has_area((x1, y1, x2, y2))


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        ((1, 1.0, True, "1", "1.0", "01", "1.00", " true ", "TRUE", "Yes"), True),
        ((0, 0.0, False, None, "", " ", "0", "0.0", "00", "false", "False", "NO", "Unspecified"), False),
        ((2, -1, 0.5, math.nan, "maybe", "2", "nan", 10**400, [1], {"a": 1}), None),
    ],
)
def test_parse_flag(values, meaning):
    assert [parse_flag(value) for value in values] == [meaning] * len(values)


def test_unusable_flag_is_counted_once_per_object():
    where, flags = "a.json: annotation 3", {"iscrowd": "perhaps", "ignore": [0], "difficult": "no"}
    kept = repaired_and_skipped(
        lambda problems: (any_flag_set(flags, where, problems, 1), problems.keeps(1)),
        {"unusable flag": 1},
        f"^{where} has iscrowd 'perhaps', expected 0 or 1: unusable",
    )
    assert kept == ((False, True), (False, False))
    assert any_flag_set({"iscrowd": "1", "ignore": "perhaps"}, "a.json: annotation 4", Problems(), 2)


def test_normalized_boxes_are_an_error_if_most_and_counted_if_few(on_bad):
    source, suspects = Path("a.json"), [("a.json: annotation 1", 7), ("a.json: annotation 2", 8)]
    with pytest.raises(DataError, match=r"^a.json: 2 of 3 boxes lie in 0..1 .*multiply them by the photo's width and"):
        check_unit(suspects, 3, source, Problems(on_bad))
    check_unit([], 0, source, Problems("refuse"))
    message = "^a.json: annotation 1: normalized box"
    repaired_and_skipped(lambda problems: check_unit(suspects, 4, source, problems), {"normalized box": 2}, message)


@pytest.mark.parametrize(
    ("size", "bottom", "count"), [((640, 480), 100, 1), ((640, 300), 100, 0), ((640, 480), 101, 0)]
)
def test_boxes_in_percent_are_noted(size, bottom, count):
    """All boxes lie within 100 px, and the photos are more than three times as large. It is a note, not an error."""
    records = [Record(i, Path("a.jpg"), *size, (Annotation((1, 1, 9, bottom), 1),)) for i in range(4)]
    problems = Problems("refuse")
    check_boxes(RawDataset("set", ("chair",), tuple(records)), problems)
    assert problems.counts == ({"set with small boxes only": 1} if count else {})


@pytest.mark.parametrize(
    ("names", "joined"),
    [(("a", "A", "b", "b"), 1), (("left_turn", "Left Turn"), 1), (("sofa", "couch"), 1), (("cup", "Cup", "CUP"), 2)],
)
def test_equivalent_class_names_are_counted(names, joined):
    message = f"^a.json: classes '{names[0]}' and '{names[1]}' are the same"
    counts = {"two names of one class": joined}
    repaired_and_skipped(lambda problems: check_names(names, Path("a.json"), problems), counts, message)


# Photo files are checked before training.

CHAIR = Annotation((5, 6, 25, 36), 1, area=500.0)


@pytest.mark.parametrize("content", [None, "text", "half"])
def test_missing_and_unreadable_files(photo_file, content):
    good, bad = photo_file("good.jpg"), photo_file("bad.jpg")
    half = bad.read_bytes()[:500]
    bad.unlink()
    if content:
        bad.write_bytes(half if content == "half" else b"text")
    records = [Record(1, bad, 60, 40, (CHAIR,)), Record(2, good, 60, 40, (CHAIR,))]
    kind = "unreadable photo file" if content else "missing photo file"
    message = rf"photo bad.jpg \(id 1\).*: {kind}"
    results = repaired_and_skipped(lambda problems: check_photos(records, problems), {kind: 1}, message)
    assert results == (records[1:], records[1:])


def test_photo_of_another_size_than_annotated(photo_file):
    """The boxes are scaled, except if width and height are swapped."""
    path, box = photo_file("a.jpg"), Annotation((10, 24, 50, 144), 1, area=4000.0)
    for size, annotation, kind in (
        ((120, 160), box, "photo of another size than annotated"),  # the area, too
        ((40, 60), CHAIR, "photo with width and height swapped"),
    ):
        record = Record(1, path, *size, (annotation, dataclasses.replace(annotation, area=None)))
        message = rf"photo a.jpg \(id 1\) is 60 x 40, annotated as {size[0]} x {size[1]}: {kind}"
        results = repaired_and_skipped(lambda problems, r=record: check_photos([r], problems), {kind: 1}, message)
        assert results == ([Record(1, path, 60, 40, (CHAIR, dataclasses.replace(CHAIR, area=None)))], [])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


UNUSUAL = {
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


@pytest.mark.parametrize("name", UNUSUAL)
def test_photos_that_are_not_8_bit_rgb(tmp_path, name):
    mode, kind, options = UNUSUAL[name]
    Image.new(mode, (60, 40)).save(tmp_path / name, **options)
    record = Record(1, tmp_path / name, 60, 40, (CHAIR,))
    message = rf"photo {name} \(id 1\) has .*: {kind}"
    results = repaired_and_skipped(lambda problems: check_photos([record], problems), {kind: 1}, message)
    assert results == ([record], [])
    assert kind in REPAIRS


def test_unknown_modes_and_kinds_of_problems():
    with pytest.raises(DataError, match="'ignore', expected one of repair, refuse, skip"):
        Problems("ignore")
    with pytest.raises(DataError, match=r"a.txt: 'malformed boxes' is no .* \(did you mean 'malformed box'\?\)"):
        Problems().add("malformed boxes", "a.txt")


def test_16_bit_colour(tmp_path):
    """Pillow opens it as 8-bit RGB, and only its decoder's name shows the depth. Pillow cannot write such a file."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 60, 3), 65535, np.uint16))
    problems = Problems()
    assert len(check_photos([Record(1, tmp_path / "a.png", 60, 40)], problems)) == 1
    assert problems.counts == {"photo of more than 8 bits": 1}


def test_repeated_files_are_dropped(photo_file):
    """Duplicates with equal objects are dropped. If the objects differ, all entries are dropped. Links are resolved."""
    copied, mixed, alone = (photo_file(f"{name}.png") for name in ("copied", "mixed", "alone"))
    link = mixed.with_name("link.png")
    link.symlink_to(mixed)
    paths = (copied, copied, mixed, alone, link, mixed.with_name("lost.png"), mixed.with_name("lost.png"))
    objects = {2: (CHAIR,), 4: ()}
    raw = RawDataset("set", ("chair",), tuple(Record(i, p, 60, 40, objects.get(i, ())) for i, p in enumerate(paths)))
    results = repaired_and_skipped(
        lambda problems: [record.image_id for record in drop_repeated_files(raw, problems).records],
        {"one file under two ids": 2},
        r"photo copied.png \(id 1\) is the same file as id 0, .*: one file under two ids",
    )
    assert results == ([0, 3, 5, 6], [0, 3, 5, 6])

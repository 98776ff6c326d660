"""Checks and repairs of boxes, flags, class names and photo files, in every mode."""

from __future__ import annotations

import dataclasses
import logging
import math
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
    resize_record,
)
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import Annotation, RawDataset, Record
from earlyexit_ssd.errors import DataError

GOOD = Annotation((1, 2, 11, 12), 1, id=1)
BAD = {
    "zero width": ((5, 5, 5, 9), "box without area", None),
    "negative height": ((5, 9, 8, 5), "box without area", None),
    "not a number": ((5, math.nan, 8, 9), "box with NaN or infinity", None),
    "infinite": ((5, 5, math.inf, 9), "box with NaN or infinity", None),
    "partly outside": ((-10, 5, 20, 45), "box outside the photo", (0, 5, 20, 40)),
    "wholly outside": ((70, 5, 90, 15), "box outside the photo", None),
    "wholly outside, near": ((60.2, 5, 60.9, 15), "box outside the photo", None),
}


def checked_records(raw: RawDataset, problems: Problems) -> list[Record]:
    """Check and clip the boxes, as load_dataset does."""
    return clip_boxes(check_boxes(raw, problems).records, problems)


def dataset(annotation: Annotation) -> RawDataset:
    """Return a data set of two photos. The second has ``annotation`` as its second object."""
    source = Path("boxes.json")
    first = Record(1, Path("good.jpg"), 60, 40, (GOOD,), source)
    second = Record(2, Path("bad.jpg"), 60, 40, (GOOD, annotation), source)
    return RawDataset("set", ("chair", "cat"), (first, second))


@pytest.mark.parametrize("case", BAD)
def test_bad_boxes(case, on_bad):
    box, kind, repaired = BAD[case]
    problems = Problems(on_bad)
    raw = dataset(Annotation(box, 2, id=77))
    if on_bad == "refuse":
        with pytest.raises(DataError, match=kind) as error:
            checked_records(raw, problems)
        message = str(error.value)
        assert message.startswith("boxes.json: photo bad.jpg (id 2), annotation 77 has box")
        assert ", ".join(f"{value:g}" for value in box) in message
        assert "60 x 40" in message
        assert "\n" not in message
        return
    checked = checked_records(raw, problems)
    assert problems.counts == {kind: 1}
    if on_bad == "skip":
        assert [record.image_id for record in checked] == [1]
    else:
        expected = [GOOD.box] if repaired is None else [GOOD.box, repaired]
        assert [a.box for a in checked[1].annotations] == expected


@pytest.mark.parametrize("label", [0, 3, -1])
def test_labels_outside_the_classes(label, on_bad):
    problems = Problems(on_bad)
    raw = dataset(Annotation((1, 1, 5, 5), label, id="a9"))
    if on_bad == "refuse":
        with pytest.raises(DataError, match=f"annotation a9 has label {label}, expected 1 to 2: unknown label"):
            check_boxes(raw, problems)
        return
    checked = check_boxes(raw, problems)
    assert problems.counts == {"unknown label": 1}
    assert [len(record.annotations) for record in checked.records] == ([1, 1] if on_bad == "repair" else [1])


def test_rounding_at_the_border_is_not_counted():
    """COCO's files round to two decimals."""
    problems = Problems("refuse")
    checked = checked_records(dataset(Annotation((-0.01, 5, 50.01 + 10, 40.01), 1)), problems)
    assert checked[1].annotations[1].box == (0, 5, 60, 40)
    assert not problems.counts


@pytest.mark.parametrize("box", [(-1, 5, 20, 30), (5, 5, 60.5, 30)])
def test_box_half_a_pixel_or_more_outside_is_counted(box):
    problems = Problems()
    checked_records(dataset(Annotation(box, 1)), problems)
    assert problems.counts == {"box outside the photo": 1}


def test_boxes_that_are_too_thin_after_scaling(on_bad):
    """A photo of 60 x 40 that was annotated as one of 60,000 x 40,000, scaled."""
    problems = Problems(on_bad)
    record = Record(1, Path("a.jpg"), 60, 40, (Annotation((1, 1, 1.005, 9), 1),))
    if on_bad == "refuse":
        with pytest.raises(DataError, match="box without area"):
            clip_boxes([record], problems)
        return
    assert [r.annotations for r in clip_boxes([record], problems)] == ([()] if on_bad == "repair" else [])
    assert problems.counts == {"box without area": 1}


def test_good_records_are_unchanged():
    raw = dataset(Annotation((0, 0, 60, 40), 2, True, 5.0))
    assert check_boxes(raw, Problems("refuse")) == raw
    assert clip_boxes(raw.records, Problems("refuse")) == list(raw.records)


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


def test_unknown_mode():
    with pytest.raises(DataError, match="'ignore', expected one of repair, refuse, skip"):
        Problems("ignore")


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-100, 100)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5), st.integers(1, 50), st.integers(1, 50))
def test_repaired_boxes_have_area_and_lie_inside_the_photo(boxes, width, height):
    record = Record(1, Path("p.jpg"), width, height, tuple(Annotation(box, 1) for box in boxes))
    checked = checked_records(RawDataset("set", ("chair",), (record,)), Problems("repair"))
    for annotation in checked[0].annotations:
        x1, y1, x2, y2 = annotation.box
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert has_area(annotation.box)


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


def test_unusable_flag_is_counted_once_per_object(on_bad):
    problems = Problems(on_bad)
    flags = {"iscrowd": "perhaps", "ignore": [0], "difficult": "no"}
    if on_bad == "refuse":
        with pytest.raises(DataError, match="^a.json: annotation 3 has iscrowd 'perhaps', expected 0 or 1: unusable"):
            any_flag_set(flags, "a.json: annotation 3", problems, 1)
        return
    assert not any_flag_set(flags, "a.json: annotation 3", problems, 1)
    assert problems.counts == {"unusable flag": 1}
    assert problems.keeps(1) == (on_bad == "repair")
    assert any_flag_set({"iscrowd": "1", "ignore": "perhaps"}, "a.json: annotation 4", problems, 2)


def test_normalized_boxes_are_an_error_if_most_and_counted_if_few(on_bad):
    suspects = [("a.json: annotation 1", 7), ("a.json: annotation 2", 8)]
    with pytest.raises(
        DataError, match=r"^a.json: 2 of 3 boxes lie in 0..1 .*multiply them by the photo's width and height"
    ):
        check_unit(suspects, 3, Path("a.json"), Problems(on_bad))
    problems = Problems(on_bad)
    check_unit([], 0, Path("a.json"), problems)
    if on_bad == "refuse":
        with pytest.raises(DataError, match="^a.json: annotation 1: normalized box"):
            check_unit(suspects, 4, Path("a.json"), problems)
        return
    check_unit(suspects, 4, Path("a.json"), problems)
    assert problems.counts == {"normalized box": 2}


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
    [
        (("a", "A"), 1),
        (("left_turn", "Left Turn"), 1),
        (("sofa", "couch"), 1),
        (("cup", "Cup", "CUP"), 2),
        (("cup", "cup", "mug"), 0),
    ],
)
def test_equivalent_class_names_are_counted(on_bad, names, joined):
    problems = Problems(on_bad)
    if on_bad == "refuse" and joined:
        with pytest.raises(DataError, match=f"^a.json: classes '{names[0]}' and '{names[1]}' are the same"):
            check_names(names, Path("a.json"), problems)
        return
    check_names(names, Path("a.json"), problems)
    assert sum(problems.counts.values()) == joined


# Photo files are checked before training, in every mode.

CHAIR = Annotation((5, 6, 25, 36), 1, area=500.0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_missing_and_unreadable_files(photo_file, on_bad, damage):
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


def test_photo_of_another_size_than_annotated(photo_file, on_bad):
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


def test_swapped_width_and_height(photo_file, on_bad):
    """The annotated width is the photo's height. The boxes are correct and stay."""
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


@pytest.mark.parametrize(("area", "resized"), [(None, None), (3.0, 18.0)])
def test_resize_scales_known_areas(tmp_path, area, resized):
    record = Record(1, tmp_path, 10, 10, (Annotation((1, 2, 3, 4), 1, area=area),))
    assert resize_record(record, 20, 30).annotations[0] == Annotation((2, 6, 6, 12), 1, area=resized)


def test_good_photos_are_unchanged(photo_file):
    record = Record(1, photo_file("a.jpg"), 60, 40, (CHAIR,))
    assert check_photos([record], Problems("refuse")) == [record]


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
def test_photos_that_are_not_8_bit_rgb(tmp_path, on_bad, name, caplog):
    mode, kind, options = UNUSUAL[name]
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
    """Pillow opens it as 8-bit RGB, and only its decoder's name shows the depth. Pillow cannot write such a file."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 60, 3), 65535, np.uint16))
    problems = Problems()
    assert len(check_photos([Record(1, tmp_path / "a.png", 60, 40)], problems)) == 1
    assert problems.counts == {"photo of more than 8 bits": 1}


def test_repeated_files_are_dropped(photo_file, on_bad):
    """Duplicates with equal objects are dropped. If the objects differ, all entries are dropped. Links are resolved."""
    copied, mixed, alone = (photo_file(f"{name}.png") for name in ("copied", "mixed", "alone"))
    link = mixed.with_name("link.png")
    link.symlink_to(mixed)
    paths = (copied, copied, mixed, alone, link, mixed.with_name("lost.png"), mixed.with_name("lost.png"))
    objects = {2: (CHAIR,), 4: ()}
    records = [Record(i, path, 60, 40, objects.get(i, ())) for i, path in enumerate(paths)]
    problems = Problems(on_bad)
    raw = RawDataset("set", ("chair",), tuple(records))
    if on_bad == "refuse":
        with pytest.raises(
            DataError, match=r"photo copied.png \(id 1\) is the same file as id 0, .*: one file under two ids"
        ):
            drop_repeated_files(raw, problems)
        return
    assert [record.image_id for record in drop_repeated_files(raw, problems).records] == [0, 3, 5, 6]
    assert problems.counts == {"one file under two ids": 2}

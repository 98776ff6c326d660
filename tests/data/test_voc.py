"""VOC's 1-based XML becomes 0-based boxes, under COCO's names."""

from __future__ import annotations

import pytest

from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.voc import VOC_CLASSES, read_voc, read_xml_folder
from earlyexit_ssd.errors import DataError


def test_boxes_count_pixels_from_one(make_voc, voc_xml, voc_object):
    """A box over the whole photo of 60 x 40, and one over the single pixel in its corner."""
    text = voc_xml(voc_object("sofa", (1, 1, 60, 40)), voc_object("dog", (60, 40, 60, 40), difficult=1))
    raw = read_voc("v", make_voc({"a": text}), "trainval", Problems())

    assert raw.classes == VOC_CLASSES
    whole, pixel = raw.records[0].annotations
    assert whole.box == (0, 0, 60, 40)
    assert pixel.box == (59, 39, 60, 40)
    assert (raw.classes[whole.label - 1], raw.classes[pixel.label - 1]) == ("couch", "dog")
    assert (whole.ignore, pixel.ignore) == (False, True)
    assert (raw.records[0].width, raw.records[0].height) == (60, 40)


def test_classes_are_cocos_twenty():
    assert len(set(VOC_CLASSES)) == 20
    for name in ("airplane", "couch", "dining table", "motorcycle", "potted plant", "tv"):
        assert name in VOC_CLASSES


def test_names_outside_voc_make_their_own_list(make_voc, voc_xml, voc_object):
    text = voc_xml(voc_object("stool", (1, 1, 9, 9)), voc_object("chair", (1, 1, 9, 9)))
    raw = read_voc("v", make_voc({"a": text}), "trainval", Problems())
    assert raw.classes == ("chair", "stool")
    assert [a.label for a in raw.records[0].annotations] == [2, 1]


def test_a_folder_of_xml_files_has_the_classes_that_occur(make_voc, voc_xml, voc_object):
    """Not VOC's twenty, even where all names are among them; a photo without objects has none."""
    devkit = make_voc({"a": voc_xml(voc_object("sofa", (1, 1, 9, 9))), "b": voc_xml()})
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert (raw.classes, raw.open_classes) == (("couch",), True)
    (devkit / "Annotations/a.xml").unlink()
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert (raw.classes, raw.open_classes, len(raw.records)) == ((), True, 1)
    assert read_voc("v", make_voc({"b": voc_xml()}, "negatives"), "negatives", Problems()).classes == ()


def test_parts_of_an_object_are_not_its_box(make_voc, voc_xml):
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    box = "<bndbox><xmax>30</xmax><xmin>11</xmin><ymax>20.5</ymax><ymin>5</ymin></bndbox>"
    raw = read_voc(
        "v", make_voc({"a": voc_xml(f"<object><name>person</name>{part}{box}</object>")}), "trainval", Problems()
    )
    assert [a.box for a in raw.records[0].annotations] == [(10, 4, 30, 20.5)]


def test_a_folder_of_xml_files(make_voc, voc_xml, voc_object, tmp_path):
    devkit = make_voc({"b": voc_xml(), "a": voc_xml(voc_object("chair", (1, 1, 5, 5)))})
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert [record.path.name for record in raw.records] == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match="no XML file in it"):
        read_xml_folder("v", devkit / "JPEGImages", tmp_path, Problems())


def test_missing_split_names_those_there_are(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    with pytest.raises(DataError, match=r"val.txt: no such list of photos; .* has trainval"):
        read_voc("v", devkit, "val", Problems())


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("<annotation>", "unreadable annotation file", "no element found"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "unreadable annotation file", "multi-byte encodings"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "unreadable annotation file", "encoding"),
        (
            "<annotation><size><width>60</width><height>40</height></size><object><name>cat</name></object>"
            "</annotation>",
            "malformed box",
            r"object 1 \(cat\) has xmin, ymin, xmax, ymax = \[None",
        ),
        (
            "<annotation><size><width>60</width><height>40</height></size><object/></annotation>",
            "annotation without a needed key",
            "object 1 has no name",
        ),
        ("<annotation/>", "photo without width and height", "width and height are"),
        (
            "<annotation><size><width>0</width><height>40</height></size></annotation>",
            "photo without width and height",
            "'0'",
        ),
    ],
)
def test_broken_files(make_voc, voc_xml, on_bad, text, kind, value):
    devkit = make_voc({"good": voc_xml(), "bad": text})
    problems = Problems(on_bad)
    if on_bad == "refuse":
        with pytest.raises(DataError, match=value) as error:
            read_voc("v", devkit, "trainval", problems)
        assert "bad.xml" in str(error.value)
        return
    raw = read_voc("v", devkit, "trainval", problems)
    assert problems.counts == {kind: 1}
    dropped = on_bad == "skip" or kind == "unreadable annotation file"
    assert [record.path.stem for record in raw.records] == (["good"] if dropped else ["good", "bad"])
    assert (raw.records[-1].width, raw.records[-1].height) == (60, 40)


def test_missing_xml_and_double_lines(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "ImageSets/Main/trainval.txt").write_text("a -1\n\na  1\nlost\n", encoding="utf-8-sig")
    problems = Problems()
    raw = read_voc("v", devkit, "trainval", problems)
    assert [record.path.stem for record in raw.records] == ["a"]
    assert problems.counts == {"duplicate photo id": 1, "unreadable annotation file": 1}


def test_the_photo_that_the_xml_names_is_found(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "JPEGImages/a.jpg").rename(devkit / "JPEGImages/other.jpg")
    raw = read_voc("v", devkit, "trainval", Problems())
    assert raw.records[0].path.name == "other.jpg"

"""The readers of VOC devkits and XML folders."""

from __future__ import annotations

import os

import pytest

from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.voc import VOC_CLASSES, read_voc, read_xml_folder
from earlyexit_ssd.errors import DataError
from tests.data.conftest import write_photo


def test_one_based_pixels_become_zero_based_boxes(make_voc, voc_xml, voc_object):
    """One box covers the whole photo of 60 x 40, the other its last pixel."""
    text = voc_xml(voc_object("sofa", (1, 1, 60, 40)), voc_object("dog", (60, 40, 60, 40), difficult=1))
    raw = read_voc("v", make_voc({"a": text}), "trainval", Problems())

    assert raw.classes == VOC_CLASSES
    whole, pixel = raw.records[0].annotations
    assert whole.box == (0, 0, 60, 40)
    assert pixel.box == (59, 39, 60, 40)
    assert (raw.classes[whole.label - 1], raw.classes[pixel.label - 1]) == ("couch", "dog")
    assert (whole.ignore, pixel.ignore) == (False, True)
    assert (raw.records[0].width, raw.records[0].height) == (60, 40)


def test_voc_classes_have_names_of_coco():
    assert len(set(VOC_CLASSES)) == 20
    for name in ("airplane", "couch", "dining table", "motorcycle", "potted plant", "tv"):
        assert name in VOC_CLASSES


def test_classes_are_those_that_occur_if_one_is_not_in_voc(make_voc, voc_xml, voc_object):
    text = voc_xml(voc_object("stool", (1, 1, 9, 9)), voc_object("chair", (1, 1, 9, 9)))
    raw = read_voc("v", make_voc({"a": text}), "trainval", Problems())
    assert raw.classes == ("chair", "stool")
    assert [a.label for a in raw.records[0].annotations] == [2, 1]


def test_xml_folder_has_the_classes_that_occur(make_voc, voc_xml, voc_object):
    """They are not VOC's twenty, even if all names are names of VOC."""
    devkit = make_voc({"a": voc_xml(voc_object("sofa", (1, 1, 9, 9))), "b": voc_xml()})
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert (raw.classes, raw.open_classes) == (("couch",), True)
    (devkit / "Annotations/a.xml").unlink()
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert (raw.classes, raw.open_classes, len(raw.records)) == ((), True, 1)
    assert read_voc("v", make_voc({"b": voc_xml()}, "negatives"), "negatives", Problems()).classes == ()


def test_boxes_of_parts_are_not_read(make_voc, voc_xml):
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    box = "<bndbox><xmax>30</xmax><xmin>11</xmin><ymax>20.5</ymax><ymin>5</ymin></bndbox>"
    raw = read_voc(
        "v", make_voc({"a": voc_xml(f"<object><name>person</name>{part}{box}</object>")}), "trainval", Problems()
    )
    assert [a.box for a in raw.records[0].annotations] == [(10, 4, 30, 20.5)]


def test_xml_folder(make_voc, voc_xml, voc_object, tmp_path):
    devkit = make_voc({"b": voc_xml(), "a": voc_xml(voc_object("chair", (1, 1, 5, 5)))})
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert [record.path.name for record in raw.records] == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match="no XML file here"):
        read_xml_folder("v", devkit / "JPEGImages", tmp_path, Problems())


def test_missing_split_is_an_error_with_the_existing_splits(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    with pytest.raises(DataError, match=r"val.txt: no such list of photos, expected .*: trainval"):
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
            "object 1 has no <name>",
        ),
        ("<annotation/>", "photo without width and height", "width None and height None"),
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


def test_missing_xml_and_repeated_lines_are_counted(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "ImageSets/Main/trainval.txt").write_text("a -1\n\na  1\nlost\n", encoding="utf-8-sig")
    problems = Problems()
    raw = read_voc("v", devkit, "trainval", problems)
    assert [record.path.stem for record in raw.records] == ["a"]
    assert problems.counts == {"duplicate photo id": 1, "unreadable annotation file": 1}


def test_photo_is_found_by_the_filename_in_the_xml(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "JPEGImages/a.jpg").rename(devkit / "JPEGImages/other.jpg")
    raw = read_voc("v", devkit, "trainval", Problems())
    assert raw.records[0].path.name == "other.jpg"


@pytest.mark.parametrize(
    ("listing", "names", "read"),
    [
        ("my photo 1\nmy photo 2\n", ("my photo 1", "my photo 2"), ("my photo 1", "my photo 2")),
        ("my photo 1  1\nmy photo 2 -1\n", ("my photo 1", "my photo 2"), ("my photo 1", "my photo 2")),
        ("my photo 1\t0\r\n\r\nb\t1\r\n", ("my photo 1", "b"), ("my photo 1", "b")),
        ('"my photo 1"\n"b" 1\n', ("my photo 1", "b"), ("my photo 1", "b")),
        ("cup 1\ncup 2\n", ("cup 1", "cup 2", "cup"), ("cup 1", "cup 2")),
        ("cup 1\ncup 0\n", ("cup 1", "cup 0", "cup"), ("cup 1", "cup 0")),
        ("cup  1\ncup 1  1\n", ("cup 1", "cup"), ("cup", "cup 1")),
        ("cup 1\ncup 1 -1\n", ("cup 1", "cup"), ("cup", "cup 1")),
        ("sub/a 1\n", ("sub/a",), ("sub/a",)),
    ],
)
def test_lines_of_a_split(make_voc, voc_xml, listing, names, read):
    """Names may have spaces or quotes, and the last column of lists per class, even if a photo with the shorter name
    exists."""
    devkit = make_voc({"good": voc_xml()})
    for name in names:
        (devkit / "Annotations" / name).parent.mkdir(exist_ok=True)
        (devkit / f"Annotations/{name}.xml").write_text(voc_xml())
        write_photo(devkit / f"JPEGImages/{name}.jpg")
    (devkit / "ImageSets/Main/trainval.txt").write_bytes(listing.encode("utf-8-sig"))
    raw = read_voc("v", devkit, "trainval", Problems("refuse"))
    assert [record.path for record in raw.records] == [devkit / f"JPEGImages/{name}.jpg" for name in read]


def test_split_that_is_not_a_text_file_is_an_error(make_voc, voc_xml):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "ImageSets/Main/latin.txt").write_bytes("b\u00e4r".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt: cannot be read as a list of photos .*; save it as text in UTF-8"):
        read_voc("v", devkit, "latin", Problems())
    (devkit / "ImageSets/Main/folder.txt").mkdir()
    os.mkfifo(devkit / "ImageSets/Main/pipe.txt")
    for split in ("folder", "pipe", "a" * 5000, "nul\0"):
        with pytest.raises(DataError, match="no such list of photos"):
            read_voc("v", devkit, split, Problems())


@pytest.mark.parametrize("line", ["../JPEGImages/secret", "/etc/passwd", "nul\0", "x" * 5000, "pipe"])
def test_lines_without_an_annotation_file_are_counted(make_voc, voc_xml, line):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "JPEGImages/secret.xml").write_text(voc_xml())
    os.mkfifo(devkit / "Annotations/pipe.xml")
    (devkit / "ImageSets/Main/trainval.txt").write_text(f"a\n{line}\n")
    problems = Problems()
    assert [record.path.name for record in read_voc("v", devkit, "trainval", problems).records] == ["a.jpg"]
    assert sum(problems.counts.values()) == 1


@pytest.mark.parametrize(
    ("filename", "photos", "read", "kind"),
    [
        ("a.png", ("a.jpg", "a.png"), "a.png", None),
        ("a.JPG", ("a.jpg", "a.JPG"), "a.JPG", None),
        ("C:\\photos\\a.png", ("a.jpg", "a.png"), "a.png", None),
        ("/elsewhere/a.png", ("a.jpg", "a.png"), "a.png", None),
        ("", ("a.JPEG",), "a.JPEG", None),
        ("a.bmp", ("a.Png",), "a.Png", None),
        ("", ("a.jpg", "a.png"), None, "two photos of one name"),
        ("lost.jpg", ("a.jpg", "a.gif"), None, "two photos of one name"),
        ("b.jpg", ("a.jpg", "b.jpg"), "b.jpg", "photo of another name than its annotations"),
        ("../secret.jpg", ("b.jpg",), None, "photo outside the photo folder"),
        ("../secret.jpg", ("a.jpg",), "a.jpg", None),
    ],
)
def test_photo_of_an_annotation(tmp_path, voc_xml, on_bad, filename, photos, read, kind):
    """<filename> precedes the name of the XML file. If neither is unique, no photo is used."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.xml").write_text(voc_xml().replace("other.jpg", filename))
    for name in (*photos, "../secret.jpg"):
        write_photo(tmp_path / "p" / name)
    problems = Problems(on_bad)
    if on_bad == "refuse" and kind:
        with pytest.raises(DataError, match=f"a.xml: .*: {kind}"):
            read_xml_folder("v", tmp_path / "x", tmp_path / "p", problems)
        return
    raw = read_xml_folder("v", tmp_path / "x", tmp_path / "p", problems)
    expected = [] if read is None or (on_bad == "skip" and kind) else [tmp_path / "p" / read]
    assert [record.path for record in raw.records] == expected
    problems.counts.pop("photo without annotations", None)
    assert problems.counts == ({kind: 1} if kind else {})


def test_photos_outside_are_read_if_allowed(tmp_path, voc_xml):
    (tmp_path / "x").mkdir()
    (tmp_path / "p").mkdir()
    write_photo(tmp_path / "secret.jpg")
    (tmp_path / "x/a.xml").write_text(voc_xml().replace("other.jpg", str(tmp_path / "secret.jpg")))
    raw = read_xml_folder("v", tmp_path / "x", tmp_path / "p", Problems("refuse"), allow_outside=True)
    assert [record.path for record in raw.records] == [tmp_path / "secret.jpg"]


def test_files_that_are_left_out_are_counted(tmp_path, voc_xml, caplog):
    for name in ("a", "b", "sub/c", "sub/d", "e"):
        write_photo(tmp_path / f"p/{name}.jpg")
    (tmp_path / "x/sub").mkdir(parents=True)
    for name in ("a.xml", "b.XML", "sub/c.xml", "e.txt"):
        (tmp_path / "x" / name).write_text(voc_xml())
    (tmp_path / "x/sub/flat.xml").write_text(voc_xml().replace("other.jpg", "e.jpg"))
    problems = Problems("refuse")
    raw = read_xml_folder("v", tmp_path / "x", tmp_path / "p", problems)
    read = [record.path.relative_to(tmp_path / "p").as_posix() for record in raw.records]
    assert read == ["a.jpg", "b.jpg", "sub/c.jpg", "e.jpg"]
    assert problems.counts == {"photo without annotations": 1, "file of another kind": 1}
    problems.log("v")
    assert "v: 1 x photo without annotations (left out); the first: " in caplog.text and "sub/d.jpg" in caplog.text


@pytest.mark.parametrize(
    ("text", "ignore"),
    [("Unspecified", False), ("False", False), ("0.0", False), ("no", False), ("", False), ("TRUE", True), ("1", True)],
)
def test_difficult_as_text(make_voc, voc_xml, voc_object, text, ignore):
    devkit = make_voc({"a": voc_xml(voc_object("cat", (1, 1, 9, 9), difficult=text))})
    raw = read_voc("v", devkit, "trainval", Problems("refuse"))
    assert [annotation.ignore for annotation in raw.records[0].annotations] == [ignore]


def test_unusable_flag_is_counted(make_voc, voc_xml, voc_object):
    problems = Problems()
    devkit = make_voc({"a": voc_xml(voc_object("cat", (1, 1, 9, 9), difficult="perhaps"))})
    assert not read_voc("v", devkit, "trainval", problems).records[0].annotations[0].ignore
    assert problems.counts == {"unusable flag": 1}


def test_normalized_boxes(make_voc, voc_xml, voc_object):
    normalized, pixels = voc_object("cat", (0.1, 0.2, 0.5, 0.6)), voc_object("cat", (5, 5, 9, 9))
    devkit = make_voc({"a": voc_xml(normalized), "b": voc_xml(pixels)})
    problems = Problems("skip")
    assert [record.path.name for record in read_voc("v", devkit, "trainval", problems).records] == ["b.jpg"]
    assert problems.counts == {"normalized box": 1}
    (devkit / "Annotations/b.xml").write_text(voc_xml(normalized, normalized))
    with pytest.raises(DataError, match="Annotations: 3 of 3 boxes lie in 0..1 and look normalized"):
        read_voc("v", devkit, "trainval", Problems())


def test_two_names_of_one_class_are_counted(make_voc, voc_xml, voc_object):
    problems = Problems()
    text = voc_xml(voc_object("sofa", (1, 1, 9, 9)), voc_object("couch", (1, 1, 9, 9)))
    assert read_voc("v", make_voc({"a": text}), "trainval", problems).classes == VOC_CLASSES
    assert problems.counts == {"two names of one class": 1}

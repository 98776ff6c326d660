"""The readers of VOC devkits and XML folders."""

import os
from pathlib import Path

import pytest

from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.data.voc import VOC_CLASSES, read_voc, read_xml_folder
from earlyexit_ssd.errors import DataError
from tests.data.conftest import repaired_and_skipped, voc_object, voc_xml, write_photo


def read(devkit: Path, problems: Problems | None = None, split: str = "trainval") -> RawDataset:
    return read_voc("v", devkit, split, problems or Problems("refuse"))


def read_folder(root: Path, problems: Problems | None = None, **options: bool) -> RawDataset:
    """Read the XML files in the folder x. The photos are in the folder p."""
    return read_xml_folder("v", root / "x", root / "p", problems or Problems("refuse"), **options)


def paths_of(raw: RawDataset, folder: Path) -> list[str]:
    return [os.path.relpath(record.path, folder) for record in raw.records]


def test_one_based_pixels_become_zero_based_boxes(make_voc):
    """One box covers the whole photo of 60 x 40, the other its last pixel. VOC's classes have the names of COCO."""
    text = voc_xml(voc_object("sofa", (1, 1, 60, 40)), voc_object("dog", (60, 40, 60, 40), difficult=1))
    raw = read(make_voc({"a": text}))
    assert raw.classes == VOC_CLASSES and len(set(VOC_CLASSES)) == 20
    assert {"airplane", "couch", "dining table", "motorcycle", "potted plant", "tv"} < set(VOC_CLASSES)
    whole, pixel = raw.records[0].annotations
    assert (whole.box, raw.classes[whole.label - 1], whole.ignore) == ((0, 0, 60, 40), "couch", False)
    assert (pixel.box, raw.classes[pixel.label - 1], pixel.ignore) == ((59, 39, 60, 40), "dog", True)
    assert (raw.records[0].width, raw.records[0].height) == (60, 40)


def test_classes_are_those_that_occur_if_one_is_not_in_voc(make_voc):
    text = voc_xml(voc_object("stool", (1, 1, 9, 9)), voc_object("chair", (1, 1, 9, 9)))
    raw = read(make_voc({"a": text}))
    assert raw.classes == ("chair", "stool")
    assert [a.label for a in raw.records[0].annotations] == [2, 1]


def test_xml_folder_has_the_classes_that_occur(make_voc, tmp_path):
    """They are not VOC's twenty, even if all names are names of VOC."""
    devkit = make_voc({"b": voc_xml(), "a": voc_xml(voc_object("sofa", (1, 1, 9, 9)))})
    raw = read_xml_folder("v", devkit / "Annotations", devkit / "JPEGImages", Problems())
    assert (raw.classes, raw.open_classes) == (("couch",), True)
    assert paths_of(raw, devkit / "JPEGImages") == ["a.jpg", "b.jpg"]
    assert read(make_voc({"b": voc_xml()}, "negatives"), split="negatives").classes == ()
    with pytest.raises(DataError, match="no XML file here"):
        read_xml_folder("v", devkit / "JPEGImages", tmp_path, Problems())


def test_boxes_of_parts_are_not_read(make_voc):
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    box = "<bndbox><xmax>30</xmax><xmin>11</xmin><ymax>20.5</ymax><ymin>5</ymin></bndbox>"
    raw = read(make_voc({"a": voc_xml(f"<object><name>person</name>{part}{box}</object>")}))
    assert [a.box for a in raw.records[0].annotations] == [(10, 4, 30, 20.5)]


SIZE = "<size><width>60</width><height>40</height></size>"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("<annotation>", "unreadable annotation file", "no element found"),
        ("<html/>", "unreadable annotation file", "its root is 'html', expected annotation"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "unreadable annotation file", "multi-byte encodings"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "unreadable annotation file", "encoding"),
        (
            f"<annotation>{SIZE}<object><name>cat</name></object></annotation>",
            "malformed box",
            r"object 1 \(cat\) has xmin, ymin, xmax, ymax = \[None",
        ),
        (f"<annotation>{SIZE}<object/></annotation>", "annotation without a needed key", "object 1 has no <name>"),
        ("<annotation/>", "photo without width and height", "width None and height None"),
        (f"<annotation>{SIZE.replace('60', '0')}</annotation>", "photo without width and height", "'0'"),
    ],
)
def test_broken_files(make_voc, text, kind, value):
    devkit = make_voc({"good": voc_xml(), "bad": text})
    message = f"bad.xml.*{value}.*: {kind}"
    repaired, skipped = repaired_and_skipped(lambda problems: read(devkit, problems), {kind: 1}, message)
    dropped = kind == "unreadable annotation file"
    assert [record.path.stem for record in repaired.records] == (["good"] if dropped else ["good", "bad"])
    assert (repaired.records[-1].width, repaired.records[-1].height) == (60, 40)
    assert [record.path.stem for record in skipped.records] == ["good"]


def test_missing_xml_and_repeated_lines_are_counted(make_voc):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "ImageSets/Main/trainval.txt").write_text("a -1\n\na  1\nlost\n", encoding="utf-8-sig")
    problems = Problems()
    assert paths_of(read(devkit, problems), devkit) == ["JPEGImages/a.jpg"]
    assert problems.counts == {"duplicate photo id": 1, "unreadable annotation file": 1}


@pytest.mark.parametrize(
    ("listing", "listed", "others"),
    [
        ("my photo 1\nmy photo 2\n", ["my photo 1", "my photo 2"], []),
        ("my photo 1  1\nmy photo 2 -1\n", ["my photo 1", "my photo 2"], []),
        ("my photo 1\t0\r\n\r\nb\t1\r\n", ["my photo 1", "b"], []),
        ('"my photo 1"\n"b" 1\n', ["my photo 1", "b"], []),
        ("cup 1\ncup 2\n", ["cup 1", "cup 2"], ["cup"]),
        ("cup 1\ncup 0\n", ["cup 1", "cup 0"], ["cup"]),
        ("cup  1\ncup 1  1\n", ["cup", "cup 1"], []),
        ("cup 1\ncup 1 -1\n", ["cup", "cup 1"], []),
        ("sub/a 1\n", ["sub/a"], []),
    ],
)
def test_lines_of_a_split(make_voc, listing, listed, others):
    """Names may have spaces or quotes, and the last column of lists per class, even if a photo with the shorter name
    exists."""
    devkit = make_voc({"good": voc_xml()})
    for name in listed + others:
        (devkit / "Annotations" / name).parent.mkdir(exist_ok=True)
        (devkit / f"Annotations/{name}.xml").write_text(voc_xml())
        write_photo(devkit / f"JPEGImages/{name}.jpg")
    (devkit / "ImageSets/Main/trainval.txt").write_bytes(listing.encode("utf-8-sig"))
    assert paths_of(read(devkit), devkit / "JPEGImages") == [f"{name}.jpg" for name in listed]


def test_split_that_is_not_a_text_file_is_an_error(make_voc):
    devkit = make_voc({"a": voc_xml()})
    with pytest.raises(DataError, match=r"val.txt: no such list of photos, expected .*: trainval"):
        read(devkit, split="val")
    (devkit / "ImageSets/Main/latin.txt").write_bytes("b\u00e4r".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt: cannot be read as a list of photos .*; save it as text in UTF-8"):
        read(devkit, split="latin")
    (devkit / "ImageSets/Main/folder.txt").mkdir()
    os.mkfifo(devkit / "ImageSets/Main/pipe.txt")
    for split in ("folder", "pipe", "a" * 5000, "nul\0"):
        with pytest.raises(DataError, match="no such list of photos"):
            read(devkit, split=split)


@pytest.mark.parametrize("line", ["../JPEGImages/secret", "/etc/passwd", "nul\0", "x" * 5000, "pipe"])
def test_lines_without_an_annotation_file_are_counted(make_voc, line):
    devkit = make_voc({"a": voc_xml()})
    (devkit / "JPEGImages/secret.xml").write_text(voc_xml())
    os.mkfifo(devkit / "Annotations/pipe.xml")
    (devkit / "ImageSets/Main/trainval.txt").write_text(f"a\n{line}\n")
    problems = Problems()
    assert paths_of(read(devkit, problems), devkit) == ["JPEGImages/a.jpg"]
    assert sum(problems.counts.values()) == 1


@pytest.mark.parametrize(
    ("filename", "photos", "used", "kind"),
    [
        ("b.jpg", ("b.jpg",), "b.jpg", None),
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
def test_photo_of_an_annotation(tmp_path, filename, photos, used, kind):
    """<filename> precedes the name of the XML file. If neither is unique, no photo is used."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.xml").write_text(voc_xml(filename=filename))
    for name in (*photos, "../secret.jpg"):
        write_photo(tmp_path / "p" / name)

    def read_paths(problems):
        paths = paths_of(read_folder(tmp_path, problems), tmp_path / "p")
        problems.counts.pop("photo without annotations", None)
        return paths

    if kind:
        results = repaired_and_skipped(read_paths, {kind: 1}, f"a.xml: .*: {kind}")
        assert results == ([used] if used else [], [])
        if "secret" in filename:
            assert paths_of(read_folder(tmp_path, Problems(), allow_outside=True), tmp_path / "p") == [filename]
    else:
        assert read_paths(Problems("refuse")) == [used]


def test_files_that_are_left_out_are_counted(tmp_path, caplog):
    for name in ("a", "b", "sub/c", "sub/d", "e"):
        write_photo(tmp_path / f"p/{name}.jpg")
    (tmp_path / "x/sub").mkdir(parents=True)
    for name in ("a.xml", "b.XML", "sub/c.xml", "e.txt"):
        (tmp_path / "x" / name).write_text(voc_xml())
    (tmp_path / "x/sub/flat.xml").write_text(voc_xml(filename="e.jpg"))
    problems = Problems("refuse")
    raw = read_folder(tmp_path, problems)
    assert paths_of(raw, tmp_path / "p") == ["a.jpg", "b.jpg", "sub/c.jpg", "e.jpg"]
    assert problems.counts == {"photo without annotations": 1, "file of another kind": 1}
    problems.log("v")
    assert "v: 1 x photo without annotations (left out); the first: " in caplog.text and "sub/d.jpg" in caplog.text


def test_difficult_as_text(make_voc):
    problems, texts = Problems(), ("Unspecified", "0.0", "", "TRUE", "perhaps")
    objects = [voc_object("cat", (1, 1, 9, 9), difficult=text) for text in texts]
    raw = read(make_voc({"a": voc_xml(*objects)}), problems)
    assert [annotation.ignore for annotation in raw.records[0].annotations] == [False, False, False, True, False]
    assert problems.counts == {"unusable flag": 1}


def test_normalized_boxes(make_voc):
    normalized, pixels = voc_object("cat", (0.1, 0.2, 0.5, 0.6)), voc_object("cat", (5, 5, 9, 9))
    devkit = make_voc({"a": voc_xml(normalized), "b": voc_xml(pixels)})
    problems = Problems("skip")
    assert paths_of(read(devkit, problems), devkit) == ["JPEGImages/b.jpg"]
    assert problems.counts == {"normalized box": 1}
    (devkit / "Annotations/b.xml").write_text(voc_xml(normalized, normalized))
    with pytest.raises(DataError, match="Annotations: 3 of 3 boxes lie in 0..1 and look normalized"):
        read(devkit, Problems())


def test_two_names_of_one_class_are_counted(make_voc):
    problems = Problems()
    text = voc_xml(voc_object("sofa", (1, 1, 9, 9)), voc_object("couch", (1, 1, 9, 9)))
    assert read(make_voc({"a": text}), problems).classes == VOC_CLASSES
    assert problems.counts == {"two names of one class": 1}

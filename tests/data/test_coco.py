"""The reader of COCO files, and its errors for broken records."""

import json
import math
import os
from pathlib import Path

import pytest

from earlyexit_ssd.data.coco import read_coco
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.errors import DataError, shown
from tests.data.conftest import repaired_and_skipped, write_photo


def read(root: Path, problems: Problems | None = None, allow_outside: bool = False) -> RawDataset:
    return read_coco("tiny", root / "tiny.json", root / "tiny", problems or Problems("refuse"), allow_outside)


def ids(raw: RawDataset) -> list[int]:
    return [record.image_id for record in raw.records]


def read_all_modes(root: Path, kind: str, message: str, count: int = 1) -> tuple[RawDataset, list[int]]:
    """Return the data set of mode "repair" and the ids of its photos in mode "skip". Check mode "refuse"."""
    counts, message = {kind: count}, rf"tiny.json: {message}.*: {kind}"
    repaired, skipped = repaired_and_skipped(lambda problems: read(root, problems), counts, message)
    return repaired, ids(skipped)


def test_boxes_labels_and_flags(make_coco, tmp_path):
    make_coco()
    raw = read(tmp_path)
    assert (raw.classes, ids(raw)) == (("chair", "cat"), [10, 20, 30])
    chair, crowd, difficult = (annotation for record in raw.records for annotation in record.annotations)
    assert (chair.box, chair.label, chair.ignore, chair.area) == ((5, 6, 25, 36), 1, False, 500.0)
    assert (crowd.box, crowd.label, crowd.ignore, crowd.area) == ((30, 10, 40, 20), 2, True, None)
    assert difficult.ignore and raw.records[1].annotations == (difficult,)
    first = raw.records[0]
    assert (first.width, first.height, first.path) == (60, 40, tmp_path / "tiny" / "tiny10.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such annotation file; correct its path in DATA.DATASETS"),
        ("{", "cannot be read as JSON .*; export it again"),
        pytest.param("[" * 100_000, "cannot be read as JSON .*recursion", id="deep"),
        ([], "no list 'images'"),
        ({"annotations": 3}, "no list 'annotations'"),
        ({"categories": None}, "no list 'categories'"),
        ({"images": [3]}, r"images\[0\] is 3"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] .* expected an id .* and a name"),
        ({"categories": [{"id": [1], "name": "a"}]}, r"categories\[0\] .* expected"),
        ({"categories": [{"id": 1, "name": " \n"}]}, r"categories\[0\] .* expected"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "repeats id 1"),
    ],
)
def test_invalid_file_is_an_error_in_every_mode(tmp_path, on_bad, content, message):
    if isinstance(content, dict):
        content = {"images": [], "annotations": [], "categories": []} | content
    if content is not None:
        (tmp_path / "tiny.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, Problems(on_bad))
    assert "tiny.json" in str(error.value)
    assert "\n" not in str(error.value)


GOOD = {"id": 9, "image_id": 10, "category_id": 62, "bbox": [1, 1, 5, 5]}


@pytest.mark.parametrize(
    ("part", "kind", "value"),
    [
        *(({"category_id": i}, "unknown label", f"category_id {i}") for i in (0, 7)),
        ({"category_id": [62]}, "unknown label", r"category_id \[62\]"),
        ({"image_id": 99}, "annotation of an unknown photo", "image_id 99"),
        *(
            ({key: ...}, "annotation without a needed key", f"no '{key}'")
            for key in ("category_id", "bbox", "image_id")
        ),
        ({"bbox": [1, 2, 3]}, "malformed box", r"bbox \[1, 2, 3\]"),
        *(({"bbox": box}, "malformed box", "bbox ") for box in ([1, 2, "3", 4], None)),
    ],
)
def test_broken_annotations(make_coco, tmp_path, part, kind, value):
    """``...`` is a missing key."""
    entry = {key: item for key, item in {**GOOD, **part}.items() if item is not ...}
    make_coco(entries=(entry,))
    raw, skipped = read_all_modes(tmp_path, kind, f"annotation 9.* has {value}")
    assert (ids(raw), sum(len(record.annotations) for record in raw.records)) == ([10, 20, 30], 3)
    assert skipped == ([20, 30] if entry.get("image_id") == 10 else [10, 20, 30])


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"id": [9]}, "malformed annotation id"),
        ({"id": {}}, "malformed annotation id"),
        ({"area": math.inf}, "unusable area"),
        ({"area": math.nan}, "unusable area"),
        pytest.param({"area": 10**400}, "unusable area", id="huge area"),
        ({"area": 0}, "unusable area"),
        ({"area": "big"}, "unusable area"),
    ],
)
def test_objects_with_invalid_id_or_area_are_kept(make_coco, tmp_path, part, kind):
    make_coco(entries=({**GOOD, **part},))
    raw, skipped = read_all_modes(tmp_path, kind, "annotation ")
    kept = raw.records[0].annotations[2]
    assert (kept.box, kept.area) == ((1, 1, 6, 6), None)
    assert skipped == [20, 30]


def test_byte_order_mark_and_numbers_too_large_for_float(make_coco, tmp_path):
    make_coco(entries=({**GOOD, "bbox": [1, 1, 10**400, 5]},))
    (tmp_path / "tiny.json").write_text((tmp_path / "tiny.json").read_text(), encoding="utf-8-sig")
    assert read(tmp_path).records[0].annotations[2].box == (1, 1, math.inf, 6)


def test_duplicate_annotation_ids(make_coco, tmp_path):
    copy = {"id": 1, "image_id": 10, "category_id": 62, "bbox": [5, 6, 20, 30]}
    make_coco(entries=(copy, {**GOOD, "id": 1}))
    raw, skipped = read_all_modes(tmp_path, "duplicate annotation id", "annotation 1 .*repeats id 1, ", count=2)
    assert [a.box for a in raw.records[0].annotations] == [(5, 6, 25, 36), (30, 10, 40, 20), (1, 1, 6, 6)]
    assert skipped == [20, 30]


@pytest.mark.parametrize(("file_name", "kept"), [("tiny10.png", [10, 20, 30]), ("another.png", [20, 30])])
def test_duplicate_photo_ids(make_coco, tmp_path, file_name, kept):
    """A duplicate is dropped. If the two files differ, both are dropped, because the boxes may belong to either."""
    make_coco(photos=({"id": 10, "file_name": file_name, "width": 60, "height": 40},))
    raw, skipped = read_all_modes(tmp_path, "duplicate photo id", rf"images\[3\] \({file_name}\) repeats id 10, ")
    assert ids(raw) == skipped == kept


def test_warnings_in_skip_mode_name_what_is_left_out(make_coco, tmp_path, caplog):
    copy = {"id": 10, "file_name": "tiny10.png", "width": 60, "height": 40}
    no_photo, no_box = {"id": 8, "category_id": 62, "bbox": [1, 1, 5, 5]}, {"id": 7, "image_id": 20, "category_id": 62}
    make_coco(photos=(copy,), entries=({**GOOD, "image_id": 99}, {**GOOD, "id": 6, "bbox": 3}, no_photo, no_box))
    problems = Problems("skip")
    assert ids(read(tmp_path, problems)) == [30]
    problems.log("set")
    assert [message.split(";")[0] for message in caplog.messages] == [
        "set: 1 x duplicate photo id (duplicates dropped, or all entries if their files differ)",
        "set: 1 x annotation of an unknown photo (dropped)",
        "set: 1 x malformed box (photo left out)",
        "set: 2 x annotation without a needed key (photo left out, or dropped if the photo is unknown)",
    ]


@pytest.mark.parametrize("entry", [{"file_name": "tiny10.png"}, {"id": 40}, {"id": 40, "file_name": 5}])
def test_malformed_photo_entries(make_coco, tmp_path, entry):
    make_coco()
    tree = json.loads((tmp_path / "tiny.json").read_text())
    tree["images"].append(entry)
    (tmp_path / "tiny.json").write_text(json.dumps(tree))
    raw, skipped = read_all_modes(tmp_path, "malformed photo entry", r"images\[3\] is ")
    assert len(raw.records) == len(skipped) == 3 and len(raw.records[0].annotations) == 2


@pytest.mark.parametrize("width", [None, math.inf, math.nan, pytest.param(10**400, id="huge"), 0, "60", True])
def test_invalid_width_is_read_from_the_photo_file(make_coco, tmp_path, width):
    make_coco(photos=({"id": 40, "file_name": "unsized.png", "width": width, "height": 40},))
    message = rf"images\[3\] \(unsized.png\) has width {shown(width)}"
    raw, skipped = read_all_modes(tmp_path, "photo without width and height", message)
    assert (raw.records[3].width, raw.records[3].height) == (60, 40)
    assert skipped == [10, 20, 30]


@pytest.mark.parametrize("photo_id", ["a7", 2**63])
def test_ids_that_are_text_or_above_64_bits_are_replaced_by_numbers(make_coco, tmp_path, photo_id):
    image = {"id": photo_id, "file_name": "a7.png", "width": 60, "height": 40}
    make_coco(images=[image], annotations=[{**GOOD, "image_id": photo_id}])
    assert [(record.image_id, len(record.annotations)) for record in read(tmp_path).records] == [(1, 1)]


@pytest.mark.parametrize("flags", [{"iscrowd": "0"}, {"ignore": "false"}, {"difficult": "No"}, {"iscrowd": None}])
def test_flags_as_text(make_coco, tmp_path, flags):
    make_coco(entries=({**GOOD, **flags}, {**GOOD, "id": 8, "ignore": "TRUE"}))
    assert [annotation.ignore for annotation in read(tmp_path).records[0].annotations[2:]] == [False, True]


def test_normalized_boxes(make_coco, tmp_path):
    """xyxy counts as well as xywh. Boxes without area do not count. A single normalized box is dropped."""
    boxes = ([0.1, 0.2, 0.34, 0.33], [0.4, 0.4, 0.9, 0.9], [0, 0, 1, 1], [0, 0, 0, 0])
    entries = [{**GOOD, "id": i, "bbox": box} for i, box in enumerate(boxes)]
    make_coco(annotations=entries)
    with pytest.raises(DataError, match=r"tiny.json: 3 of 4 boxes lie in 0..1 and look normalized"):
        read(tmp_path, Problems())
    make_coco(entries=(entries[0],))
    problems = Problems()
    assert len(read(tmp_path, problems).records[0].annotations) == 2
    assert problems.counts == {"normalized box": 1}
    assert "annotation 0 of photo tiny10.png has bbox [0.1, 0.2, 0.34, 0.33]" in problems.examples["normalized box"]


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "absolute"])
def test_photos_outside_the_folder(make_coco, tmp_path, name):
    """Photos outside are not opened unless allowed. Inside, absolute names and ../ are allowed."""
    secret, folder = tmp_path / "secret.png", tmp_path / "tiny"
    for path in (secret, folder / "tiny20.png", folder / "tiny30.png"):
        write_photo(path)
    names = {10: str(secret) if name == "absolute" else name, 20: str(folder / "tiny20.png"), 30: "sub/../tiny30.png"}
    images = [{"id": i, "file_name": file_name, "width": 60, "height": 40} for i, file_name in names.items()]
    del images[0]["width"]  # it would be read from the photo
    make_coco(images=images, annotations=[GOOD])
    raw, skipped = read_all_modes(tmp_path, "photo outside the photo folder", r"images\[0\] has file_name .*secret.png")
    assert [record.path for record in raw.records] == [folder / f"tiny{i}.png" for i in (20, 30)]
    assert skipped == [20, 30]
    raw = read(tmp_path, Problems(), allow_outside=True)
    assert raw.records[0].path.resolve() == secret.resolve()
    assert (raw.records[0].width, len(raw.records[0].annotations)) == (60, 1)


def test_class_names(make_coco, tmp_path):
    """Line breaks become spaces. Two names of one class are counted."""
    make_coco(categories=[{"id": 62, "name": "a\n chair"}, {"id": 3, "name": " cat"}])
    assert read(tmp_path).classes == ("a chair", "cat")
    make_coco(categories=[{"id": 62, "name": "sofa"}, {"id": 3, "name": "Couch"}])
    read_all_modes(tmp_path, "two names of one class", "classes 'sofa' and 'Couch'")


def test_annotations_that_are_not_a_regular_file(tmp_path):
    """Reading a pipe would never end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}: no such annotation file"):
            read_coco("s", path, tmp_path, Problems())

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import get_args

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import class_names, load_dataset
from earlyexit_ssd.data.dataset import Labels
from earlyexit_ssd.data.folder import photo_path, read_photo_folder
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.errors import DataError
from tests.data.conftest import write_photo


@pytest.fixture
def folder(tmp_path):
    """A folder with two photos, one of them in a subfolder, a hidden photo and a text file."""
    root = tmp_path / "photos"
    write_photo(root / "b.png", (60, 40))
    write_photo(root / "deep" / "a.JPG", (30, 50))
    write_photo(root / ".thumbnails" / "b.png")
    (root / "notes.txt").touch()
    return root


def config(root, **data):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(root)
    cfg.DATA.DATASETS = (("mine", "", "photos"),)
    cfg.DATA.TRAIN = ("mine",)
    cfg.DATA.update(data)
    return cfg


def write_coco(root, name, annotations):
    """Write a COCO data set of one photo. Return its entry of DATA.DATASETS."""
    write_photo(root / name / "a.png", (60, 40))
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "chair"}]}
    (root / f"{name}.json").write_text(json.dumps(content))
    return name, f"{name}.json", name


def test_records_have_sizes_and_no_boxes(folder):
    raw = read_photo_folder("mine", folder, Problems("refuse"))
    assert [(record.image_id, record.width, record.height) for record in raw.records] == [(1, 60, 40), (2, 30, 50)]
    assert [record.path.relative_to(folder).as_posix() for record in raw.records] == ["b.png", "deep/a.JPG"]
    assert not raw.labelled and not any(record.annotations for record in raw.records)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"data set 'mine' has no photo here .* expected .jpg, "),
        ("a.txt", "a.txt: data set 'mine' is a file, expected a folder of photos"),
        ("lost", "lost: data set 'mine' not found"),
    ],
)
def test_folder_without_photos_is_an_error(tmp_path, path, message):
    (tmp_path / "a.txt").touch()
    cfg = config(tmp_path, DATASETS=(("mine", "", path),), CLASSES=("chair",))
    with pytest.raises(DataError, match=message):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels="optional")


def test_broken_photo_is_dropped_or_refused(folder):
    (folder / "c.jpg").write_bytes(b"no picture")
    assert len(read_photo_folder("mine", folder, Problems("repair")).records) == 2
    with pytest.raises(DataError, match="c.jpg"):
        read_photo_folder("mine", folder, Problems("refuse"))


def test_unlabelled_photos_load_only_if_labels_are_optional(folder, tmp_path, caplog):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    datasets = (write_coco(tmp_path, "theirs", [box]), ("mine", "", "photos"))
    cfg = config(tmp_path, CLASSES=("chair", "cat"), DATASETS=datasets)
    dataset = load_dataset(cfg, "mine", train=True, labels="optional")
    assert dataset.classes == ("chair", "cat") and len(dataset) == 2
    assert "has no box" not in caplog.text
    assert len(load_dataset(cfg, ("theirs", "mine"), train=True, labels="optional")) == 3
    for names in ("mine", ("theirs", "mine")):
        with pytest.raises(DataError, match="'mine' is a folder of photos without labels.*LOSS.SUPERVISION teacher"):
            load_dataset(cfg, names, train=True)
    with pytest.raises(
        DataError,
        match="'mine' is a folder .*; use data sets with boxes, such as those of `earlyexit predict --save labels`$",
    ):
        load_dataset(cfg, "mine")  # every detection would count as a false positive


@pytest.mark.parametrize("labels", [*get_args(Labels), "require"])
def test_labels_argument_of_load_dataset(folder, tmp_path, labels):
    """The set "mine" has no annotations, the set "empty" has no chair."""
    cfg = config(tmp_path, DATASETS=(write_coco(tmp_path, "empty", []), ("mine", "", "photos")), CLASSES=("chair",))
    accepted = set()
    for name in ("mine", "empty"):
        with contextlib.suppress(DataError):
            load_dataset(cfg, name, labels=labels)
            accepted.add(name)
    expected = {"replaced": {"mine"}, "optional": {"mine", "empty"}, "annotated": {"empty"}}
    assert accepted == expected.get(labels, set())


def test_unlabelled_photos_need_classes(folder, tmp_path):
    cfg = config(tmp_path)
    with pytest.raises(DataError, match="mine has no classes; set DATA.CLASSES"):
        load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels="optional")
    with pytest.raises(DataError, match="mine has no classes; set DATA.CLASSES"):
        class_names(cfg)


def test_every_file_is_read_or_counted(tmp_path, caplog):
    """Suffixes may have any case. Linked folders are read once. A pipe counts as another kind of file."""
    root = tmp_path / "photos"
    for name in ("a.jpg", "b.AVIF", "c.gif", "d.jpe"):
        write_photo(root / name)
    shutil.copy(root / "a.jpg", root / "e.jfif")
    write_photo(tmp_path / "elsewhere/f.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    for name in "strange":  # these links are left out, whatever order the file system lists them in
        (root / f"s{name}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    (root / "clip.mp4").touch()
    problems = Problems("refuse")
    raw = read_photo_folder("mine", root, problems)
    assert [record.path.name for record in raw.records] == ["a.jpg", "b.AVIF", "c.gif", "d.jpe", "e.jfif", "f.jpg"]
    assert raw.records[-1].path.parent == root / "linked"
    assert problems.counts == {"file of another kind": 2}
    problems.log("mine")
    assert "mine: 2 x file of another kind (left out); the first: " in caplog.text


@pytest.mark.parametrize(
    ("name", "inside"),
    [("a.jpg", "a.jpg"), ("b/../a.jpg", "a.jpg"), ("b/a.jpg", "b/a.jpg"), ("/photos/p/a.jpg", "a.jpg")]
    + [(name, None) for name in ("../a.jpg", "b/../../a.jpg", "/photos/a.jpg", "/photos/p2/a.jpg", "..")],
)
def test_photo_paths_stay_in_their_folder(name, inside):
    folder = Path("/photos/p")
    assert photo_path(folder, name, False) == (None if inside is None else folder / inside)
    assert photo_path(folder, name, True) is not None

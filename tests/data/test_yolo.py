"""The reader of YOLO data sets."""

from pathlib import Path

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import DetectionDataset, load_dataset
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.data.yolo import read_yolo
from earlyexit_ssd.errors import DataError
from tests.data.conftest import write_photo

YAML = "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cup, dinner mug]\n"
CUP = (15.0, 8.0, 45.0, 32.0)  # 0.5 0.5 0.5 0.6 of 60 x 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Photos of 60 x 40: train a (one cup), b (no label file); val c."""
    for name in ("train/a", "train/b", "val/c"):
        write_photo(tmp_path / f"yolo/images/{name}.png")
    write(tmp_path, "labels/train/a.txt", "0 0.5 0.5 0.5 0.6\n")
    write(tmp_path, "data.yaml", YAML)
    return tmp_path / "yolo"


def write(root: Path, name: str, text: str) -> None:
    path = (root if root.name == "yolo" else root / "yolo") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(root: Path, split: str = "train", problems: Problems | None = None, outside: bool = False) -> RawDataset:
    return read_yolo("y", root / "data.yaml", split, problems or Problems("refuse"), outside)


def names(raw: RawDataset | DetectionDataset) -> list[str]:
    return [record.path.name for record in raw.records]


def test_records_of_a_split(root):
    problems = Problems("refuse")
    raw = read(root, problems=problems)
    assert raw.classes == ("cup", "dinner mug") and raw.labelled and not raw.open_classes
    first, second = raw.records
    assert (first.path, first.width, first.height) == (root / "images/train/a.png", 60, 40)
    (cup,) = first.annotations
    assert (cup.box, cup.label, cup.id, cup.ignore) == (pytest.approx(CUP), 1, 1, False)
    assert second.annotations == () and problems.counts == {"photo without a label file": 1}
    assert names(read(root, "val")) == ["c.png"]


@pytest.mark.parametrize(
    "source",
    ["images", "[images/train, images/val]", "all.txt", "[all.txt]", "../images", "[images/train, images/val.txt]"],
)
def test_sources_of_a_split(root, source):
    """A source is a folder with subfolders, a text file with absolute paths or paths relative to its folder, or a list
    of these. Roboflow writes ../ before a folder beside data.yaml."""
    write(root, "all.txt", f"\ufeff./images/train/a.png\r\n\nimages/train/b.png\n{root}/images/val/c.png")
    write(root, "images/val.txt", "val/c.png\n")
    write(root, "data.yaml", f"train: {source}\nnames: {{1: mug, 0: cup}}\n")
    raw = read(root)
    assert names(raw) == ["a.png", "b.png", "c.png"] and raw.classes == ("cup", "mug")
    assert raw.records[0].annotations[0].box == pytest.approx(CUP)


@pytest.mark.parametrize("above", ["", "images/yolo"])  # a folder images above the data set stays
@pytest.mark.parametrize(
    ("photo", "labels"),
    [
        ("train/images/x.png", "train/labels/x.txt"),
        ("images/images/x.y.png", "images/labels/x.y.txt"),
        ("photos/x.png", "photos/x.txt"),
        ("images/a/images.png", "labels/a/images.txt"),
    ],
)
def test_label_path(root, photo, labels, above):
    root /= above
    write_photo(root / photo)
    write(root, labels, "1 0.5 0.5 1 1")
    write(root, "data.yaml", f"train: {Path(photo).parent.as_posix()}\nnames: [cup, mug]")
    (record,) = (record for record in read(root).records if record.path == root / photo)
    assert record.source == root / labels
    assert [(annotation.label, annotation.box) for annotation in record.annotations] == [(2, (0, 0, 60, 40))]


def test_polygons_become_bounding_boxes_and_keypoints_are_ignored(root):
    write(root, "labels/train/a.txt", "0 0.25 0.5 0.5 0.2 0.75 0.5 0.5 0.8\n1 -0.004 0.1 0.5 1.009 0.5 0.1\n")
    first, second = read(root).records[0].annotations
    assert (first.box, second.box) == (pytest.approx(CUP), pytest.approx((0, 4, 30, 40)))
    write(root, "data.yaml", YAML + "kpt_shape: [2, 2]\n")
    write(root, "labels/train/a.txt", "0 0.5 0.5 0.5 0.6 7 0.2 0.3 0.4\n")
    assert read(root).records[0].annotations[0].box == pytest.approx(CUP)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        *((line, "malformed label line") for line in ("0 0.5 0.5 0.5", "0 0.5 0.5 0.5 0.5 0.9", "cup 0.5 0.5 0.5 0.5")),
        *((f"{label} 0.5 0.5 0.5 0.5", "unknown label") for label in ("2", "-1", "0.5", "nan")),
        *((line, "box with NaN or infinity") for line in ("0 nan 0.5 0.5 0.5", "0 0.5 0.5 inf 0.5")),
        *((line, "box in pixels") for line in ("0 1.5 0.5 0.5 0.5", "0 0.5 0.5 -0.5 0.5")),
        ("0,0.5,0.5,0.5,0.5", "malformed label line"),
        ("0 0.1 0.1 0.2 0.2", "duplicate label line"),
        ("0 0.5 0.5 0 0.5", "box without area"),
        ("0 0.9 0.5 0.4 0.5", "box outside the photo"),
    ],
)
def test_broken_lines_are_counted_or_refused(root, line, kind, caplog):
    write(root, "labels/train/a.txt", f"0 0.1 0.1 0.2 0.2\n{line}\n1.0 0.3 0.3 0.2 0.2\n")
    cfg = get_cfg()
    cfg.DATA.ROOT, cfg.DATA.DATASETS, cfg.DATA.TRAIN = str(root.parent), (("y", "yolo/data.yaml", "train"),), ("y",)
    left = 3 if kind == "box outside the photo" else 2
    assert [len(record.annotations) for record in load_dataset(cfg, "y").records] == [left, 0]
    assert f"1 x {kind}" in caplog.text and "a.txt" in caplog.text
    cfg.DATA.ON_BAD = "skip"
    assert names(load_dataset(cfg, "y", labels="optional")) == ["b.png"]
    cfg.DATA.ON_BAD = "refuse"
    with pytest.raises(DataError, match=f"a.txt: .*{kind}"):
        load_dataset(cfg, "y")


def test_boxes_in_pixels_are_an_error_in_every_mode(root, on_bad):
    write(root, "labels/train/a.txt", "0 30 20 30 24\n1 10 20 10 24\n")
    with pytest.raises(DataError, match=r"data.yaml: 2 of 2 boxes .* expected normalized boxes; divide"):
        read(root, problems=Problems(on_bad))


def test_broken_files_are_counted(root):
    write(root, "images/train/d.png", "no picture")
    write(root, "images/train/notes.md", "")
    (root / "labels/train/b.txt").write_bytes(b"\xff\xfe\xff")
    problems = Problems()
    assert names(read(root, problems=problems)) == ["a.png"]
    kinds = ("unreadable annotation file", "unreadable photo file", "file of another kind")
    assert problems.counts == dict.fromkeys(kinds, 1)


def test_photos_outside_are_read_if_allowed(root, tmp_path):
    write_photo(tmp_path / "secret/s.png")
    for key, problem in (("train: ../secret", "secret', outside"), (f"path: {tmp_path}\ntrain: secret", "outside")):
        write(root, "data.yaml", f"{key}\nnames: [cup]")
        with pytest.raises(DataError, match=problem):
            read(root, problems=Problems())
        assert names(read(root, outside=True)) == ["s.png"]
    write(root, "data.yaml", "train: list.txt\nnames: [cup]")
    write(root, "list.txt", "../secret/s.png\nimages/train/a.png\nimages/lost.png")
    for problems in (Problems("skip"), Problems()):
        assert names(read(root, problems=problems)) == ["a.png"]
    assert problems.counts == {"photo outside the photo folder": 1, "missing photo file": 1}
    assert names(read(root, problems=Problems(), outside=True)) == ["s.png", "a.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"is \[1\], expected the keys names"),
        ("train: images", "names is None, expected a list of classes"),
        ("train: images\nnames: []", r"names is \[\], expected"),
        ("train: images\nnames: {0: cup, 2: mug}", "names is .*expected a list of classes, or 0: first"),
        ("train: images\nnames: [cup, cup]", "names has 'cup' as class 0 and 1; name it once"),
        ("train: images\nnames: [cup]\nnc: 5", "nc is 5, but names has 1 classes"),
        ("train: images\nnames: [yes]", "names has True as class 0, expected text; put it in quotes"),
        ("names: [cup]\nval: images", "train is None, expected a folder of photos"),
        ("names: [cup]\ntrain: [images, 5]", r"train is \['images', 5\], expected a folder"),
        ("names: [cup]\ntrain: imagez", "imagez, expected a folder of photos or a text file"),
        ("names: [cup]\ntrain: images/train/a.png", "a.png, expected a folder of photos or a text file"),
        ("names: [cup]\ntrain: labels", r"train has no photo, expected .jpg"),
        ("names: [cup]\ntrain: a\ntrain: b", "data.yaml: not valid YAML .*the key 'train' is given twice"),
        ("names: [cup]\npath: 5\ntrain: images", "path is 5"),
        ("names: [cup]\ntrian: images", r"train is None, .*\(did you mean 'trian'\?\)"),
    ],
)
def test_invalid_data_yaml_is_a_one_line_error(root, text, message):
    write(root, "data.yaml", text)
    with pytest.raises(DataError, match=message) as error:
        read(root, problems=Problems())
    assert len(str(error.value)) < 300 and "data.yaml" in str(error.value)

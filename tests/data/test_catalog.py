"""Data sets by name, and the folders in which they are searched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import catalog, records
from earlyexit_ssd.data import catalog as builtin
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _own_catalog(monkeypatch):
    monkeypatch.setattr(catalog, "_LOADERS", dict(catalog._LOADERS))
    monkeypatch.delenv(catalog.ROOT_VARIABLE, raising=False)


def load(name, cfg, on_bad="repair"):
    return catalog.load(name, cfg.DATA, Problems(on_bad))


def test_root_is_the_config_key_then_the_variable_then_datasets(monkeypatch):
    data = get_cfg().DATA
    assert catalog.dataset_root(data) == Path("datasets")
    monkeypatch.setenv(catalog.ROOT_VARIABLE, "/elsewhere")
    assert catalog.dataset_root(data) == Path("/elsewhere")
    data.ROOT = "/here"
    assert catalog.dataset_root(data) == Path("/here")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'coco_2017_tran' \(did you mean 'coco_2017_train'\?\)"):
        catalog.get("coco_2017_tran")
    with pytest.raises(ConfigError, match=r"registered: .*furniture_test"):
        catalog.get("zzz")


def test_register(tmp_path):
    raw = RawDataset("mine", ("a",), ())
    catalog.register("mine", lambda root, data, problems: raw)
    assert load("mine", get_cfg()) is raw
    with pytest.raises(DataError, match="'mine' is registered already"):
        catalog.register("mine", lambda root, data, problems: raw)


def test_register_coco(make_coco, tmp_path):
    cfg = make_coco()
    catalog.register_coco("relative", "tiny.json", "tiny")
    catalog.register_coco("absolute", tmp_path / "tiny.json", tmp_path / "tiny")
    assert len(load("relative", cfg).records) == 3
    cfg.DATA.ROOT = "/nowhere"
    assert len(load("absolute", cfg).records) == 3


def test_register_voc(make_voc, voc_xml, tmp_path):
    make_voc({"a": voc_xml()})
    catalog.register_voc("myvoc", "VOCdevkit/VOC2012", "trainval")
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path)
    assert len(load("myvoc", cfg).records) == 1


def test_datasets_of_the_configuration(make_coco, make_voc, voc_xml, voc_object):
    cfg = make_coco()
    make_voc({"a": voc_xml(voc_object("chair", (1, 1, 5, 5))), "b": voc_xml()}, split="mysplit", folder="kit")
    cfg.DATA.DATASETS = (
        ("one", "tiny.json", "tiny"),
        ("two", "kit", "mysplit"),
        ("three", "kit/Annotations", "kit/JPEGImages"),
    )
    for name, count in (("one", 3), ("two", 2), ("three", 2)):
        raw = load(name, cfg)
        assert (raw.name, len(raw.records)) == (name, count)


def test_user_format_precedes_built_in_formats(make_coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(records, "FORMATS", dict(records.FORMATS))
    monkeypatch.setattr(catalog, "FORMATS", records.FORMATS)
    monkeypatch.setitem(records.REPAIRS, "empty row", "")  # the decorator adds it; monkeypatch removes it

    @records.register_format(
        "rows", lambda annotations, path: path.suffix == ".csv", names_split=True, empty_row="dropped"
    )
    def read_rows(name, table, split, problems, allow_outside):
        problems.add("empty row", f"{table}: row 2")
        return RawDataset(name, (split,), ())

    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("mine", "rows.csv", "mugs"))
    with pytest.raises(DataError, match=r"rows.csv: data set 'mine' not found"):
        load("mine", cfg)
    (tmp_path / "rows.csv").touch()
    problems = Problems()
    assert catalog.load("mine", cfg.DATA, problems) == RawDataset("mine", ("mugs",), ())
    problems.log("mine")
    assert "1 x empty row (dropped); the first: " in caplog.text
    assert load("tiny", cfg).classes == ("chair", "cat")


def test_datasets_of_the_configuration_precede_built_in_datasets(make_coco):
    cfg = make_coco(name="furniture_test")
    assert len(load("furniture_test", cfg).records) == 3


@pytest.mark.parametrize(
    ("entries", "wrong"),
    [
        (("a", "b", "c"), "'a'"),
        ((("tiny", "tiny.json", "tiny"), ("a", "b")), r"\('a', 'b'\)"),
        (((1, "b", "c"),), r"\(1, 'b', 'c'\)"),
    ],
)
def test_datasets_of_the_configuration_are_triples(make_coco, entries, wrong):
    """The error is raised for every name that is loaded."""
    cfg = make_coco()
    cfg.DATA.DATASETS = entries
    with pytest.raises(ConfigError, match=rf"DATA.DATASETS has {wrong}, expected triples") as error:
        load("tiny", cfg)
    assert "\n" not in str(error.value)


def test_datasets_of_the_configuration_have_unique_names(make_coco):
    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("tiny", "other.json", "other"))
    with pytest.raises(ConfigError, match="DATA.DATASETS has two data sets named 'tiny'; give each its own name"):
        load("tiny", cfg)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("coco_2017_train", "coco/annotations/instances_train2017.json"),
        ("furniture_calib", "furniture/annotations/instances_calib.json"),
        ("voc2012_animals_test", "voc2012_animals/annotations/instances_test.json"),
        ("voc_2007_test", "VOCdevkit/VOC2007/ImageSets/Main/test.txt"),
        ("voc_2012_train", "VOCdevkit/VOC2012/ImageSets/Main/train.txt"),
        ("voc_xml_sample_trainval", "voc_xml_sample/VOCdevkit/VOC2012"),
    ],
)
def test_missing_folder_error_names_the_path_and_the_fix(tmp_path, name, missing):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path)
    with pytest.raises(DataError, match=f"{missing}: data set '{name}' not found") as error:
        load(name, cfg)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "DATA.ROOT" in message
    assert "EARLYEXIT_SSD_DATASETS" in message
    assert ("DATA.DOWNLOAD" in message) == name.startswith("voc_20")


def test_missing_photo_folder(make_coco, tmp_path):
    cfg = make_coco()
    cfg.DATA.DATASETS = (("tiny", "tiny.json", "lost"),)
    with pytest.raises(DataError, match="lost: data set 'tiny' not found"):
        load("tiny", cfg)


# The built-in data sets: names, download, and rendering.


def test_built_in_names():
    own = ("synthetic_chairs", "voc2012_animals", "furniture")
    expected = {f"{name}_{split}" for name in own for split in ("train", "calib", "test")}
    expected |= {"coco_2017_train", "coco_2017_val", "voc_2007_trainval", "voc_2007_test", "voc_xml_sample_trainval"}
    expected |= {f"voc_2012_{split}" for split in ("train", "val", "trainval")}
    assert expected <= set(catalog._LOADERS)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path / "root")
    return cfg


def test_download_by_torchvision(cfg, make_voc, voc_xml, tmp_path, monkeypatch):
    """A fake of torchvision's class unpacks a devkit."""
    devkit = make_voc({"a": voc_xml()}, split="test", folder="unpacked/VOC2007")
    calls = []

    def download(root, year, image_set, download):
        calls.append((year, image_set, download))
        assert not (tmp_path / "root" / "VOCdevkit").exists(), "a partly unpacked devkit is not in its final folder"
        shutil.copytree(devkit, Path(root) / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    for _ in range(2):
        raw = catalog.load("voc_2007_test", cfg.DATA, Problems())
        assert [record.path.name for record in raw.records] == ["a.jpg"]
    assert calls == [("2007", "test", True)], "an existing devkit is not downloaded again"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["VOCdevkit"], "no temporary folder is left"


def test_second_split_is_added_to_the_devkit(cfg, make_voc, voc_xml, tmp_path, monkeypatch):
    """VOC2007's two archives unpack into one folder."""
    devkits = {
        split: make_voc({name: voc_xml()}, split=split, folder=f"unpacked/{split}/VOC2007")
        for name, split in (("a", "test"), ("b", "trainval"))
    }

    def download(root, year, image_set, download):
        shutil.copytree(devkits[image_set], Path(root) / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    for split, photo in (("test", "a.jpg"), ("trainval", "b.jpg"), ("test", "a.jpg")):
        raw = catalog.load(f"voc_2007_{split}", cfg.DATA, Problems())
        assert [record.path.name for record in raw.records] == [photo]


@pytest.mark.parametrize("failure", [OSError("<urlopen error no\nnetwork>"), RuntimeError("File not found")])
def test_failed_download_is_a_one_line_error(cfg, monkeypatch, failure):
    def download(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    with pytest.raises(DataError, match=r"VOC 2012 could not be downloaded to .*check the network") as error:
        catalog.load("voc_2012_train", cfg.DATA, Problems())
    assert "\n" not in str(error.value)


def test_synthetic_scenes_are_rendered_with_the_settings(cfg, make_coco, tmp_path, monkeypatch):
    make_coco()
    calls = []

    def render(root, sizes, image_size, seed):
        calls.append((root, sizes, image_size, seed))
        folder = root / "synthetic_chairs"
        (folder / "annotations").mkdir(parents=True)
        shutil.copy(tmp_path / "tiny.json", folder / "annotations" / "instances_calib.json")
        shutil.copytree(tmp_path / "tiny", folder / "calib")
        return folder

    monkeypatch.setattr(builtin, "ensure_synthetic", render)
    cfg.DATA.SYNTHETIC.SIZES = (3, 2, 1)
    cfg.DATA.SYNTHETIC.SEED = 5
    raw = catalog.load("synthetic_chairs_calib", cfg.DATA, Problems())
    assert calls == [(tmp_path / "root", (3, 2, 1), 192, 5)]
    assert raw.records[0].path == tmp_path / "root" / "synthetic_chairs" / "calib" / "tiny10.png"

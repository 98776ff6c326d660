"""Data sets by name, and the folders in which they are searched."""

import shutil
from copy import copy
from pathlib import Path

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import catalog, records
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.data.records import RawDataset
from earlyexit_ssd.errors import ConfigError, DataError, EarlyExitError
from tests.data.conftest import voc_object, voc_xml


@pytest.fixture(autouse=True)
def _own_catalog(monkeypatch):
    monkeypatch.setattr(catalog, "_LOADERS", copy(catalog._LOADERS))
    monkeypatch.delenv(catalog.ROOT_VARIABLE, raising=False)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path / "root")
    return cfg


def load(name, cfg):
    return catalog.load(name, cfg.DATA, Problems())


def names(raw):
    return [record.path.name for record in raw.records]


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


def test_register(make_coco, make_voc, tmp_path):
    cfg, raw = make_coco(), RawDataset("mine", ("a",), ())
    make_voc({"a": voc_xml()})
    catalog.register("mine", lambda root, data, problems: raw)
    catalog.register_coco("relative", "tiny.json", "tiny")
    catalog.register_coco("absolute", tmp_path / "tiny.json", tmp_path / "tiny")
    catalog.register_voc("myvoc", "VOCdevkit/VOC2012", "trainval")
    assert load("mine", cfg) is raw
    assert len(load("relative", cfg).records) == 3
    assert names(load("myvoc", cfg)) == ["a.jpg"]
    cfg.DATA.ROOT = "/nowhere"
    assert len(load("absolute", cfg).records) == 3
    with pytest.raises(EarlyExitError, match="data set 'mine' is registered already"):
        catalog.register("mine", lambda root, data, problems: raw)


def test_datasets_of_the_configuration(make_coco, make_voc):
    cfg = make_coco(name="furniture_test")  # it precedes the built-in data set
    make_voc({"a": voc_xml(voc_object("chair", (1, 1, 5, 5))), "b": voc_xml()}, split="mysplit", folder="kit")
    cfg.DATA.DATASETS = (
        *cfg.DATA.DATASETS,
        ("two", "kit", "mysplit"),
        ("three", "kit/Annotations", "kit/JPEGImages"),
    )
    for name, count in (("furniture_test", 3), ("two", 2), ("three", 2)):
        raw = load(name, cfg)
        assert (raw.name, len(raw.records)) == (name, count)


def test_user_format_precedes_built_in_formats(make_coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(records, "DATA_FORMATS", copy(records.DATA_FORMATS))
    monkeypatch.setattr(catalog, "DATA_FORMATS", records.DATA_FORMATS)
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


TINY = ("tiny", "tiny.json", "tiny")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("a", "b", "c"), "has 'a', expected triples"),
        ((TINY, ("a", "b")), r"has \('a', 'b'\), expected triples"),
        (((1, "b", "c"),), r"has \(1, 'b', 'c'\), expected triples"),
        ((TINY, ("tiny", "other.json", "other")), "has two data sets named 'tiny'; give each its own name"),
    ],
)
def test_datasets_of_the_configuration_are_triples_with_unique_names(make_coco, entries, message):
    """The error is raised for every name that is loaded."""
    cfg = make_coco()
    cfg.DATA.DATASETS = entries
    with pytest.raises(ConfigError, match=f"DATA.DATASETS {message}") as error:
        load("tiny", cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("coco_2017_train", "coco/annotations/instances_train2017.json"),
        ("coco_2017_val", "coco/annotations/instances_val2017.json"),
        ("furniture_calib", "furniture/annotations/instances_calib.json"),
        ("voc2012_animals_test", "voc2012_animals/annotations/instances_test.json"),
        *((f"voc_2007_{split}", f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt") for split in ("trainval", "test")),
        *((f"voc_2012_{split}", f"VOC2012/ImageSets/Main/{split}.txt") for split in ("train", "val", "trainval")),
        ("voc_xml_sample_trainval", "voc_xml_sample/VOCdevkit/VOC2012"),
        ("mine", "tiny.json"),
        ("lost", "lost"),
    ],
)
def test_missing_folder_error_names_the_path_and_the_fix(cfg, name, missing):
    Path(cfg.DATA.ROOT).mkdir()
    Path(cfg.DATA.ROOT, "there.json").touch()
    cfg.DATA.DATASETS = (("mine", "tiny.json", "tiny"), ("lost", "there.json", "lost"))
    with pytest.raises(DataError, match=f"{missing}: data set '{name}' not found") as error:
        load(name, cfg)
    assert f"{cfg.DATA.ROOT}/" in str(error.value)
    assert "set DATA.ROOT or the environment variable EARLYEXIT_SSD_DATASETS" in str(error.value)
    assert ("DATA.DOWNLOAD" in str(error.value)) == name.startswith("voc_20")


def test_download_by_torchvision(cfg, make_voc, tmp_path, monkeypatch):
    """A fake of torchvision's class unpacks devkits. VOC2007's two archives unpack into one folder."""
    devkits = {
        split: make_voc({name: voc_xml()}, split=split, folder=f"unpacked/{split}/VOC2007")
        for name, split in (("a", "test"), ("b", "trainval"))
    }
    root, calls = tmp_path / "root", []

    def download(folder, year, image_set, download):
        calls.append((year, image_set, download))
        assert (root / ".VOC2007.lock").is_file(), "another process has to wait"
        assert not (root / f"VOCdevkit/VOC2007/ImageSets/Main/{image_set}.txt").exists(), "unpacked elsewhere"
        shutil.copytree(devkits[image_set], Path(folder) / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    for split, photo in (("test", "a.jpg"), ("trainval", "b.jpg"), ("test", "a.jpg")):
        assert names(load(f"voc_2007_{split}", cfg)) == [photo]
        assert [path.name for path in root.iterdir()] == ["VOCdevkit"], "no temporary folder is left"
    assert calls == [("2007", "test", True), ("2007", "trainval", True)], "an existing split is not downloaded again"


@pytest.mark.parametrize("failure", [OSError("<urlopen error no\nnetwork>"), RuntimeError("File not found")])
def test_failed_download_is_a_one_line_error(cfg, monkeypatch, failure):
    def download(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    with pytest.raises(DataError, match=r"VOC 2012 could not be downloaded to .*check the network") as error:
        load("voc_2012_train", cfg)
    assert "\n" not in str(error.value)


def test_synthetic_scenes_are_rendered_with_the_settings(cfg):
    cfg.DATA.SYNTHETIC.update(SIZES=(1, 2, 1), SEED=5, IMAGE_SIZE=64)
    raw = load("synthetic_chairs_calib", cfg)
    assert (len(raw.records), raw.records[0].width, raw.classes) == (2, 64, ("chair",))
    assert raw.records[0].path.parents[1].name.startswith("64px_1_2_1_seed5_")

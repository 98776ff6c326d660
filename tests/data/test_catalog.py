"""Data sets by name, and where they are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import catalog
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


def test_unknown_names_name_the_nearest():
    with pytest.raises(ConfigError, match=r"'coco_2017_tran' \(did you mean 'coco_2017_train'\?\)"):
        catalog.get("coco_2017_tran")
    with pytest.raises(ConfigError, match=r"known: .*furniture_test"):
        catalog.get("zzz")


def test_register(tmp_path):
    raw = RawDataset("mine", ("a",), ())
    catalog.register("mine", lambda root, data, problems: raw)
    assert load("mine", get_cfg()) is raw
    assert "mine" in catalog.names()
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


def test_own_sets_of_the_configuration(make_coco, make_voc, voc_xml, voc_object):
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


def test_own_sets_come_before_built_in_ones(make_coco):
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
def test_own_sets_are_triples(make_coco, entries, wrong):
    """Whichever of them is asked for."""
    cfg = make_coco()
    cfg.DATA.DATASETS = entries
    with pytest.raises(ConfigError, match=rf"DATA.DATASETS has {wrong}, expected triples") as error:
        load("tiny", cfg)
    assert "\n" not in str(error.value)


def test_own_sets_are_named_once(make_coco):
    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("tiny", "other.json", "other"))
    with pytest.raises(ConfigError, match="DATA.DATASETS has two sets named 'tiny'; give each its own name"):
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
def test_missing_folders_say_what_was_looked_for_and_how_to_fix_it(tmp_path, name, missing):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path)
    with pytest.raises(DataError, match=f"{missing}: data set '{name}' is not there") as error:
        load(name, cfg)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "DATA.ROOT" in message
    assert "EARLYEXIT_SSD_DATASETS" in message
    assert ("DATA.DOWNLOAD" in message) == name.startswith("voc_20")


def test_missing_photo_folder(make_coco, tmp_path):
    cfg = make_coco()
    cfg.DATA.DATASETS = (("tiny", "tiny.json", "lost"),)
    with pytest.raises(DataError, match="lost: data set 'tiny' is not there"):
        load("tiny", cfg)

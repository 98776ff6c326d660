"""The built-in data sets: names, download, and the folder that the renderer is asked to fill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import builtin, catalog
from earlyexit_ssd.data.problems import Problems
from earlyexit_ssd.errors import DataError


def test_names():
    expected = {f"{name}_{split}" for name in ("synthetic_chairs", "voc2012_animals", "furniture")
                for split in ("train", "calib", "test")}  # fmt: skip
    expected |= {"coco_2017_train", "coco_2017_val", "voc_2007_trainval", "voc_2007_test", "voc_xml_sample_trainval"}
    expected |= {f"voc_2012_{split}" for split in ("train", "val", "trainval")}
    assert expected <= set(catalog.names())


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.DATA.ROOT = str(tmp_path / "root")
    return cfg


def test_download_by_torchvision(cfg, make_voc, voc_xml, tmp_path, monkeypatch):
    """The stand-in for torchvision's class unpacks a devkit as it does."""
    devkit = make_voc({"a": voc_xml()}, split="test", folder="unpacked/VOC2007")
    calls = []

    def download(root, year, image_set, download):
        calls.append((year, image_set, download))
        assert not (tmp_path / "root" / "VOCdevkit").exists(), "nothing half unpacked is where it is looked for"
        shutil.copytree(devkit, Path(root) / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    for _ in range(2):
        raw = catalog.load("voc_2007_test", cfg.DATA, Problems())
        assert [record.path.name for record in raw.records] == ["a.jpg"]
    assert calls == [("2007", "test", True)], "what is there is not fetched again"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["VOCdevkit"], "nothing is left over"


def test_a_second_split_joins_the_devkit(cfg, make_voc, voc_xml, tmp_path, monkeypatch):
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
def test_a_failed_download_is_one_line(cfg, monkeypatch, failure):
    def download(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    cfg.DATA.DOWNLOAD = True
    with pytest.raises(DataError, match=r"VOC 2012 could not be downloaded to .*check the network") as error:
        catalog.load("voc_2012_train", cfg.DATA, Problems())
    assert "\n" not in str(error.value)


def test_synthetic_scenes_are_asked_for_with_the_settings(cfg, make_coco, tmp_path, monkeypatch):
    make_coco()
    calls = []

    def render(root, sizes, image_size, seed):
        calls.append((root, sizes, image_size, seed))
        folder = root / "synthetic_chairs"
        (folder / "annotations").mkdir(parents=True)
        shutil.copy(tmp_path / "tiny.json", folder / "annotations" / "instances_calib.json")
        shutil.copytree(tmp_path / "tiny", folder / "calib")

    monkeypatch.setattr(builtin, "ensure_synthetic", render)
    cfg.DATA.SYNTHETIC.SIZES = (3, 2, 1)
    cfg.DATA.SYNTHETIC.SEED = 5
    raw = catalog.load("synthetic_chairs_calib", cfg.DATA, Problems())
    assert calls == [(tmp_path / "root", (3, 2, 1), 192, 5)]
    assert raw.records[0].path == tmp_path / "root" / "synthetic_chairs" / "calib" / "tiny10.png"

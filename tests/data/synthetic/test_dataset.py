"""The data set on disk."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from earlyexit_ssd.data.synthetic import dataset, ensure_synthetic
from earlyexit_ssd.data.synthetic.dataset import FOLDER, SPLITS
from earlyexit_ssd.errors import DataError

SIZES = (8, 3, 4)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    ensure_synthetic(root, SIZES, 96, seed=0, workers=1)
    return root


def test_pycocotools_reads_every_split(root):
    seen = []
    for split, size in zip(SPLITS, SIZES, strict=True):
        coco = COCO(root / FOLDER / "annotations" / f"instances_{split}.json")
        assert len(coco.imgs) == size
        assert len(coco.anns) == len(coco.dataset["annotations"])  # no id twice
        assert coco.loadCats(coco.getCatIds()) == [{"id": 62, "name": "chair", "supercategory": "furniture"}]
        for image in coco.imgs.values():
            with Image.open(root / FOLDER / split / image["file_name"]) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (image["width"], image["height"]) == (96, 96)
        for annotation in coco.anns.values():
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            assert annotation["area"] == width * height and annotation["iscrowd"] == 0
            assert annotation["image_id"] in coco.imgs
        seen += list(coco.imgs)
    assert sorted(seen) == list(range(1, sum(SIZES) + 1))
    assert (root / FOLDER / "train" / "000001.jpg").exists()


def test_files_hold_the_scenes_of_their_seeds(root):
    _, boxes = dataset.render_scene(np.random.default_rng((0, 2, 1)), 96)
    coco = json.loads((root / FOLDER / "annotations" / "instances_test.json").read_text())
    image_id = SIZES[0] + SIZES[1] + 2
    found = [record["bbox"] for record in coco["annotations"] if record["image_id"] == image_id]
    assert found == [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]


def test_number_of_workers_changes_nothing(root, tmp_path):
    ensure_synthetic(tmp_path, SIZES, 96, seed=0, workers=2)
    assert contents(tmp_path / FOLDER) == contents(root / FOLDER)


def test_made_once_and_again_when_settings_change(tmp_path, monkeypatch):
    ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0, workers=1)
    first = contents(tmp_path / FOLDER)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_render_all", lambda *_: pytest.fail("rendered again"))
        ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0)
    ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=1, workers=1)
    second = contents(tmp_path / FOLDER)
    assert len(second) == len(first) - 1
    assert all(first.get(path) != content for path, content in second.items())
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_render_leaves_nothing(tmp_path, monkeypatch, workers):
    render = dataset.render_scene
    calls = iter(range(100))

    def interrupted(generator, image_size):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return render(generator, image_size)

    monkeypatch.setattr(dataset, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(tmp_path, (20, 1, 1), 64, seed=0, workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_change_keeps_the_old_set(tmp_path, monkeypatch):
    ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=0, workers=1)
    before = contents(tmp_path / FOLDER)
    monkeypatch.setattr(dataset, "coco_json", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(RuntimeError):
        ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=5, workers=1)
    assert contents(tmp_path / FOLDER) == before


def test_leftovers_of_killed_runs_go_but_running_ones_stay(tmp_path):
    old, new = (tmp_path / f".{FOLDER}.{name}.partial" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "000001.jpg").write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=0, workers=1)
    assert not old.exists() and new.exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"settings\.json"):
        ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=0)
    assert (tmp_path / FOLDER / "mine.txt").read_text() == "precious"


def test_an_empty_split_is_an_empty_list(tmp_path):
    ensure_synthetic(tmp_path, (1, 0, 0), 64, seed=0)
    coco = json.loads((tmp_path / FOLDER / "annotations" / "instances_test.json").read_text())
    assert coco["images"] == coco["annotations"] == []


@pytest.mark.parametrize(
    ("sizes", "image_size", "seed", "named"),
    [
        ((1, 2), 64, 0, "SIZES"),
        ((1, -1, 1), 64, 0, "SIZES"),
        ((1, 1, 1), 8, 0, "IMAGE_SIZE"),
        ((1, 1, 1), 64, -1, "SEED"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, sizes, image_size, seed, named):
    with pytest.raises(DataError, match=named):
        ensure_synthetic(tmp_path, sizes, image_size, seed)


USE = """
import sys, time
from pathlib import Path
from earlyexit_ssd.data.synthetic import ensure_synthetic
ensure_synthetic(Path(sys.argv[1]), (2, 1, 1), 64, seed=int(sys.argv[2]), workers=1)
print("has it", flush=True)
time.sleep(60)
"""


def test_a_set_that_another_process_uses_is_not_replaced(tmp_path):
    with subprocess.Popen([sys.executable, "-c", USE, str(tmp_path), "0"], stdout=subprocess.PIPE) as user:
        assert user.stdout.readline() == b"has it\n"
        ensure_synthetic(tmp_path, (2, 1, 1), 64, seed=0)  # the same settings are shared
        before = contents(tmp_path / FOLDER)
        with pytest.raises(DataError, match="in use by another process, with other DATA.SYNTHETIC settings"):
            ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=5, workers=1)
        assert contents(tmp_path / FOLDER) == before
        user.kill()
        user.wait()
    ensure_synthetic(tmp_path, (1, 1, 1), 64, seed=5, workers=1)
    assert contents(tmp_path / FOLDER) != before


def test_two_processes_render_once(tmp_path):
    command = [sys.executable, "-c", USE.replace("time.sleep(60)", ""), str(tmp_path), "0"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("rendering scenes" in error for _, error in outputs) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]

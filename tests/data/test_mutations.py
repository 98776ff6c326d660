"""Valid files, mutated at random: each loads, or is refused in one line. Seeded, so that a failure comes again."""

from __future__ import annotations

import copy
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from earlyexit_ssd.config import get_cfg
from earlyexit_ssd.data import load_dataset, to_coco
from earlyexit_ssd.data.records import MODES
from earlyexit_ssd.errors import EarlyExitError
from tests.data.conftest import write_photo

SEEDS = range(500)
NAMES = ("../secret.png", "ABSOLUTE", "/dev/zero", "pipe.png", "folder", "..", "", "0.png", "1.png", "x" * 5000, "a\nb")
NUMBERS = (0, 1, -1, 0.5, 2**53, 2**63, -(2**63), 10**400, 1e308, 5e-324, math.nan, math.inf, -math.inf)
VALUES = (
    *NAMES,
    *NUMBERS,
    None,
    True,
    "1",
    "no",
    "Unspecified",
    "nul\0",
    "\ud800",
    "\x1b",
    [],
    {},
    [[1]],
    [1, 2, 3, 4],
)
DEEP = "[" * 700 + "]" * 700


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(3):
        write_photo(tmp_path / f"photos/{number}.png")
    write_photo(tmp_path / "secret.png")
    (tmp_path / "photos/folder").mkdir()
    (tmp_path / "xml").mkdir()
    os.mkfifo(tmp_path / "photos/pipe.png")
    return tmp_path


def use(root: Path, seed: int, annotations: str) -> None:
    """Everything that is done with a data set before a model sees it."""
    cfg = get_cfg()
    cfg.DATA.ROOT, cfg.DATA.DATASETS, cfg.DATA.TRAIN = str(root), (("set", annotations, "photos"),), ("set",)
    cfg.DATA.ON_BAD = MODES[seed % 3]
    try:
        dataset = load_dataset(cfg, "set", train=seed % 2 == 0)
        samples = [dataset[i] for i in range(len(dataset))]
    except EarlyExitError as error:
        message = str(error)
        assert len(message) < 300 and message.isprintable(), (seed, message)
        return
    assert all(record.path.parent == root / "photos" for record in dataset.records), seed
    assert len(samples) == len(to_coco(dataset).imgs), seed


def test_coco_files(root):
    images = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(3)]
    box = {"category_id": 1, "bbox": [5, 6, 20, 21], "area": 420.0, "iscrowd": 0}
    tree = {
        "images": images,
        "annotations": [{"id": i, "image_id": i % 3, **box} for i in range(5)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "mug"}],
    }
    for seed in SEEDS:
        chance = random.Random(seed)
        mutated = copy.deepcopy(tree)
        for _ in range(chance.choice((1, 1, 2, 4))):
            mutate(mutated, chance)
        text = json.dumps(mutated).replace("ABSOLUTE", str(root / "secret.png")).replace('"DEEP"', DEEP)
        (root / "set.json").write_text(text)
        use(root, seed, "set.json")


def mutate(tree: dict[str, list[dict[str, Any]]], chance: random.Random) -> None:
    """Put in, take away or repeat something in one entry."""
    section = chance.choice([name for name in tree if isinstance(tree[name], list) and tree[name]] or [None])
    if section is None or chance.random() < 0.05:
        tree[chance.choice(list(tree))] = chance.choice(VALUES)
        return
    entry = chance.choice(tree[section])
    if not isinstance(entry, dict) or not entry or chance.random() < 0.1:
        tree[section].append(chance.choice((copy.deepcopy(entry), *VALUES)))
        return
    key = chance.choice([*entry, "ignore", "difficult"])
    if chance.random() < 0.2:
        entry.pop(key, None)
    elif isinstance(entry.get(key), list) and entry[key] and chance.random() < 0.7:
        entry[key][chance.randrange(len(entry[key]))] = chance.choice(VALUES)
    else:
        entry[key] = chance.choice((*VALUES, "DEEP"))


def test_voc_files(root):
    texts = (*map(str, NUMBERS), *NAMES, "&amp;", "&x;", "]]>", "<a/>", "9" * 5000, "&#0;", "\x00", "é", "no", "CUP")
    parts = "<difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>25</xmax><ymax>27</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name>{parts}</object>" for name in ("cup", "mug"))
    size = "<size><width>60</width><height>40</height></size>"
    for seed in SEEDS:
        chance = random.Random(seed)
        for number in range(3):
            text = f"<annotation><filename>{number}.png</filename>{size}{objects}</annotation>"
            for _ in range(chance.choice((0, 1, 2))):
                start = chance.choice([place + 1 for place, letter in enumerate(text) if letter == ">"])
                end = max(start, text.find("<", start)) if chance.random() < 0.7 else start + chance.randrange(40)
                text = text[:start] + chance.choice(texts) + text[end:]
            text = text.replace("ABSOLUTE", str(root / "secret.png"))
            coding = "utf-8" if chance.random() < 0.95 else "utf-16"
            (root / f"xml/{number}.xml").write_bytes(text.encode(coding))
        use(root, seed, "xml")


def test_damaged_photos(root):
    whole = (root / "photos/0.png").read_bytes()
    for seed in range(200):
        chance, content = random.Random(seed), bytearray(whole)
        for _ in range(chance.choice((1, 3, 10))):
            content[chance.randrange(chance.choice((60, len(content))))] = chance.randrange(256)
        (root / "photos/0.png").write_bytes(content[: chance.choice((len(content), chance.randrange(len(content))))])
        (root / "set.json").write_text(
            '{"images": [{"id": 1, "file_name": "0.png", "width": 60, "height": 40}],'
            ' "categories": [{"id": 1, "name": "cup"}], "annotations": []}'
        )
        use(root, 2 * seed + 1, "set.json")

"""Duplicate photos, and blocks of video frames."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from earlyexit_ssd.data import DetectionDataset, Record
from earlyexit_ssd.data.duplicates import PerceptualHashes, block_of_each, blocks_of, distinct, parse_block
from earlyexit_ssd.errors import DataError, EarlyExitError


def scene(seed: int) -> Image.Image:
    """Return a smooth random image that depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def dataset(paths) -> DetectionDataset:
    return DetectionDataset([Record(i, path, 160, 120) for i, path in enumerate(paths, start=1)], ("chair",))


def kept(dataset: DetectionDataset) -> list[str]:
    return [record.path.name for record in dataset.records]


@pytest.fixture
def five_paths(tmp_path):
    """Paths of a photo, a copy, two near-duplicates (encoded again, resized), and a different photo."""
    scene(0).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    scene(0).save(tmp_path / "again.jpg", quality=60)
    scene(0).resize((80, 60)).save(tmp_path / "small.jpg", quality=85)
    scene(1).save(tmp_path / "b.png")
    return [tmp_path / name for name in ("a.png", "copy.png", "again.jpg", "small.jpg", "b.png")]


def test_duplicates_and_near_duplicates_count_once(five_paths, caplog):
    unique, repeats = distinct(dataset([*five_paths, five_paths[0]]))
    assert kept(unique) == ["a.png", "b.png"] and (repeats.equal, repeats.near) == (2, 2)
    assert len(repeats.near_sha256) == 2
    assert "2 of 6 photos are duplicates and left out" in caplog.text
    assert "2 of 4 photos are near-duplicates and left out; for frames of a video" in caplog.text
    unique, repeats = distinct(dataset(five_paths), near=False)
    assert kept(unique) == ["a.png", "again.jpg", "small.jpg", "b.png"] and (repeats.equal, repeats.near) == (1, 0)


def test_photos_with_a_small_moved_object_are_different(tmp_path):
    paths = []
    for place in (20, 100):
        image = scene(0)
        image.paste((255, 255, 255), (place, 40, place + 12, 56))
        image.save(tmp_path / f"{place}.png")
        paths.append(tmp_path / f"{place}.png")
    assert len(distinct(dataset(paths))[0]) == 2


def test_a_photo_rotated_by_exif_and_its_upright_copy_are_near_duplicates(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn counterclockwise
    scene(0).save(tmp_path / "upright.jpg")
    scene(0).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    assert len(distinct(dataset([tmp_path / "upright.jpg", tmp_path / "turned.jpg"]))[0]) == 1


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_pictures_of_16_bits_or_with_transparency_are_compared(tmp_path, mode):
    """The picture of RGBA is in its transparency; its colour is black."""
    paths = [tmp_path / f"{seed}.png" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        grey = np.asarray(scene(seed).convert("L"))
        black = np.zeros((*grey.shape, 3), np.uint8)
        Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else np.dstack([black, grey])).save(path)
    assert len(distinct(dataset(paths))[0]) == 2


def test_unreadable_photo_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.jpg: not a readable photo"):
        PerceptualHashes.read([tmp_path / "a.jpg"])


@pytest.mark.parametrize(
    ("text", "fps", "photos"), [("25", None, 25), ("5s", 5, 25), ("0.5 s", 4, 2), ("1s", 0.1, 1), ("2.5s", 2, 5)]
)
def test_parse_block(text, fps, photos):
    assert parse_block(text, fps) == photos


@pytest.mark.parametrize(
    ("text", "fps", "message"),
    [
        ("5s", None, "the frame rate is unknown; give --fps"),
        ("25", 5, "remove --fps"),
        ("0", None, "expected photos such as 25"),
        ("0s", 5, "expected photos such as 25"),
        *((text, None, "expected photos such as 25") for text in ("-3", "2.5", "5m", "", "9" * 500)),
        ("5s", 0, "fps is 0, expected photos per second"),
        ("5s", float("nan"), "fps is nan, expected photos per second"),
    ],
)
def test_parse_block_errors(text, fps, message):
    with pytest.raises(EarlyExitError) as error:
        parse_block(text, fps)
    assert message in str(error.value) and len(str(error.value)) < 300


def test_blocks_are_consecutive_photos_of_a_folder():
    """Photos are sorted by number, so 10 follows 9. Each folder starts a new block."""
    names = ["cam/f10.jpg", "cam/f9.jpg", "cam/f8.jpg", "door/f1.jpg", "cam/f11.jpg", "cam/f100.jpg"]
    assert block_of_each([Path(name) for name in names], 2).tolist() == [1, 0, 0, 3, 1, 2]
    assert block_of_each([], 2).tolist() == []
    dataset = SimpleNamespace(records=[SimpleNamespace(image_id=9 - i, path=Path(f"{i}.jpg")) for i in range(4)])
    assert blocks_of(dataset, 3).tolist() == [1, 0, 0, 0] and blocks_of(dataset, None) is None
    assert block_of_each([Path("²5.jpg"), Path("1.jpg")], 1).tolist() == [1, 0], "² is a digit, but no number"

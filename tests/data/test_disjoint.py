"""A photo that teaches must not test, whatever its name is."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from earlyexit_ssd.data import DetectionDataset, Record, load_dataset, require_disjoint
from earlyexit_ssd.errors import DataError


def dataset(*paths: Path) -> DetectionDataset:
    return DetectionDataset([Record(i, path, 60, 40) for i, path in enumerate(paths, start=1)], ("chair",))


def test_different_photos(photo_file):
    """Also where they are of equal size, and where a set has two copies for itself."""
    a, b, c = (photo_file(f"{name}.bmp") for name in "abc")
    copy = Path(shutil.copy(a, a.with_name("copy.bmp")))
    assert len({path.stat().st_size for path in (a, b, c)}) == 1
    require_disjoint(train=dataset(a, copy), calib=dataset(b), test=dataset(c))


@pytest.mark.parametrize("how", ["same path", "detour", "symlink", "copy"])
def test_a_shared_photo(photo_file, tmp_path, how):
    """The first of them, as each set names it, and their count."""
    a, b, c = (photo_file(f"{name}.png") for name in "abc")
    (tmp_path / "other").mkdir()
    again = {"same path": b, "detour": tmp_path / "other" / ".." / "b.png"}.get(how, tmp_path / "other" / "again.png")
    if how == "symlink":
        again.symlink_to(b)
    elif how == "copy":
        shutil.copy(b, again)
    with pytest.raises(DataError, match=r"^train and test share photos \(1\), the first: ") as error:
        require_disjoint(train=dataset(a, b), calib=dataset(c), test=dataset(again))
    assert f"the first: {b} and {again if how == 'copy' else b}; " in str(error.value)
    assert "take them out of one of the two" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_that_has_a_photo_twice(make_coco):
    """Here by two names of one file of annotations."""
    cfg = make_coco()
    cfg.DATA.DATASETS = (*cfg.DATA.DATASETS, ("again", "tiny.json", "tiny"))
    with pytest.raises(DataError, match=r"^tiny \+ again has the photo .*tiny10.png twice; name each file once"):
        load_dataset(cfg, ("tiny", "again"))
    with pytest.raises(DataError, match=r"^train has the photo .*tiny10.png twice; name each file once"):
        require_disjoint(train=dataset(*[load_dataset(cfg, "tiny").records[0].path] * 2))


def test_a_missing_photo(photo_file):
    photo = photo_file("a.png")
    photo.unlink()
    with pytest.raises(DataError, match=r"a.png: no readable photo \(No such file or directory\)"):
        require_disjoint(train=dataset(photo))


def test_only_files_of_equal_size_are_read(photo_file, monkeypatch):
    photos = [photo_file("a.png"), photo_file("b.png", (50, 40)), photo_file("c.png", (40, 40))]
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    require_disjoint(train=dataset(photos[0]), calib=dataset(photos[1]), test=dataset(photos[2]))


def test_cheap(tmp_path):
    """3,000 photos of 100 kB, all of one size, in less than 2 s of this process's time: the machine is shared."""
    paths = [tmp_path / f"{number}.bin" for number in range(3000)]
    for path in paths:
        path.write_bytes(os.urandom(16) * 6250)
    start = time.process_time()
    require_disjoint(train=dataset(*paths[:2000]), calib=dataset(*paths[2000:2500]), test=dataset(*paths[2500:]))
    assert time.process_time() - start < 2

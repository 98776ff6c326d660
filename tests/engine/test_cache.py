import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd.data import Annotation, DetectionDataset, Record, build_loader
from earlyexit_ssd.data.transforms import build_transforms
from earlyexit_ssd.engine.cache import ARRAYS_OF_HEAD, CachedLoader, TapCache
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_image
from earlyexit_ssd.modeling.detector import compute_taps, default_boxes_of_image
from tests.modeling.conftest import small_model

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path):
    records = []
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        write_image(tmp_path / f"{index}.png", Image.fromarray(pixels))
        box = Annotation((4.0, 4.0, 30.0, 20.0 + index), 1 + index % 2)
        records.append(Record(index + 1, tmp_path / f"{index}.png", 48, 40, (box,)))
    return DetectionDataset(records, ("chair", "table"), build_transforms("flip"), train=True)


def build(folder, dataset, views=2, key="a", dtype="float16", workers=0, **model_settings):
    model = small_model(**model_settings)
    cache = TapCache(folder, model, len(dataset), views, dtype)
    cache.build(model, build_loader(dataset, 4, workers, train=False, seed=0), key)
    return cache, model


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_cached_and_computed_taps_differ_by_rounding_only(tmp_path, dataset, dtype, tolerance):
    cache, model = build(tmp_path / "taps", dataset, dtype=dtype)
    model.eval()
    for view, batch in itertools.product(range(2), (np.arange(4), np.arange(4, 6))):  # sums depend on the batch size
        images, targets = zip(*(dataset.sample(index, view) for index in batch.tolist()), strict=True)
        expected = compute_taps(model, list(images), [dict(target) for target in targets])
        cached = cache.rows(batch + 6 * view, CPU)
        pairs = [*zip(cached.taps, expected.taps, strict=True)]
        pairs += [(cached.head[name], expected.head[name]) for name in ARRAYS_OF_HEAD]
        for found, value in pairs:
            assert ((found - value).abs() <= tolerance * value.abs() + 2.0**-24 * (tolerance > 0)).all()
        for found, target in zip(cached.targets, expected.targets, strict=True):
            assert torch.equal(found["boxes"], target["boxes"])
            assert int(found["image_id"]) == target["image_id"]


def test_complete_cache_is_used_again_and_another_key_replaces_it(tmp_path, dataset):
    folder = tmp_path / "taps"
    build(folder, dataset)
    written = (folder / "tap0.npy").stat().st_mtime_ns
    build(folder, dataset)
    assert (folder / "tap0.npy").stat().st_mtime_ns == written
    build(folder, dataset, key="b")
    assert (folder / "tap0.npy").stat().st_mtime_ns != written
    cache, model = build(folder, dataset, key="b", image_size=64)  # the same weights
    _, size = cache.rows(np.arange(1), CPU).head["cls_logits"].shape[:2]
    assert size == len(default_boxes_of_image(model, CPU))


@pytest.mark.parametrize("name", ["cache.key", "tap0.npy", "rest.pt"])
def test_incomplete_or_damaged_cache_is_built_again(tmp_path, dataset, caplog, name):
    folder = tmp_path / "taps"
    build(folder, dataset)
    (folder / name).write_bytes(b"half")
    cache, _ = build(folder, dataset)
    assert len(cache.rows(np.arange(6), CPU).targets) == 6
    assert ("the cache is damaged" in caplog.text) == (name != "cache.key")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_no_file_stays_open_for_batches_of_workers(tmp_path, dataset):
    import resource  # only on Unix

    records = [replace(dataset.records[index % 6], image_id=index + 1) for index in range(200)]
    many = DetectionDataset(records, dataset.classes, dataset.transforms, train=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, limits[1]))
    try:
        cache, _ = build(tmp_path / "taps", many, views=1, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(cache.targets) == 200


def test_cache_above_the_budget_is_an_error(tmp_path, dataset):
    cache = TapCache(tmp_path, small_model(), 10**6, 4)
    with pytest.raises(EarlyExitError, match=r"needs .* GiB, .* set EXITS_PHASE.CACHE to false"):
        cache.require_budget(0.1)
    with pytest.raises(EarlyExitError, match="set EXITS_PHASE.CACHE_VIEWS to 2"):
        cache.require_budget(cache.gibibytes * 0.6)
    cache.require_budget(cache.gibibytes)


def test_epoch_has_each_photo_once_and_the_next_view(tmp_path, dataset):
    cache, _ = build(tmp_path / "taps", dataset)
    loader = CachedLoader(cache, 3, 0, CPU)
    seen = []
    cache.rows = lambda rows, device: seen.append(rows)
    for epoch in range(2):
        list(loader.epoch(epoch, 0))
    rows = np.concatenate(seen)
    assert sorted(rows[:6] % 6) == sorted(rows[6:] % 6) == list(range(6))
    assert sorted(rows) == list(range(12))


def test_processes_split_each_batch(tmp_path, dataset):
    cache, _ = build(tmp_path / "taps", dataset)
    cache.rows = lambda rows, device: list(rows)
    whole = list(CachedLoader(cache, 4, 0, CPU).epoch(1, 0))
    parts = [list(CachedLoader(cache, 4, 0, CPU, rank, 2).epoch(1, 0)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(first + second)
        assert len(first) == len(second)

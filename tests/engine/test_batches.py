import numpy as np
import torch
from PIL import Image

from earlyexit_ssd.data import DetectionDataset, Record, build_loader
from earlyexit_ssd.engine import PhotoLoader


def ids(batches):
    return [[target["image_id"] for target in targets] for _, targets in batches]


def test_same_batches_for_the_same_numbers(tmp_path):
    records = []
    for index in range(11):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
        records.append(Record(index + 1, path, 8, 8))
    dataset = DetectionDataset(records, ("chair",), train=True)
    loader = PhotoLoader(build_loader(dataset, 3, 0, True, seed=0), torch.device("cpu"))
    assert len(loader) == 3
    first, second = ids(loader.epoch(0, 0)), ids(loader.epoch(1, 0))
    assert [len(batch) for batch in first] == [3, 3, 3]
    assert first != second
    # Resumed within an epoch, then on to the next one whole.
    assert ids(loader.epoch(0, 2)) == first[2:]
    assert ids(loader.epoch(1, 0)) == second
    assert len(loader) == 3

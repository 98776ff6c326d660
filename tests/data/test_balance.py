"""Photos of rare classes, shown more often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from earlyexit_ssd.data.balance import repeat_factors, repeat_rare_classes
from earlyexit_ssd.data.dataset import DetectionDataset
from earlyexit_ssd.data.records import Annotation, Record


def photos(*labels, ignore=()):
    """A data set of photos that show these labels."""
    records = [
        Record(number, Path(f"{number}.jpg"), 60, 40, tuple(Annotation((0, 0, 9, 9), a, a in ignore) for a in shown))
        for number, shown in enumerate(labels)
    ]
    return DetectionDataset(records, ("chair", "cat", "dog"), train=True)


def test_factors_by_hand():
    """Of eight photos, one shows a cat and two a dog: f = 1/8 and 1/4, at t = 1/2 the roots of 4 and 2."""
    dataset = photos((1,), (1,), (1,), (1, 2), (1, 3), (3, 3), (), (1,))
    assert repeat_factors(dataset, 0.5) == pytest.approx([1, 1, 1, 2, 2**0.5, 2**0.5, 1, 1])


def test_objects_to_ignore_show_no_class():
    assert repeat_factors(photos((1,), (2,), ignore=(2,)), 1.0) == pytest.approx([2**0.5, 1])


def test_repeated_photos_stay_together_and_keep_their_numbers():
    dataset = photos((1,), (1,), (1,), (1, 2))
    repeated = repeat_rare_classes(dataset, 1.0, seed=0)  # the cat's factor is the root of 4
    assert [record.image_id for record in repeated.records[-2:]] == [3, 3]
    assert repeated.paths(3) == Path("3.jpg")
    assert len(dataset) == 4
    assert repeat_rare_classes(dataset, 0.0, seed=0) is dataset


def test_fractions_are_rounded_by_chance_and_by_seed():
    dataset = photos(*[(1,)] * 900, *[(2,)] * 100)  # factors: 1 at t = 0.225, and 1.5 for the cats
    counts = [len(repeat_rare_classes(dataset, 0.225, seed)) for seed in (0, 0, 1)]
    assert counts[0] == counts[1] != counts[2]
    assert np.array(counts) == pytest.approx(1050, abs=25)

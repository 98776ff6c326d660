"""Selection of classes and photos from one or several data sets."""

import dataclasses
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlyexit_ssd.data.records import (
    Annotation,
    RawDataset,
    Record,
    canonical,
    limit_negatives,
    limit_photos,
    select_classes,
    union_of_classes,
)
from earlyexit_ssd.errors import DataError


def dataset(name: str, classes: tuple[str, ...], *labels: tuple[int, ...], first_id: int = 1) -> RawDataset:
    """Return a data set with one photo for each tuple of labels."""
    records = [
        Record(i, Path(f"{name}{i}.jpg"), 60, 40, tuple(Annotation((0, 0, 9, 9), label) for label in own))
        for i, own in enumerate(labels, start=first_id)
    ]
    return RawDataset(name, classes, tuple(records))


def labels_of(records: list[Record]) -> list[list[int]]:
    return [[annotation.label for annotation in record.annotations] for record in records]


def test_photos_without_the_wanted_class_stay_as_negatives():
    raw = dataset("a", ("cat", "chair"), (1, 2, 2), (1,), (), first_id=7)
    records = select_classes([raw], ["chair"])
    assert labels_of(records) == [[1, 1], [], []]
    assert [record.image_id for record in records] == [7, 8, 9], "a single set keeps its image ids"
    assert labels_of(select_classes([raw], ["chair", "cat"])) == [[2, 1, 1], [2], []], "labels follow the classes"


def test_aliases_and_spelling():
    voc = dataset("voc", ("sofa", "diningtable", "Chair"), (1, 2, 3))
    coco = dataset("coco", ("dining table", "couch"), (1, 2))
    records = select_classes([voc, coco], ["couch", "dining table", "chair"])
    assert labels_of(records) == [[1, 2, 3], [2, 1]]
    assert labels_of(select_classes([coco], ["sofa"])) == [[1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Sofa", "couch"), ("dining_table", "dining table"), ("diningtable", "dining table"), ("TVmonitor", "tv"),
     ("pottedplant", "potted plant"), (" chair ", "chair")],
)  # fmt: skip
def test_canonical(name, expected):
    assert canonical(name) == expected
    assert canonical(expected) == expected


def test_image_ids_of_several_sets_are_unique():
    records = select_classes([dataset("a", ("cat",), (1,), ()), dataset("b", ("cat",), (1,))], ["cat"])
    assert [(r.image_id, r.path.name) for r in records] == [(1, "a1.jpg"), (2, "a2.jpg"), (3, "b1.jpg")]


def test_class_missing_in_one_set_is_a_warning(caplog):
    sets = [dataset("a", ("cat", "chair"), (1, 2)), dataset("b", ("cat", "chair"), (1,)), dataset("c", ("cat",), (1,))]
    with caplog.at_level(logging.WARNING):
        select_classes(sets, ["chair"])
    assert caplog.messages == ["b has no box of chair", "c has no box of chair"]


def test_set_without_declared_classes_may_lack_a_class(caplog):
    """In training it is an error, because the name is probably misspelt."""
    mugs = dataclasses.replace(dataset("mugs", ("mug",), (1,), ()), open_classes=True)
    with caplog.at_level(logging.WARNING):
        records = select_classes([mugs], ["cup", "mug"])
    assert labels_of(records) == [[2], []]
    assert caplog.messages == ["mugs has no box of cup"]
    with pytest.raises(DataError, match=r"'mgu', which is not a class of mugs \(did you mean 'mug'\?\)"):
        select_classes([mugs], ["mgu"], train=True)
    empty = dataclasses.replace(mugs, classes=(), records=())
    with pytest.raises(DataError, match="classes: none"):
        select_classes([empty], ["mug"], train=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "chiar"], r"'chiar', which is not a class of a, b \(did you mean 'chair'\?\)"),
        (["couch", "sofa"], "the same class twice"),
    ],
)
def test_wrong_classes_are_errors(names, message):
    with pytest.raises(DataError, match=message):
        select_classes([dataset("a", ("couch", "cat", "chair")), dataset("b", ("cat",))], names)


def test_union_of_classes():
    sets = [dataset("a", ("sofa", "cat")), dataset("b", ("cat", "couch", "dog"))]
    assert union_of_classes(sets) == ("sofa", "cat", "dog")


def photos(positives: int, negatives: int) -> list[Record]:
    return list(dataset("a", ("cat",), *[(1,)] * positives, *[()] * negatives).records)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0, 0.95), st.integers(0, 5))
def test_share_of_negatives(positives, negatives, share, seed):
    records = photos(positives, negatives)
    kept = limit_negatives(records, share, seed)
    count = sum(not record.annotations for record in kept)
    assert len(kept) - count == positives
    assert not positives or count <= share * len(kept) + 1e-4
    assert count == negatives or count + 1 > share * (len(kept) + 1) - 1e-4  # one more would be too many
    assert [r.image_id for r in kept] == sorted(r.image_id for r in kept)
    assert kept == limit_negatives(records, share, seed)


def test_seed_decides_which_negatives_stay():
    records = photos(10, 100)
    assert limit_negatives(records, 0.5, 0) != limit_negatives(records, 0.5, 1)
    assert limit_negatives(records, -1, 0) == records


@given(st.integers(0, 20), st.integers(0, 30), st.integers(0, 5))
def test_limit(count, limit, seed):
    records = photos(count, 0)
    kept = limit_photos(records, limit, seed)
    assert len(kept) == (min(limit, count) if limit else count)
    assert [r.image_id for r in kept] == sorted({r.image_id for r in kept})
    assert kept == limit_photos(records, limit, seed)

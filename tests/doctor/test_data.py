"""Each check reports the records with its own defect, and no sound records."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from earlyexit_ssd.data.duplicates import PerceptualHashes
from earlyexit_ssd.data.records import Annotation, Record
from earlyexit_ssd.doctor.data import DATA_CHECKS, DataEvidence, Split, summarise
from earlyexit_ssd.doctor.findings import Diagnosis, diagnose

PHOTOS = 240
DEFAULT_BOXES = torch.tensor([[x, y, x + 64.0, y + 64.0] for x in range(0, 257, 32) for y in range(0, 257, 32)])
"""Of an input of 320 px."""


def record(number: int, *boxes: tuple[float, float, float, float], label: int = 1) -> Record:
    """A photo of 640 x 320."""
    return Record(number, Path(f"{number}.jpg"), 640, 320, tuple(Annotation(box, label) for box in boxes))


def sound_records() -> list[Record]:
    """Five of six photos show one object of 128 x 64 px on a default box. Classes 1 and 2 take turns."""
    places = [(64.0 * (number % 8 + 1), 32.0 * (number % 7)) for number in range(PHOTOS)]
    shown = [[(x, y, x + 128, y + 64)] if number % 6 else [] for number, (x, y) in enumerate(places)]
    return [record(number, *boxes, label=number % 2 + 1) for number, boxes in enumerate(shown)]


def split(name: str, first: int, records: list[Record] | None = None) -> Split:
    """Photos whose hashes and looks are derived from the numbers from ``first`` on."""
    records = sound_records() if records is None else records
    numbers = range(first, first + len(records))
    bits = [np.random.default_rng(number).integers(0, 256, 8) for number in numbers]
    looks = PerceptualHashes(np.array(bits, np.uint8), np.zeros((len(bits), 16, 16), np.int16))
    return Split(name, ("cat", "dog"), records, True, list(map(str, numbers)), looks)


def evidence(train: list[Record] | None = None, first_of_test: int = 1000, **changes: object) -> DataEvidence:
    """Two splits, with ``changes`` of the first."""
    if train is None:
        train = [replace(photo, image_id=number) for number, photo in enumerate(sound_records() * 3)]
    return DataEvidence([replace(split("TRAIN", 0, train), **changes), split("TEST", first_of_test)], DEFAULT_BOXES)


def with_boxes(function) -> DataEvidence:
    """The splits, with ``function`` (x1, y1, x2, y2) -> box applied to the training boxes."""
    photos = evidence().splits[0].records
    changed = [photo.with_annotations(replace(a, box=function(*a.box)) for a in photo.annotations) for photo in photos]
    return evidence(changed)


BROKEN = {
    "few_photos": lambda: evidence(sound_records()[:60]),
    "empty_photos": lambda: evidence([record(n) for n in range(2000)] + sound_records()[:60], 10000),
    "copies_across_splits": lambda: evidence(sha256=[str(n) for n in range(1000, 1720)]),
    "near_copies_across_splits": lambda: evidence(looks=split("TRAIN", 990, sound_records() * 3).looks),
    "boxes_in_shares": lambda: with_boxes(lambda *box: tuple(value / 10 for value in box)),
    "boxes_as_corners": lambda: with_boxes(lambda x1, y1, x2, y2: (x1, y1, x1 + x2, y1 + y2)),
    "too_small_objects": lambda: with_boxes(lambda x1, y1, x2, y2: (x1, y1, x1 + 60, y1 + 30)),
    "matched_by_force": lambda: with_boxes(lambda x1, y1, x2, y2: (x1 + 32, y1 + 16, x1 + 160, y1 + 50)),
    "rare_class_in_training": lambda: evidence(sound_records()),
    "rare_class_in_evaluation": lambda: evidence(sound_records()[:40] + [record(1)] * 99, name="CALIB"),
}  # fmt: skip
ALSO = {
    "few_photos": ["rare_class_in_training"],
    "empty_photos": ["rare_class_in_training"],
    "boxes_in_shares": ["too_small_objects", "matched_by_force"],
    "boxes_as_corners": ["matched_by_force"],
    "too_small_objects": ["matched_by_force"],
}


def test_sound_splits_give_no_bad_finding_and_every_check_judges():
    diagnosis = diagnose(DATA_CHECKS, evidence())
    assert diagnosis.bad == () and diagnosis.not_judged == []


def test_every_check_has_a_case():
    assert list(BROKEN) == list(DATA_CHECKS)


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_reports_its_own_defect(name):
    fired = {finding.check for finding in diagnose(DATA_CHECKS, BROKEN[name]()).bad}
    assert name in fired
    assert fired <= {name, *ALSO.get(name, ())}


def test_figures_of_a_split():
    """One box of 128 x 64 in a photo of 640 x 320 is 64 x 64 in a network of 320 px, and lies on a default box."""
    summary = summarise(DataEvidence([], DEFAULT_BOXES), split("TEST", 0, [record(0, (64.0, 32.0, 192.0, 96.0))]))
    assert (summary.photos, summary.boxes, summary.objects) == (1, 1, {"cat": 1, "dog": 0})
    assert summary.aspects == [2, 2, 2] and summary.object_sides == pytest.approx([64] * 3)
    assert summary.best_ious == pytest.approx([1] * 3)


def test_boxes_of_an_unlabelled_split_are_not_judged():
    unlabelled = evidence([record(number) for number in range(PHOTOS)], labelled=False)
    assert not [finding for finding in diagnose(DATA_CHECKS, unlabelled).bad if finding.subject.startswith("TRAIN")]


def test_nothing_judged_is_not_called_sound():
    assert str(Diagnosis((), ["few_photos"])).endswith("nothing could be judged")

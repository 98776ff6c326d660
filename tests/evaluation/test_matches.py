"""AP, counts and losses compared with hand-written values and with pycocotools."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from earlyexit_ssd.errors import DataError
from earlyexit_ssd.evaluation.evaluate import evaluate_detections
from earlyexit_ssd.evaluation.matches import (
    Agreement,
    APs,
    agreement,
    ap_of_choice,
    bootstrap_choices,
    exit_matches,
    interval,
    losses_against_full,
    photo_counts,
    photo_list,
)
from earlyexit_ssd.evaluation.metrics import EvaluationSettings
from earlyexit_ssd.evaluation.outputs import Collected

BOX, FAR = (10.0, 10.0, 110.0, 110.0), (300.0, 300.0, 400.0, 400.0)


def evaluated(coco, detections, score=0.5, iou=0.5):
    return SimpleNamespace(**evaluate_detections(coco, detections, EvaluationSettings(score, iou, resamples=0)).figures)


def pycocotools_evaluation(coco, detections):
    results = [
        {"image_id": image, "category_id": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for image, found in detections.items()
        for (x1, y1, x2, y2), score, label in zip(*(found[key].tolist() for key in found), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        none = COCO()
        none.dataset = {**coco.dataset, "annotations": []}
        none.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results) if results else none, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def none_as_minus_one(values):
    return [-1 if value is None else value for value in values]


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(seed, random_case):
    coco, detections = random_case(seed)
    ours, theirs = evaluated(coco, detections), pycocotools_evaluation(coco, detections)
    values = [ours.AP, ours.AP50, ours.AP75, ours.AP_small, ours.AP_medium, ours.AP_large]
    assert none_as_minus_one(values) == theirs.stats[:6].tolist()
    for index, (name, figures) in enumerate(ours.per_class.items()):
        theirs.params.catIds = [index + 1]
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        assert name == f"class{index}"
        assert none_as_minus_one(figures.values()) == theirs.stats[:2].tolist()


def test_ap_without_objects_is_none(ground_truth, found):
    metrics = evaluated(ground_truth(1, [(1, 1, BOX)]), {1: found((1, 0.9, BOX))})
    assert metrics.per_class["dog"] == {"AP": None, "AP50": None}
    assert metrics.per_class["cat"] == pytest.approx({"AP": 1.0, "AP50": 1.0})
    assert (metrics.AP_small, metrics.AP_large) == (None, pytest.approx(1.0))


# True positives, false positives and false negatives.

NARROW = (10.0, 10.0, 110.0, 90.0)  # IoU 0.8 with BOX


def test_operating_point_by_hand(ground_truth, found):
    coco = ground_truth(3, [(1, 1, BOX), (1, 2, FAR), (2, 1, BOX)])
    point = evaluated(
        coco,
        {
            # true positive, duplicate, below the score threshold, no category
            1: found((1, 0.9, NARROW), (1, 0.8, BOX), (1, 0.4, FAR), (3, 0.9, BOX)),
            3: found((2, 0.7, BOX)),  # on the empty photo
        },
    )
    assert (point.true_positives, point.false_positives, point.false_negatives) == (1, 2, 2)
    assert (point.precision, point.recall, point.f1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert point.false_positives_per_image == pytest.approx(2 / 3)
    assert point.false_positives_per_empty_image == 1.0
    assert point.localization_error == pytest.approx(0.2)


def test_score_and_iou_are_inclusive(ground_truth, found):
    coco = ground_truth(1, [(1, 1, (0.0, 0.0, 100.0, 100.0))])
    half = {1: found((1, 0.5, (0.0, 0.0, 100.0, 50.0)))}
    assert evaluated(coco, half, score=0.5, iou=0.5).true_positives == 1
    assert evaluated(coco, half, score=0.51, iou=0.5).false_negatives == 1
    assert evaluated(coco, half, score=0.5, iou=0.51).false_positives == 1
    half[1] |= {key: half[1][key].bfloat16() for key in ("boxes", "scores")}
    assert evaluated(coco, half, score=0.5, iou=0.5).true_positives == 1


def test_a_photo_with_only_crowds_is_empty(ground_truth, found):
    coco = ground_truth(2, [(1, 1, BOX, 1), (2, 1, BOX)])
    assert exit_matches(coco, [{}]).objects.tolist() == [0, 1]
    point = evaluated(coco, {1: found((1, 0.9, FAR)), 2: found((1, 0.9, FAR))})
    assert point.false_positives_per_empty_image == 1.0


def test_undefined_figures(ground_truth, found):
    no_detections = evaluated(ground_truth(1, [(1, 1, BOX)]), {})
    assert (no_detections.precision, no_detections.recall, no_detections.f1) == (None, 0.0, 0.0)
    assert no_detections.localization_error is None
    assert no_detections.false_positives_per_empty_image is None
    no_objects = evaluated(ground_truth(1, []), {1: found((1, 0.9, BOX))})
    assert (no_objects.precision, no_objects.recall, no_objects.f1) == (0.0, None, 0.0)
    no_photos = evaluated(ground_truth(0, []), {})
    assert (no_photos.f1, no_photos.false_positives_per_image) == (None, None)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), score=st.sampled_from([0.0, 0.3, 0.6]))
def test_counts_equal_pycocotools(random_case, seed, score):
    coco, detections = random_case(seed, images=6)
    point = evaluated(coco, detections, score=score)
    entries = np.array(pycocotools_evaluation(coco, detections).evalImgs, object).reshape(3, 4, 6)  # class, size, photo
    true = false = objects = 0
    for entry in filter(None, entries[:, 0].flat):
        counted = ~entry["dtIgnore"][0] & (np.array(entry["dtScores"]) >= score)
        matched = entry["dtMatches"][0] != 0
        true += (matched & counted).sum()
        false += (~matched & counted).sum()
        objects += (entry["gtIgnore"] == 0).sum()
    assert (point.true_positives, point.false_positives, point.false_negatives) == (true, false, objects - true)


def test_of_equal_ious_the_last_object_is_taken_as_in_pycocotools(ground_truth, found):
    left, middle, right = ((x, 0.0, x + 100.0, 100.0) for x in (0.0, 10.0, 20.0))
    coco = ground_truth(1, [(1, 1, left), (1, 1, right)])
    detections = {1: found((1, 0.9, middle), (1, 0.8, right))}  # the second has too small an IoU with the first object
    matches = exit_matches(coco, [detections], iou=0.75)
    assert matches.true_positive[-1].tolist() == [True, False]
    assert pycocotools_evaluation(coco, detections).stats[:1].tolist() == [evaluated(coco, detections).AP]


# The bootstrap.


def mixed(exits, choice):
    """Return the detections of the chosen exits."""
    return {index + 1: exits[taken][index + 1] for index, taken in enumerate(choice)}


@pytest.mark.parametrize("blocks", [None, np.arange(12) // 4])
def test_draws_are_those_of_the_seed(random_case, blocks):
    """All choices have the same draws, so their differences are paired."""
    coco, detections = random_case(4)
    matches, choices = exit_matches(coco, [detections, random_case(5)[1]]), [np.zeros(12, int), np.arange(12) % 2]
    first, second = bootstrap_choices(matches, choices, resamples=5, seed=7, ap50_only=False, blocks=blocks)
    generator, (count, of_photo) = np.random.default_rng(7), (12, np.arange(12)) if blocks is None else (3, blocks)
    for index in range(5):
        weights = np.bincount(generator.integers(count, size=count), minlength=count)[of_photo]
        for draws, choice in ((first, choices[0]), (second, choices[1])):
            assert (draws.AP[index], draws.AP50[index]) == ap_of_choice(matches, choice, weights)


def test_bootstrap_depends_on_the_seed_and_includes_the_value(random_case):
    coco, detections = random_case(3, images=40)
    matches, everyone = exit_matches(coco, [detections]), [np.zeros(40, int)]
    first, second, other = (bootstrap_choices(matches, everyone, 100, seed)[0].AP50 for seed in (5, 5, 6))
    assert np.isnan(bootstrap_choices(matches, everyone, 3)[0].AP).all()  # not computed by default
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    low, high = interval(first)
    assert low < evaluated(coco, detections).AP50 < high
    assert 0.02 < high - low < 0.5


def test_interval_is_central():
    assert interval(np.arange(101.0)) == pytest.approx([2.5, 97.5])
    assert interval(np.array([np.nan, 1.0])) == [1.0, 1.0]
    assert interval(np.full(3, np.nan)) is None


@pytest.mark.parametrize("images", [0, 3])
def test_ap_without_any_object_is_undefined(images, ground_truth, found):
    detections = {1: found((1, 0.9, BOX))} if images else {}
    matches, choice = exit_matches(ground_truth(images, []), [detections, {}]), np.zeros(images, int)
    assert ap_of_choice(matches, choice) == APs(None, None)
    assert np.isnan(bootstrap_choices(matches, [choice], resamples=3, ap50_only=False)).all()


# AP of choices of exits.

PHOTOS, EXITS = 7, 3
HERE, LOW, AWAY = (0, 0, 100, 100), (0, 0, 100, 67), (300, 300, 400, 400)  # IoU of LOW with HERE: 0.67


@pytest.fixture(scope="module")
def exits_case(random_case):
    """Objects and crowds, and detections of three exits: equal scores, empty photos, 110 detections on one photo."""

    def build(seed):
        coco, base = random_case(seed, images=PHOTOS)
        generator = torch.Generator().manual_seed(seed)

        def vary(found, spread, repeats):
            known = len(found["labels"])
            picked = torch.randint(max(known, 1), (known,), generator=generator)
            if torch.rand((), generator=generator) < 0.2:
                picked = picked[:0]
            picked = torch.cat([picked, picked[:1].repeat(repeats)])
            scores = torch.rand(len(picked), generator=generator).mul(8).ceil().div(8)
            return {
                "boxes": found["boxes"][picked] + spread * torch.randn(len(picked), 4, generator=generator),
                "scores": scores,
                "labels": found["labels"][picked],
            }

        crowded = 1 + seed % PHOTOS
        return coco, [
            {image_id: vary(found, 9 - 3 * index, 110 * (image_id == crowded)) for image_id, found in base.items()}
            for index in range(EXITS)
        ]

    return build


@pytest.fixture(scope="module")
def two_exits(ground_truth, found):
    """Two photos with one cat each. The deep exit finds both, the second at IoU 0.67."""
    return exit_matches(
        ground_truth(2, [(1, 1, HERE), (2, 1, HERE)]),
        [
            {1: found((1, 0.9, HERE)), 2: found((1, 0.8, AWAY))},
            {1: found((1, 0.95, AWAY), (1, 0.7, HERE)), 2: found((1, 0.6, LOW))},
        ],
    )


def pycocotools_aps(coco, detections):
    return APs(*(None if value < 0 else value for value in pycocotools_evaluation(coco, detections).stats[:2]))


@pytest.mark.parametrize(
    ("choice", "ap50", "ap"),
    [
        ([0, 0], 51 / 101, 51 / 101),  # one of two objects, at precision 1: 51 of the 101 recalls
        ([0, 1], 1, 0.4 + 0.6 * 51 / 101),  # the second counts at 4 of the 10 IoU thresholds
        ([1, 0], 51 / 101 / 3, 51 / 101 / 3),  # behind two false positives
        ([1, 1], 2 / 3, 0.4 * 2 / 3 + 0.6 * 51 / 101 / 2),
    ],
)
def test_ap_of_choices_by_hand(two_exits, choice, ap50, ap):
    assert ap_of_choice(two_exits, choice) == APs(pytest.approx(ap), pytest.approx(ap50))
    assert ap_of_choice(two_exits, choice, ap50_only=True) == APs(None, pytest.approx(ap50))


def test_weights_by_hand(two_exits):
    # 3 false positives, then 3 true positives and that of the second photo
    assert ap_of_choice(two_exits, [1, 1], [3, 1], ap50_only=True) == APs(None, pytest.approx(4 / 7))
    # without the second photo its class has one object, which is found first
    assert ap_of_choice(two_exits, [0, 1], [1, 0]) == APs(pytest.approx(1), pytest.approx(1))
    assert ap_of_choice(two_exits, [0, 1], [0, 0]) == APs(None, None)


def test_arrays_of_the_matches(two_exits):
    assert two_exits.score == pytest.approx([0.95, 0.9, 0.8, 0.7, 0.6])
    assert (two_exits.photo.tolist(), two_exits.exit.tolist()) == ([0, 0, 1, 0, 1], [1, 0, 0, 1, 1])
    assert two_exits.box.T.tolist() == [[*AWAY], [*HERE], [*AWAY], [*HERE], [*LOW]]
    assert two_exits.true_positive[two_exits.ap50_condition].tolist() == [False, True, False, True, True]
    assert two_exits.true_positive[:-1].sum(axis=0).tolist() == [0, 10, 0, 10, 4]
    assert (two_exits.true_positive != two_exits.false_positive).all()  # no detection is ignored
    assert two_exits.classes == ["cat", "dog"] and two_exits.label.tolist() == [0] * 5
    assert two_exits.objects_by_size["all"].tolist() == [[1, 1], [0, 0]]
    assert (two_exits.photos, two_exits.exits, two_exits.image_ids) == (2, 2, [1, 2])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_choice_equals_pycocotools(exits_case, seed):
    coco, exits = exits_case(seed)
    matches = exit_matches(coco, exits)
    choices = [np.full(PHOTOS, index) for index in range(EXITS)]
    choices.append(np.random.default_rng(seed).integers(EXITS, size=PHOTOS))
    for choice in choices:
        expected = pycocotools_aps(coco, mixed(exits, choice.tolist()))
        assert ap_of_choice(matches, choice) == expected
        assert ap_of_choice(matches, choice, ap50_only=True) == APs(None, expected.AP50)
        assert ap_of_choice(matches, choice, np.ones(PHOTOS, dtype=int)) == expected


def test_ap_of_a_choice_without_detections_is_zero(ground_truth):
    matches = exit_matches(ground_truth(2, [(1, 1, HERE)]), [{}, {}])
    assert ap_of_choice(matches, [0, 1]) == APs(0, 0)


def test_detections_of_an_unknown_image_are_refused(ground_truth, found):
    with pytest.raises(DataError, match="image 7"):
        exit_matches(ground_truth(1, []), [{}, {7: found()}])


# Counts and losses of single photos.

FIRST, SECOND, THIRD = (10.0, 10.0, 110.0, 110.0), (200.0, 200.0, 300.0, 320.0), (400.0, 400.0, 500.0, 500.0)


@pytest.fixture
def case(ground_truth, found):
    """Photo 1 has two objects, photo 3 has none. The order of the photos is not that of the ids."""
    truth = ground_truth(3, [(1, 1, FIRST), (1, 2, SECOND), (2, 1, THIRD)])
    truth.imgs = {image_id: truth.imgs[image_id] for image_id in (2, 3, 1)}
    early = {1: found((1, 0.9, FIRST), (1, 0.8, THIRD), (2, 0.3, SECOND)), 2: found((1, 0.2, THIRD)), 3: found()}
    full = {1: found((1, 0.9, FIRST), (2, 0.9, SECOND)), 2: found((1, 0.7, THIRD)), 3: found((1, 0.6, FIRST))}
    return truth, early, full


def against_labels(truth, exits, score, iou):
    return photo_counts(exit_matches(truth, exits, iou), score).losses_against_labels()


def test_counts_are_sorted_by_image_id(case):
    truth, early, _ = case
    counts = photo_counts(exit_matches(truth, [early]), 0.5)
    assert counts.true_positives.tolist() == [[1], [0], [0]]
    assert counts.false_negatives.tolist() == [[1], [1], [0]]
    assert counts.false_positives.tolist() == [[1], [0], [0]]


def test_losses_against_the_full_path(case):
    truth, early, full = case
    losses = losses_against_full(truth, [early, full], 0.5, 0.5)
    # photo 1: one of two missed and one added; photo 2: the only one missed; photo 3: the full path's false positive
    assert losses.tolist() == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert losses_against_full(truth, [early, full], 0.25, 0.5)[0, 0] == 0.5  # SECOND is found, THIRD is added
    assert losses_against_full(truth, [early, full], 0.95, 0.5).tolist() == [[0.0, 0.0]] * 3  # no detections
    # 0.7 in single precision is below 0.7
    assert losses_against_full(truth, [early, full], 0.7, 0.5).tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_losses_against_the_labels(case):
    truth, early, full = case
    losses = against_labels(truth, [early, full], 0.5, 0.5)
    # photo 3: only the full path has a false positive
    assert losses.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_rows_of_photos_csv(case):
    """Photo 1 leaves early: one of two objects is found, one that the full path finds is lost, one is added. Photo 3,
    without an object, leaves early too, without the full path's false positive. Photo 2 takes the full path."""
    truth, early, full = case
    confidences = [torch.tensor([0.5, 0.9, 0.75]), torch.tensor([0.25, -1.0, 0.1])]
    collected = Collected([2, 3, 1], [early, full], confidences)
    counts = photo_counts(exit_matches(truth, [early, full]), 0.5)
    rows = photo_list(counts, collected, torch.tensor([1, 0, 0]), ("exit8", "full"), "photos/{}.jpg".format)
    assert {tuple(row) for row in rows} == {("file", "exit", "confidence", "objects", "found", "lost", "added")}
    assert [tuple(row.values()) for row in rows] == [
        ("photos/2.jpg", "full", 0.25, 1, 1, 0, 0),
        ("photos/3.jpg", "exit8", pytest.approx(0.9), 0, 0, 0, 0),
        ("photos/1.jpg", "exit8", 0.75, 2, 1, 1, 1),
    ]


def test_agreement_by_hand(case):
    """The early exit keeps the full path's first detection and adds one to photo 1."""
    truth, early, full = case
    assert agreement(truth, full, early, 0.5, 0.5) == Agreement(objects=4, kept=1, added=1, same_photos=0.0)
    assert agreement(truth, full, full, 0.5, 0.5) == Agreement(objects=4, kept=4, added=0, same_photos=1.0)
    assert agreement(truth, full, early, 0.95, 0.5) == Agreement(objects=0, kept=0, added=0, same_photos=1.0)

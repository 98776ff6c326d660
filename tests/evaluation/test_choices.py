"""Any choice of exits has pycocotools' AP, weighted photos and bootstrap draws included."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices
from earlyexit_ssd.evaluation.choices import (
    APs,
    ap_of_choice,
    exit_matches,
)
from earlyexit_ssd.evaluation.coco import coco_evaluation

PHOTOS, EXITS = 7, 3
HERE, LOW, AWAY = (0, 0, 100, 100), (0, 0, 100, 67), (300, 300, 400, 400)  # IoU of LOW with HERE: 0.67
seeds = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def exits_case(random_case):
    """Objects, some of them crowds, and three exits: tied scores, empty photos, 110 detections on one photo."""

    def build(seed, ties=True):
        coco, base = random_case(seed, images=PHOTOS)
        generator = torch.Generator().manual_seed(seed)

        def vary(found, spread, repeats):
            known = len(found["labels"])
            picked = torch.randint(max(known, 1), (known,), generator=generator)
            if torch.rand((), generator=generator) < 0.2:
                picked = picked[:0]
            picked = torch.cat([picked, picked[:1].repeat(repeats)])
            scores = torch.rand(len(picked), generator=generator)
            return {
                "boxes": found["boxes"][picked] + spread * torch.randn(len(picked), 4, generator=generator),
                "scores": scores.mul(8).ceil().div(8) if ties else scores,
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
    """Two photos with a cat; the deep exit finds both, the second one at IoU 0.67."""
    return exit_matches(
        ground_truth(2, [(1, 1, HERE), (2, 1, HERE)]),
        [
            {1: found((1, 0.9, HERE)), 2: found((1, 0.8, AWAY))},
            {1: found((1, 0.95, AWAY), (1, 0.7, HERE)), 2: found((1, 0.6, LOW))},
        ],
    )


def mixed(exits, choice):
    return {image_id: exits[choice[image_id - 1]][image_id] for image_id in exits[0]}


def figures(evaluation):
    return APs(*(None if value < 0 else value for value in evaluation.stats[:2]))


@pytest.mark.parametrize(
    ("choice", "ap50", "ap"),
    [
        ([0, 0], 51 / 101, 51 / 101),  # the first of two objects, at precision 1: 51 of the 101 recalls
        ([0, 1], 1, 0.4 + 0.6 * 51 / 101),  # the second counts at 4 of the 10 IoU thresholds
        ([1, 0], 51 / 101 / 3, 51 / 101 / 3),  # behind two false positives
        ([1, 1], 2 / 3, 0.4 * 2 / 3 + 0.6 * 51 / 101 / 2),
    ],
)
def test_by_hand(two_exits, choice, ap50, ap):
    assert ap_of_choice(two_exits, choice) == APs(pytest.approx(ap), pytest.approx(ap50))
    assert ap_of_choice(two_exits, choice, ap50_only=True) == APs(None, pytest.approx(ap50))


def test_weights_by_hand(two_exits):
    # 3 false positives, 3 hits, and the second photo's hit
    assert ap_of_choice(two_exits, [1, 1], [3, 1], ap50_only=True) == APs(None, pytest.approx(4 / 7))
    # without the second photo its class has one object, found at once
    assert ap_of_choice(two_exits, [0, 1], [1, 0]) == APs(pytest.approx(1), pytest.approx(1))
    assert ap_of_choice(two_exits, [0, 1], [0, 0]) == APs(None, None)


def test_the_stack(two_exits):
    cats, dogs = two_exits.classes
    assert cats.score == pytest.approx([0.95, 0.9, 0.8, 0.7, 0.6])
    assert (cats.photo.tolist(), cats.exit.tolist()) == ([0, 0, 1, 0, 1], [1, 0, 0, 1, 1])
    assert cats.hit[two_exits.half].tolist() == [False, True, False, True, True]
    assert cats.hit.sum(axis=0).tolist() == [0, 10, 0, 10, 4]
    assert not cats.ignored.any()
    assert (cats.objects.tolist(), dogs.objects.tolist()) == ([1, 1], [0, 0])
    assert (two_exits.photos, two_exits.exits, two_exits.image_ids) == (2, 2, [1, 2])


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_equals_pycocotools(exits_case, seed):
    coco, exits = exits_case(seed)
    matches = exit_matches(coco, exits)
    choices = [np.full(PHOTOS, index) for index in range(EXITS)]
    choices.append(np.random.default_rng(seed).integers(EXITS, size=PHOTOS))
    for choice in choices:
        expected = figures(coco_evaluation(coco, mixed(exits, choice)))
        assert ap_of_choice(matches, choice) == expected
        assert ap_of_choice(matches, choice, ap50_only=True) == APs(None, expected.AP50)
        assert ap_of_choice(matches, choice, np.ones(PHOTOS, dtype=int)) == expected


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_weights_equal_a_data_set_with_repeated_photos(exits_case, ground_truth, seed):
    coco, exits = exits_case(seed, ties=False)  # pycocotools ranks equal scores photo by photo, repeats apart
    generator = np.random.default_rng(seed)
    choice, drawn = generator.integers(EXITS, size=PHOTOS), generator.integers(PHOTOS, size=PHOTOS)
    objects, repeated = [], {}
    for new_id, index in enumerate(drawn.tolist(), start=1):
        repeated[new_id] = copy.deepcopy(exits[choice[index]][index + 1])
        for annotation in coco.imgToAnns[index + 1]:
            x, y, width, height = annotation["bbox"]
            box = (x, y, x + width, y + height)
            objects.append((new_id, annotation["category_id"], box, annotation["iscrowd"]))
    expected = figures(coco_evaluation(ground_truth(PHOTOS, objects, ("a", "b", "c")), repeated))
    value = ap_of_choice(exit_matches(coco, exits), choice, np.bincount(drawn, minlength=PHOTOS))
    for ours, theirs in ((value.AP, expected.AP), (value.AP50, expected.AP50)):
        assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-12))


def test_only_100_detections_of_a_class_and_photo_count(ground_truth, found):
    coco = ground_truth(1, [(1, 1, HERE)])
    crowded = [(1, 0.9, AWAY)] * 99 + [(2, 0.9, AWAY)]
    last = {1: found(*crowded, (1, 0.1, HERE))}
    late = {1: found(*crowded, (1, 0.2, AWAY), (1, 0.1, HERE))}
    matches = exit_matches(coco, [last, late])
    assert ap_of_choice(matches, [0], ap50_only=True) == APs(None, pytest.approx(1 / 100))
    assert ap_of_choice(matches, [1], ap50_only=True) == APs(None, 0)


def test_bootstrap_of_ap(two_exits):
    (draws,) = bootstrap_choices(two_exits, [[0, 1]], resamples=40, ap50_only=False)
    # both photos, twice the first, twice the second
    assert sorted(set(draws.AP.round(6).tolist())) == pytest.approx([0.4, 0.4 + 0.6 * 51 / 101, 1])


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_to_find(images, ground_truth):
    matches = exit_matches(ground_truth(images, []), [{}, {}])
    choice = np.zeros(images, dtype=int)
    assert ap_of_choice(matches, choice) == APs(None, None)


def test_nothing_found(ground_truth):
    matches = exit_matches(ground_truth(2, [(1, 1, HERE)]), [{}, {}])
    assert ap_of_choice(matches, [0, 1]) == APs(0, 0)


def test_takes_the_tensor_of_choose_exits(two_exits):
    assert ap_of_choice(two_exits, torch.tensor([0, 1])) == ap_of_choice(two_exits, [0, 1])


def test_errors(two_exits, ground_truth, found):
    with pytest.raises(EarlyExitError, match="no exits"):
        exit_matches(ground_truth(1, []), [])
    with pytest.raises(DataError, match="image 7"):
        exit_matches(ground_truth(1, []), [{}, {7: found()}])
    with pytest.raises(EarlyExitError, match=r"choice int64 \[1\]: give 2 whole numbers"):
        ap_of_choice(two_exits, [0])
    with pytest.raises(EarlyExitError, match=r"weights int64 \[3\]: give 2 whole numbers"):
        ap_of_choice(two_exits, [0, 1], [1, 1, 1])
    for outside in ([0, 2], [-1, 0]):
        with pytest.raises(EarlyExitError, match=r"exits are 0\.\.1"):
            ap_of_choice(two_exits, outside)
    with pytest.raises(EarlyExitError, match=r"choice float64 \[2\]: give 2 whole numbers"):
        ap_of_choice(two_exits, [0.5, 0.9])

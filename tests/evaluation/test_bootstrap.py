"""The bootstrap draws photos; what a draw is worth is ap_of_choice's, which test_choices holds against pycocotools."""

import numpy as np
import pytest

from earlyexit_ssd.evaluation.bootstrap import bootstrap_choices, interval
from earlyexit_ssd.evaluation.choices import ap_of_choice, exit_matches, matches_of
from earlyexit_ssd.evaluation.coco import coco_evaluation


def mixed(exits, choice):
    """The detections of the chosen exits."""
    return {index + 1: exits[taken][index + 1] for index, taken in enumerate(choice)}


@pytest.fixture
def three_exits(random_case):
    """The same photos, three detectors."""
    coco, first = random_case(4)
    return coco, [first, random_case(5)[1], random_case(6)[1]]


def test_every_choice_sees_the_same_photos(three_exits):
    """Whatever stands beside it: paired values are what differences are made of."""
    coco, exits = three_exits
    matches = exit_matches(coco, exits)
    choices = [np.zeros(12, int), np.arange(12) % 3]
    together = bootstrap_choices(matches, choices, resamples=30, seed=5, ap50_only=False)
    for choice, ours in zip(choices, together, strict=True):
        alone = matches_of([coco_evaluation(coco, mixed(exits, choice.tolist()))])
        (theirs,) = bootstrap_choices(alone, [np.zeros(12, int)], resamples=30, seed=5, ap50_only=False)
        for key in ("AP", "AP50"):
            assert getattr(ours, key) == pytest.approx(getattr(theirs, key), abs=1e-12, nan_ok=True)
    assert len(set(together[0].AP50.tolist())) > 10


def test_a_draw_by_hand(three_exits):
    coco, exits = three_exits
    matches, choice = exit_matches(coco, exits), np.ones(12, int)
    (draws,) = bootstrap_choices(matches, [choice], resamples=2, seed=7, ap50_only=False)
    generator = np.random.default_rng(7)
    for ap, ap50 in zip(*draws, strict=True):
        weights = np.bincount(generator.integers(12, size=12), minlength=12)
        found = ap_of_choice(matches, choice, weights)
        assert (ap, ap50) == (found.AP, found.AP50)


def test_ap_is_left_out_where_it_is_not_asked_for(three_exits):
    matches = exit_matches(*three_exits)
    (quick,) = bootstrap_choices(matches, [np.zeros(12, int)], resamples=10)
    (both,) = bootstrap_choices(matches, [np.zeros(12, int)], resamples=10, ap50_only=False)
    assert np.isnan(quick.AP).all() and np.array_equal(quick.AP50, both.AP50)


def test_seeded_and_around_the_value(random_case):
    evaluation = coco_evaluation(*random_case(3, images=40))
    matches, everyone = matches_of([evaluation]), [np.zeros(40, int)]
    (draws,) = bootstrap_choices(matches, everyone, resamples=100, seed=5)
    assert np.array_equal(draws.AP50, bootstrap_choices(matches, everyone, resamples=100, seed=5)[0].AP50)
    assert not np.array_equal(draws.AP50, bootstrap_choices(matches, everyone, resamples=100, seed=6)[0].AP50)
    low, high = interval(draws.AP50)
    assert low < evaluation.stats[1] < high
    assert 0.02 < high - low < 0.5


def test_interval_is_central():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.array([np.nan, 1.0])) == (1.0, 1.0)
    assert interval(np.full(3, np.nan)) is None


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_to_find(images, ground_truth):
    matches = matches_of([coco_evaluation(ground_truth(images, []), {})])
    (draws,) = bootstrap_choices(matches, [np.zeros(images, int)], resamples=3, ap50_only=False)
    assert np.isnan(draws).all()


def test_photos_of_a_group_are_drawn_together(three_exits):
    coco, exits = three_exits
    matches, choice, groups = exit_matches(coco, exits), np.ones(12, int), np.arange(12) // 4
    (draws,) = bootstrap_choices(matches, [choice], resamples=5, seed=7, groups=groups)
    generator = np.random.default_rng(7)
    for ap50 in draws.AP50:
        weights = np.bincount(generator.integers(3, size=3), minlength=3)[groups]
        assert ap50 == ap_of_choice(matches, choice, weights, ap50_only=True).AP50

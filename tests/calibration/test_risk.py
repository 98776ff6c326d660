"""The cheapest thresholds whose mean loss is small."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit_ssd.calibration import risk
from earlyexit_ssd.calibration.risk import LONGEST_PATH, certify, threshold_path
from earlyexit_ssd.calibration.thresholds import CurvePoint, choose
from earlyexit_ssd.config import CLOSED

COSTS = np.array([1.0, 2.0, 4.0])


def same_costs(thresholds):
    return np.tile(COSTS, (len(thresholds), 1))


def photos(count, seed, noise=0.3):
    """Hard photos lose more at the shallow exits, and the exits know it, more or less."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(count)
    losses = np.stack([generator.random(count) < hardness, generator.random(count) < hardness / 3, np.zeros(count)], 1)
    confidences = [np.clip(1 - hardness + noise * generator.standard_normal(count), 0, 1) for _ in range(2)]
    return confidences, losses.astype(float)


def test_path_is_ordered_by_loss():
    confidences, losses = photos(400, 0)
    path = threshold_path(confidences, losses, same_costs)
    assert (path[0] == CLOSED).all() and 10 < len(path) <= LONGEST_PATH + 1
    choices = [choose(confidences, thresholds) for thresholds in path]
    rows = np.arange(400)
    risks = [losses[rows, choice].mean() for choice in choices]
    costs = [COSTS[choice].mean() for choice in choices]
    assert risks == sorted(risks) and costs == sorted(costs, reverse=True)
    assert costs[-1] == 1.0  # at last everybody leaves at the first exit


def test_the_cheapest_step_that_passes():
    path = threshold_path(*photos(400, 0), same_costs)
    confidences, losses = photos(600, 1)
    found = certify(path, confidences, losses, same_costs(path), 0.1, 0.05, "hoeffding_bentkus")
    assert found.point.thresholds == tuple(path[found.step].tolist())
    assert found.point.loss == pytest.approx(losses[np.arange(600), found.choice].mean())
    assert found.point.loss < found.point.bound <= 0.1 and found.curve == ()
    looser = certify(path, confidences, losses, same_costs(path), 0.2, 0.05, "hoeffding_bentkus")
    assert looser.step > found.step and COSTS[looser.choice].mean() < COSTS[found.choice].mean()


def test_the_curve_of_a_report_has_the_bound_of_the_test():
    path = threshold_path(*photos(400, 0), same_costs)[:5]
    confidences, losses = photos(600, 1)
    found = certify(path, confidences, losses, same_costs(path), 0.1, 0.05, "hoeffding_bentkus", with_curve=True)
    assert [point.thresholds for point in found.curve] == [tuple(row) for row in path.tolist()]
    assert found.step > 0 and found.curve[found.step] == found.point
    assert found.point.cost == COSTS[found.choice].mean()
    assert found.curve[0].loss == found.curve[0].bound == 0.0  # closed: nothing is lost


def test_a_step_that_costs_more_than_the_one_before_is_not_taken():
    """An exit that pays on the photos of the path may not on those of the calibration: all stays as it was then."""
    path = np.array([[CLOSED, CLOSED], [CLOSED, 0.5], [0.5, 0.5]])
    confidences, losses = [np.full(400, 0.9)] * 2, np.zeros((400, 3))
    costs = np.array([[9.0, 9.0, 4.0], [9.0, 2.0, 5.0], [3.0, 9.0, 9.0]])
    found = certify(path, confidences, losses, costs, 0.05, 0.05)
    assert (found.step, found.passed, found.point.thresholds) == (1, 2, (CLOSED, 0.5))
    assert certify(path, confidences, losses, costs + np.array([[0], [9], [9]]), 0.05, 0.05).step == 0


def test_closed_if_no_step_passes():
    path = np.array([[CLOSED, CLOSED], [CLOSED, 0.5], [0.5, 0.5]])
    confidences = [np.full(30, 0.9)] * 2
    losses = np.zeros((30, 3))
    losses[:, 0] = 1.0
    found = certify(path, confidences, losses, same_costs(path), 0.02, 0.05, "hoeffding_bentkus")
    assert (found.step, found.point) == (0, CurvePoint((CLOSED, CLOSED), 4.0, 0.0, 0.0))
    assert found.photos_needed == 149  # 0.98^149 < 0.05 < 0.98^148
    losses[:, 1] = 1.0
    assert certify(path, confidences, losses, same_costs(path), 0.02, 0.05, "betting").photos_needed is None


@pytest.fixture
def no_advice(monkeypatch):
    """How many photos would do takes most of the time, and is not looked at."""
    monkeypatch.setattr(risk, "photos_needed", lambda *_: None)


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize("bound", ["hoeffding_bentkus", "betting"])
def test_holds_over_draws_of_the_calibration_photos(bound):
    """The expected loss of what is certified exceeds epsilon in at most delta of the draws."""
    path = threshold_path(*photos(400, 0), same_costs)
    confidences, losses = photos(20000, 2)
    choices = [choose(confidences, thresholds) for thresholds in path]
    true = [losses[np.arange(20000), choice].mean() for choice in choices]
    draws, broken, steps = 150, 0, []
    for seed in range(draws):
        found = certify(path, *photos(300, 100 + seed), same_costs(path), 0.1, 0.1, bound)
        broken += true[found.step] > 0.1
        steps.append(found.step)
    assert broken <= 0.1 * draws + 2 * (0.09 * draws) ** 0.5
    assert np.mean(steps) > 5  # it is not safe by doing nothing


def test_blocks_are_shuffled_before_the_test():
    """900 photos, the first 480 without a loss: bets in their order win before the others are looked at."""
    path = np.array([[CLOSED], [0.5]])
    losses = np.zeros((900, 2))
    losses[480:, 0] = 0.5
    costs = np.array([[2.0, 2.0], [1.0, 2.0]])
    in_order = certify(path, [np.full(900, 0.9)], losses, costs, 0.02, 0.05, seed=None)
    assert in_order.step == 1 and in_order.point.loss > 0.2  # what a seed is for
    mixed = [certify(path, [np.full(900, 0.9)], losses, costs, 0.02, 0.05, seed=seed) for seed in range(20)]
    assert {found.step for found in mixed} == {0}
    fine = certify(path, [np.full(900, 0.9)], np.zeros((900, 2)), costs, 0.02, 0.05, seed=0)
    assert fine.step == 1 and fine.choice.tolist() == [0] * 900


@pytest.mark.usefixtures("no_advice")
def test_frames_of_a_scene_are_one_draw():
    """Ten frames of a scene lose alike: an exit that loses 0.205 where 0.2 is allowed opens far more often than delta
    allows if every frame counts, and does not if blocks of ten do. Losses of frames differ, that of a block is their
    mean."""
    path, costs = np.array([[CLOSED], [0.5]]), np.array([[2.0, 2.0], [1.0, 2.0]])

    def opened(blocks):
        steps = 0
        for seed in range(300):
            generator = np.random.default_rng(seed)
            lost = np.repeat(generator.random(40) < 0.205, 10) * (generator.random(400) < 0.9)
            losses = np.stack([lost, np.zeros(400)], axis=1)
            steps += certify(path, [np.full(400, 0.9)], losses, costs, 0.9 * 0.2, 0.1, blocks=blocks).step
        return steps / 300

    assert opened(np.arange(400) // 10) <= 0.1 < 0.2 < opened(None)


def test_loss_of_a_block_is_the_mean_over_its_frames():
    path = np.array([[CLOSED], [0.5]])
    losses = np.array([[0.3, 0.0], [0.1, 0.0], [0.4, 0.0]])
    found = certify(path, [np.full(3, 0.9)], losses, np.array([[2.0, 2.0], [1.0, 2.0]]), 0.9, 0.9, blocks=[0, 0, 1])
    assert found.step == 1 and found.point.loss == pytest.approx((0.2 + 0.4) / 2)
    nothing = np.zeros((90, 2))
    closed = certify(
        path, [np.full(90, 0.9)], nothing, nothing[:2], 0.02, 0.05, "hoeffding_bentkus", blocks=np.arange(90) // 3
    )
    assert closed.passed == 0 and closed.photos_needed == 149  # blocks: 0.98^149 < 0.05 < 0.98^148

"""Risk control: the cheapest thresholds with an expected loss within a limit."""

import numpy as np
import pytest

from earlyexit_ssd.calibration import risk
from earlyexit_ssd.calibration.risk import LONGEST_PATH, certify, threshold_path
from earlyexit_ssd.calibration.thresholds import CurvePoint, choose
from earlyexit_ssd.config import CLOSED

COSTS = np.array([1.0, 2.0, 4.0])
# step 0 with all exits closed, and one or two steps that open exits
ONE_EXIT, ONE_EXIT_COSTS = np.array([[CLOSED], [0.5]]), np.array([[2.0, 2.0], [1.0, 2.0]])
TWO_EXITS = np.array([[CLOSED, CLOSED], [CLOSED, 0.5], [0.5, 0.5]])


def same_costs(thresholds):
    return np.tile(COSTS, (len(thresholds), 1))


def photos(count, seed, noise=0.3):
    """Return confidences and losses. Hard photos lose more at the early exits, and have low confidences there."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(count)
    losses = np.stack([generator.random(count) < hardness, generator.random(count) < hardness / 3, np.zeros(count)], 1)
    confidences = [np.clip(1 - hardness + noise * generator.standard_normal(count), 0, 1) for _ in range(2)]
    return confidences, losses.astype(float)


@pytest.fixture(scope="module")
def path():
    return threshold_path(*photos(400, 0), same_costs)


def test_path_is_ordered_by_loss(path):
    confidences, losses = photos(400, 0)
    assert (path[0] == CLOSED).all() and 10 < len(path) <= LONGEST_PATH + 1
    choices = [choose(confidences, thresholds) for thresholds in path]
    risks = [losses[np.arange(400), choice].mean() for choice in choices]
    costs = [COSTS[choice].mean() for choice in choices]
    assert risks == sorted(risks) and costs == sorted(costs, reverse=True)
    assert costs[-1] == 1.0  # at the last step all photos leave at the first exit


def test_the_cheapest_step_that_passes(path):
    confidences, losses = photos(600, 1)
    strict, loose = (
        certify(path, confidences, losses, same_costs(path), epsilon, 0.05, "hoeffding_bentkus")
        for epsilon in (0.1, 0.2)
    )
    assert strict.point.thresholds == tuple(path[strict.step].tolist())
    assert strict.point.loss == pytest.approx(losses[np.arange(600), strict.choice].mean())
    assert strict.point.loss < strict.point.bound <= 0.1 and strict.curve == ()
    assert loose.step > strict.step and COSTS[loose.choice].mean() < COSTS[strict.choice].mean()


def test_curve_has_the_bound_of_the_test(path):
    path, (confidences, losses) = path[:5], photos(600, 1)
    found = certify(path, confidences, losses, same_costs(path), 0.1, 0.05, "hoeffding_bentkus", with_curve=True)
    assert [point.thresholds for point in found.curve] == [tuple(row) for row in path.tolist()]
    assert found.step > 0 and found.curve[found.step] == found.point
    assert found.point.cost == COSTS[found.choice].mean()
    assert found.curve[0].loss == found.curve[0].bound == 0.0  # closed exits lose nothing


def test_step_that_costs_more_than_a_step_before_is_not_taken():
    """An exit that saves cost on the photos of the path may not save cost on the calibration photos."""
    confidences, losses = [np.full(400, 0.9)] * 2, np.zeros((400, 3))
    costs = np.array([[9.0, 9.0, 4.0], [9.0, 2.0, 5.0], [3.0, 9.0, 9.0]])
    found = certify(TWO_EXITS, confidences, losses, costs, 0.05, 0.05)
    assert (found.step, found.passed, found.point.thresholds) == (1, 2, (CLOSED, 0.5))
    assert certify(TWO_EXITS, confidences, losses, costs + np.array([[0], [9], [9]]), 0.05, 0.05).step == 0


def test_exits_stay_closed_if_no_step_passes():
    confidences, losses = [np.full(30, 0.9)] * 2, np.zeros((30, 3))
    losses[:, 0] = 1.0
    found = certify(TWO_EXITS, confidences, losses, same_costs(TWO_EXITS), 0.02, 0.05, "hoeffding_bentkus")
    assert (found.step, found.point) == (0, CurvePoint((CLOSED, CLOSED), 4.0, 0.0, 0.0))
    assert found.photos_needed == 149  # 0.98^149 < 0.05 < 0.98^148
    # no step is tested after one that fails: exit 12 loses all detections, exit 8 none
    losses[:, :2] = 0.0, 1.0
    assert certify(TWO_EXITS, confidences, losses, same_costs(TWO_EXITS), 0.5, 0.05).passed == 0
    losses[:, 0] = 1.0
    assert certify(TWO_EXITS, confidences, losses, same_costs(TWO_EXITS), 0.02, 0.05).photos_needed is None


@pytest.fixture
def no_advice(monkeypatch):
    """Leave out the estimate of the number of photos, which takes most of the time."""
    monkeypatch.setattr(risk, "photos_needed", lambda *_: None)


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize("bound", ["hoeffding_bentkus", "betting"])
def test_guarantee_holds_over_draws_of_the_calibration_photos(path, bound):
    """The expected loss of the certified thresholds exceeds epsilon in at most a share delta of the draws."""
    confidences, losses = photos(20000, 2)
    choices = [choose(confidences, thresholds) for thresholds in path]
    risks = np.array([losses[np.arange(20000), choice].mean() for choice in choices])
    draws = 150
    steps = [certify(path, *photos(300, 100 + seed), same_costs(path), 0.1, 0.1, bound).step for seed in range(draws)]
    assert (risks[steps] > 0.1).sum() <= 0.1 * draws + 2 * (0.09 * draws) ** 0.5
    assert np.mean(steps) > 5  # exits are open


def test_blocks_are_shuffled_before_the_test():
    """The first 480 of 900 photos have no loss. Bets in this order win before the others are read."""
    losses = np.zeros((900, 2))
    losses[480:, 0] = 0.5

    def certified(losses, seed):
        return certify(ONE_EXIT, [np.full(900, 0.9)], losses, ONE_EXIT_COSTS, 0.02, 0.05, seed=seed)

    in_order = certified(losses, None)
    assert in_order.step == 1 and in_order.point.loss > 0.2
    assert {certified(losses, seed).step for seed in range(20)} == {0}
    lossless = certified(np.zeros((900, 2)), 0)
    assert lossless.step == 1 and lossless.choice.tolist() == [0] * 900


@pytest.mark.usefixtures("no_advice")
def test_guarantee_holds_for_blocks_of_frames_but_not_for_frames():
    """Ten frames of a scene lose alike, 0.205 on average where 0.2 is allowed. If every frame is a draw, the exit opens
    far more often than delta allows."""

    def share_opened(blocks):
        opened = 0
        for seed in range(300):
            generator = np.random.default_rng(seed)
            lost = np.repeat(generator.random(40) < 0.205, 10) * (generator.random(400) < 0.9)
            losses, confidences = np.stack([lost, np.zeros(400)], axis=1), [np.full(400, 0.9)]
            opened += certify(ONE_EXIT, confidences, losses, ONE_EXIT_COSTS, 0.9 * 0.2, 0.1, blocks=blocks).step
        return opened / 300

    assert share_opened(np.arange(400) // 10) <= 0.1 < 0.2 < share_opened(None)


def test_loss_of_a_block_is_the_mean_over_its_frames():
    losses = np.array([[0.3, 0.0], [0.1, 0.0], [0.4, 0.0]])
    found = certify(ONE_EXIT, [np.full(3, 0.9)], losses, ONE_EXIT_COSTS, 0.9, 0.9, blocks=[0, 0, 1])
    assert found.step == 1 and found.point.loss == pytest.approx((0.2 + 0.4) / 2)
    confidences, losses, blocks = [np.full(90, 0.9)], np.zeros((90, 2)), np.arange(90) // 3
    closed = certify(ONE_EXIT, confidences, losses, ONE_EXIT_COSTS, 0.02, 0.05, "hoeffding_bentkus", blocks=blocks)
    assert closed.passed == 0 and closed.photos_needed == 149  # blocks: 0.98^149 < 0.05 < 0.98^148

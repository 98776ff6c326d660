"""The router: thresholds, temperatures and settings."""

import math
from copy import copy

import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.losses import Assignment
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import policies, register_policy

LOGITS = torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]])  # probabilities of the object: 0.881, 0.047


def test_images_leave_at_confidences_of_at_least_the_threshold():
    router = ExitRouter(2, thresholds=[0.5, 0.9])
    confidence = torch.tensor([0.5, 0.49])
    assert router.leaves(confidence, 0).tolist() == [True, False]
    assert router.leaves(confidence, 1).tolist() == [False, False]


def test_exits_are_closed_by_default():
    router = ExitRouter(2)
    assert router.closed and "closed" in repr(router)
    assert not router.leaves(torch.ones(3), 0).any()
    assert router.policy == load_config().ROUTING.POLICY == "ambiguous_mass"
    assert load_config().ROUTING.THRESHOLDS == (CLOSED,)
    assert not ExitRouter(2, thresholds=[CLOSED, 0.5]).closed


def test_temperature_by_hand():
    router = ExitRouter(1, policy="max_foreground", temperatures=[2.0])
    for exit_index, differences in enumerate(([1.0, -1.5], [2.0, -3.0])):  # the full path has no temperature
        expected = torch.sigmoid(torch.tensor(differences))
        torch.testing.assert_close(router.confidence(ExitSignals(LOGITS), exit_index), expected)


def test_temperatures_are_buffers_unless_they_are_learnt():
    assert list(ExitRouter(2).parameters()) == []
    assert [name for name, _ in ExitRouter(2, learn_temperatures=True).named_parameters()] == ["temperatures"]
    assert ExitRouter(2).temperature_loss(LOGITS, None, 0) is None


def test_learning_finds_the_temperature_of_overconfident_logits():
    generator = torch.Generator().manual_seed(0)
    calibrated = torch.randn(1, 4000, 2, generator=generator)
    labels = torch.multinomial(calibrated[0].softmax(-1), 1, generator=generator).T
    router = ExitRouter(1, learn_temperatures=True)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        router.temperature_loss(2 * calibrated, Assignment(labels, None), 0).backward()
        optimizer.step()
        router.clamp_temperatures()
    assert router.temperatures.item() == pytest.approx(2.0, abs=0.25)


def test_bounds_hold_in_a_loop_that_does_not_clamp():
    router = ExitRouter(1, learn_temperatures=True)
    optimizer = torch.optim.SGD(router.parameters(), lr=1000.0)
    labels = torch.tensor([[1], [1]])
    for _ in range(3):
        optimizer.zero_grad()
        router.temperature_loss(LOGITS, Assignment(labels, None), 0).backward()
        optimizer.step()
    assert not 0.5 <= router.temperatures.item() <= 3.0
    first, second = router.confidence(ExitSignals(LOGITS), 0)
    assert first > second
    assert ExitRouter(**router.to_dict()).temperatures.item() in (0.5, 3.0)
    for value, clamped in ((math.nan, 1.0), (-math.inf, 0.5), (math.inf, 3.0)):
        router.temperatures.data.fill_(value)
        router.clamp_temperatures()
        assert router.temperatures.item() == clamped


def test_objects_and_background_have_equal_weight():
    router = ExitRouter(1, learn_temperatures=True)
    logits, labels = torch.tensor([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[1, 0, 0]])
    losses = [math.log1p(math.exp(-difference)) for difference in (2, 1, 3)]
    expected = (losses[0] + (losses[1] + losses[2]) / 2) / 2
    assert router.temperature_loss(logits, Assignment(labels, None), 0).item() == pytest.approx(expected)
    only = router.temperature_loss(logits[:, 1:], Assignment(labels[:, 1:], None), 0).item()
    assert only == pytest.approx((losses[1] + losses[2]) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": [-0.2]}, r"thresholds has -0.2, expected a number in \[0, 1\], or 2 to close the exit"),
        ({"thresholds": [0.3, 1.5]}, r"thresholds has 1.5, expected a number in \[0, 1\], or 2"),
        ({"thresholds": [0.1, 0.2, 0.3]}, "one for each of 2 exits"),
        ({"thresholds": None}, "thresholds is None, expected one number"),
        ({"temperatures": [5.0]}, "temperatures has 5.0"),
        ({"temperature_bounds": (3.0, 0.5)}, "0 < low < high"),
        ({"temperature_bounds": (1.0,)}, "temperature_bounds"),
        ({"policy": "entropie"}, "routing policy is 'entropie', expected one of"),
        ({"policy": len}, "routing policy is <built-in function len>, expected one of"),
        ({"num_exits": -1}, "num_exits is -1, expected the number of early exits"),
        ({"num_exits": 2.0}, "num_exits is 2.0"),
        ({"hybrid": "no"}, "hybrid is 'no', expected True or False"),
    ],
)
def test_invalid_settings(arguments, message):
    with pytest.raises(EarlyExitError, match=message):
        ExitRouter(**{"num_exits": 2, **arguments})


def test_misspelt_keyword():
    with pytest.raises(TypeError, match="did you mean 'thresholds'"):
        ExitRouter(2, threshold=[0.5])


def test_numbers_of_any_type_are_one_value_per_exit():
    for value in (0.75, np.float32(0.75), torch.tensor(0.75), [0.75] * 2, torch.full([2], 0.75), (np.float64(0.75),)):
        router = ExitRouter(2, thresholds=value, temperatures=value)
        assert router.thresholds.tolist() == router.temperatures.tolist() == [0.75, 0.75]


@pytest.fixture
def own_policy(monkeypatch):
    """Return a function that registers a policy for one test and returns its router."""
    monkeypatch.setattr(policies, "POLICIES", copy(policies.POLICIES))

    def register(function, boxes=None):
        register_policy("of_a_test", boxes)(function)
        return ExitRouter(1, policy="of_a_test")

    return register


@pytest.mark.parametrize("boxes", [None, 2, 3, 512])  # of three
def test_a_policy_may_work_in_place(own_policy, boxes):
    router = own_policy(lambda logits: logits.zero_()[:, 0, 0], boxes)
    logits = torch.ones(2, 3, 4)
    for exit_index in (0, 1):  # at the full path, temperature 1 makes no copy
        router.confidence(ExitSignals(logits), exit_index)
        assert logits.eq(1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda logits: logits.amax(-1), r"\[2, 3\], expected one number per image"),
        (lambda logits: logits.amax()[None], r"\[1\], expected one number per image"),
        (lambda logits: [0.5, 0.5], "a list, expected one number per image, a tensor"),
        (lambda logits: logits[:, 0, 0] / 0 * 0, r"NaN, expected numbers in \[0, 1\]"),
    ],
)
def test_a_policy_returns_one_number_per_image(own_policy, wrong, message):
    router = own_policy(wrong)
    with pytest.raises(EarlyExitError, match=rf"'of_a_test' returns {message}"):
        router.confidence(ExitSignals(torch.ones(2, 3, 4)), 0)


def test_a_policy_may_return_nan_for_logits_that_are_not_finite(own_policy):
    logits = torch.full((2, 3, 4), torch.inf)
    assert own_policy(lambda logits: (logits - logits)[:, 0, 0]).confidence(ExitSignals(logits), 0).isnan().all()


def test_numbers_of_a_policy_are_clamped(own_policy):
    router = own_policy(lambda logits: logits[:, 0, 0])
    assert router.confidence(ExitSignals(torch.tensor([[[-3.0]], [[3.0]]])), 0).tolist() == [0, 1]


@pytest.mark.parametrize("learnt", [False, True])
def test_assigned_numbers_are_checked(learnt):
    router = ExitRouter(2, learn_temperatures=learnt)
    router.thresholds = [0.5, 0.7]
    router.temperatures = (1.5, 2.0)
    assert router.thresholds.tolist() == pytest.approx([0.5, 0.7]) and router.temperatures.tolist() == [1.5, 2.0]
    assert router.leaves(torch.tensor([0.6]), 0).item() and not router.leaves(torch.tensor([0.6]), 1).item()
    assert isinstance(router.temperatures, torch.nn.Parameter) == learnt
    assert set(router.state_dict()) == {"thresholds", "temperatures"}
    router.thresholds = torch.tensor(0.9)
    assert router.to_dict()["thresholds"] == pytest.approx([0.9, 0.9])
    for wrong in ([0.1, 0.2, 0.3], [0.5, float("nan")], [float("inf"), 0.5], [-0.1, 0.5], [0.5, 3.0], "high", None):
        with pytest.raises(EarlyExitError, match="^thresholds "):
            router.thresholds = wrong
    with pytest.raises(EarlyExitError, match="^temperatures has 9.0"):
        router.temperatures = [1.0, 9.0]
    assert router.thresholds.tolist() == pytest.approx([0.9, 0.9])


def test_the_policy_is_assigned_by_name():
    router = ExitRouter(2, policy="balanced_ambiguity", parameters=[1.0, 2.0])
    router.policy = "emptiness"
    assert router.to_dict() == ExitRouter(2, policy="emptiness").to_dict()
    assert "_policy" not in dict(router.named_children())
    with pytest.raises(EarlyExitError, match="did you mean 'emptiness'"):
        router.policy = "emptines"
    assert router.policy == "emptiness"

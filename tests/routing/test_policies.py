import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import POLICIES, ExitRouter, get_policy
from earlyexit_ssd.routing.learned_gain import GainModel, to_plain
from earlyexit_ssd.routing.policies import FITTED_POLICIES, below, largest_of, looked_at, register_policy

# Two images, two default boxes, background and two classes; probabilities by softmax of logs.
PROBABILITIES = torch.tensor([[[0.9, 0.05, 0.05], [0.5, 0.4, 0.1]], [[0.2, 0.7, 0.1], [0.98, 0.01, 0.01]]])


def entropy_of(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_foreground", [(0.1 + 0.5) / 2, (0.8 + 0.02) / 2]),
        ("max_foreground", [0.4, 0.7]),
        (
            "entropy",
            [
                1 - (entropy_of(0.9, 0.05, 0.05) + entropy_of(0.5, 0.4, 0.1)) / 2 / math.log(3),
                1 - (entropy_of(0.2, 0.7, 0.1) + entropy_of(0.98, 0.01, 0.01)) / 2 / math.log(3),
            ],
        ),
        ("margin", [(0.85 * 0.1 + 0.1 * 0.5) / 0.6, (0.5 * 0.8 + 0.97 * 0.02) / 0.82]),
        ("ambiguous_mass", [1 / 1.4, 1.0]),  # 0.4 is undecided; 0.7 is decided, 0.01 and 0.05 are nothing
        ("emptiness", [0.6, 0.3]),
    ],
)
def test_values_by_hand(name, expected):
    # 0.05 itself lies on the border of what is undecided; a hair less is not
    now = PROBABILITIES.log() + 7
    now[0, 0, 1:] -= 1e-4
    found = get_policy(name)(ExitSignals(now), 1)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 2**31), st.floats(0.01, 50))
def test_in_the_unit_interval_and_one_number_per_image(name, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 5, 4, generator=generator)
    confidence = POLICIES[name](ExitSignals(logits), 1)
    assert confidence.shape == (3,)
    assert ((confidence >= 0) & (confidence <= 1)).all()
    alone = POLICIES[name](ExitSignals(logits[1:2]), 1)
    assert math.isclose(confidence[1].item(), alone.item(), abs_tol=1e-5)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"mean_foreground", "max_foreground"}))
def test_a_frame_of_sure_background_leaves(name):
    """All but the history's rule and "very sure" say so; margin needs no object either."""
    logits = torch.zeros(1, 50, 4)
    logits[..., 0] = 12.0
    assert get_policy(name)(ExitSignals(logits), 0).item() > 0.99


def test_unknown_policy():
    with pytest.raises(EarlyExitError, match="did you mean 'max_foreground'"):
        get_policy("max_forground")
    with pytest.raises(EarlyExitError, match="did you mean 'learned_gain'"):
        get_policy("learnt_gain")


def test_a_policy_of_ones_own_is_a_function_and_a_name():
    @register_policy("test_only")
    def largest_logit(logits):
        return logits[..., 1:].amax((-1, -2)).sigmoid()

    try:
        assert get_policy("test_only")(ExitSignals(torch.zeros(2, 3, 2)), 0).tolist() == [0.5, 0.5]
        with pytest.raises(EarlyExitError, match="'test_only' is registered already"):
            register_policy("test_only")(largest_logit)
    finally:
        del POLICIES["test_only"]


def test_a_policy_looks_at_one_default_box_at_least():
    for boxes in (0, 1.5):
        with pytest.raises(EarlyExitError, match=f"'none' looks at {boxes} default boxes; give 1 or more"):
            register_policy("none", boxes=boxes)


def test_names_are_names_and_taken_once():
    with pytest.raises(EarlyExitError, match=r'write @register_policy\("name"\)'):
        register_policy(len)
    with pytest.raises(EarlyExitError, match="'learned_gain' is registered already"):
        register_policy("learned_gain")(len)


def test_parameters_are_for_policies_that_are_fitted():
    with pytest.raises(EarlyExitError, match="'entropy' has no parameters"):
        get_policy("entropy", [{}])
    with pytest.raises(EarlyExitError, match="tools/calibrate.py"):
        get_policy("learned_gain")


def test_sure_background_need_not_be_looked_at():
    """Among more default boxes than candidates, the rules about single objects say what all of them would say."""
    logits = torch.randn(2, 3234, 8) - 12 * (torch.arange(8) > 0)
    logits[0, 5:400:4, 3] += torch.linspace(5, 20, 99)  # from nothing by way of undecided to sure
    largest = logits.softmax(-1)[..., 1:].amax(-1)
    mass = torch.where((largest > 0.05) & (largest < 0.6), largest, 0.0).sum(-1)
    expected = {"max_foreground": largest.amax(-1), "emptiness": 1 - largest.amax(-1), "ambiguous_mass": 1 / (1 + mass)}
    assert mass[0] > 5
    for name, values in expected.items():
        router = ExitRouter(1, policy=name)
        assert router.confidence(ExitSignals(logits), 0).tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_looks_at_the_boxes_whose_objects_lead_most():
    # leads over background, box by box: -1, 3, 0, 2
    logits = torch.tensor([[[1.0, -2, 0], [0, 3, 1], [2, 2, 1], [-3, -4, -1]]])
    signals = ExitSignals(logits, torch.ones(1, 6))
    seen = looked_at(signals, 2)
    order = seen.logits[0, :, 1].argsort(descending=True)
    assert seen.logits[0, order].tolist() == [[0, 3, 1], [-3, -4, -1]]
    assert seen.tap is signals.tap
    assert looked_at(signals, None) is signals and looked_at(signals, 4) is signals
    pair = looked_at(ExitSignals(torch.cat([logits, logits.flip(1)])), 2).logits.sort(1).values
    assert pair[0].equal(pair[1])


@pytest.mark.parametrize("classes", [1, 31, 32, 33, 80])
def test_largest_of_any_number_of_classes(classes):
    values = torch.randn(2, 5, classes)
    assert largest_of(values).equal(values.amax(-1))
    assert largest_of(values.flip(-1)).equal(values.amax(-1))
    values = values.abs()
    assert below(values, values.amax(-1)).equal(values.masked_fill(values == values.amax(-1, keepdim=True), 0.0))


@pytest.mark.parametrize("outputs", [8, 81])
@pytest.mark.parametrize("name", [*sorted(POLICIES), *sorted(FITTED_POLICIES)])
def test_quick_enough(name, outputs):
    """The limit is 0.3 ms per image on one thread; ten times that here, since the machine may be busy."""
    logits, tap, threads = torch.randn(4, 3234, outputs), torch.randn(4, 160), torch.get_num_threads()
    fitted = {
        "learned_gain": [to_plain(GainModel(80))] * 2,
        "foreseen_emptiness": [{"weight": [0.1] * 161, "bias": 0.0}] * 2,
        "balanced_ambiguity": [0.5] * (outputs - 1),
    }
    router = ExitRouter(2, policy=name, temperatures=1.5, parameters=fitted.get(name))
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            router.confidence(ExitSignals(logits, tap), 1)
            times.append((time.perf_counter() - start) / len(logits))
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.003

"""Confidences against tensors written by hand."""

import json
import math
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import POLICIES, ExitRouter, get_policy, policies
from earlyexit_ssd.routing.policies import (
    LEVELS,
    LOGIT_EPS,
    NUM_STATISTICS,
    BalancedAmbiguity,
    FittedPolicy,
    ForeseenEmptiness,
    GainModel,
    LearnedGain,
    at_likeliest_boxes,
    fit_gain,
    fit_largest_score,
    gain_inputs,
    register_policy,
)

FITTED = [name for name in POLICIES if policies.is_fitted(name)]
NOT_FITTED = [name for name in POLICIES if name not in FITTED]

# Probabilities of background and two classes at two default boxes of two images.
PROBABILITIES = torch.tensor([[[0.9, 0.05, 0.05], [0.5, 0.4, 0.1]], [[0.2, 0.7, 0.1], [0.98, 0.01, 0.01]]])


def certainty(*probabilities: float) -> float:
    return 1 + sum(p * math.log(p) for p in probabilities) / math.log(3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_foreground", [(0.1 + 0.5) / 2, (0.8 + 0.02) / 2]),
        ("max_foreground", [0.4, 0.7]),
        (
            "entropy",
            [
                (certainty(0.9, 0.05, 0.05) + certainty(0.5, 0.4, 0.1)) / 2,
                (certainty(0.2, 0.7, 0.1) + certainty(0.98, 0.01, 0.01)) / 2,
            ],
        ),
        ("margin", [(0.85 * 0.1 + 0.1 * 0.5) / 0.6, (0.5 * 0.8 + 0.97 * 0.02) / 0.82]),
        ("ambiguous_mass", [1 / 1.4, 1.0]),  # only 0.4 is ambiguous
        ("emptiness", [0.6, 0.3]),
    ],
)
def test_values_by_hand(name, expected):
    logits = PROBABILITIES.log() + 7
    logits[0, 0, 1:] -= 1e-4  # below the bound 0.05 of ambiguous boxes
    assert get_policy(name)(ExitSignals(logits), 1).tolist() == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NOT_FITTED), st.integers(0, 2**31), st.floats(0.01, 50))
def test_in_the_unit_interval_and_one_number_per_image(name, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 5, 4, generator=generator)
    confidence = POLICIES[name](ExitSignals(logits), 1)
    assert confidence.shape == (3,)
    assert ((confidence >= 0) & (confidence <= 1)).all()
    alone = POLICIES[name](ExitSignals(logits[1:2]), 1)
    assert math.isclose(confidence[1].item(), alone.item(), abs_tol=1e-5)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (get_policy, ["max_forground"], "did you mean 'max_foreground'"),
        (get_policy, ["learnt_gain"], "did you mean 'learned_gain'"),
        (get_policy, ["entropy", [{}]], "'entropy' takes no parameters"),
        *((get_policy, [name], f"'{name}' needs parameters; tools/calibrate.py fits them") for name in FITTED),
        (get_policy, ["balanced_ambiguity", []], "'balanced_ambiguity' needs parameters"),
        (register_policy, ["none", 0], "'none': boxes is 0, expected 1 or more"),
        (register_policy, ["none", 1.5], "'none': boxes is 1.5, expected 1 or more"),
        (register_policy("none"), [torch.nn.Linear], "'none' is the class Linear; derive it from FittedPolicy"),
    ],
)
def test_invalid_names_parameters_and_registrations(function, arguments, message):
    with pytest.raises(EarlyExitError, match=message):
        function(*arguments)


def test_the_number_0_is_a_fitted_parameter(monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", copy(policies.POLICIES))

    @register_policy("of_a_test")
    class Offset(FittedPolicy):
        def __init__(self, parameters):
            super().__init__()
            self.offset = parameters

    assert get_policy("of_a_test", 0.0).offset == 0


WRONG_PARAMETERS = {
    "learned_gain": [3, "abc", [3], [{}], [{"tap.weight": 0.5}], [{"tap.weight": [[0.1, 0.2]]}]],
    "foreseen_emptiness": [3, "abc", [3], {"weight": [0.1]}, [{"weights": [0.1]}], [{"weight": "a", "bias": 0}]],
    "balanced_ambiguity": [3, [0.5, "a"], [0.5, 0.0], [0.5, float("nan")], {"cat": 1.0}],
}


@pytest.mark.parametrize(
    ("name", "parameters"), [(name, value) for name, values in WRONG_PARAMETERS.items() for value in values]
)
def test_wrong_parameters_are_refused(name, parameters):
    with pytest.raises(EarlyExitError, match=f"'{name}': its parameters are .*, expected {POLICIES[name].expected}"):
        get_policy(name, parameters)


def test_flags_of_policies():
    """Policies that read taps can decide at empty exits. Counts of labels need no training photos."""
    for flag in ("needs_training_photos", "reads_taps"):
        names = {name for name, policy in POLICIES.items() if getattr(policy, flag)}
        assert names == {"learned_gain", "foreseen_emptiness"}
    assert not policies.reads_taps("unknown") and not policies.reads_taps(None)


def test_certain_background_changes_little():
    """Policies that read only the likeliest default boxes have the same confidence as on all default boxes."""
    logits = torch.randn(2, 3234, 8) - 12 * (torch.arange(8) > 0)
    logits[0, 5:400:4, 3] += torch.linspace(5, 20, 99)  # object probabilities from 0 to 1
    largest = logits.softmax(-1)[..., 1:].amax(-1)
    mass = torch.where((largest > 0.05) & (largest < 0.6), largest, 0.0).sum(-1)
    expected = {"max_foreground": largest.amax(-1), "emptiness": 1 - largest.amax(-1), "ambiguous_mass": 1 / (1 + mass)}
    assert mass[0] > 5
    for name, values in expected.items():
        router = ExitRouter(1, policy=name)
        assert router.confidence(ExitSignals(logits), 0).tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_likeliest_boxes_by_hand():
    logits = torch.tensor([[[1.0, -2, 0], [0, 3, 1], [2, 2, 1], [-3, -4, -1]]])  # over background: -1, 3, 0, 2
    signals = ExitSignals(logits, torch.ones(1, 6))
    likeliest = at_likeliest_boxes(signals, 2)
    assert sorted(likeliest.logits[0].tolist()) == [[-3, -4, -1], [0, 3, 1]]
    assert likeliest.tap is signals.tap
    assert at_likeliest_boxes(signals, None) is signals and at_likeliest_boxes(signals, 4) is signals
    pair = at_likeliest_boxes(ExitSignals(torch.cat([logits, logits.flip(1)])), 2).logits
    assert sorted(pair[0].tolist()) == sorted(pair[1].tolist()) == [[-3, -4, -1], [0, 3, 1]]


# Probabilities of background and two classes at three default boxes of two images.
UNDECIDED = torch.tensor(
    [
        [[0.70, 0.20, 0.10], [0.98, 0.01, 0.01], [0.10, 0.10, 0.80]],  # ambiguous: 0.20 of class 1
        [[0.60, 0.10, 0.30], [0.50, 0.40, 0.10], [0.97, 0.02, 0.01]],  # 0.30 of class 2 and 0.40 of class 1
    ]
)


def balanced(weights, probabilities=UNDECIDED):
    router = ExitRouter(1, policy="balanced_ambiguity", parameters=weights)
    return router.confidence(ExitSignals(probabilities.log()), 0)


def test_ambiguous_boxes_have_the_weight_of_their_class():
    expected = torch.tensor([1 / (1 + 0.5 * 0.20), 1 / (1 + 4.0 * 0.30 + 0.5 * 0.40)])
    torch.testing.assert_close(balanced([0.5, 4.0]), expected)
    certain = torch.tensor([[[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]])
    assert balanced([9.0, 9.0], certain).tolist() == [1.0]  # no ambiguous box
    with pytest.raises(EarlyExitError, match="has weights of 3 classes, the model has 2; calibrate again"):
        balanced([1.0, 1.0, 1.0])


def test_rare_classes_have_large_weights():
    def weights(*objects):
        return BalancedAmbiguity.fit(SimpleNamespace(object_counts=lambda: list(objects)))

    assert weights(9, 4) == [0.75, 1.5]  # (10 + 5) / 2 over 10 and over 5
    assert weights(3, 3, 3) == [1.0, 1.0, 1.0]
    assert weights(0, 2) == [2.0, 2 / 3]  # a class without an object has a weight all the same
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' counts labelled objects, and the photos have none"):
        weights(0, 0)


def test_statistics_by_hand():
    """The object probabilities are 0.8, 0.2 (ambiguous) and 0.01."""
    probabilities = torch.tensor([[[0.15, 0.8, 0.05], [0.75, 0.05, 0.2], [0.98, 0.01, 0.01]]])
    values = policies.logit_statistics(probabilities.log() + 2)[0]
    counts = (values[:11].exp() - 1).tolist()
    assert LEVELS[3] == 0.2 and LEVELS[9] == 0.8
    expected = [2, 2, 2, counts[3], 1, 1, 1, 1, 1, counts[9], 0]  # rounding decides at the levels 0.2 and 0.8
    assert counts == pytest.approx(expected, abs=1e-4)
    assert (values[11:13].exp() - 1).tolist() == pytest.approx([0.8 + 0.2 + 0.01, 0.2], abs=1e-4)
    assert values[13:].tolist() == pytest.approx([0.8, 0.2], abs=1e-4)


def test_second_largest_probability_of_one_class_is_0():
    values = policies.logit_statistics(torch.randn(3, 40, 2))
    assert values.shape == (3, NUM_STATISTICS) and values.isfinite().all()
    assert values[:, -1].abs().max() == 0


def test_fits_a_function_of_the_statistics():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, NUM_STATISTICS + 6, generator=generator) * 3 + 5
    gains = 0.2 * (inputs[:, 2] - 5) + 0.1 * (inputs[:, NUM_STATISTICS + 1] - 5)
    model = fit_gain(inputs[:400], gains[:400])
    error = (model(inputs[400:]) - gains[400:]).pow(2).mean()
    assert error < 0.2 * gains[400:].var()
    assert sum(parameter.numel() for parameter in model.parameters()) < 400


def test_fit_depends_on_the_seed_only_and_accepts_one_photo(monkeypatch):
    monkeypatch.setattr(policies, "FIT_STEPS", 10)
    inputs = torch.randn(1, NUM_STATISTICS + 6)  # one photo has no variance
    first, second = (fit_gain(inputs, torch.tensor([0.5]))(inputs) for _ in range(2))
    assert first.isfinite().all() and first.equal(second)


def random_model(tap_channels, seed):
    model, generator = GainModel(tap_channels), torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.normal_(std=0.3, generator=generator)
    model.scale.fill_(2.0)
    return model


def test_router_of_learned_gain_goes_through_json():
    models = [random_model(4, 0), random_model(6, 1)]
    parameters = [model.to_plain() for model in models]
    settings = ExitRouter(2, policy="learned_gain", parameters=parameters, thresholds=[0.4, 0.5]).to_dict()
    router = ExitRouter(**json.loads(json.dumps(settings)))
    assert not any(parameter.requires_grad for parameter in router.parameters())
    signals = ExitSignals(torch.randn(5, 30, 3), torch.rand(5, 12))
    assert gain_inputs(signals, 6)[:, NUM_STATISTICS:].equal(signals.tap[:, :6])  # the means, not the maxima
    for exit_index, model in enumerate(models):
        expected = torch.sigmoid(-model(gain_inputs(signals, model.tap_channels)))
        torch.testing.assert_close(router.confidence(signals, exit_index), expected)
    assert router.confidence(signals, 2).tolist() == [1.0] * 5  # no exit follows the full path


def test_buffers_are_loaded_from_a_state_dict():
    """A policy that precomputes from its parameters would ignore a loaded state dict."""
    first, second = (LearnedGain([random_model(3, seed).to_plain()]) for seed in (1, 2))
    signals = ExitSignals(torch.randn(3, 20, 4), torch.randn(3, 6))
    assert not torch.allclose(first(signals, 0), second(signals, 0))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(signals, 0), second(signals, 0))


def test_regression_inputs_are_the_tap_and_the_largest_probability():
    tap, logits = torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    assert policies.regression_inputs(ExitSignals(logits, tap=tap, empty=True)).tolist() == [[1, 2]]
    assert policies.regression_inputs(ExitSignals(logits, tap=tap))[0].tolist() == pytest.approx([1, 2, np.log(3)])


def test_foreseen_emptiness_by_hand():
    router = ExitRouter(1, policy="foreseen_emptiness", parameters=[{"weight": [1.0, -2.0], "bias": 0.5}])
    signals = ExitSignals(torch.zeros(1, 3, 2), tap=torch.tensor([[2.0, 0.25]]), empty=True)
    full = ExitSignals(torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log())
    for each in (router, ExitRouter(**router.to_dict())):
        assert each.confidence(signals, 0).item() == pytest.approx(1 / (1 + np.exp(2.0)))
        assert each.confidence(full, 1).item() == pytest.approx(0.25)


def test_finds_a_linear_rule_and_shrinks_noise():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 20, generator=generator) * 3 + 1
    weight = [0.5, -0.3, *[0.0] * 18]
    fitted = fit_largest_score(inputs, torch.sigmoid(inputs @ torch.tensor(weight) + 0.2))
    assert fitted["weight"] == pytest.approx(weight, abs=0.01)
    assert fitted["bias"] == pytest.approx(0.2, abs=0.02)
    noise = fit_largest_score(inputs, torch.rand(300, generator=generator))
    assert np.abs(noise["weight"]).max() < 0.05


def test_leave_one_out_error_equals_refits():
    """The chosen penalty has the smallest error of fits that leave one photo out."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(25, 12, generator=generator)
    probability = torch.sigmoid(inputs[:, 0] + torch.randn(25, generator=generator))
    targets = torch.logit(probability, eps=LOGIT_EPS).double()
    scaled = ((inputs - inputs.mean(0)) / inputs.std(0, unbiased=False)).double()

    def ridge(rows, penalty):
        x, y = torch.cat([scaled[rows], torch.ones(len(rows), 1)], dim=1), targets[rows]
        weight = torch.diag(torch.tensor([penalty] * 12 + [0.0], dtype=torch.float64))
        return torch.linalg.solve(x.T @ x + weight, x.T @ y)

    def error(penalty):
        solutions = [ridge([row for row in range(25) if row != left_out], penalty) for left_out in range(25)]
        return sum((scaled[i] @ fit[:-1] + fit[-1] - targets[i]) ** 2 for i, fit in enumerate(solutions))

    best = min((10.0**power for power in range(-1, 6)), key=error)
    expected = ridge(list(range(25)), best)[:-1] / inputs.std(0, unbiased=False)
    assert fit_largest_score(inputs, probability)["weight"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_weight_counts_like_copies_of_the_photo(monkeypatch):
    """The last of 6 photos has weight 3. Weights are scaled to the sum 6, so the penalty is scaled too."""
    generator = torch.Generator().manual_seed(2)
    inputs, probability = torch.randn(6, 2, generator=generator), torch.rand(6, generator=generator)
    rows = [*range(6), 5, 5]
    monkeypatch.setattr(policies, "RIDGE_PENALTIES", (8.0,))
    copied = fit_largest_score(inputs[rows], probability[rows])
    monkeypatch.setattr(policies, "RIDGE_PENALTIES", (6.0,))
    weighted = fit_largest_score(inputs, probability, torch.tensor([1.0, 1, 1, 1, 1, 3]))
    assert weighted["weight"] == pytest.approx(copied["weight"], rel=1e-5)
    assert weighted["bias"] == pytest.approx(copied["bias"], rel=1e-5)


class Photos:
    """Recorded photos with an empty exit and a tap of three numbers."""

    temperatures, seed = (1.0,), 0

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tap = torch.randn(count, 3, generator=generator)
        self.scores = torch.sigmoid(self.tap[:, 0] + 0.1 * torch.randn(count, generator=generator))

    def signals(self, exit_index, boxes=None):
        yield ExitSignals(torch.zeros(len(self.tap), 1, 2), self.tap, empty=True)

    def largest_scores(self):
        return self.scores


def test_a_cross_fitted_confidence_does_not_depend_on_its_photo():
    train, calib, folds = Photos(20, 1), Photos(12, 2), torch.arange(12) % 3
    fitted, (confidences,) = ForeseenEmptiness.cross_fit(train, calib, folds)
    calib.scores = calib.scores.clone()
    calib.scores[folds == 1] = 0.999
    changed, (others,) = ForeseenEmptiness.cross_fit(train, calib, folds)
    assert torch.equal(confidences[folds == 1], others[folds == 1])
    assert not torch.isclose(confidences[folds != 1], others[folds != 1]).any()
    assert fitted != changed
    alone = fit_largest_score(
        torch.cat([train.tap, calib.tap[folds != 1]]),
        torch.cat([train.scores, calib.scores[folds != 1]]),
        torch.tensor([1.0] * 20 + [20 / 12] * 8),  # both sets count alike
    )
    expected = torch.sigmoid(-(calib.tap[folds == 1] @ torch.tensor(alone["weight"]) + alone["bias"]))
    assert torch.allclose(others[folds == 1], expected)

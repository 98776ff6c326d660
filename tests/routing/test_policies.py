"""Confidences against tensors written by hand."""

from __future__ import annotations

import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.routing import POLICIES, ExitRouter, get_policy, policies
from earlyexit_ssd.routing.policies import (
    FITTED_POLICIES,
    LEVELS,
    LOGIT_EPS,
    NUM_STATISTICS,
    BalancedAmbiguity,
    ForeseenEmptiness,
    GainModel,
    LearnedGain,
    at_likeliest_boxes,
    fit_gain,
    fit_largest_score,
    gain_inputs,
    largest_of,
    logit_statistics,
    needs_training_photos,
    reads_taps,
    register_policy,
    regression_inputs,
    without_largest,
)

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
        ("ambiguous_mass", [1 / 1.4, 1.0]),  # 0.4 is ambiguous; 0.7 is clear, 0.01 and 0.05 are nothing
        ("emptiness", [0.6, 0.3]),
    ],
)
def test_values_by_hand(name, expected):
    # 0.05 itself lies on the border of what is ambiguous; a hair less is not
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
def test_an_image_of_certain_background_leaves(name):
    """All but the history's rule and "very sure" say so; margin needs no object either."""
    logits = torch.zeros(1, 50, 4)
    logits[..., 0] = 12.0
    assert get_policy(name)(ExitSignals(logits), 0).item() > 0.99


def test_unknown_policy():
    with pytest.raises(EarlyExitError, match="did you mean 'max_foreground'"):
        get_policy("max_forground")
    with pytest.raises(EarlyExitError, match="did you mean 'learned_gain'"):
        get_policy("learnt_gain")


def test_register_a_function():
    @register_policy("test_only")
    def largest_logit(logits):
        return logits[..., 1:].amax((-1, -2)).sigmoid()

    try:
        assert get_policy("test_only")(ExitSignals(torch.zeros(2, 3, 2)), 0).tolist() == [0.5, 0.5]
        with pytest.raises(EarlyExitError, match="'test_only' is registered already"):
            register_policy("test_only")(largest_logit)
    finally:
        del POLICIES["test_only"]


def test_number_of_boxes_is_checked():
    for boxes in (0, 1.5):
        with pytest.raises(EarlyExitError, match=f"'none': boxes is {boxes}, expected 1 or more"):
            register_policy("none", boxes=boxes)


def test_names_are_strings_and_unique():
    with pytest.raises(EarlyExitError, match=r'write @register_policy\("name"\)'):
        register_policy(len)
    with pytest.raises(EarlyExitError, match="'learned_gain' is registered already"):
        register_policy("learned_gain")(len)


def test_a_fitted_policy_is_a_subclass():
    with pytest.raises(EarlyExitError, match="'none' is the class Linear; derive it from FittedPolicy"):
        register_policy("none")(torch.nn.Linear)


def test_flags_of_policies():
    """One that counts labels alone needs no training photos; one that looks at the trunk judges empty exits."""
    names = (*POLICIES, *FITTED_POLICIES)
    assert {name for name in names if needs_training_photos(name)} == {"learned_gain", "foreseen_emptiness"}
    assert {name for name in names if reads_taps(name)} == {"learned_gain", "foreseen_emptiness"}
    assert not reads_taps("unknown") and not reads_taps(None)


def test_only_fitted_policies_take_parameters():
    with pytest.raises(EarlyExitError, match="'entropy' takes no parameters"):
        get_policy("entropy", [{}])
    with pytest.raises(EarlyExitError, match="tools/calibrate.py"):
        get_policy("learned_gain")


def test_certain_background_changes_little():
    """Policies that read only the likeliest default boxes have the same confidence as on all default boxes."""
    logits = torch.randn(2, 3234, 8) - 12 * (torch.arange(8) > 0)
    logits[0, 5:400:4, 3] += torch.linspace(5, 20, 99)  # from nothing by way of ambiguous to sure
    largest = logits.softmax(-1)[..., 1:].amax(-1)
    mass = torch.where((largest > 0.05) & (largest < 0.6), largest, 0.0).sum(-1)
    expected = {"max_foreground": largest.amax(-1), "emptiness": 1 - largest.amax(-1), "ambiguous_mass": 1 / (1 + mass)}
    assert mass[0] > 5
    for name, values in expected.items():
        router = ExitRouter(1, policy=name)
        assert router.confidence(ExitSignals(logits), 0).tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_likeliest_boxes_by_hand():
    # leads over background, box by box: -1, 3, 0, 2
    logits = torch.tensor([[[1.0, -2, 0], [0, 3, 1], [2, 2, 1], [-3, -4, -1]]])
    signals = ExitSignals(logits, torch.ones(1, 6))
    seen = at_likeliest_boxes(signals, 2)
    order = seen.logits[0, :, 1].argsort(descending=True)
    assert seen.logits[0, order].tolist() == [[0, 3, 1], [-3, -4, -1]]
    assert seen.tap is signals.tap
    assert at_likeliest_boxes(signals, None) is signals and at_likeliest_boxes(signals, 4) is signals
    pair = at_likeliest_boxes(ExitSignals(torch.cat([logits, logits.flip(1)])), 2).logits.sort(1).values
    assert pair[0].equal(pair[1])


@pytest.mark.parametrize("classes", [1, 31, 32, 33, 80])
def test_largest_of_any_number_of_classes(classes):
    values = torch.randn(2, 5, classes)
    assert largest_of(values).equal(values.amax(-1))
    assert largest_of(values.flip(-1)).equal(values.amax(-1))
    values = values.abs()
    assert without_largest(values, values.amax(-1)).equal(
        values.masked_fill(values == values.amax(-1, keepdim=True), 0.0)
    )


@pytest.mark.parametrize("outputs", [8, 81])
@pytest.mark.parametrize("name", [*sorted(POLICIES), *sorted(FITTED_POLICIES)])
def test_speed(name, outputs):
    """The limit is 0.3 ms per image on one thread; ten times that here, since the machine may be busy."""
    logits, tap, threads = torch.randn(4, 3234, outputs), torch.randn(4, 160), torch.get_num_threads()
    fitted = {
        "learned_gain": [GainModel(80).to_plain()] * 2,
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


# Probabilities of background and of two classes at three default boxes of two photos.
UNDECIDED = torch.tensor(
    [
        [[0.70, 0.20, 0.10], [0.98, 0.01, 0.01], [0.10, 0.10, 0.80]],  # ambiguous: 0.20 of class 1
        [[0.60, 0.10, 0.30], [0.50, 0.40, 0.10], [0.97, 0.02, 0.01]],  # 0.30 of class 2 and 0.40 of class 1
    ]
)


def confidence(weights, probabilities=UNDECIDED, **more):
    router = ExitRouter(1, policy="balanced_ambiguity", parameters=weights, **more)
    return router.confidence(ExitSignals(probabilities.log(), torch.zeros(len(probabilities), 1)), 0)


def test_ambiguous_boxes_have_the_weight_of_their_class():
    expected = torch.tensor([1 / (1 + 0.5 * 0.20), 1 / (1 + 4.0 * 0.30 + 0.5 * 0.40)])
    torch.testing.assert_close(confidence([0.5, 4.0]), expected)


def test_equal_weights_are_ambiguous_mass():
    signals = ExitSignals((torch.randn(5, 128, 4) * 2), torch.zeros(5, 1))
    plain = ExitRouter(1, policy="ambiguous_mass").confidence(signals, 0)
    balanced = ExitRouter(1, policy="balanced_ambiguity", parameters=[1.0] * 3).confidence(signals, 0)
    torch.testing.assert_close(balanced, plain)


def test_confidence_is_1_without_ambiguous_boxes():
    sure = torch.tensor([[[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]])
    assert confidence([9.0, 9.0], sure).tolist() == [1.0]


def test_rare_classes_have_large_weights():
    def weights(*objects):
        return BalancedAmbiguity.fit(SimpleNamespace(object_counts=lambda: list(objects)))

    assert weights(9, 4) == [0.75, 1.5]  # (10 + 5) / 2 over 10 and over 5
    assert weights(3, 3, 3) == [1.0, 1.0, 1.0]
    assert weights(0, 2) == [2.0, 2 / 3]  # a class without an object has a weight all the same
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' counts labelled objects, and the photos have none"):
        weights(0, 0)


@pytest.mark.parametrize("missing", [None, []])
def test_missing_parameters_are_refused(missing):
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' needs parameters; tools/calibrate.py fits them"):
        ExitRouter(1, policy="balanced_ambiguity", parameters=missing)


@pytest.mark.parametrize("wrong", [3, [0.5, "a"], [0.5, 0.0], [0.5, float("nan")], {"cat": 1.0}])
def test_invalid_weights_are_refused(wrong):
    with pytest.raises(EarlyExitError, match="its parameters are .*, expected a positive weight for every class"):
        ExitRouter(1, policy="balanced_ambiguity", parameters=wrong)


def test_weights_of_other_classes_are_refused():
    with pytest.raises(EarlyExitError, match="has weights of 3 classes, the model has 2; calibrate again"):
        confidence([1.0, 1.0, 1.0])


def logits_of(*probabilities):
    """One image whose default boxes have these class probabilities, background first."""
    return torch.tensor([probabilities]).log() + 2


def test_statistics_by_hand():
    logits = logits_of((0.15, 0.8, 0.05), (0.75, 0.05, 0.2), (0.98, 0.01, 0.01))
    values = logit_statistics(logits)[0]
    # largest object probabilities 0.8, 0.2 (ambiguous), 0.01
    above = [2, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0]
    assert LEVELS[3] == 0.2 and LEVELS[9] == 0.8
    close = pytest.approx
    counts = values[:11].exp() - 1
    expected = torch.tensor(above).float()
    expected[3], expected[9] = counts[3], counts[9]  # exactly on the level: rounding decides
    assert counts.tolist() == close(expected.tolist(), abs=1e-4)
    assert (values[11:13].exp() - 1).tolist() == close([0.8 + 0.2 + 0.01, 0.2], abs=1e-4)
    assert values[13:].tolist() == close([0.8, 0.2], abs=1e-4)


def test_one_class_has_no_second():
    values = logit_statistics(torch.randn(3, 40, 2))
    assert values.shape == (3, NUM_STATISTICS)
    assert values.isfinite().all()
    assert values[:, -1].abs().max() == 0


def test_fits_a_function_of_the_statistics():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, NUM_STATISTICS + 6, generator=generator) * 3 + 5
    gains = 0.2 * (inputs[:, 2] - 5) + 0.1 * (inputs[:, NUM_STATISTICS + 1] - 5)
    model = fit_gain(inputs[:400], gains[:400])
    error = (model(inputs[400:]) - gains[400:]).pow(2).mean()
    assert error < 0.2 * gains[400:].var()
    assert fit_gain(inputs[:400], gains[:400])(inputs).equal(model(inputs))  # the same seed, the same model


def test_the_policy_uses_the_gain_model():
    """The router's shorter way to the same number: 1 / (1 + exp(gain))."""
    generator = torch.Generator().manual_seed(1)
    signals = ExitSignals(torch.randn(3, 300, 5, generator=generator), torch.randn(3, 6))
    inputs = gain_inputs(signals, 6)
    model = fit_gain(torch.cat([inputs, inputs.flip(0) * 1.3]), torch.randn(6, generator=generator))
    policy = LearnedGain([GainModel(6).to_plain(), model.to_plain()])
    assert torch.allclose(policy(signals, 1), torch.sigmoid(-model(inputs)), atol=1e-5)
    assert policy(signals, 2).tolist() == [1.0] * 3


def test_a_few_hundred_parameters():
    assert sum(parameter.numel() for parameter in GainModel(112).parameters()) < 400


def test_router_with_its_parameters_goes_through_json():
    torch.manual_seed(0)
    models = [GainModel(4), GainModel(6)]
    for model in models:
        torch.nn.init.normal_(model.skip.weight)
    settings = ExitRouter(
        2, policy="learned_gain", parameters=[model.to_plain() for model in models], thresholds=[0.4, 0.5]
    ).to_dict()
    router = ExitRouter(**json.loads(json.dumps(settings)))
    assert list(router.parameters()) == [] or not any(p.requires_grad for p in router.parameters())
    signals = ExitSignals(torch.randn(5, 30, 3), torch.rand(5, 12))
    expected = torch.sigmoid(-models[1](gain_inputs(signals, 6)))
    assert router.confidence(signals, 1).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert router.confidence(signals, 2).tolist() == [1.0] * 5  # nothing to gain behind the full path


@pytest.mark.parametrize("wrong", [3, "abc", [3], [{}], [{"tap.weight": 0.5}], [{"tap.weight": [[0.1, 0.2]]}]])
def test_parameters_of_another_kind_are_refused(wrong):
    with pytest.raises(EarlyExitError, match="'learned_gain': its parameters are .*, expected the numbers of a fitted"):
        ExitRouter(1, policy="learned_gain", parameters=wrong)


def test_buffers_are_loaded_from_a_state_dict():
    """A policy that precomputes from its parameters would ignore a loaded state dict."""
    first, second = (LearnedGain([random_model(seed).to_plain()]) for seed in (1, 2))
    signals = ExitSignals(torch.randn(3, 20, 4), torch.randn(3, 6))
    assert not torch.allclose(first(signals, 0), second(signals, 0))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(signals, 0), second(signals, 0))


def random_model(seed):
    model = GainModel(3)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_inputs_are_the_tap_and_the_branch_s_probability():
    tap, logits = torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    assert regression_inputs(ExitSignals(logits, tap=tap, empty=True)).tolist() == [[1, 2]]
    assert regression_inputs(ExitSignals(logits, tap=tap))[0].tolist() == pytest.approx([1, 2, np.log(3)])


def test_confidence_by_hand():
    router = ExitRouter(1, policy="foreseen_emptiness", parameters=[{"weight": [1.0, -2.0], "bias": 0.5}])
    signals = ExitSignals(torch.zeros(1, 3, 2), tap=torch.tensor([[2.0, 0.25]]), empty=True)
    assert router.confidence(signals, 0).item() == pytest.approx(1 / (1 + np.exp(2.0)))
    full = ExitSignals(torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log())
    assert router.confidence(full, 1).item() == pytest.approx(0.25)
    again = ExitRouter(**router.to_dict())
    assert again.confidence(signals, 0).equal(router.confidence(signals, 0))


def test_missing_parameters_name_the_tool():
    with pytest.raises(EarlyExitError, match="tools/calibrate.py fits them"):
        ExitRouter(1, policy="foreseen_emptiness")


@pytest.mark.parametrize(
    "wrong", [3, "abc", [3], {"weight": [0.1]}, [{"weights": [0.1]}], [{"weight": "a", "bias": 0}]]
)
def test_parameters_of_another_kind_are_refused_of_test_foreseen(wrong):
    with pytest.raises(EarlyExitError, match="'foreseen_emptiness': its parameters are .*, expected weight and bias"):
        ExitRouter(1, policy="foreseen_emptiness", parameters=wrong)


def test_finds_a_linear_rule_and_shrinks_noise():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 20, generator=generator) * 3 + 1
    true = torch.zeros(20)
    true[:2] = torch.tensor([0.5, -0.3])
    logits = inputs @ true + 0.2
    fitted = fit_largest_score(inputs, torch.sigmoid(logits))
    assert fitted["weight"] == pytest.approx(true.tolist(), abs=0.01)
    assert fitted["bias"] == pytest.approx(0.2, abs=0.02)
    noise = fit_largest_score(inputs, torch.rand(300, generator=generator))
    assert np.abs(noise["weight"]).max() < 0.05


def test_leave_one_out_error_equals_refits():
    """The penalty that it takes has the least error of fits that really leave a photo out."""
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
        total = 0.0
        for left_out in range(25):
            solution = ridge([row for row in range(25) if row != left_out], penalty)
            total += (scaled[left_out] @ solution[:-1] + solution[-1] - targets[left_out]) ** 2
        return total

    best = min((10.0**power for power in range(-1, 6)), key=error)
    expected = ridge(list(range(25)), best)[:-1] / inputs.std(0, unbiased=False)
    assert fit_largest_score(inputs, probability)["weight"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_weight_counts_like_copies_of_the_photo(monkeypatch):
    """Of 6 photos the last counts three times. Weights are scaled to a sum of 6, so the penalty is too."""
    generator = torch.Generator().manual_seed(2)
    inputs, probability = torch.randn(6, 2, generator=generator), torch.rand(6, generator=generator)
    rows = [0, 1, 2, 3, 4, 5, 5, 5]
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
    calib.scores[folds == 1] = 0.999  # other answers for fold 1
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


def test_scoring_can_be_counted_and_traced():
    """As costs are measured and networks exported."""
    model = Architecture(("chair",), image_size=96, width=0.25, exit_layers=(6, 8), empty=(6,)).build()
    channels = [branch_input(model, index) for index in range(2)]
    parameters = [
        {"weight": [0.0] * (2 * channels[0]), "bias": 0.0},
        {"weight": [0.0] * (2 * channels[1] + 1), "bias": 0.0},
    ]
    router = ExitRouter(2, policy="foreseen_emptiness", parameters=parameters, thresholds=0.9)
    costs = mmacs_to_exit(model, router)
    assert costs == sorted(costs)
    assert costs[1] - mmacs_to_exit(model)[1] == pytest.approx(sum(2 * count for count in channels) / 1e6, rel=0.1)


def branch_input(model, index):
    """Channels of an exit's tap."""
    with evaluating(model):
        return model.trunk_maps(torch.zeros(1, 3, 96, 96))[0][index].shape[1]

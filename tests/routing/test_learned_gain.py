import json

import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.learned_gain import (
    LEVELS,
    NUM_STATISTICS,
    GainModel,
    LearnedGain,
    fit_gain,
    logit_statistics,
    to_plain,
)


def logits_of(*probabilities):
    """One image whose default boxes have these class probabilities, background first."""
    return torch.tensor([probabilities]).log() + 2


def test_statistics_by_hand():
    logits = logits_of((0.15, 0.8, 0.05), (0.75, 0.05, 0.2), (0.98, 0.01, 0.01))
    values = logit_statistics(logits)[0]
    # largest object probabilities 0.8, 0.2 (undecided), 0.01
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


def test_fits_what_the_statistics_can_say():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, NUM_STATISTICS + 6, generator=generator) * 3 + 5
    gains = 0.2 * (inputs[:, 2] - 5) + 0.1 * (inputs[:, NUM_STATISTICS + 1] - 5)
    model = fit_gain(inputs[:400], gains[:400])
    error = (model(inputs[400:]) - gains[400:]).pow(2).mean()
    assert error < 0.2 * gains[400:].var()
    assert fit_gain(inputs[:400], gains[:400])(inputs).equal(model(inputs))  # the same seed, the same model


def test_the_policy_says_what_the_model_says():
    """The router's shorter way to the same number: 1 / (1 + exp(gain))."""
    generator = torch.Generator().manual_seed(1)
    signals = ExitSignals(torch.randn(3, 300, 5, generator=generator), torch.randn(3, 6))
    inputs = GainModel(6).inputs(signals)
    model = fit_gain(torch.cat([inputs, inputs.flip(0) * 1.3]), torch.randn(6, generator=generator))
    policy = LearnedGain([to_plain(GainModel(6)), to_plain(model)])
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
        2, policy="learned_gain", parameters=[to_plain(model) for model in models], thresholds=[0.4, 0.5]
    ).to_dict()
    router = ExitRouter(**json.loads(json.dumps(settings)))
    assert list(router.parameters()) == [] or not any(p.requires_grad for p in router.parameters())
    signals = ExitSignals(torch.randn(5, 30, 3), torch.rand(5, 12))
    expected = torch.sigmoid(-models[1](models[1].inputs(signals)))
    assert router.confidence(signals, 1).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert router.confidence(signals, 2).tolist() == [1.0] * 5  # nothing to gain behind the full path


@pytest.mark.parametrize("wrong", [3, "abc", [3], [{}], [{"tap.weight": 0.5}], [{"tap.weight": [[0.1, 0.2]]}]])
def test_parameters_of_another_kind_are_refused(wrong):
    with pytest.raises(EarlyExitError, match="'learned_gain': its parameters are .*, expected the numbers of a fitted"):
        ExitRouter(1, policy="learned_gain", parameters=wrong)


def test_numbers_that_a_state_dict_brings_are_used():
    """What is folded at first would otherwise go on deciding."""
    first, second = (LearnedGain([to_plain(random_model(seed))]) for seed in (1, 2))
    signals = ExitSignals(torch.randn(3, 20, 4), None, torch.randn(3, 6))
    assert not torch.allclose(first(signals, 0), second(signals, 0))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(signals, 0), second(signals, 0))


def random_model(seed):
    model = GainModel(3)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model

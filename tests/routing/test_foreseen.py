import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.evaluation.mode import evaluating
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing.foreseen import LEAST_PROBABILITY, evidence, fit_foresight


def test_evidence_is_the_tap_and_what_a_branch_says():
    tap, logits = torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    assert evidence(ExitSignals(logits, tap=tap, empty=True)).tolist() == [[1, 2]]
    assert evidence(ExitSignals(logits, tap=tap))[0].tolist() == pytest.approx([1, 2, np.log(3)])


def test_confidence_by_hand():
    router = ExitRouter(1, policy="foreseen_emptiness", parameters=[{"weight": [1.0, -2.0], "bias": 0.5}])
    signals = ExitSignals(torch.zeros(1, 3, 2), tap=torch.tensor([[2.0, 0.25]]), empty=True)
    assert router.confidence(signals, 0).item() == pytest.approx(1 / (1 + np.exp(2.0)))
    full = ExitSignals(torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log())
    assert router.confidence(full, 1).item() == pytest.approx(0.25)
    again = ExitRouter(**router.to_dict())
    assert again.confidence(signals, 0).equal(router.confidence(signals, 0))


def test_without_parameters_it_says_what_fits_it():
    with pytest.raises(EarlyExitError, match="tools/calibrate.py fits it"):
        ExitRouter(1, policy="foreseen_emptiness")


@pytest.mark.parametrize(
    "wrong", [3, "abc", [3], {"weight": [0.1]}, [{"weights": [0.1]}], [{"weight": "a", "bias": 0}]]
)
def test_parameters_of_another_kind_are_refused(wrong):
    with pytest.raises(EarlyExitError, match="'foreseen_emptiness': its parameters are .*, expected weight and bias"):
        ExitRouter(1, policy="foreseen_emptiness", parameters=wrong)


def test_finds_a_linear_rule_and_shrinks_noise():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 20, generator=generator) * 3 + 1
    true = torch.zeros(20)
    true[:2] = torch.tensor([0.5, -0.3])
    logits = inputs @ true + 0.2
    fitted = fit_foresight(inputs, torch.sigmoid(logits))
    assert fitted["weight"] == pytest.approx(true.tolist(), abs=0.01)
    assert fitted["bias"] == pytest.approx(0.2, abs=0.02)
    noise = fit_foresight(inputs, torch.rand(300, generator=generator))
    assert np.abs(noise["weight"]).max() < 0.05


def test_leave_one_out_by_leaving_one_out():
    """The penalty that it takes has the least error of fits that really leave a photo out."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(25, 12, generator=generator)
    probability = torch.sigmoid(inputs[:, 0] + torch.randn(25, generator=generator))
    targets = torch.logit(probability, eps=LEAST_PROBABILITY).double()
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
    assert fit_foresight(inputs, probability)["weight"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_its_scoring_can_be_counted_and_traced():
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

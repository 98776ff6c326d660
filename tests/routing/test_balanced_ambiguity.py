import pytest
import torch

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.balanced_ambiguity import class_weights

# Probabilities of background and of two classes at three default boxes of two photos.
PROBABILITIES = torch.tensor(
    [
        [[0.70, 0.20, 0.10], [0.98, 0.01, 0.01], [0.10, 0.10, 0.80]],  # undecided: 0.20 of class 1
        [[0.60, 0.10, 0.30], [0.50, 0.40, 0.10], [0.97, 0.02, 0.01]],  # 0.30 of class 2 and 0.40 of class 1
    ]
)


def confidence(weights, probabilities=PROBABILITIES, **more):
    router = ExitRouter(1, policy="balanced_ambiguity", parameters=weights, **more)
    return router.confidence(ExitSignals(probabilities.log(), torch.zeros(len(probabilities), 1)), 0)


def test_what_is_undecided_counts_by_the_weight_of_its_class():
    expected = torch.tensor([1 / (1 + 0.5 * 0.20), 1 / (1 + 4.0 * 0.30 + 0.5 * 0.40)])
    torch.testing.assert_close(confidence([0.5, 4.0]), expected)


def test_equal_weights_are_ambiguous_mass():
    signals = ExitSignals((torch.randn(5, 128, 4) * 2), torch.zeros(5, 1))
    plain = ExitRouter(1, policy="ambiguous_mass").confidence(signals, 0)
    balanced = ExitRouter(1, policy="balanced_ambiguity", parameters=[1.0] * 3).confidence(signals, 0)
    torch.testing.assert_close(balanced, plain)


def test_a_photo_with_nothing_undecided_is_sure():
    sure = torch.tensor([[[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]])
    assert confidence([9.0, 9.0], sure).tolist() == [1.0]


def test_the_rarer_a_class_the_more_it_weighs():
    assert class_weights([9, 4]) == [0.75, 1.5]  # (10 + 5) / 2 over 10 and over 5
    assert class_weights([3, 3, 3]) == [1.0, 1.0, 1.0]
    assert class_weights([0, 2]) == [2.0, 2 / 3]  # a class without an object has a weight all the same


@pytest.mark.parametrize("missing", [None, []])
def test_it_has_to_be_fitted(missing):
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' has no parameters; tools/calibrate.py fits it"):
        ExitRouter(1, policy="balanced_ambiguity", parameters=missing)


@pytest.mark.parametrize("wrong", [3, [0.5, "a"], [0.5, 0.0], [0.5, float("nan")], {"cat": 1.0}])
def test_what_is_no_weight_is_refused(wrong):
    with pytest.raises(EarlyExitError, match="its parameters are .*, expected a positive weight for every class"):
        ExitRouter(1, policy="balanced_ambiguity", parameters=wrong)


def test_weights_of_other_classes_are_refused():
    with pytest.raises(EarlyExitError, match="has weights of 3 classes, the model has 2; calibrate again"):
        confidence([1.0, 1.0, 1.0])

import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.evaluation.mode import evaluating
from earlyexit_ssd.modeling.empty import EmptyExit, num_default_boxes
from earlyexit_ssd.modeling.outputs import ExitSignals

from .conftest import small_model


def test_it_says_background_at_every_default_box():
    head = EmptyExit(5, 3)(torch.ones(2, 4, 6, 6))
    assert head["cls_logits"].softmax(-1).allclose(torch.tensor([1.0, 0, 0]).expand(2, 5, 3))
    assert head["bbox_regression"].equal(torch.zeros(2, 5, 4))


def test_default_boxes_by_hand():
    assert num_default_boxes([(2, 3), (1, 1)], [6, 4]) == 6 * 6 + 4


def test_shapes_are_those_of_the_other_exits(images):
    model = small_model(exit_layers=(6, 8, 12), empty=(6,))
    with evaluating(model):
        outputs = model.exit_outputs(images)
    assert len({head["cls_logits"].shape for head in outputs.heads}) == 1
    assert model.detections(outputs, 0)[0]["scores"].numel() == 0
    assert model.detections(outputs, 1)[0]["scores"].numel() > 0
    assert outputs.signals(0).empty and not outputs.signals(1).empty


def test_it_costs_nothing():
    with_exit, without = small_model(exit_layers=(6, 8), empty=(6,)), small_model(exit_layers=(8,))
    assert mmacs_to_exit(with_exit)[1:] == pytest.approx(mmacs_to_exit(without))
    assert with_exit.state_dict().keys() == without.state_dict().keys()


def test_it_takes_no_part_in_training(images, targets):
    model = small_model(exit_layers=(6, 8), empty=(6,))
    model.train()
    losses = model(images, targets)
    assert {key.partition("_")[0] for key in losses} == {"bbox", "classification", "exit8"}


class LooksAtTheTap:
    """A router that sends brighter taps than the mean of a batch away at the first exit."""

    hybrid, policy = False, "test"

    def needs(self, exit_index):
        return True

    def confidence(self, signals, exit_index):
        assert signals.empty == (exit_index == 0)
        return signals.tap.sum(1) if signals.tap is not None else signals.logits[:, 0, 0]

    def leaves(self, confidence, exit_index):
        return confidence > confidence.mean()


def test_who_leaves_there_has_an_empty_answer(images):
    model = small_model(exit_layers=(6, 8), empty=(6,))
    model.router = LooksAtTheTap()
    with evaluating(model):
        found = model(images)
    exits = [int(one["exit_index"]) for one in found]
    assert 0 in exits and max(exits) > 0
    assert all((len(one["scores"]) == 0) == (index == 0) for one, index in zip(found, exits, strict=True))


@pytest.mark.parametrize("policy", ["max_foreground", "emptiness", "entropy", "ambiguous_mass"])
def test_policies_of_logits_let_nobody_leave_there(policy):
    signals = ExitSignals(EmptyExit(5, 3)(torch.ones(2, 4, 6, 6))["cls_logits"], empty=True)
    router = ExitRouter(1, policy=policy, thresholds=0.0)
    assert router.leaves(router.confidence(signals, 0), 0).tolist() == [False, False]


def test_a_layer_without_an_exit_is_refused():
    with pytest.raises(ValueError, match=r"empty has 7, expected some of the exits' layers \(6, 8\)"):
        small_model(exit_layers=(6, 8), empty=(7,))

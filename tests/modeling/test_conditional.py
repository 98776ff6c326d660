"""Photos that leave are not computed further, and what nobody needs is not computed at all."""

import torch
from torch import nn

from earlyexit_ssd import ExitRouter
from tests.modeling.conftest import small_model


class FixedRouter(nn.Module):
    """Image i leaves at exit ``plan[i]``; recognises the images by their order."""

    hybrid = False

    def __init__(self, plan):
        super().__init__()
        self.plan = torch.tensor(plan)
        self.active = torch.arange(len(plan))

    def confidence(self, signals, exit_index):
        assert len(signals.logits) == len(self.active)
        assert (signals.tap is None) == (exit_index == 2)
        assert signals.tap is None or len(signals.tap) == len(self.active)
        return self.active.float()

    def needs(self, exit_index):
        return True

    def leaves(self, confidence, exit_index):
        leave = self.plan[self.active] == exit_index
        self.active = self.active[~leave]
        return leave


def count_images(module):
    """Images that ``module`` computes, in a list that grows."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def test_images_that_have_left_are_not_computed_further():
    model = small_model().eval()
    images = [torch.rand(3, 96, 96) for _ in range(5)]
    model.router = FixedRouter([0, 2, 1, 0, 2])
    first = count_images(model.backbone.features[0][0])
    behind_8 = count_images(model.backbone.features[0][9])
    branch_12 = count_images(model.branches["exit12"].head.classification_head.module_list[0])
    behind_12 = count_images(model.backbone.features[1][0])
    detections = model(images)
    assert (first, behind_8, branch_12, behind_12) == ([5], [3], [3], [2])
    assert [int(detection["exit_index"]) for detection in detections] == [0, 2, 1, 0, 2]
    assert [float(detection["exit_confidence"]) for detection in detections] == [0, 1, 2, 3, 4]


def test_nothing_behind_is_computed_when_all_have_left():
    model = small_model().eval()
    model.router = FixedRouter([0, 0])
    behind_8 = count_images(model.backbone.features[0][9])
    model([torch.rand(3, 96, 96) for _ in range(2)])
    assert behind_8 == []


def test_routed_detections_are_those_of_the_exit_taken():
    model = small_model().eval()
    images = [torch.rand(3, 96, 96) for _ in range(4)]
    outputs = model.exit_outputs(images)
    model.router = FixedRouter([2, 0, 1, 0])
    for index, found in enumerate(model(images)):
        expected = model.detections(outputs, int(found["exit_index"]))[index]
        assert torch.allclose(found["scores"], expected["scores"], atol=1e-5)
        assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-3)


def test_router_with_thresholds_of_zero_and_one(images):
    model = small_model().eval()
    model.router = ExitRouter(2, thresholds=[0.0])
    assert [int(one["exit_index"]) for one in model(images)] == [0, 0, 0]
    model.router = ExitRouter(2, thresholds=[1.0])
    assert [int(one["exit_index"]) for one in model(images)] == [2, 2, 2]


class Closing(FixedRouter):
    """Everybody takes the full path but where ``plan`` says so; only exits of the plan are needed."""

    def needs(self, exit_index):
        return exit_index in self.plan.tolist()

    def confidence(self, signals, exit_index):
        return self.active.float()


def test_branches_of_closed_exits_are_not_computed():
    model = small_model(exit_layers=(8, 12)).eval()
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    model.router = Closing([2, 1])
    heads = [count_images(branch.head.regression_head) for branch in model.branches.values()]
    blocks = count_images(model.branches["exit8"].tail.blocks)
    found = model(images)
    assert heads[0] == blocks == [] and len(heads[1]) == 1
    model.router = None
    assert [int(one["exit_index"]) for one in found] == [2, 1]
    outputs = model.exit_outputs(images)
    for position, index in enumerate([2, 1]):
        expected = model.detections(outputs, index)[position]["scores"]
        assert torch.allclose(found[position]["scores"], expected, atol=1e-5)


def test_behind_the_last_open_exit_no_branch_is_computed():
    model = small_model(exit_layers=(8, 12)).eval()
    model.router = Closing([0, 2])
    blocks = count_images(model.branches["exit12"].tail.blocks)
    model([torch.rand(3, 96, 96) for _ in range(2)])
    assert blocks == []


def test_hybrid_takes_classes_from_the_exit_and_boxes_from_the_full_path():
    model = small_model().eval()
    images = [torch.rand(3, 96, 96) for _ in range(5)]
    model.router = FixedRouter([0, 2, 1, 0, 2])
    model.router.hybrid = True
    trunk = count_images(model.backbone.features[1][0])
    branch_12 = count_images(model.branches["exit12"].tail.blocks)
    last_head = count_images(model.head.classification_head.module_list[0])
    found = model(images)
    assert (trunk, branch_12, last_head) == ([5], [3], [2])
    assert [int(one["exit_index"]) for one in found] == [0, 2, 1, 0, 2]
    model.router = None
    outputs = model.exit_outputs(images).on_full_boxes()
    for position, index in enumerate([0, 2, 1, 0, 2]):
        expected = model.detections(outputs, index)[position]
        for key in ("boxes", "scores"):
            assert torch.allclose(found[position][key], expected[key], atol=1e-3), (position, key)


def test_hybrid_spares_the_last_classification_head_where_all_are_sure():
    model = small_model().eval()
    model.router = FixedRouter([0, 0])
    model.router.hybrid = True
    last_head = count_images(model.head.classification_head.module_list[0])
    branch_12 = count_images(model.branches["exit12"].tail.blocks)
    assert len(model([torch.rand(3, 96, 96) for _ in range(2)])) == 2
    assert last_head == branch_12 == []

"""The description of exits, and the branches of every kind."""

from copy import copy

import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.modeling import Architecture, PathToExit
from earlyexit_ssd.modeling.branches import (
    BRANCHES,
    Argument,
    Branch,
    CopiedPathToC4,
    EmptyExit,
    Exit,
    LightBranch,
    Place,
    PyramidStep,
    Tail,
    ThinnedBlock,
    describe_exits,
    exit_keywords,
    inherit_predictors,
    register_branch,
)
from earlyexit_ssd.modeling.heads import FoldedClassificationHead
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.modeling.trunk import evaluating
from tests.modeling.conftest import assert_equal, copy_state, model_with_varied_scores, small_model

# The kind "copied".


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_tail_copies_the_last_blocks_and_inherits_their_weights(depth):
    backbone = small_model().backbone.requires_grad_(False)
    tail = Tail(backbone, depth)
    before = copy_state(tail)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
    assert_equal(copy_state(tail), before)
    tail.inherit(backbone)
    _, *blocks, last = backbone.features[1]
    copied = [module.state_dict() for module in (*tail.blocks, tail.last, tail.extra)]
    assert_equal(copied, [module.state_dict() for module in (*blocks[2 - depth :], last, backbone.extra)])
    assert all(parameter.requires_grad for parameter in tail.parameters())


def test_branch_inherits_the_wanted_rows_of_a_folded_head():
    model, wide = small_model(), small_model(classes=tuple("abcd"))
    wide.head.classification_head = FoldedClassificationHead(wide.head.classification_head, (4, 2))
    head = model.branches["exit8"].head
    first_map = head.classification_head.module_list[0][1].weight.clone()
    inherit_predictors(head, wide.head)
    full = wide.head.classification_head.module_list[1][1].weight.view(6, 5, -1)
    assert torch.equal(head.classification_head.module_list[1][1].weight.view(6, 3, -1), full[:, [0, 4, 2]])
    assert torch.equal(head.classification_head.module_list[0][1].weight, first_map)
    boxes, full_boxes = (part.regression_head.module_list[1:].state_dict() for part in (head, wide.head))
    assert_equal(boxes, full_boxes)


@pytest.fixture
def backbone():
    """A frozen backbone with BatchNorm statistics and scales that differ from channel to channel."""
    backbone = small_model().backbone.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return backbone


@pytest.mark.parametrize("layer", [2, 4, 7, 11])
def test_copy_with_all_channels_equals_the_block(backbone, layer):
    block = list(backbone.features[0][layer].block)
    copied = ThinnedBlock(block, 1.0)
    copied.inherit(block)
    x = torch.rand(2, block[0][0].in_channels, 8, 8)
    assert torch.equal(copied.eval()(x), backbone.features[0][layer].block(x))
    assert all(parameter.requires_grad for parameter in copied.parameters())


def test_unused_channels_are_removed_first(backbone):
    """The projection ignores half of the expansion."""
    block = list(backbone.features[0][7].block)
    channels = block[-1][0].in_channels
    used = torch.randperm(channels, generator=torch.Generator().manual_seed(1))[: channels // 2].sort().values
    unused = torch.ones(channels, dtype=torch.bool)
    unused[used] = False
    block[-1][0].weight.data[:, unused] = 0.0
    copied = ThinnedBlock(block, (channels // 2 // 8) * 8 / channels)
    kept = copied.inherit(block)
    assert set(kept.tolist()) <= set(used.tolist())
    assert copied.expanded_channels == len(kept) == channels // 2 // 8 * 8


def test_kept_channels_have_the_block_s_values_and_attention(backbone):
    block = list(backbone.features[0][11].block)
    copied = ThinnedBlock(block, 0.5).eval()
    kept = copied.inherit(block)
    x = torch.rand(1, block[0][0].in_channels, 6, 6)
    assert torch.allclose(copied[1](copied[0](x)), block[1](block[0](x))[:, kept], atol=1e-6)
    assert torch.equal(copied[2].fc2.weight, block[2].fc2.weight[kept])
    assert torch.equal(copied[2].fc1.weight, block[2].fc1.weight[:, kept])


def test_untrained_branch_with_whole_copies_equals_the_full_path(backbone):
    model = small_model(exit_layers=(12,), copy=(1.0,), channels=0, depth=(2,)).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    model.inherit()
    assert_equal(*model.exit_outputs([torch.rand(3, 96, 96)]).heads)


@pytest.mark.parametrize(("layer", "blocks"), [(1, 5), (4, 3), (6, 3), (8, 2), (12, 1), (13, 0), (15, 0)])
def test_blocks_with_residual_connections_are_skipped(backbone, layer, blocks):
    path = CopiedPathToC4(backbone, layer, 0.5)
    assert len(path.before) + (path.c4 is not None) == blocks
    # half of C4's expansion (168 channels at this width), rounded to a multiple of 8
    assert path.first_channels == 80


@pytest.mark.parametrize(("channels", "blocks"), [(0, [2, 2, 1, 0]), (16, [2, 2, 2, 2])])  # older files have channels
def test_branch_after_c4_copies_only_later_blocks(images, targets, channels, blocks):
    model = small_model(exit_layers=(12, 13, 14, 15), channels=channels, copy=(0.5,), depth=(2,)).train()
    assert [len(branch.tail.blocks) for branch in model.branches.values()] == blocks
    sum(model(images, targets).values()).backward()
    assert all(parameter.grad is not None for parameter in model.branches.parameters())


def test_only_the_first_map_of_a_branch_has_its_own_channels():
    model = small_model(channels=16)
    heads = (model.branches["exit8"].head.classification_head, model.head.classification_head)
    channels, full = ([block[1].in_channels for block in head.module_list] for head in heads)
    assert channels == [16, *full[1:]]


# The kind "empty".


def empty_head():
    """Return the outputs of an empty exit for 2 images, 3 classes, and 6 * 6 + 4 default boxes."""
    place = Place(torch.nn.Module(), 8, (4, 6, 6), grids=[(2, 3), (1, 1)], boxes_per_cell=[6, 4], num_classes=3)
    return EmptyExit(place)(torch.ones(2, 4, 6, 6))


def test_empty_exit_has_the_shapes_of_other_exits_no_detections_and_no_losses(images, targets):
    model = small_model(exit_layers=(6, 8, 12), empty=(6,))
    with evaluating(model):
        outputs = model.exit_outputs(images)
    assert len({head["cls_logits"].shape for head in outputs.heads}) == 1
    assert model.detections(outputs, 0)[0]["scores"].numel() == 0
    assert model.detections(outputs, 1)[0]["scores"].numel() > 0
    assert outputs.signals(0).empty and not outputs.signals(1).empty
    assert {key.partition("_")[0] for key in model.train()(images, targets)} == {
        "bbox",
        "classification",
        "exit8",
        "exit12",
    }


def test_empty_exit_costs_nothing():
    with_exit, without = small_model(exit_layers=(6, 8), empty=(6,)), small_model(exit_layers=(8,))
    assert mmacs_to_exit(with_exit)[1:] == pytest.approx(mmacs_to_exit(without))
    assert with_exit.state_dict().keys() == without.state_dict().keys()


def test_no_image_leaves_at_an_empty_exit_by_its_logits():
    head = empty_head()
    assert head["cls_logits"].softmax(-1).allclose(torch.tensor([1.0, 0, 0]).expand(2, 40, 3))
    assert head["bbox_regression"].equal(torch.zeros(2, 40, 4))
    signals = ExitSignals(head["cls_logits"], empty=True)
    router = ExitRouter(1, policy="emptiness", thresholds=0.0)
    assert router.leaves(router.confidence(signals, 0), 0).tolist() == [False, False]


# The description of exits.


def test_keywords_have_one_value_per_exit():
    assert describe_exits((4, 8, 12), branch=("light", "copied", "copied"), empty=(8,), copy=(0.25, 0.5, 1.0)) == (
        Exit(4, "light", {"channels": 0, "context": True, "head_rank": 0}),
        Exit(8, "empty", {}),
        Exit(12, "copied", {"channels": 0, "depth": 2, "copy": 1.0, "head_rank": 0}),
    )


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"exit_layers": (4, 8, 12), "copy": (0.25, 0.5, 1.0), "depth": (0, 1, 2), "empty": (4,)},
        {"exit_layers": (6, 8), "branch": "light", "context": False, "channels": 32},
        {"exit_layers": (6, 8, 12), "branch": ("light", "copied", "light"), "channels": [8, 16, 24], "empty": (12,)},
        {"exit_layers": (6,), "empty": (6,)},
        {"exit_layers": (6, 8), "empty": (6,), "copy": (0.5, 1.0), "glances": ((64, 8), (128, 12))},
        {"exit_layers": (), "glances": [[64, 8]]},
    ],
    ids=str,
)
def test_exits_are_rebuilt_from_their_keywords(keywords):
    exits = describe_exits(**keywords)
    assert describe_exits(**exit_keywords(exits)) == exits
    architecture = Architecture(("chair",), exits=exits)
    assert Architecture.from_dict(architecture.to_dict()) == architecture


def test_description_without_branch_is_read():
    """Older files have no key ``branch``."""
    older = {"exit_layers": [6, 8], "channels": 0, "depth": [2], "copy": [0.5], "head_rank": 64, "empty": [6]}
    copied = {"channels": 0, "depth": 2, "copy": 0.5, "head_rank": 64}
    exits = Architecture.from_dict({"classes": ["chair"], **older}).exits
    assert exits == (Exit(6, "empty"), Exit(8, "copied", copied))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(8, "lihgt"), "branch is 'lihgt', expected one of copied, light, empty, or .*'light'"),
        (lambda: describe_exits(glances=[128, 12]), "glances has 128, expected pairs of pixels and a trunk layer"),
        (lambda: describe_exits(glances=[(16, 12)]), "pixels is 16, expected 32 to 4096"),
        (lambda: Exit(8, "light", pixels=64), "a glance has the branch 'light', expected 'empty'"),
        (lambda: Exit(8, ["light"]), r"branch is \['light'\], expected text"),
        (lambda: Exit(8, "light", {"depth": 1}), "a light branch has no argument 'depth'"),
        (lambda: Exit(8, "copied", {"copy": 0.0}), r"copy is 0, expected a number in \(0, 1\]"),
        (lambda: Exit(8.5), "layer is 8.5, expected a whole number"),
        (lambda: describe_exits((6, 8), branch=("light",) * 3), "or one for each of 2 exits"),
        (lambda: describe_exits((6, 8), branch="light", context=1), "context is 1, expected true or false"),
        (lambda: describe_exits((6, 8), channels=5000), "channels is 5000, expected 0 to 4096"),
        (lambda: describe_exits((6, 8), empty=(7,)), r"empty has 7, expected some of the exits' layers \(6, 8\)"),
        (lambda: describe_exits(8), "exit_layers is 8, expected a list"),
        (lambda: describe_exits("8"), "exit_layers is '8', expected a list"),
        (lambda: describe_exits((8, 12.0)), r"exit_layers\[1\] is 12.0, expected a whole number"),
        (lambda: describe_exits(empty=6), "empty is 6, expected a list"),
        (lambda: describe_exits(depth=(1.5,)), "depth is 1.5, expected a whole number"),
        (lambda: describe_exits(depth=(True,)), "depth is True, expected a whole number"),
        (lambda: describe_exits(copy=(0.5,) * 3), "expected one value, or one for each of 2 exits"),
        (lambda: describe_exits(copy="0.5"), "copy is '0.5', expected a finite number"),
        (lambda: describe_exits(copy=(float("nan"),)), "copy is nan, expected a finite number"),
        (lambda: describe_exits(channels=-1), "channels is -1, expected 0 to 4096"),
        (lambda: describe_exits(head_rank="64"), "head_rank is '64', expected a whole number"),
    ],
)
def test_invalid_descriptions_are_refused(make, message):
    with pytest.raises(EarlyExitError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25, [0.25] * 2), ((0.25,), [0.25] * 2), ([1, np.float32(0.5)], [1.0, 0.5]), (np.array([1, 0.5]), [1.0, 0.5])],
)
def test_argument_has_one_value_per_exit(value, expected):
    values = [exit.arguments["copy"] for exit in describe_exits((8, 12), copy=value)]
    assert values == expected and all(type(value) is float for value in values)


def test_exits_and_their_keywords_exclude_each_other():
    with pytest.raises(TypeError, match="got exits and exit_layers; give one of them"):
        Architecture(("chair",), exits=(Exit(8),), exit_layers=(8,))


def test_registered_branch_is_built_and_described(images, monkeypatch):
    monkeypatch.setattr("earlyexit_ssd.modeling.branches.BRANCHES", copy(BRANCHES))

    class Constant(Branch):
        def __init__(self, place: Place, channels: int) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(place.num_boxes, place.num_classes))

        def forward(self, tap, context=None):
            count = len(tap)
            boxes = tap.new_zeros(count, len(self.logits), 4)
            return {"cls_logits": self.logits.expand(count, -1, -1), "bbox_regression": boxes}

    register_branch("constant", channels=Argument(8, highest=16))(Constant)
    assert describe_exits((8,), "light", channels=96)[0].arguments["channels"] == 96  # the limit of a light branch
    model = small_model(branch=("constant", "copied"))
    outputs = model.eval().exit_outputs(images)
    assert outputs.heads[0]["cls_logits"].shape == outputs.heads[2]["cls_logits"].shape
    assert Architecture.of(model).to_dict()["branch"] == ["constant", "copied"]
    with pytest.raises(EarlyExitError, match="branch 'other': channels is 0, expected an Argument"):
        register_branch("other", channels=0)


# The kind "light".


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        (((40, 40), (20, 20)), [2]),
        (((75, 75), (38, 38)), [2]),
        (((80, 80), (20, 20)), [2, 2]),
        (((20, 20), (20, 20)), [1]),
        (((10, 10), (20, 20)), [1]),
        (((3, 3), (1, 1)), [2, 2]),
    ],
)
def test_pyramid_step_has_the_next_map_s_size(sizes, strides):
    step = PyramidStep(8, sizes).eval()
    assert [layer[0].stride[0] for layer in step.layers[::2]] == strides
    assert step(torch.rand(2, 8, *sizes[0])).shape == (2, 8, *sizes[1])


@pytest.mark.parametrize("changes", [{}, {"exit_layers": (2, 6, 13, 15)}, {"exit_layers": (4, 8, 12), "empty": (8,)}])
def test_light_branches_predict_all_default_boxes_and_train(changes, images, targets):
    model = small_model(branch="light", channels=8, **changes).train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.branches.parameters())
    outputs = model.eval().exit_outputs(images)
    assert len({head["cls_logits"].shape for head in outputs.heads}) == 1
    branch = next(branch for branch in model.branches.values() if isinstance(branch, LightBranch))
    assert {block[1].in_channels for block in branch.head.classification_head.module_list} == {8}


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("empty", [(), (8,)])
def test_context_reaches_the_next_light_branch_across_empty_exits(images, empty, context):
    model = small_model(branch="light", exit_layers=(6, 8, 12), empty=empty, channels=8, context=context).eval()
    before = model.exit_outputs(images).heads[-2]["cls_logits"]
    torch.nn.init.constant_(model.branches["exit6"].narrow[1].bias, 3.0)
    assert torch.equal(before, model.exit_outputs(images).heads[-2]["cls_logits"]) != context
    assert (model.branches["exit12"].cascade is not None) == context


@pytest.mark.parametrize("hybrid", [False, True])
def test_routed_light_branches_have_the_outputs_of_one_pass(images, hybrid):
    """The context is passed on across a closed exit, for the images that have not left."""
    model = model_with_varied_scores(branch="light", exit_layers=(6, 8, 12), channels=8)
    outputs = model.exit_outputs(images)
    at_8 = outputs.heads[1]["cls_logits"].softmax(-1)[..., 1:].amax((1, 2)).sort().values
    thresholds = [2.0, at_8[1:].mean().item(), 0.0]
    model.router = ExitRouter(3, policy="max_foreground", thresholds=thresholds, hybrid=hybrid)
    expected, detections = outputs.on_full_boxes() if hybrid else outputs, model(images)
    exits = [int(detection["exit_index"]) for detection in detections]
    assert set(exits) == {1, 2}
    for index, (detection, exit_index) in enumerate(zip(detections, exits, strict=True)):
        assert torch.allclose(detection["scores"], model.detections(expected, exit_index)[index]["scores"], atol=1e-5)
    logits, _ = PathToExit(model, 2, model.router)(model.transform(images)[0].tensors)
    assert torch.allclose(logits, outputs.heads[2]["cls_logits"], atol=1e-5)

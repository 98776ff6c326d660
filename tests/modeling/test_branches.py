"""What exits are described by, and the branches of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, PathToExit, build_ssdlite
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
from tests.modeling.conftest import SMALL, small_model


def test_fed_with_the_full_path_s_map_it_gives_the_full_path_s_maps():
    model = small_model().eval()
    tail = Tail(model.backbone, depth=2).eval()
    expansion, rest = model.backbone.features
    projected = rest[0](expansion(torch.rand(2, 3, 96, 96)))
    expected, x = [], projected
    for layer in rest[1:]:
        x = layer(x)
    for block in (None, *model.backbone.extra):
        x = x if block is None else block(x)
        expected.append(x)
    _, maps = tail(projected)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))
    assert tail.in_channels == projected.shape[1]
    assert tail.out_channels == [one.shape[1] for one in maps]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_weights_are_copies_that_can_be_fetched_again(depth):
    model = small_model()
    tail = Tail(model.backbone, depth)
    assert len(tail.blocks) == depth
    last_block = model.backbone.features[1][2]
    with torch.no_grad():
        for parameter in last_block.parameters():
            parameter.add_(1.0)
    if depth:
        assert not torch.equal(next(tail.blocks[-1].parameters()), next(last_block.parameters()))
    tail.inherit(model.backbone)
    if depth:
        pairs = zip(tail.blocks[-1].parameters(), last_block.parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(parameter.requires_grad for parameter in tail.parameters())


def test_head_takes_the_wanted_rows():
    model, wide = small_model(), small_model(classes=tuple("abcd"))
    wide.head.classification_head = FoldedClassificationHead(wide.head.classification_head, (4, 2))
    mine = model.branches["exit8"].head
    first = mine.classification_head.module_list[0][1].weight.clone()
    inherit_predictors(mine, wide.head)
    old = wide.head.classification_head.module_list[1][1].weight.view(6, 5, -1)
    new = mine.classification_head.module_list[1][1].weight.view(6, 3, -1)
    assert torch.equal(new, old[:, [0, 4, 2]])
    assert torch.equal(mine.classification_head.module_list[0][1].weight, first)
    for one, other in zip(
        mine.regression_head.module_list[1:].parameters(),
        wide.head.regression_head.module_list[1:].parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_model_s_branches_follow_its_full_path():
    model = small_model()
    with torch.no_grad():
        for parameter in model.backbone.features[1].parameters():
            parameter.mul_(2.0)
    model.inherit()
    for branch in model.branches.values():
        assert torch.equal(branch.tail.last[0].weight, model.backbone.features[1][-1][0].weight)


# Copies of the full path's layers: the same function where nothing is left out.


@pytest.fixture
def backbone():
    """With statistics and scales that differ from channel to channel."""
    backbone = small_model().backbone.eval()
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return backbone


@pytest.mark.parametrize("layer", [2, 4, 7, 11])
def test_a_whole_copy_is_the_block(backbone, layer):
    block = list(backbone.features[0][layer].block)
    copied = ThinnedBlock(block, 1.0)
    copied.inherit(block)
    x = torch.rand(2, block[0][0].in_channels, 8, 8)
    assert torch.equal(copied.eval()(x), backbone.features[0][layer].block(x))


def test_channels_that_reach_nothing_go_first(backbone):
    """Half of the expansion is cut off at the projection: the other half, kept, is the whole block."""
    block = list(backbone.features[0][7].block)
    channels = block[-1][0].in_channels
    used = torch.randperm(channels, generator=torch.Generator().manual_seed(1))[: channels // 2].sort().values
    with torch.no_grad():
        unused = torch.ones(channels, dtype=torch.bool)
        unused[used] = False
        block[-1][0].weight[:, unused] = 0.0
    copied = ThinnedBlock(block, (channels // 2 // 8) * 8 / channels)
    kept = copied.inherit(block)
    assert set(kept.tolist()) <= set(used.tolist())
    assert copied.expanded_channels == len(kept) == channels // 2 // 8 * 8


def test_attention_and_norms_follow_their_channels(backbone):
    """A channel that is kept has the same value before the projection's attention as in the block."""
    block = list(backbone.features[0][11].block)
    copied = ThinnedBlock(block, 0.5).eval()
    kept = copied.inherit(block)
    x = torch.rand(1, block[0][0].in_channels, 6, 6)
    assert torch.allclose(copied[1](copied[0](x)), block[1](block[0](x))[:, kept], atol=1e-6)
    assert torch.equal(copied[2].fc2.weight, block[2].fc2.weight[kept])
    assert torch.equal(copied[2].fc1.weight, block[2].fc1.weight[:, kept])


def test_exit_before_c4_starts_as_the_full_path(backbone):
    model = small_model(exit_layers=(12,), copy=(1.0,), channels=0, depth=(2,)).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    model.inherit()
    early, full = model.exit_outputs([torch.rand(3, 96, 96)]).heads
    assert torch.equal(early["cls_logits"], full["cls_logits"])
    assert torch.equal(early["bbox_regression"], full["bbox_regression"])


@pytest.mark.parametrize(("layer", "blocks"), [(1, 5), (4, 3), (6, 3), (8, 2), (12, 1), (13, 0), (15, 0)])
def test_residual_layers_are_left_out(backbone, layer, blocks):
    path = CopiedPathToC4(backbone, layer, 0.5)
    assert len(path.before) + (path.c4 is not None) == blocks
    # half of C4's expansion, 168 channels at this width, as a multiple of 8; also where nothing is copied
    assert path.first_channels == 80


def test_copies_learn_on_their_own(backbone):
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    path = CopiedPathToC4(backbone, 8, 0.5)
    path.inherit(backbone)
    assert all(parameter.requires_grad for parameter in path.parameters())
    path.c4[0][0].weight.data.zero_()
    assert backbone.features[0][-1][0].weight.abs().sum() > 0


def test_behind_c4_a_branch_runs_what_the_trunk_has_not_run():
    model = small_model(exit_layers=(12, 13, 14, 15), channels=0, copy=(0.5,), depth=(2,)).train()
    assert [len(branch.tail.blocks) for branch in model.branches.values()] == [2, 2, 1, 0]
    images = [torch.rand(3, 96, 96)] * 2
    targets = [{"boxes": torch.tensor([[5.0, 5, 50, 60]]), "labels": torch.tensor([1])}] * 2
    sum(model(images, targets).values()).backward()
    for branch in model.branches.values():
        assert all(parameter.grad is not None for parameter in branch.parameters())


def test_older_models_with_channels_behind_c4_keep_their_blocks():
    model = small_model(exit_layers=(14, 15), channels=16, depth=(2,))
    assert [len(branch.tail.blocks) for branch in model.branches.values()] == [2, 2]


@pytest.mark.parametrize("channels", [0, 16])
def test_a_model_with_copies_comes_back_from_its_description(channels):
    model = small_model(exit_layers=(6, 12), copy=(0.5,), channels=channels)
    again = small_model(exit_layers=(6, 12), copy=(0.5,), channels=channels)
    again.load_state_dict(model.state_dict())
    image = [torch.rand(3, 96, 96)]
    for mine, theirs in zip(
        again.eval().exit_outputs(image).heads, model.eval().exit_outputs(image).heads, strict=True
    ):
        assert torch.equal(mine["cls_logits"], theirs["cls_logits"])


def test_shares_are_one_for_each_exit():
    model = small_model(exit_layers=(8, 12), copy=(0.5, 1.0))
    widths = [branch.copied.c4.expanded_channels for branch in model.branches.values()]
    assert widths[0] < widths[1] == model.backbone.features[0][-1][0].out_channels
    for wrong in ((0.5, 0.5, 0.5), (1.5,), (0.0,)):
        with pytest.raises(EarlyExitError, match=r"copy is .*, expected a number in \(0, 1\], or one for each"):
            small_model(exit_layers=(8, 12), copy=wrong)


# The kind "empty".


def place(**changes):
    """Of an exit of three classes and 40 default boxes."""
    shapes = {"tap": (4, 6, 6), "grids": [(2, 3), (1, 1)], "boxes_per_cell": [6, 4], "num_classes": 3}
    return Place(torch.nn.Module(), 8, **shapes | changes)


def test_it_says_background_at_every_default_box():
    head = EmptyExit(place())(torch.ones(2, 4, 6, 6))
    assert head["cls_logits"].softmax(-1).allclose(torch.tensor([1.0, 0, 0]).expand(2, 40, 3))
    assert head["bbox_regression"].equal(torch.zeros(2, 40, 4))


def test_default_boxes_by_hand():
    assert place(grids=[(2, 3), (1, 1)], boxes_per_cell=[6, 4]).num_boxes == 6 * 6 + 4


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
    signals = ExitSignals(EmptyExit(place())(torch.ones(2, 4, 6, 6))["cls_logits"], empty=True)
    router = ExitRouter(1, policy=policy, thresholds=0.0)
    assert router.leaves(router.confidence(signals, 0), 0).tolist() == [False, False]


def test_a_layer_without_an_exit_is_refused():
    with pytest.raises(ValueError, match=r"empty has 7, expected some of the exits' layers \(6, 8\)"):
        small_model(exit_layers=(6, 8), empty=(7,))


# The kind "copied" as a whole.


def test_only_the_first_map_is_narrow():
    model = small_model(channels=16)
    found = [block[1].in_channels for block in model.branches["exit8"].head.classification_head.module_list]
    full = [block[1].in_channels for block in model.head.classification_head.module_list]
    assert found == [16, *full[1:]]


# The description of an exit.


def test_keywords_are_spread_over_the_exits():
    assert describe_exits((4, 8, 12), branch=("light", "copied", "copied"), empty=(8,), copy=(0.25, 0.5, 1.0)) == (
        Exit(4, "light", {"channels": 0, "context": True, "head_rank": 0}),
        Exit(8, "empty", {}),
        Exit(12, "copied", {"channels": 0, "depth": 2, "copy": 1.0, "head_rank": 0}),
    )


@pytest.mark.parametrize(
    "words",
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
def test_exits_and_their_keywords_are_the_same(words):
    exits = describe_exits(**words)
    assert describe_exits(**exit_keywords(exits)) == exits
    architecture = Architecture(("chair",), exits=exits)
    assert Architecture.from_dict(architecture.to_dict()) == architecture


def test_a_description_of_the_first_format_is_read():
    """As it stands in the files of before: no kind of branches, and no argument for each exit alone."""
    older = {"exit_layers": [6, 8], "channels": 0, "depth": [2], "copy": [0.5], "head_rank": 64, "empty": [6]}
    copied = {"channels": 0, "depth": 2, "copy": 0.5, "head_rank": 64}
    assert Architecture.from_dict({"classes": ["chair"], **older}).exits == (
        Exit(6, "empty"),
        Exit(8, "copied", copied),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(8, "lihgt"), "branch is 'lihgt', expected one of copied, light, empty .did you mean 'light'"),
        (lambda: describe_exits(glances=[128, 12]), "glances has 128, expected pairs of pixels and a trunk layer"),
        (lambda: describe_exits(glances=[(16, 12)]), "a glance's side is 16, expected 32 to 4096"),
        (lambda: Exit(8, "light", pixels=64), "a glance has the branch 'light', expected 'empty'"),
        (lambda: Exit(8, ["light"]), r"branch is \['light'\], expected one of"),
        (lambda: Exit(8, "light", {"depth": 1}), "a light branch has no argument 'depth'"),
        (lambda: Exit(8, "copied", {"copy": 0.0}), r"copy is 0.0, expected a number in \(0, 1\]"),
        (lambda: Exit(8.5), "layer is 8.5, expected a whole number"),
        (lambda: describe_exits((6, 8), branch=("light",) * 3), "or one for each of 2 exits"),
        (lambda: describe_exits((6, 8), branch="light", context=1), "context is 1, expected True or False"),
        (lambda: describe_exits((6, 8), channels=5000), r"channels is 5000, expected a whole number in \[0, 4096\]"),
    ],
)
def test_what_describes_no_exit(make, message):
    with pytest.raises(EarlyExitError, match=message):
        make()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exit_layers": 8}, "exit_layers is 8, expected a list"),
        ({"exit_layers": "8"}, "exit_layers is '8', expected a list"),
        ({"exit_layers": (8, 12.0)}, r"exit_layers\[1\] is 12.0, expected a whole number"),
        ({"exit_layers": (12, 8)}, "exit_layers .12, 8.: expected increasing trunk layers from 1 to 15"),
        ({"empty": 6}, "empty is 6, expected a list"),
        ({"depth": (1.5,)}, "depth is .1.5,., expected a whole number in"),
        ({"depth": (True,)}, "depth is .True,., expected a whole number in"),
        ({"copy": "0.5"}, "copy is '0.5', expected a number in"),
        ({"copy": (float("nan"),)}, "copy is .nan,., expected a number in"),
        ({"channels": -1}, "channels is -1, expected a whole number in"),
        ({"head_rank": "64"}, "head_rank is '64', expected a whole number in"),
    ],
)
def test_the_constructor_names_what_is_wrong(wrong, message):
    detector = build_ssdlite(num_classes=2, image_size=96, width=0.25)
    with pytest.raises(EarlyExitError, match=message):
        EarlyExitSSDLite(detector, **wrong)


def test_one_stands_for_all():
    assert Argument(0.5, 1).per_exit("copy", 0.25, 3) == Argument(0.5, 1).per_exit("copy", (0.25,), 3) == [0.25] * 3
    assert Argument(0.5, 1).per_exit("copy", [1, np.float32(0.5)], 2) == [1.0, 0.5]
    assert Argument(2, 2).per_exit("depth", np.array([2, 0]), 2) == [2, 0]
    assert Argument(2, 2).per_exit("depth", [], 0) == Argument(2, 2).per_exit("depth", (2,), 0) == []
    with pytest.raises(EarlyExitError, match=r"copy is 0, expected a number in \(0, 1\], or one for each of 2 exits"):
        Argument(0.5, 1, zero=False).per_exit("copy", 0, 2)


def test_exits_and_their_keywords_are_not_given_together():
    with pytest.raises(TypeError, match="got exits and exit_layers; give one of them"):
        Architecture(("chair",), exits=(Exit(8),), exit_layers=(8,))


def test_a_kind_of_branches_is_added_in_one_place(images, monkeypatch):
    """Keywords, description, model and training know it from its registration."""
    monkeypatch.setattr("earlyexit_ssd.modeling.branches.BRANCHES", dict(BRANCHES))

    class Constant(Branch):
        def __init__(self, place: Place) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(place.num_boxes, place.num_classes))

        def forward(self, tap, context=None):
            count = len(tap)
            boxes = tap.new_zeros(count, len(self.logits), 4)
            return {"cls_logits": self.logits.expand(count, -1, -1), "bbox_regression": boxes}

    register_branch("constant")(Constant)
    model = small_model(branch=("constant", "copied"))
    outputs = model.eval().exit_outputs(images)
    assert outputs.heads[0]["cls_logits"].shape == outputs.heads[2]["cls_logits"].shape
    assert Architecture.of(model).to_dict()["branch"] == ["constant", "copied"]


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
def test_a_step_of_the_pyramid_reaches_its_grid(sizes, strides):
    step = PyramidStep(8, sizes).eval()
    assert [layer[0].stride[0] for layer in step.layers[::2]] == strides
    assert step(torch.rand(2, 8, *sizes[0])).shape == (2, 8, *sizes[1])


@pytest.mark.parametrize("changes", [{}, {"exit_layers": (2, 6, 13, 15)}, {"exit_layers": (4, 8, 12), "empty": (8,)}])
def test_light_branches_give_all_default_boxes_and_learn(changes, images, targets):
    model = small_model(branch="light", channels=8, **changes).train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.branches.parameters())
    outputs = model.eval().exit_outputs(images)
    assert len({head["cls_logits"].shape for head in outputs.heads}) == 1
    branch = next(one for one in model.branches.values() if isinstance(one, LightBranch))
    assert {block[1].in_channels for block in branch.head.classification_head.module_list} == {8}


@pytest.mark.parametrize("empty", [(), (8,)])
def test_an_exit_sees_what_the_exit_before_has_seen(images, empty):
    """Across an exit without a branch too, and not where the cascade is off."""

    def last_exit(model):
        return model.eval().exit_outputs(images).heads[-2]["cls_logits"]

    for context in (True, False):
        model = small_model(branch="light", exit_layers=(6, 8, 12), empty=empty, channels=8, context=context)
        before = last_exit(model)
        torch.nn.init.constant_(model.branches["exit6"].narrow[1].bias, 3.0)
        assert torch.equal(before, last_exit(model)) != context
        assert (model.branches["exit12"].cascade is not None) == context


def test_light_branches_are_routed_as_they_are_in_one_pass(images):
    """The context goes along with the images that go on, past an exit that is closed too."""
    model = small_model(branch="light", exit_layers=(6, 8, 12), channels=8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    outputs = model.exit_outputs(images)
    at_8 = outputs.heads[1]["cls_logits"].softmax(-1)[..., 1:].amax((1, 2)).sort().values
    for hybrid in (False, True):
        model.router = ExitRouter(
            3, policy="max_foreground", thresholds=[2.0, float(at_8[1:].mean()), 0.0], hybrid=hybrid
        )
        expected = outputs.on_full_boxes() if hybrid else outputs
        taken = [int(one["exit_index"]) for one in model(images)]
        assert set(taken) == {1, 2}
        for index, (found, exit_index) in enumerate(zip(model(images), taken, strict=True)):
            other = model.detections(expected, exit_index)[index]
            assert torch.allclose(found["scores"], other["scores"], atol=1e-5)
        path = PathToExit(model, 2, model.router)(model.transform(images)[0].tensors)
        assert torch.allclose(path[0], outputs.heads[2]["cls_logits"], atol=1e-5)


def test_a_saved_light_model_is_the_model(images, tmp_path):
    model = small_model(branch=("light", "copied"), channels=16).eval()
    model.save(tmp_path / "m.pth")
    again = EarlyExitSSDLite.from_pretrained(tmp_path / "m.pth")
    assert again.exits == model.exits == Architecture(**SMALL, branch=("light", "copied")).exits
    for one, other in zip(again.exit_outputs(images).heads, model.exit_outputs(images).heads, strict=True):
        assert torch.equal(one["cls_logits"], other["cls_logits"])

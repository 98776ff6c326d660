"""The walk from exit to exit, and what detects, trains and times by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from earlyexit_ssd import ExitRouter, fuse_for_inference
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, Exit, PathToExit, save_model
from earlyexit_ssd.modeling.detector import (
    AllOutputs,
    AtExit,
    BranchLosses,
    FullPathLosses,
    compute_taps,
    early_exit_losses,
)
from earlyexit_ssd.modeling.losses import Assignment, LossSettings
from earlyexit_ssd.modeling.outputs import pool_tap
from earlyexit_ssd.modeling.trunk import small_copy
from tests.modeling.conftest import SMALL, small_model


def heads(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "cls_logits": torch.randn(2, 5, 3, generator=generator).requires_grad_(),
            "bbox_regression": torch.randn(2, 5, 4, generator=generator).requires_grad_(),
        }
        for _ in range(count)
    ]


def labelled(*rows):
    labels = torch.tensor(rows)
    return Assignment(labels, torch.zeros(*labels.shape, 4))


def test_a_teacher_alone_does_not_look_at_labels():
    settings = LossSettings(supervision="teacher", teacher="full")
    router = ExitRouter(1, learn_temperatures=True)
    found = [
        early_exit_losses({0: "exit8"}, heads(2), assignment, settings, router)
        for assignment in (labelled([0] * 5, [0] * 5), labelled([1] * 5, [2, 0, 0, 1, 1]))
    ]
    assert list(found[0]) == ["exit8_distillation", "exit8_temperature"]
    assert found[0] == found[1]


def test_the_next_exit_as_teacher_is_one_that_has_a_branch():
    """The second of three exits is empty: the first learns from the third, and that from the full path."""
    settings = LossSettings(supervision="teacher", teacher="next")
    exits = heads(4)
    losses = early_exit_losses({0: "exit6", 2: "exit12"}, exits, labelled([0] * 5, [0] * 5), settings)
    direct = LossSettings(supervision="teacher", teacher="full")
    for name, student, teacher in (("exit6", 0, 2), ("exit12", 2, 3)):
        expected = early_exit_losses({0: name}, [exits[student], exits[teacher]], labelled([0] * 5, [0] * 5), direct)
        assert torch.equal(losses[f"{name}_distillation"], expected[f"{name}_distillation"])


def test_what_a_teacher_sees_on_an_unlabelled_photo_is_learnt():
    """With labels, the same photo would count as empty and push its objects down."""
    full = {"cls_logits": torch.tensor([[[0.0, 4.0]]]), "bbox_regression": torch.zeros(1, 1, 4)}
    student = {"cls_logits": torch.zeros(1, 1, 2, requires_grad=True), "bbox_regression": torch.zeros(1, 1, 4)}
    settings = LossSettings(supervision="teacher", teacher="full")
    losses = early_exit_losses({0: "exit8"}, [student, full], labelled([0]), settings)
    sum(losses.values()).backward()
    assert student["cls_logits"].grad[0, 0, 1] < 0


# Photos that leave are not computed further, and what nobody needs is not computed at all.


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


def test_selected_images_go_on_alone():
    three = torch.arange(3.0).reshape(3, 1, 1, 1)
    at = AtExit(small_model(), None, 0, three, 2 * three, 3 * three)
    at.keep(torch.tensor([True, False, True]))
    assert [one.flatten().tolist() for one in (at.x, at.finest, at.context)] == [[0, 2], [0, 4], [0, 6]]
    assert at.glance_tap is None


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


# The detector.


def test_without_router_the_detections_are_torchvision_s(images):
    architecture = Architecture(**SMALL)
    detector = architecture.build_detector().eval()
    model = architecture.add_exits(detector).eval()
    for found, expected in zip(model(images), detector(images), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value)


def test_every_name_of_torchvision_s_detector_is_kept():
    architecture = Architecture(**SMALL)
    detector = architecture.build_detector()
    names = set(detector.state_dict())
    model = architecture.add_exits(detector)
    assert {name for name in model.state_dict() if not name.startswith("branches.")} == names


def test_last_exit_of_one_pass_is_the_full_path(model, images):
    model.eval()
    outputs = model.exit_outputs(images)
    for found, expected in zip(model.detections(outputs, 2), model(images), strict=True):
        assert torch.equal(found["boxes"], expected["boxes"])


@pytest.mark.parametrize("layers", [(8,), (8, 12), (12, 14), (3, 6, 8, 12)])
def test_all_exits_share_the_default_boxes(layers, images):
    model = small_model(exit_layers=layers).eval()
    shapes = {head["cls_logits"].shape for head in model.exit_outputs(images).heads}
    assert shapes == {(3, sum(6 * grid[0] * grid[1] for grid in model.grids), 3)}


@pytest.mark.parametrize(("size", "width"), [(64, 0.25), (130, 0.35), (160, 0.5)])
def test_any_input_size_and_width(size, width, images, targets):
    model = small_model(image_size=size, width=width, exit_layers=(4, 12))
    losses = model.train()(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_losses_of_all_exits(model, images, targets):
    model.losses = LossSettings(teacher="next")
    losses = model.train()(images, targets)
    assert sorted(losses) == [
        "bbox_regression",
        "classification",
        "exit12_bbox_regression",
        "exit12_classification",
        "exit12_distillation",
        "exit8_bbox_regression",
        "exit8_classification",
        "exit8_distillation",
    ]
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_keys_do_not_depend_on_the_photos(model, images):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    model.train()
    full = model(images, [{"boxes": torch.tensor([[1.0, 1, 30, 30]]), "labels": torch.tensor([1])}] * 3)
    assert model(images, [empty] * 3).keys() == full.keys()


def test_loss_weights_scale_the_losses(images, targets):
    model = small_model().eval()
    outputs = model.exit_outputs(images)
    heads, assignment = outputs.heads, model.assign(targets, outputs.anchors)
    plain = model.compute_losses(heads, assignment)
    model.losses = LossSettings(exit_weights=(0.5, 2.0), full_weight=3.0)
    weighted = model.compute_losses(heads, assignment)
    for key, factor in (("exit8_classification", 0.5), ("exit12_bbox_regression", 2.0), ("classification", 3.0)):
        assert weighted[key].item() == pytest.approx(factor * plain[key].item())


def test_frozen_trunk_learns_nothing_and_keeps_its_statistics(model, images, targets):
    model.freeze_full_path()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model(images, targets)
    assert all(key.startswith("exit") for key in losses)
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("branches."))
    assert not all(torch.equal(before[key], after[key]) for key in before if key.startswith("branches."))


def test_frozen_norm_stays_in_eval(model):
    model.norm_frozen = True
    model.train()
    assert model.training
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_anchors_stay_exact_under_autocast(model, images):
    model.eval()
    expected = model.exit_outputs(images).anchors
    used = []
    postprocess = model.postprocess_detections
    model.postprocess_detections = lambda head, anchors, sizes: (
        used.append(anchors) or postprocess(head, anchors, sizes)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.exit_outputs(images).anchors
        model(images)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(used[0][0], expected[0])


def test_router_for_another_number_of_exits_is_refused(model, images, targets):
    model.router = ExitRouter(1)
    with pytest.raises(ValueError, match="the router is for 1 early exits, the model has 2"):
        model.eval()(images)
    with pytest.raises(ValueError, match="the router is for 1 early exits"):
        model.train()(images, targets)


def test_a_detector_may_have_no_exit(images):
    model = small_model(exit_layers=()).eval()
    assert model.exit_names == ("full",)
    model.router = ExitRouter(0)
    assert [int(found["exit_index"]) for found in model(images)] == [0, 0, 0]


@pytest.mark.parametrize("layers", [(0,), (16,), (99,), (12, 8), (8, 8)])
def test_impossible_exit_layers(layers):
    with pytest.raises(ValueError, match="increasing trunk layers from 1 to 15"):
        small_model(exit_layers=layers)


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="did you mean 'exit_layers'"):
        EarlyExitSSDLite(Architecture(**SMALL).build_detector(), exit_layer=(8,))


def test_wrong_count_of_class_names():
    with pytest.raises(ValueError, match="1 class names for a head with 3 outputs"):
        EarlyExitSSDLite(Architecture(**SMALL).build_detector(), classes=["chair"])


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[5.0, 5, 5, 9]], [1], "target 0, box 0"),
        ([[5.0, 5, float("nan"), 9]], [1], "target 0, box 0"),
        ([[5.0, 5, 9, 9]], [0], "labels 0..0, expected 1..2"),
        ([[5.0, 5, 9, 9]], [3], "labels 3..3, expected 1..2"),
        ([[5.0, 5, 9, 9]], [1, 2], r"boxes \[n, 4\] and labels \[n\]"),
    ],
)
def test_bad_targets_are_named(model, images, boxes, labels, message):
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    with pytest.raises(ValueError, match=message):
        model.train()(images, [target] * 3)


def test_training_needs_targets_and_more_than_one_image(model, images, targets):
    model.train()
    with pytest.raises(ValueError, match="one target per image"):
        model(images)
    with pytest.raises(ValueError, match="training batch of 1 image"):
        model(images[:1], targets[:1])


def test_images_must_be_floats(model):
    with pytest.raises(ValueError, match="image 1: expected a float tensor"):
        model.eval()([torch.rand(3, 50, 50), torch.zeros(3, 50, 50, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 64, "width": 1.5},
        {"image_size": 200, "exit_layers": (13, 14, 15)},
        {"image_size": 321, "exit_layers": (15,)},
        {"exit_layers": (1, 2, 3, 14), "reduced_tail": False},
    ],
    ids=str,
)
def test_any_size_width_and_exits(changes):
    """Photos of extreme shapes, trained and routed; every exit gives the same default boxes."""
    model = small_model(**changes).train()
    images = [torch.rand(3, 20, 300), torch.rand(3, 310, 31)]
    target = {"boxes": torch.tensor([[1.0, 1, 19, 19]]), "labels": torch.tensor([2])}
    sum(model(images, [target] * 2).values()).backward()
    outputs = model.eval().exit_outputs(images)
    assert {tuple(head["cls_logits"].shape) for head in outputs.heads} == {(2, len(outputs.anchors[0]), 3)}
    model.router = ExitRouter(model.num_early_exits)
    assert len(model(images)) == 2


# The path to one exit.


def test_path_gives_the_exit_s_outputs(model, images):
    model.eval()
    batch, _ = model.transform(images)
    for index, head in enumerate(model.exit_outputs(images).heads):
        logits, boxes = PathToExit(model, index)(batch.tensors)
        assert torch.equal(logits, head["cls_logits"])
        assert torch.equal(boxes, head["bbox_regression"])


def test_no_such_exit(model):
    with pytest.raises(ValueError, match="exits 0 to 2"):
        PathToExit(model, 3)


def test_all_outputs_are_those_of_every_exit_on_the_way(model, images):
    model.eval()
    batch, _ = model.transform(images)
    found, router = model.exit_outputs(images), ExitRouter(2, policy="entropy", thresholds=0.5, temperatures=(1.0, 2.0))
    outputs = AllOutputs(PathToExit(model, 2, router))(batch.tensors)
    expected = [tensor for head in found.heads for tensor in head.values()]
    expected += [router.confidence(found.signals(index), index) for index in (0, 1)]
    assert len(outputs) == 8
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))


def test_hybrid_path_ends_with_the_boxes_of_the_full_path(model, images):
    model.eval()
    batch, _ = model.transform(images)
    found = model.exit_outputs(images)
    for index in range(3):
        logits, boxes = PathToExit(model, index, ExitRouter(2, hybrid=True))(batch.tensors)
        assert torch.equal(logits, found.heads[index]["cls_logits"])
        assert torch.equal(boxes, found.heads[-1]["bbox_regression"])


# Fused for inference.


@pytest.fixture
def trained():
    """BatchNorm statistics that matter."""
    model = small_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def test_every_exit_says_the_same(trained, images):
    before = copy.deepcopy(trained.state_dict())
    fused = fuse_for_inference(trained.train())
    assert not fused.training and not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        outputs, expected = fused.exit_outputs(images), trained.eval().exit_outputs(images)
    assert len(outputs.heads) == 3
    for head, other in zip(outputs.heads, expected.heads, strict=True):
        for key, values in head.items():
            assert torch.allclose(values, other[key], atol=1e-4), key
    assert all(value.equal(before[key]) for key, value in trained.state_dict().items())


def test_the_router_goes_along(trained, images):
    trained.router = ExitRouter(2, thresholds=[0.0, 1.0])
    fused = fuse_for_inference(trained)
    assert [int(found["exit_index"]) for found in fused(images)] == [0, 0, 0]
    assert fused.router is not trained.router


def test_what_is_fused_is_not_saved(trained, tmp_path):
    with pytest.raises(EarlyExitError, match="fused for inference cannot be saved"):
        save_model(tmp_path / "model.pth", fuse_for_inference(trained), None)
    assert not list(tmp_path.iterdir())


def test_synchronised_normalisation_is_fused_too(trained, images):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trained))
    fused = fuse_for_inference(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in fused.modules())
    with torch.inference_mode():
        found, expected = fused.exit_outputs(images), fuse_for_inference(trained).exit_outputs(images)
    assert torch.allclose(found.heads[-1]["cls_logits"], expected.heads[-1]["cls_logits"], atol=1e-4)


def test_a_model_with_other_normalisation_is_saved(trained, tmp_path):
    save_model(tmp_path / "model.pth", nn.SyncBatchNorm.convert_sync_batchnorm(trained), Architecture(**SMALL))
    assert (tmp_path / "model.pth").is_file()


# What a phase trains.


def test_branches_from_taps_have_the_whole_model_s_losses_and_gradients(images, targets):
    results = []
    for cached in (False, True):
        model = small_model()
        model.losses = LossSettings(teacher="full")
        model.router = ExitRouter(2, learn_temperatures=True)
        model.freeze_full_path()
        model.train()
        losses = BranchLosses(model)(compute_taps(model, images, targets)) if cached else model(images, targets)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (cached_losses, cached_gradients) = results
    assert losses.keys() == cached_losses.keys()
    assert all(torch.equal(losses[key], cached_losses[key]) for key in losses)
    assert gradients.keys() == cached_gradients.keys()
    assert all(torch.equal(gradients[key], cached_gradients[key]) for key in gradients)


def test_full_path_trains_no_branch(model, images, targets):
    module = FullPathLosses(model.train())
    losses = module(images, targets)
    assert sorted(losses) == ["bbox_regression", "classification"]
    names = [name for name, _ in module.named_parameters()]
    assert all(name.startswith(("backbone.", "head.")) for name in names)
    assert len(names) == sum(1 for name, _ in model.named_parameters() if not name.startswith("branches."))


# Glances: exits that look at a small copy of the image.


def glancing(**changes):
    """A glance at 64 pixels behind layer 12, then exit 8 with a branch."""
    return small_model(exit_layers=(8,), glances=((64, 12),), **changes).eval()


def foresight(model, bias):
    """A policy that is equally sure of every image at every exit: sigmoid(-bias)."""
    taps = model.exit_outputs(ONE).taps
    sizes = [tap.shape[1] + (not empty) for tap, empty in zip(taps, model.empty, strict=True)]
    return [{"weight": [0.0] * size, "bias": bias} for size in sizes]


ONE = [torch.rand(3, 80, 90, generator=torch.Generator().manual_seed(3))]


def test_a_glance_is_the_trunk_on_a_small_copy(images):
    model = glancing()
    assert model.exit_names == ("glance64", "exit8", "full")
    assert model.empty == (True, False)
    batch, _ = model.transform(images, None)
    tap, _ = model.trunk.run(small_copy(batch.tensors, 64), 0, model.trunk.ends[12])
    assert torch.equal(model.exit_outputs(images).taps[0], pool_tap(tap))


def test_a_glance_has_no_parameters_and_leaves_the_full_path_as_it_is(images):
    model, plain = glancing(), small_model(exit_layers=(8,)).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    model.router = ExitRouter(2)
    for found, expected in zip(model(images), plain(images), strict=True):
        assert torch.equal(found["boxes"], expected["boxes"])


def test_who_leaves_at_a_glance_has_an_empty_answer_and_the_others_go_on(images):
    model = glancing()
    weight = foresight(model, 0.0)
    outputs = model.exit_outputs(images)
    feature = int(outputs.taps[0].std(0).argmax())
    values = outputs.taps[0][:, feature]
    slope = 4 / float(values.std())
    weight[0]["weight"][feature], weight[0]["bias"] = slope, -slope * float(values.sort().values[:2].mean())
    model.router = ExitRouter(2, policy="foreseen_emptiness", parameters=weight, thresholds=[0.5, CLOSED])
    leave = model.router.confidence(outputs.signals(0), 0) >= 0.5
    assert 0 < leave.sum() < 3
    full = [model.detections(outputs, 2)[index] for index in range(3)]
    for found, leaves, expected in zip(model(images), leave.tolist(), full, strict=True):
        assert int(found["exit_index"]) == (0 if leaves else 2)
        assert len(found["boxes"]) == 0 if leaves else torch.equal(found["boxes"], expected["boxes"])


def test_a_closed_glance_is_not_computed(images, monkeypatch):
    model = glancing()
    model.router = ExitRouter(
        2, policy="foreseen_emptiness", parameters=foresight(model, 9.0), thresholds=[CLOSED, 0.5]
    )
    monkeypatch.setattr("earlyexit_ssd.modeling.detector.small_copy", lambda *_: pytest.fail("computed"))
    assert all(int(found["exit_index"]) == 2 for found in model(images))


def test_training_does_not_run_the_trunk_on_small_copies(images, targets, monkeypatch):
    """Their statistics would go into BatchNorm."""
    model = glancing().train()
    monkeypatch.setattr("earlyexit_ssd.modeling.detector.small_copy", lambda *_: pytest.fail("computed"))
    losses = model(images, targets)
    assert not any("glance" in key for key in losses)


def test_glances_come_first_and_grow():
    detector = small_model().eval()
    glance, branch = Exit(12, "empty", pixels=64), Exit(8, "light")
    with pytest.raises(EarlyExitError, match="expected increasing sides, and glances before other exits"):
        EarlyExitSSDLite(detector, exits=(branch, glance), classes=detector.classes)
    with pytest.raises(EarlyExitError, match="increasing trunk layers from 1 to 15"):
        EarlyExitSSDLite(detector, exits=(Exit(16, "empty", pixels=64),), classes=detector.classes)

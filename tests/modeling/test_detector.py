"""The walk from exit to exit, the detector, paths to one exit, and the losses of one phase."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from earlyexit_ssd import ExitRouter, fuse_for_inference
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, Exit, PathToExit
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
from earlyexit_ssd.modeling.trunk import Trunk
from tests.modeling.conftest import SMALL, assert_equal, copy_state, model_with_varied_scores, small_model


def random_heads(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "cls_logits": torch.randn(2, 5, 3, generator=generator),
            "bbox_regression": torch.randn(2, 5, 4, generator=generator),
        }
        for _ in range(count)
    ]


def labelled(*rows):
    labels = torch.tensor(rows)
    return Assignment(labels, torch.zeros(*labels.shape, 4))


TEACHER_ONLY = LossSettings(supervision="teacher", teacher="full")


def test_losses_from_the_teacher_alone_ignore_labels():
    router = ExitRouter(1, learn_temperatures=True)
    losses = [
        early_exit_losses({0: "exit8"}, random_heads(2), assignment, TEACHER_ONLY, router)
        for assignment in (labelled([0] * 5, [0] * 5), labelled([1] * 5, [2, 0, 0, 1, 1]))
    ]
    assert list(losses[0]) == ["exit8_distillation", "exit8_temperature"]
    assert losses[0] == losses[1]


def test_next_teacher_is_the_next_exit_with_a_branch():
    """The second of three exits is empty. The first exit's teacher is the third, whose teacher is the full path."""
    settings = LossSettings(supervision="teacher", teacher="next")
    heads, assignment = random_heads(4), labelled([0] * 5, [0] * 5)
    losses = early_exit_losses({0: "exit6", 2: "exit12"}, heads, assignment, settings)
    for name, student, teacher in (("exit6", 0, 2), ("exit12", 2, 3)):
        expected = early_exit_losses({0: name}, [heads[student], heads[teacher]], assignment, TEACHER_ONLY)
        assert torch.equal(losses[f"{name}_distillation"], expected[f"{name}_distillation"])


# Routing.


class FixedRouter(nn.Module):
    """Image i leaves at exit ``plan[i]``."""

    def __init__(self, plan, closed, hybrid):
        super().__init__()
        self.plan, self.closed, self.hybrid = torch.tensor(plan), closed, hybrid
        self.active = torch.arange(len(plan))

    def confidence(self, signals, exit_index):
        assert len(signals.logits) == len(self.active)
        assert (signals.tap is None) == (exit_index == 2)
        assert signals.tap is None or len(signals.tap) == len(self.active)
        return self.active.float()

    def needs(self, exit_index):
        return exit_index not in self.closed

    def leaves(self, confidence, exit_index):
        leave = self.plan[self.active] == exit_index
        self.active = self.active[~leave]
        return leave


def record_batch_sizes(module):
    """Return a list that gets the number of images of each later call of ``module``."""
    sizes = []
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


MODULES = ("layer0", "layer9", "exit8", "exit12", "layer14", "full")


@pytest.mark.parametrize(
    ("plan", "closed", "hybrid", "images_per_call"),
    [
        ([0, 2, 1, 0, 2], (), False, ([5], [3], [5], [3], [2], [2])),
        ([0, 0], (), False, ([2], [], [2], [], [], [])),
        ([2, 1], (0,), False, ([2], [2], [], [2], [1], [1])),
        ([0, 2], (1,), False, ([2], [1], [2], [], [1], [1])),
        ([0, 2, 1, 0, 2], (), True, ([5], [5], [5], [3], [5], [2])),
        ([0, 0], (), True, ([2], [2], [2], [], [2], [])),
    ],
)
def test_routed_images_get_their_exit_s_detections_and_no_other_layers_run(plan, closed, hybrid, images_per_call):
    model, images = model_with_varied_scores(), [torch.rand(3, 96, 96) for _ in plan]
    outputs = model.exit_outputs(images)
    outputs = outputs.on_full_boxes() if hybrid else outputs
    model.router = FixedRouter(plan, closed, hybrid)
    (first, second), branches = model.backbone.features, [branch.tail.blocks for branch in model.branches.values()]
    modules = (first[0], first[9], *branches, second[1], model.head.classification_head.module_list[0])
    sizes = [record_batch_sizes(module) for module in modules]
    detections = model(images)
    assert dict(zip(MODULES, sizes, strict=True)) == dict(zip(MODULES, images_per_call, strict=True))
    for index, (exit_index, detection) in enumerate(zip(plan, detections, strict=True)):
        assert (detection.pop("exit_index"), detection.pop("exit_confidence")) == (exit_index, index)
        torch.testing.assert_close(detection, model.detections(outputs, exit_index)[index], rtol=0, atol=1e-3)


def test_keep_selects_images_of_every_tensor():
    """The finest map is needed by exits after C4, the context by light branches."""
    three = torch.arange(3.0).reshape(3, 1, 1, 1)
    at = AtExit(small_model(), None, 0, three, [4 * three], 2 * three, 3 * three)
    at.keep(torch.tensor([True, False, True]))
    kept = [values.flatten().tolist() for values in (at.x, at.finest, at.context, *at.copies)]
    assert kept == [[0, 2], [0, 4], [0, 6], [0, 8]]
    assert at.glance_tap is None


# The detector.


def test_unrouted_detections_and_parameter_names_are_torchvision_s(images):
    architecture = Architecture(**SMALL)
    detector = architecture.build_detector().eval()
    model = architecture.add_exits(detector).eval()
    assert_equal(model(images), detector(images))
    assert_equal(model.detections(model.exit_outputs(images), 2), model(images))
    assert {name for name in model.state_dict() if not name.startswith("branches.")} == set(detector.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 64, "exit_layers": (4, 12)},
        {"image_size": 130, "width": 0.35, "exit_layers": (4, 12)},
        {"image_size": 64, "width": 1.5},
        {"image_size": 200, "exit_layers": (13, 14, 15)},
        {"image_size": 321, "exit_layers": (15,)},
        {"exit_layers": (1, 2, 3, 14), "reduced_tail": False},
    ],
    ids=str,
)
def test_any_size_width_and_exits_train_and_detect(changes):
    """The photos have extreme shapes."""
    model = small_model(**changes).train()
    images = [torch.rand(3, 20, 300), torch.rand(3, 310, 31)]
    target = {"boxes": torch.tensor([[1.0, 1, 19, 19]]), "labels": torch.tensor([2])}
    losses = model(images, [target] * 2)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    outputs = model.eval().exit_outputs(images)
    assert {tuple(head["cls_logits"].shape) for head in outputs.heads} == {(2, len(outputs.anchors[0]), 3)}
    model.router = ExitRouter(model.num_early_exits)
    assert len(model(images)) == 2


def test_losses_of_all_exits_reach_every_parameter(model, images, targets):
    model.losses = LossSettings(teacher="next")
    losses = model.train()(images, targets)
    own = {"bbox_regression", "classification"}
    assert losses.keys() == own | {f"{name}_{key}" for name in ("exit8", "exit12") for key in (*own, "distillation")}
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loss_weights_scale_the_losses(model, images, targets):
    outputs = model.eval().exit_outputs(images)
    assignment = model.assign(targets, outputs.anchors)
    plain = model.compute_losses(outputs.heads, assignment)
    model.losses = LossSettings(exit_weights=(0.5, 2.0), full_weight=3.0)
    weighted = model.compute_losses(outputs.heads, assignment)
    for key, factor in (("exit8_classification", 0.5), ("exit12_bbox_regression", 2.0), ("classification", 3.0)):
        assert weighted[key].item() == pytest.approx(factor * plain[key].item())


def test_frozen_norm_stays_in_eval_mode(model):
    model.norm_frozen = True
    model.train()
    assert model.training
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_default_boxes_are_exact_under_autocast(model, images):
    expected = model.eval().exit_outputs(images).anchors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(model.exit_outputs(images).anchors, expected)


def test_router_for_another_number_of_exits_is_refused(model, images, targets):
    model.router = ExitRouter(1)
    with pytest.raises(ValueError, match="the router is for 1 early exits, the model has 2"):
        model.eval()(images)
    with pytest.raises(ValueError, match="the router is for 1 early exits"):
        model.train()(images, targets)


def test_detector_without_exits_is_routed(images):
    model = small_model(exit_layers=()).eval()
    assert model.exit_names == ("full",)
    model.router = ExitRouter(0)
    assert [int(detection["exit_index"]) for detection in model(images)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"exit_layer": (8,)}, TypeError, "did you mean 'exit_layers'"),
        ({"classes": ["chair"]}, EarlyExitError, "1 class names for a head with 3 outputs"),
        ({"exits": (Exit(8, "light"), Exit(12, "empty", pixels=64))}, EarlyExitError, "and glances before other exits"),
        ({"exits": (Exit(12, "empty", pixels=128),)}, EarlyExitError, "128 pixels: expected fewer than"),
        ({"exits": (Exit(16, "empty", pixels=64),)}, EarlyExitError, "increasing trunk layers from 1 to 15"),
        ({"exit_layers": (0,)}, EarlyExitError, "increasing trunk layers from 1 to 15"),
        ({"exit_layers": (16,)}, EarlyExitError, "increasing trunk layers from 1 to 15"),
        ({"exit_layers": (8, 8)}, EarlyExitError, r"exit_layers \(8, 8\): expected increasing"),
        ({"exit_layers": (12, 8)}, EarlyExitError, r"exit_layers \(12, 8\): expected increasing"),
    ],
)
def test_invalid_arguments_are_named(keywords, error, message):
    with pytest.raises(error, match=message):
        EarlyExitSSDLite(Architecture(**SMALL).build_detector(), **keywords)


def test_training_needs_targets_and_more_than_one_image(model, images, targets):
    model.train()
    with pytest.raises(ValueError, match="one target per image"):
        model(images)
    with pytest.raises(ValueError, match="training batch of 1 image"):
        model(images[:1], targets[:1])


# The path to one exit.


@pytest.fixture
def evaluated(model, images):
    """The model, its normalised batch, and the outputs of all its exits."""
    model.eval()
    return model, model.transform(images)[0].tensors, model.exit_outputs(images)


@pytest.mark.parametrize("hybrid", [False, True])
def test_path_returns_the_exit_s_outputs(evaluated, hybrid):
    model, batch, outputs = evaluated
    for index, head in enumerate((outputs.on_full_boxes() if hybrid else outputs).heads):
        path = PathToExit(model, index, ExitRouter(2, hybrid=True) if hybrid else None)
        assert_equal(path(batch), (head["cls_logits"], head["bbox_regression"]))
    with pytest.raises(ValueError, match="exits 0 to 2"):
        PathToExit(model, 3)


def test_all_outputs_are_those_of_every_exit_on_the_path(evaluated):
    model, batch, outputs = evaluated
    router = ExitRouter(2, policy="entropy", thresholds=0.5, temperatures=(1.0, 2.0))
    expected = [tensor for head in outputs.heads for tensor in head.values()]
    expected += [router.confidence(outputs.signals(index), index) for index in (0, 1)]
    assert_equal(AllOutputs(model, 2, router)(batch), expected)


# Fused for inference.


@pytest.fixture
def trained():
    """A model in eval mode with random BatchNorm statistics."""
    model = small_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def test_fused_model_has_the_outputs_of_every_exit(trained, images):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(trained))
    before = copy_state(model)
    fused = fuse_for_inference(model.train())
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    assert not fused.training and not any(isinstance(module, norms) for module in fused.modules())
    with torch.inference_mode():
        heads, expected = fused.exit_outputs(images).heads, trained.eval().exit_outputs(images).heads
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-4)
    assert_equal(copy_state(model), before)


# The losses of one training phase.


def test_branch_losses_have_the_whole_model_s_losses_and_gradients(images, targets):
    results = []
    for cached in (False, True):
        model = small_model()
        model.losses = LossSettings(teacher="full")
        model.router = ExitRouter(2, learn_temperatures=True)
        model.freeze_full_path()
        model.train()
        losses = BranchLosses(model)(compute_taps(model, images, targets)) if cached else model(images, targets)
        sum(losses.values()).backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_equal(*results)


def test_full_path_losses_have_no_branch_parameters(model, images, targets):
    module = FullPathLosses(model.train())
    assert sorted(module(images, targets)) == ["bbox_regression", "classification"]
    names = {name for name, _ in module.named_parameters()}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("branches.")}


# Glances.


def model_with_glance():
    """Return a model with a glance at 64 pixels up to layer 12, and exit 8."""
    return small_model(exit_layers=(8,), glances=((64, 12),)).eval()


def test_losses_of_the_full_path_compute_no_glance(images, targets):
    model = model_with_glance().train()
    statistics = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before = int(statistics.num_batches_tracked)
    FullPathLosses(model)(images, targets)
    assert statistics.num_batches_tracked == before + 1  # a glance would have counted too


def test_glance_runs_the_trunk_on_small_copies_of_the_photos(images):
    model = model_with_glance()
    assert (model.exit_names, model.empty) == (("glance64", "exit8", "full"), (True, False))
    resized = [F.interpolate(image[None], (64, 64), mode="bilinear", align_corners=False) for image in images]
    (copies,) = model.small_copies(images)
    assert torch.allclose(copies, (torch.cat(resized) - 0.5) / 0.5, atol=1e-5)
    assert model.transform.fixed_size == (96, 96)
    tap, _ = model.trunk.run(copies, 0, model.trunk.ends[12])
    assert torch.equal(model.exit_outputs(images).taps[0], pool_tap(tap))


def test_glance_has_no_parameters_and_does_not_change_the_full_path(images):
    model, plain = model_with_glance(), small_model(exit_layers=(8,)).eval()
    plain.load_state_dict(model.state_dict())
    model.router = ExitRouter(2)
    for detection, expected in zip(model(images), plain(images), strict=True):
        assert torch.equal(detection["boxes"], expected["boxes"])


def test_images_that_leave_at_a_glance_have_no_detections(images):
    model = model_with_glance()
    boxes = model(images)[1]["boxes"]
    model.router = FixedRouter([0, 2, 0], (1,), False)
    first, second, third = model(images)
    assert len(first["boxes"]) == len(third["boxes"]) == 0 < len(boxes)
    torch.testing.assert_close(second["boxes"], boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_closed_glance_and_training_do_not_run_on_small_copies(images, targets, monkeypatch, training):
    """In training, their statistics would enter BatchNorm."""
    model = model_with_glance().train(training)
    model.router = ExitRouter(2, thresholds=[CLOSED, 0.5])
    sides, run = set(), Trunk.run
    monkeypatch.setattr(Trunk, "run", lambda self, x, *rest: sides.add(x.shape[-1]) or run(self, x, *rest))
    result = model(images, targets)
    assert 96 in sides and 64 not in sides
    assert not training or not any("glance" in key for key in result)

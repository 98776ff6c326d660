import pytest
import torch
from torch import nn

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, LossSettings
from tests.modeling.conftest import SMALL, small_model


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
    model.freeze_trunk()
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
    with pytest.raises(ValueError, match="the router knows 1 early exits, the model has 2"):
        model.eval()(images)
    with pytest.raises(ValueError, match="the router knows 1 early exits"):
        model.train()(images, targets)


@pytest.mark.parametrize("layers", [(), (0,), (16,), (99,), (12, 8), (8, 8)])
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

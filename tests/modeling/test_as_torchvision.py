"""Uses of a torchvision detector: replaced layers, tracing, pickling, score thresholds, saving."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter, fuse_for_inference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.routing.policies import POLICIES, register_policy
from tests.modeling.conftest import SMALL, assert_equal, model_with_varied_scores, small_model


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def logits(model, images):
    with torch.no_grad():
        return torch.cat([head["cls_logits"].flatten() for head in model.exit_outputs(images).heads])


def replace_layer(model):
    layer = copy.deepcopy(model.backbone.features[0][3])
    for parameter in layer.parameters():
        parameter.data.mul_(3)
    model.backbone.features[0][3] = layer


def replace_extra(model):
    model.backbone.extra[0] = copy.deepcopy(model.backbone.extra[0])
    model.backbone.extra[0][0][0].weight.data.mul_(-1)


def replace_backbone(model):
    model.backbone = small_model().eval().backbone


def replace_head(model):
    model.head = copy.deepcopy(model.head)
    model.head.classification_head.module_list[0][1].bias.data += 1


def replace_branch(model):
    model.branches["exit8"] = copy.deepcopy(model.branches["exit8"])
    model.branches["exit8"].head.classification_head.module_list[0][1].bias.data += 1


def parametrise_layer(model):
    convolution = model.backbone.features[0][0][0]
    parametrizations.weight_norm(convolution)
    convolution.parametrizations.weight.original0.data.mul_(2)


CHANGES = [replace_layer, replace_extra, replace_backbone, replace_head, replace_branch, parametrise_layer]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_replaced_layers_of_a_copy_run(images, change, copied):
    model = model_with_varied_scores()
    before, other = logits(model, images), copied(model)
    change(other)
    assert not torch.equal(logits(other, images), before)
    assert torch.equal(logits(model, images), before)


def test_full_path_with_replaced_layers_equals_torchvision_s(images):
    model = model_with_varied_scores()
    replace_layer(model)
    replace_extra(model)
    batch, _ = model.transform(images, None)
    expected = model.head(list(model.backbone(batch.tensors).values()))
    assert_equal(model.exit_outputs(images).heads[-1], expected)


def test_replaced_parts_that_do_not_fit_are_named(images):
    model = model_with_varied_scores()
    model.backbone = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(EarlyExitError, match="backbone is a Sequential, expected torchvision's SSDLiteFeature"):
        model(images)
    model = model_with_varied_scores()
    model.head = Architecture(**{**SMALL, "classes": tuple("abcd")}).build_detector().head
    for _ in range(2):
        with pytest.raises(EarlyExitError, match="the head has 5 outputs, expected 3 .*build a new model"):
            model(images)
        model.train()


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model([image])[0]["boxes"]


def test_routed_model_cannot_be_traced():
    model, image = small_model().eval(), torch.rand(3, 96, 96)
    model.router = ExitRouter(2)
    with pytest.raises(EarlyExitError, match=r"cannot be traced or exported: .* model.router = None"):
        torch.jit.trace(Wrapped(model), (image,))
    for strict in (False, True):
        # before torch 2.7 a strict export fails with PyTorch's message
        ours = not strict or hasattr(torch.compiler, "is_exporting")
        with pytest.raises(Exception, match="cannot be traced or exported" if ours else None):
            torch.export.export(Wrapped(model), (image,), strict=strict)
    with torch.no_grad():
        assert "exit_index" in model([image])[0]


def test_model_without_a_router_is_traced():
    model, image = small_model().eval(), torch.rand(3, 96, 96)
    model.router = ExitRouter(2)
    model.router = None
    traced = torch.jit.trace(Wrapped(model), (image,), check_trace=False)
    assert torch.allclose(traced(image), model([image])[0]["boxes"], atol=1e-3)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prepare", [lambda model: model, fuse_for_inference], ids=["model", "fused"])
def test_routed_model_is_pickled(images, hybrid, prepare):
    model = model_with_varied_scores()
    model.router = ExitRouter(2, policy="mean_foreground", thresholds=[0.3, 0.4], hybrid=hybrid)
    model = prepare(model)
    assert_equal(pickled(model)(images), model(images))


def test_registered_policy_is_unpickled_by_its_name():
    register_policy("always")(lambda logits: logits.new_ones(len(logits)))
    try:
        pickled = pickle.dumps(ExitRouter(2, policy="always"))
        assert pickle.loads(pickled).policy == "always"
    finally:
        del POLICIES["always"]
    with pytest.raises(EarlyExitError, match="routing policy is 'always'"):
        pickle.loads(pickled)


def filter_by_hand(model, outputs, index, thresholds):
    """Apply NMS without a limit, then the thresholds by label, then the limit."""
    limit, model.detections_per_img, model.score_thresh = model.detections_per_img, 10**6, min(thresholds)
    unlimited = model.detections(outputs, index)
    model.detections_per_img = limit
    lowest = torch.tensor([0.0, *thresholds])
    keep = [detection["scores"] > lowest[detection["labels"]] for detection in unlimited]
    return [{k: v[mask][:limit] for k, v in detection.items()} for detection, mask in zip(unlimited, keep, strict=True)]


def test_score_thresholds_per_class(images):
    model = model_with_varied_scores()
    model.detections_per_img = 40
    outputs = model.exit_outputs(images)
    for index in range(3):
        expected = filter_by_hand(model, outputs, index, [0.5, 0.3])
        model.score_thresh = {"table": 0.3, "chair": 0.5}
        detections = model.detections(outputs, index)
        assert sum(len(detection["scores"]) for detection in detections) > 10
        assert_equal(detections, expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"chiar": 0.4}, "has 'chiar', which is no class of the model .did you mean 'chair'"),
        ({1: 0.4}, "has 1, which is no class of the model; the classes are chair, table"),
        ({"chair": 1.5}, r"of 'chair' is 1.5, expected a number in \[0, 1\]"),
        ({"chair": True}, "of 'chair' is True"),
        ({"chair": float("nan")}, "of 'chair' is nan"),
        ({}, "an empty dict"),
        ("0.5", "score_thresh is '0.5', expected a number"),
        (None, "score_thresh is None, expected a number"),
    ],
)
def test_invalid_score_thresholds_are_refused(model, value, message):
    model.score_thresh = 0.2
    with pytest.raises(EarlyExitError, match=message):
        model.score_thresh = value
    assert model.score_thresh == 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"width": 0.35, "exit_layers": (4, 8, 12), "empty": (4,), "copy": (0.25, 0.5, 1.0), "depth": (0, 1, 2)},
        {"head_outputs": 6, "folded_rows": (2, 5), "head_rank": 4, "channels": 0, "exit_layers": (8,)},
        {"head_outputs": 6, "folded_rows": (2, 5), "folded_branches": True},
        {"branch": ("light", "copied"), "channels": 8},
        {"reduced_tail": False, "score_thresh": {"table": 0.5}, "nms_thresh": 0.4, "detections_per_img": 9},
    ],
)
def test_saved_model_is_restored(tmp_path, images, changes):
    model = model_with_varied_scores(**changes)
    exits = model.num_early_exits
    model.router = ExitRouter(exits, policy="mean_foreground", thresholds=[0.4] * exits, temperatures=[1.5] * exits)
    model.router.thresholds = [0.3] * exits
    model.save(tmp_path / "m.pth")
    restored = EarlyExitSSDLite.from_pretrained(tmp_path / "m.pth")
    assert Architecture.of(restored) == Architecture.of(model)
    assert restored.router.to_dict() == model.router.to_dict()
    assert_equal(restored(images), model(images))


def replace_convolution(model):
    model.backbone.features[0][0] = nn.Conv2d(3, 8, 3, stride=2, padding=1)


def change_default_boxes(model):
    model.anchor_generator.clip = False


def replace_router(model):
    model.router = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_convolution, r"m\.pth: the model is not as it was built: backbone\.features\.0\.0"),
        (change_default_boxes, "not as it was built: anchor_generator"),
        (fuse_for_inference, "fused for inference cannot be saved"),
        (replace_router, "a Identity, cannot be saved; set model.router = None"),
    ],
)
def test_changed_model_is_not_saved(tmp_path, change, message):
    model = small_model().eval()
    with pytest.raises(EarlyExitError, match=message):
        (change(model) or model).save(tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())

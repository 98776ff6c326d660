"""What people do with a torchvision detector: change layers, trace, pickle, cut scores, save."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from earlyexit_ssd import EarlyExitSSDLite, ExitRouter, fuse_for_inference
from earlyexit_ssd.calibration import DriftMonitor
from earlyexit_ssd.drift import Reference
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, save_model
from earlyexit_ssd.modeling.retrofit import fold_model
from earlyexit_ssd.routing.policies import POLICIES, register_policy
from tests.modeling.conftest import SMALL, small_model


def loud_model(**changes):
    """Untrained layers of torchvision's start say next to nothing: every score is 1 / classes whatever they do."""
    model = small_model(**changes).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model.inherit()
    return model


def scores(model, images):
    with torch.no_grad():
        return torch.cat([head["cls_logits"].flatten() for head in model.exit_outputs(images).heads])


def replaced_layer(model):
    layer = copy.deepcopy(model.backbone.features[0][3])
    for parameter in layer.parameters():
        parameter.data.mul_(3)
    model.backbone.features[0][3] = layer


def replaced_extra(model):
    model.backbone.extra[0] = copy.deepcopy(model.backbone.extra[0])
    model.backbone.extra[0][0][0].weight.data.mul_(-1)


def replaced_backbone(model):
    model.backbone = small_model().eval().backbone  # untrained, so that it says next to nothing


def replaced_head(model):
    model.head = copy.deepcopy(model.head)
    model.head.classification_head.module_list[0][1].bias.data += 1


def replaced_branch(model):
    model.branches["exit8"] = copy.deepcopy(model.branches["exit8"])
    model.branches["exit8"].head.classification_head.module_list[0][1].bias.data += 1


def parametrised_layer(model):
    convolution = model.backbone.features[0][0][0]
    parametrizations.weight_norm(convolution)
    convolution.parametrizations.weight.original0.data.mul_(2)


SURGERY = [replaced_layer, replaced_extra, replaced_backbone, replaced_head, replaced_branch, parametrised_layer]


@pytest.mark.parametrize("change", SURGERY)
@pytest.mark.parametrize("of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_forward_runs_the_layers_that_are_there_now(images, change, of):
    model = loud_model()
    before, other = scores(model, images), of(model)
    change(other)
    assert not torch.equal(scores(other, images), before)
    assert torch.equal(scores(model, images), before)


def test_all_other_layers_still_run_as_one(images):
    """What a changed trunk says is what its layers say one after the other, as torchvision's backbone runs them."""
    model = loud_model()
    replaced_layer(model)
    replaced_extra(model)
    batch, _ = model.transform(images, None)
    expected = model.head(list(model.backbone(batch.tensors).values()))["cls_logits"]
    assert torch.equal(model.exit_outputs(images).heads[-1]["cls_logits"], expected)


def test_parts_that_do_not_fit_are_one_line(images):
    model = loud_model()
    model.backbone = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(EarlyExitError, match="backbone is a Sequential, expected torchvision's SSDLiteFeature"):
        model(images)
    model = loud_model()
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


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("policy", ["max_foreground", "ambiguous_mass"])
def test_a_routed_model_is_not_traced(policy, hybrid):
    model, image = small_model().eval(), torch.rand(3, 96, 96)
    model.router = ExitRouter(2, policy=policy, hybrid=hybrid)
    with pytest.raises(EarlyExitError, match=r"cannot be traced or exported: .* model.router = None"):
        torch.jit.trace(Wrapped(model), (image,))
    for strict in (False, True):
        # before torch 2.7 PyTorch refuses a strict export in its own words
        ours = not strict or hasattr(torch.compiler, "is_exporting")
        with pytest.raises(Exception, match="cannot be traced or exported" if ours else None):
            torch.export.export(Wrapped(model), (image,), strict=strict)
    with torch.no_grad():
        assert "exit_index" in model([image])[0]


def test_a_model_without_a_router_is_traced():
    model, image = small_model().eval(), torch.rand(3, 96, 96)
    model.router = ExitRouter(2)
    model.router = None
    traced = torch.jit.trace(Wrapped(model), (image,), check_trace=False)
    assert torch.allclose(traced(image), model([image])[0]["boxes"], atol=1e-3)


@pytest.mark.parametrize("fuse", [False, True])
def test_no_onnx_file_holds_one_photo_s_exit(fuse):
    pytest.importorskip("onnx")
    model = small_model().eval()
    model.router = ExitRouter(2)
    model = fuse_for_inference(model) if fuse else model
    with pytest.raises(EarlyExitError, match="cannot be traced or exported"):
        torch.onnx.export(model, ([torch.rand(3, 96, 96)],), io.BytesIO(), dynamo=False)


def test_routed_models_are_pickled(images):
    for hybrid in (False, True):
        model = loud_model()
        model.router = ExitRouter(2, policy="mean_foreground", thresholds=[0.3, 0.4], hybrid=hybrid)
        for one in (model, fuse_for_inference(model)):
            again = pickle.loads(pickle.dumps(one))
            for found, expected in zip(again(images), one(images), strict=True):
                assert all(torch.equal(found[key], expected[key]) for key in expected)
    for name in POLICIES:
        assert pickle.loads(pickle.dumps(ExitRouter(2, policy=name))).to_dict() == ExitRouter(2, policy=name).to_dict()
    fitted = ExitRouter(2, policy="balanced_ambiguity", parameters=[1.0, 2.0])
    assert copy.deepcopy(pickle.loads(pickle.dumps(fitted))).to_dict() == fitted.to_dict()
    monitor = DriftMonitor(Reference(2, ("exit8", "full"), (0, 2), ((),)), window=2)
    monitor.update([1], [0.5])
    assert pickle.loads(pickle.dumps(monitor)).status() == monitor.status()


def route_in_another_process(rank, model, path):
    torch.save(model([torch.zeros(3, 96, 96)])[0]["exit_index"], path)


def test_a_spawned_process_routes(tmp_path):
    model = small_model().eval()
    model.router = ExitRouter(2, thresholds=[0.0, 0.0])
    torch.multiprocessing.spawn(route_in_another_process, (model, str(tmp_path / "exit.pt")), nprocs=1)
    assert torch.load(tmp_path / "exit.pt", weights_only=True).item() == 0


def test_a_policy_of_one_s_own_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("earlyexit_ssd.routing.policies.POLICIES", POLICIES)
    register_policy("always")(lambda logits: logits.new_ones(len(logits)))
    try:
        pickled = pickle.dumps(ExitRouter(2, policy="always"))
        assert pickle.loads(pickled).policy == "always"
    finally:
        del POLICIES["always"]
    with pytest.raises(EarlyExitError, match="unknown routing policy 'always'"):
        pickle.loads(pickled)


def cut_by_hand(model, outputs, index, least):
    """All that suppression leaves, without a limit, cut by class, and then the limit."""
    limit, model.detections_per_img, model.score_thresh = model.detections_per_img, 10**6, min(least)
    every = model.detections(outputs, index)
    model.detections_per_img = limit
    cuts = torch.tensor([0.0, *least])
    keep = [found["scores"] > cuts[found["labels"]] for found in every]
    return [{key: value[one][:limit] for key, value in found.items()} for found, one in zip(every, keep, strict=True)]


def test_scores_are_cut_by_class(images):
    model = loud_model()
    model.detections_per_img = 40
    outputs = model.exit_outputs(images)
    for index in range(3):
        expected = cut_by_hand(model, outputs, index, [0.5, 0.3])
        model.score_thresh = {"table": 0.3, "chair": 0.5}
        found = model.detections(outputs, index)
        assert sum(len(one["scores"]) for one in found) > 10
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)
            assert bool((one["scores"][one["labels"] == 1] > 0.5).all() and (one["scores"] > 0.3).all())


def test_cuts_go_along_everywhere(tmp_path, images):
    model = loud_model()
    model.score_thresh = {"chair": 0.6}
    model.router = ExitRouter(2, thresholds=[0.9, 0.9])
    model.save(tmp_path / "m.pth")
    for one in (model, EarlyExitSSDLite.from_pretrained(tmp_path / "m.pth"), fuse_for_inference(model)):
        assert one.score_thresh == {"chair": 0.6}
        for found in one(images):
            assert (found["scores"][found["labels"] == 1] > 0.6).all()
            assert (found["labels"] == 2).any()  # classes that are not named keep 0.001


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
def test_cuts_that_are_none(model, value, message):
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
        {"reduced_tail": False, "score_thresh": {"table": 0.5}, "nms_thresh": 0.4, "detections_per_img": 9},
    ],
)
def test_a_saved_model_is_the_model(tmp_path, images, changes):
    model = loud_model(**changes)
    exits = model.num_early_exits
    model.router = ExitRouter(exits, policy="mean_foreground", thresholds=[0.4] * exits, temperatures=[1.5] * exits)
    model.router.thresholds = [0.3] * exits
    model.save(tmp_path / "m.pth")
    again = EarlyExitSSDLite.from_pretrained(tmp_path / "m.pth")
    assert Architecture.of(again) == Architecture.of(model)
    assert again.router.to_dict() == model.router.to_dict()
    for found, expected in zip(again(images), model(images), strict=True):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_a_file_could_not_hold_is_not_saved(tmp_path):
    model = small_model()
    model.backbone.features[0][0] = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    with pytest.raises(EarlyExitError, match=r"m\.pth: the model is not as it was built: backbone\.features\.0\.0"):
        model.save(tmp_path / "m.pth")
    model = small_model()
    model.anchor_generator.clip = False
    with pytest.raises(EarlyExitError, match="not as it was built: anchor_generator"):
        model.save(tmp_path / "m.pth")
    model = small_model().eval()
    with pytest.raises(EarlyExitError, match="fused for inference cannot be saved"):
        fuse_for_inference(model).save(tmp_path / "m.pth")
    model.router = nn.Identity()
    with pytest.raises(EarlyExitError, match="a Identity, cannot be saved; set model.router = None"):
        model.save(tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "m.pth", small_model())


def test_folding_every_head_keeps_every_score(images):
    whole = loud_model(classes=("a", "b", "c", "d"), exit_layers=(4, 8), empty=(4,))
    folded = copy.deepcopy(whole)
    fold_model(folded, ("d", "b"), (4, 2))
    assert folded.classes == ("d", "b")
    for one, other in zip(folded.exit_outputs(images).heads, whole.exit_outputs(images).heads, strict=True):
        found, expected = one["cls_logits"].softmax(-1), other["cls_logits"].softmax(-1)
        assert torch.allclose(found[..., 1:], expected[..., [4, 2]], atol=1e-6)

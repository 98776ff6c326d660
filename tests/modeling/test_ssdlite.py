"""The builder that torchvision finds by its name."""

import pytest
import torch
import torchvision

import earlyexit_ssd  # noqa: F401 - registers the builder

NAME = "earlyexit_ssdlite320_mobilenet_v3_large"
OFFLINE = {"weights": None, "weights_backbone": None}


def test_model_at_320_pixels_equals_torchvision_s():
    torch.manual_seed(0)
    plain = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", num_classes=2, **OFFLINE)
    ours = torchvision.models.get_model(NAME, num_classes=2, **OFFLINE)
    assert set(plain.state_dict()) <= set(ours.state_dict())
    ours.load_state_dict(plain.state_dict(), strict=False)
    image = [torch.rand(3, 320, 320)]
    assert torch.equal(ours.eval()(image)[0]["boxes"], plain.eval()(image)[0]["boxes"])


def test_coco_weights_load_at_any_size(monkeypatch):
    plain = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", num_classes=91, **OFFLINE)
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: plain.state_dict())
    arguments = {"weights": "COCO_V1", "image_size": 96}
    model = torchvision.models.get_model(NAME, channels=16, trainable_backbone_layers=2, **arguments)
    assert model.transform.fixed_size == (96, 96)
    trained = [next(layer.parameters()).requires_grad for layer in model.trunk.steps]
    assert trained == [False] * 13 + [True] * 5  # C4 and the layers after it
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    with pytest.raises(ValueError, match="weights have 91 outputs, num_classes is 5"):
        torchvision.models.get_model(NAME, num_classes=5, **arguments)
    with pytest.raises(ValueError, match="weights need width=1.0"):
        torchvision.models.get_model(NAME, weights="COCO_V1", width=0.5)


def test_invalid_arguments_are_refused():
    builder = torchvision.models.get_model_builder(NAME)
    with pytest.raises(TypeError):
        builder(None)
    with pytest.raises(TypeError, match="did you mean 'score_thresh'"):
        builder(score_treshold=0.5, **OFFLINE)
    with pytest.raises(ValueError, match=r"should be in the range \[0,6\], got 7"):
        builder(trainable_backbone_layers=7, weights="COCO_V1")


def test_scores_of_untrained_detectors_vary_and_differ():
    first, second = (torchvision.models.get_model(NAME, num_classes=3, **OFFLINE).eval() for _ in range(2))
    with torch.no_grad():
        outputs = [model.exit_outputs([torch.rand(3, 96, 96)]).heads[-1]["cls_logits"] for model in (first, second)]
    scores = [logits.softmax(-1) for logits in outputs]
    assert scores[0].std() > 1e-3 and not torch.allclose(*scores)

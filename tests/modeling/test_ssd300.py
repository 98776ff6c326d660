"""torchvision's SSD300 with early exits and random weights."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import vgg
from torchvision.models.detection import ssd

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture, EarlyExitSSD300, EarlyExitSSDLite, LossSettings, build_ssdlite
from earlyexit_ssd.modeling.detector import BranchLosses, compute_taps
from earlyexit_ssd.modeling.ssd300 import vgg_trunk
from tests.modeling.conftest import assert_equal

NAME = "earlyexit_ssd300_vgg16"
OFFLINE = {"weights": None, "weights_backbone": None}


def narrow_vgg16(**_: object) -> SimpleNamespace:
    """VGG16 without its classifier, which no detector uses, and narrow where the detector allows it.

    The whole network has 138 million parameters.
    """
    features = vgg.make_layers([8, 8, "M", 8, 8, "M", 16, 16, 16, "M", 16, 16, 512, "M", 16, 16, 512, "M"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return SimpleNamespace(features=features)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "vgg16", narrow_vgg16)
        yield


@pytest.fixture(scope="module")
def plain():
    """torchvision's detector with outputs that differ from box to box."""
    torch.manual_seed(0)
    detector = torchvision.models.get_model("ssd300_vgg16", num_classes=3, **OFFLINE).eval()
    for block in detector.head.classification_head.module_list:
        nn.init.normal_(block.weight, std=0.02)
    return detector


EXITS = {"branch": "light", "exit_layers": (7, 10), "channels": 16}


@pytest.fixture
def model(plain):
    """A model with the parts of ``plain``."""
    return EarlyExitSSD300(plain, classes=("red", "blue"), **EXITS).eval()


def photo(colour):
    """Return a photo of a square of one colour, from 60 to 180 pixels, on grey."""
    image = torch.full((3, 300, 300), 0.5)
    image[:, 60:180, 60:180] = torch.tensor(colour)[:, None, None]
    return image


def test_unrouted_checkpoint_has_torchvision_s_detections(plain, tmp_path):
    torch.save({"model": plain.state_dict()}, tmp_path / "ssd300.pth")
    model = EarlyExitSSD300.from_pretrained(tmp_path / "ssd300.pth")
    assert model.exits == EarlyExitSSD300.default_exits
    full_path = {key: value for key, value in model.state_dict().items() if not key.startswith("branches.")}
    assert_equal(full_path, dict(plain.state_dict()))
    images = [torch.rand(3, 240, 320), photo((0.9, 0.1, 0.1))]
    with torch.no_grad():
        detections, expected = model(images), plain(images)
    assert sum(len(detection["scores"]) for detection in expected) > 0
    assert_equal(detections, expected)


def test_exits_share_the_default_boxes_and_are_routed(model):
    image = photo((0.9, 0.1, 0.1))
    with torch.no_grad():
        outputs = model.exit_outputs([image])
        model.router = ExitRouter(2, thresholds=[2.0, 0.0])
        (detection,) = model([image])
    # 38 and 1 cells with 4 boxes, 19, 10 and 5 with 6, 3 with 4
    boxes = 4 * (38**2 + 3**2 + 1) + 6 * (19**2 + 10**2 + 5**2)
    assert {tuple(head["cls_logits"].shape) for head in outputs.heads} == {(1, boxes, 3)}
    assert int(detection["exit_index"]) == 1
    assert torch.equal(detection["scores"], model.detections(outputs, 1)[0]["scores"])


def test_losses_of_exits_fall_in_training(model):
    model.losses = LossSettings(teacher="none")
    images = [photo((0.9, 0.1, 0.1)), photo((0.1, 0.1, 0.9))]
    targets = [{"boxes": torch.tensor([[60.0, 60, 180, 180]]), "labels": torch.tensor([label])} for label in (1, 2)]
    batch, branches = compute_taps(model, images, targets), BranchLosses(model).train()
    optimizer = torch.optim.AdamW(branches.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = sum(value for name, value in branches(batch).items() if name.startswith("exit"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_model_files_and_checkpoints_are_loaded(model, tmp_path):
    model.save(tmp_path / "m.pth")
    torch.save(model.state_dict(), tmp_path / "state.pth")
    with pytest.raises(EarlyExitError, match="ssd300_vgg16, expected ssdlite320_mobilenet_v3_large"):
        EarlyExitSSDLite.from_pretrained(tmp_path / "m.pth")
    built = torchvision.models.get_model(NAME, weights=tmp_path / "state.pth", classes=("red", "blue"), **EXITS)
    assert (built.exits, built.nms_thresh, built.score_thresh, built.training) == (model.exits, 0.45, 0.01, True)
    assert_equal(built.state_dict(), model.state_dict())


def test_unsupported_settings_are_refused(plain):
    with pytest.raises(EarlyExitError, match="this detector has others; use branch='light'"):
        EarlyExitSSD300(plain, exit_layers=(7,))
    with pytest.raises(ValueError, match="increasing trunk layers from 1 to 14"):
        EarlyExitSSD300(plain, exit_layers=(15,), branch="light")
    with pytest.raises(EarlyExitError, match="it supports only 300 and 1"):
        Architecture(("chair",), detector="ssd300_vgg16", branch="light").build_detector()
    with pytest.raises(EarlyExitError, match="did you mean 'ssd300_vgg16'"):
        Architecture(("chair",), detector="ssd300_vgg17").build_detector()
    with pytest.raises(EarlyExitError, match="expected torchvision's SSDFeatureExtractorVGG"):
        vgg_trunk(build_ssdlite(num_classes=2, image_size=96, width=0.25).backbone)

import pickle

import pytest
import torch
import torchvision
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, load_model, retrofit, save_model
from earlyexit_ssd.modeling.retrofit import load_full_path
from tests.modeling.conftest import SMALL

SOURCE = ("person", "chair", "couch")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    detector = Architecture(**{**SMALL, "classes": SOURCE}).build_detector()
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    return detector.eval(), str(tmp_path / "detector.pth")


def test_same_classes_same_detections(checkpoint, images):
    detector, path = checkpoint
    found, architecture, change = retrofit(Architecture(**{**SMALL, "classes": SOURCE}), path)
    assert change is None
    model = architecture.add_exits(found).eval()
    for one, expected in zip(model(images), detector(images), strict=True):
        assert all(torch.equal(one[key], expected[key]) for key in expected)


def test_exact_fold_keeps_scores_of_the_wanted_class(checkpoint, images):
    detector, path = checkpoint
    found, architecture, change = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), path, SOURCE)
    assert (architecture.head_outputs, architecture.folded_rows, change.folded) == (4, (2,), 2)
    model = architecture.add_exits(found).eval()
    for one, expected in zip(model(images), detector(images), strict=True):
        chair = expected["labels"] == 2
        assert torch.allclose(one["scores"][: chair.sum()], expected["scores"][chair], atol=1e-6)


def test_rows_make_a_smaller_head(checkpoint):
    _, path = checkpoint
    found, architecture, _ = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), path, SOURCE, "rows")
    assert found.head.classification_head.module_list[0][1].out_channels == 6 * 2
    assert architecture.head_outputs == 0
    # The same architecture builds a model that the weights fit.
    architecture.build_detector().load_state_dict(found.state_dict())


def test_exact_fold_cannot_add_a_class(checkpoint):
    with pytest.raises(EarlyExitError, match="set MODEL.FOLD to 'rows'"):
        retrofit(Architecture(**{**SMALL, "classes": ("chair", "lamp")}), checkpoint[1], SOURCE)


def test_wrong_class_count_is_one_line(checkpoint):
    with pytest.raises(EarlyExitError, match="does not fit the model: .*differences") as error:
        retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), checkpoint[1])
    assert "\n" not in str(error.value)


def test_a_model_of_this_project_gives_its_full_path(checkpoint, tmp_path, images):
    wanted = Architecture(**{**SMALL, "classes": ("chair",), "exit_layers": (6,)})
    found, architecture, _ = retrofit(Architecture(**{**SMALL, "classes": ("chair",)}), checkpoint[1], SOURCE)
    first = architecture.add_exits(found).eval()
    save_model(tmp_path / "model.pth", first, architecture)
    again, described, change = retrofit(wanted, tmp_path / "model.pth")
    assert (change, described.folded_rows, described.exit_layers) == (None, (2,), (6,))
    second = described.add_exits(again).eval()
    for one, expected in zip(second(images), first(images), strict=True):
        assert all(torch.equal(one[key], expected[key]) for key in expected)
    with pytest.raises(EarlyExitError, match=r"its classes \(chair\) were folded before"):
        retrofit(Architecture(**{**SMALL, "classes": ("person",)}), tmp_path / "model.pth")


def test_the_full_path_under_branches_of_an_older_version(checkpoint, tmp_path):
    wanted = Architecture(**{**SMALL, "classes": ("chair",)})
    found, architecture, _ = retrofit(wanted, checkpoint[1], SOURCE)
    save_model(tmp_path / "model.pth", architecture.add_exits(found), architecture)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    content["architecture"] |= {"attention": False, "copy": [0.0, 0.0]}
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: .* train the exits again from its full path"):
        load_model(tmp_path / "model.pth")
    again, _, _ = retrofit(wanted, tmp_path / "model.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in found.state_dict().items())
    content["architecture"]["widht"] = 1.0
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(EarlyExitError, match=r"model\.pth: the key 'widht' is unknown"):
        retrofit(wanted, tmp_path / "model.pth")


@pytest.mark.parametrize(
    "weights",
    [
        SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
        "SSDLite320_MobileNet_V3_Large_Weights.COCO_V1",
        "COCO_V1",
    ],
)
def test_torchvision_s_names(monkeypatch, weights):
    state = {"a": torch.zeros(1)}
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *args, **kwargs: state)
    assert load_full_path(weights) == (state, None)


@pytest.mark.parametrize("content", [b"hello", b".", b"", b"\x80\x02."])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(EarlyExitError, match="bad.pth: not a file of weights .* fetch or train it again") as error:
        load_full_path(tmp_path / "bad.pth")
    assert "\n" not in str(error.value)


def test_a_tensor_where_a_dict_should_be(tmp_path):
    torch.save({"model": torch.zeros(2)}, tmp_path / "odd.pth")
    with pytest.raises(EarlyExitError, match="expected a state dict of tensors"):
        load_full_path(tmp_path / "odd.pth")


def test_missing_file_names_the_nearest():
    with pytest.raises(EarlyExitError, match="did you mean 'COCO_V1'"):
        load_full_path("COCO_V2")


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(EarlyExitError, match="evil.pth: not a file of weights that can be read safely"):
        load_full_path(path)


def test_offline_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(EarlyExitError, match="set MODEL.WEIGHTS to the file's path"):
        load_full_path("COCO_V1")


@pytest.mark.shared
def test_coco_weights_give_torchvision_s_detections(shared_root):
    path = str(shared_root / "weights" / "ssdlite320_mobilenet_v3_large_coco.pth")
    state = torch.load(path, weights_only=True)
    assert len(state) == 476
    reference = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    reference.load_state_dict(state)
    detector, architecture, _ = retrofit(Architecture(classes=COCO_CLASSES), path)
    model = architecture.add_exits(detector).eval()
    image = [torch.rand(3, 240, 320)]
    found, expected = model(image)[0], reference.eval()(image)[0]
    assert max((found[key] - expected[key]).abs().max().item() for key in expected) == 0

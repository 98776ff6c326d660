import pickle

import pytest
import torch
import torchvision
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import COCO_CLASSES, Architecture, retrofit
from earlyexit_ssd.modeling.retrofit import load_torchvision_weights
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


def test_missing_file_names_the_nearest():
    with pytest.raises(EarlyExitError, match="did you mean 'COCO_V1'"):
        load_torchvision_weights("COCO_V2")


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(EarlyExitError, match="evil.pth: not a file of weights that can be read safely"):
        load_torchvision_weights(path)


def test_offline_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(EarlyExitError, match="set MODEL.WEIGHTS to the file's path"):
        load_torchvision_weights("COCO_V1")


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

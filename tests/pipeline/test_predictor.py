"""A PyTorch model with the interface of an exported detector."""

import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import load_config
from earlyexit_ssd.deploy.predict import annotate
from earlyexit_ssd.modeling.trunk import build_ssdlite
from earlyexit_ssd.pipeline.predictor import TorchPredictor, open_torch_predictor
from tests.modeling.conftest import model_with_varied_scores, small_model

PHOTO = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)


def routed(*thresholds: float) -> TorchPredictor:
    model = small_model().eval()
    model.router = ExitRouter(2, thresholds=thresholds)
    return TorchPredictor(model)


@pytest.mark.parametrize(("thresholds", "index", "name"), [((0.0, 1.0), 0, "exit8"), ((1.0, 0.0), 1, "exit12")])
def test_detections_are_those_of_the_reported_exit(thresholds, index, name):
    predictor = routed(*thresholds)
    found = predictor(PHOTO)
    assert (found.exit_index, found.exit_name) == (index, name)
    assert 0 < found.exit_confidence < 1 and found.ms > 0
    image = torch.from_numpy(PHOTO).permute(2, 0, 1) / 255
    with torch.no_grad():
        model = predictor.model
        expected = model.detections(model.exit_outputs([image]), index)[0]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(found) == len(expected["scores"]) > 0
    assert found.scores.tolist() == pytest.approx(expected["scores"].sort(descending=True).values.tolist(), abs=1e-5)
    assert found.class_names == [predictor.classes[label - 1] for label in found.labels]
    assert set(found.class_names) <= {"chair", "table"}
    assert found.boxes[:, 3].max() > 60  # it is 90 high


def test_digest_is_of_weights_and_routing():
    first = routed(0.0, 1.0)
    assert first.digest == routed(0.0, 1.0).digest != routed(1.0, 0.0).digest
    first.model.head.requires_grad_(False).classification_head.module_list[0][1].bias.add_(1)
    assert first.digest != routed(0.0, 1.0).digest


def test_pictures_of_one_exit_and_of_all():
    predictor = routed(0.0, 0.0)
    found = predictor(PHOTO)
    assert annotate(PHOTO, found, 0.5).size == (60, 90)
    # tiles with a margin of 4 px and a line of 30 px; the photo fills the tile's height
    assert predictor.side_by_side(PHOTO, found, 0.5).size == (3 * 328, 320 + 38)


def test_checkpoint_without_exits_gets_the_class_names_of_a_configuration(tmp_path):
    torch.save(build_ssdlite(num_classes=3).state_dict(), tmp_path / "plain.pth")
    predictor = open_torch_predictor(tmp_path / "plain.pth", load_config(None, ["DATA.CLASSES", "[cat, dog]"]))
    assert predictor.classes == ("cat", "dog") and predictor.exit_names == ("full",)
    found = predictor(PHOTO)
    assert (found.exit_index, found.exit_name, found.exit_confidence) == (0, "full", None)


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_framed_picture_shows_the_routed_detections(monkeypatch, hybrid):
    predictor, examples = TorchPredictor(model_with_varied_scores()), []
    predictor.model.router = ExitRouter(2, thresholds=[0.0, 1.0], hybrid=hybrid)
    monkeypatch.setattr("earlyexit_ssd.pipeline.predictor.detection_grid", lambda given, *_: examples.extend(given))
    found = predictor(PHOTO)
    predictor.side_by_side(PHOTO, found, 0.5)
    shown = examples[0].detections[found.exit_index]
    order = shown["scores"].argsort(descending=True)
    assert found.exit_index == 0 and np.allclose(found.boxes, shown["boxes"][order], atol=0.01)

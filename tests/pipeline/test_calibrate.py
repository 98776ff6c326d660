"""Thresholds from recorded photos, and what is promised of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.calibration import load_certificate
from earlyexit_ssd.calibration.thresholds import Grid
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.modeling.checkpoint import save_model
from earlyexit_ssd.pipeline import calibrate
from earlyexit_ssd.pipeline.replay import CostModel
from earlyexit_ssd.routing import FittedPolicy, register_policy
from earlyexit_ssd.routing.policies import FITTED_POLICIES


class FourPhotos:
    early_exits = 1

    def __len__(self):
        return 4


@pytest.mark.parametrize(("cost", "opened"), [(3.8, True), (4.0, False), (4.2, False)])
def test_an_ap_drop_opens_no_exit_that_makes_photos_dearer(monkeypatch, caplog, cost, opened):
    """One photo of four may leave, with more AP50 than the full path has; its branch costs the others something."""
    same = [SimpleNamespace(AP50=np.full(10, 0.5))]
    monkeypatch.setattr(calibrate, "ap_of_choice", lambda *_, **__: SimpleNamespace(AP50=0.5))
    monkeypatch.setattr(calibrate, "bootstrap_choices", lambda *_, **__: same)
    grid = Grid(np.array([[CLOSED], [0.9], [0.1]]), np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=np.int8))
    monkeypatch.setattr(calibrate, "threshold_grid", lambda confidences: grid)
    calib = SimpleNamespace(
        recording=FourPhotos(),
        matches=None,
        matches_beside=lambda reference: (None, np.ones(4, np.int64)),
        losses=lambda reference: np.array([[0.4, 0.0], [0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]),
        ap50_of=lambda choices, title: np.array([0.5, 0.51, 0.2]),
    )
    costs = SimpleNamespace(of_each=lambda thresholds: np.array([[4.0, 4.0], [cost, cost], [1.0, 1.0]]))
    target = calibrate.Target("ap_drop", 0.01, 0.05)
    found = calibrate.Search(load_config(), target, None, None, calib, None, costs).run()
    assert found.thresholds == ((0.9,) if opened else (CLOSED,))
    assert found.exits.tolist() == ([0, 1, 1, 1] if opened else [1, 1, 1, 1])
    assert ("no exit can be opened at 0.01 AP50 lost" in caplog.text) is not opened


@pytest.mark.parametrize(("ap50", "opened"), [(None, False), (0.0, False), (0.049, False), (0.051, True)])
def test_an_ap_drop_of_what_does_not_detect_opens_nothing(monkeypatch, caplog, ap50, opened):
    """Where the full path finds hardly anything, leaving early loses hardly any AP50."""
    monkeypatch.setattr(calibrate, "ap_of_choice", lambda *_, **__: SimpleNamespace(AP50=ap50))
    same = [SimpleNamespace(AP50=np.full(10, 0.04))]
    monkeypatch.setattr(calibrate, "bootstrap_choices", lambda *_, **__: same)
    calib = SimpleNamespace(
        recording=FourPhotos(),
        matches=None,
        matches_beside=lambda reference: (None, np.ones(4, np.int64)),
        losses=lambda reference: np.zeros((4, 2)),
        ap50_of=lambda choices, title: np.full(len(choices), ap50 or 0.0),
    )
    costs = CostModel("mmacs", {(): 1.0, (True,): 4.0, (False,): 3.0}, 1, 3.0, {})
    confidences = [np.array([0.9, 0.8, 0.7, 0.6])]
    target = calibrate.Target("ap_drop", 0.1)
    chosen = calibrate.Search(load_config(), target, None, confidences, calib, None, costs).run()
    assert chosen.thresholds == ((0.0,) if opened else (CLOSED,))
    assert chosen.exits.tolist() == ([0] * 4 if opened else [1] * 4)
    assert chosen.measured.AP50_lost_bound == 0.0 and chosen.measured.photos_needed == 29
    said = [record.getMessage() for record in caplog.records if "does not detect" in record.getMessage()]
    assert len(said) == (0 if opened else 1)
    assert opened or ("all exits stay closed" in said[0] and len(said[0]) < 300)


@pytest.mark.parametrize(
    ("value", "delta", "needed"), [(0.01, 0.05, 299), (0.05, 0.05, 59), (0.0, 0.05, 598), (1.0, 0.05, 1)]
)
def test_photos_that_an_ap_drop_needs(value, delta, needed):
    """0.99^299 < 0.05 < 0.99^298: a fault in one photo of a hundred then shows with probability 0.95."""
    assert calibrate.draws_needed(calibrate.Target("ap_drop", value, delta)) == needed


def test_labels_are_needed_of_the_splits_that_are_used():
    cfg = load_config(overrides=["CALIBRATION.REFERENCE", "labels", "DATA.TRAIN", "[frames]"])
    sets = {"CALIB": SimpleNamespace(labelled=True), "TRAIN": SimpleNamespace(labelled=False)}
    recorded, target = SimpleNamespace(sets=sets), calibrate.Target("speedup", 1.2)
    calibrate._require_labels(cfg, target, recorded, ("CALIB",))
    with pytest.raises(EarlyExitError, match=r"CALIBRATION.REFERENCE is labels, and DATA.TRAIN \(frames\) has photos"):
        calibrate._require_labels(cfg, target, recorded, ("CALIB", "TRAIN"))


def test_blocks_are_for_what_promises():
    with pytest.raises(EarlyExitError, match="--block is for --risk and --ap-drop"):
        calibrate.Target("speedup", 1.2, block=5)


@pytest.fixture
def own_policy():
    """A fitted policy of somebody's own: an image is as sure as its tap is brighter than the training photos'."""

    @register_policy("brightness_of_a_test", boxes=4)
    class Brightness(FittedPolicy):
        reads_taps = True

        def __init__(self, parameters):
            super().__init__()
            self.register_buffer("means", torch.tensor(parameters["means"]))

        @classmethod
        def fit(cls, photos):
            signals = list(photos.signals(0, cls.boxes))
            assert all(one.logits.shape[1] == 4 for one in signals)
            photos_seen = sum(len(one.tap) for one in signals)
            assert len(photos.losses()) == len(photos.largest_scores()) == photos_seen == 10
            early = range(len(photos.temperatures))
            return {"means": [torch.cat([one.tap for one in photos.signals(index)]).mean().item() for index in early]}

        def forward(self, signals, exit_index):
            if exit_index == len(self.means):
                return torch.ones(len(signals.logits))
            return (signals.tap.mean(1) - self.means[exit_index]).sigmoid()

    yield "brightness_of_a_test"
    del FITTED_POLICIES["brightness_of_a_test"]


def test_a_fitted_policy_of_ones_own_is_calibrated_with(own_policy, tmp_path):
    """One class in one file: fitted on the training photos, in the certificate, and routing when it is loaded."""
    generator = np.random.default_rng(0)
    for folder in ("train", "calib", "test"):
        (tmp_path / folder).mkdir()
        for photo in range(10):
            noise = generator.integers(0, 25 * (photo + 1), (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{photo}.png")
    architecture = Architecture(("chair",), image_size=64, width=0.25, exit_layers=(8, 12))
    save_model(tmp_path / "weights.pth", architecture.build(), architecture, {})
    names = ", ".join(f"[{folder}, '', {tmp_path / folder}]" for folder in ("train", "calib", "test"))
    settings = [
        "DATA.DATASETS", f"[{names}]", "DATA.TRAIN", "[train]", "DATA.CALIB", "[calib]", "DATA.TEST", "[test]",
        "DATA.WORKERS", "0", "DATA.CLASSES", "[chair]", "CALIBRATION.COST", "mmacs", "ROUTING.POLICY", own_policy,
    ]  # fmt: skip
    target = calibrate.Target("speedup", 1.01)
    calibrate.calibrate(load_config(None, settings), tmp_path / "weights.pth", target, tmp_path / "out")
    certificate = load_certificate(tmp_path / "out" / "certificate.json")
    assert certificate.router["policy"] == own_policy and not certificate.closed
    means = certificate.router["parameters"]["means"]
    model = EarlyExitSSDLite.from_pretrained(tmp_path / "out" / "model.pth").eval()
    assert model.router._policy.means.tolist() == pytest.approx(means) and len(means) == 2
    with torch.inference_mode():
        assert model([torch.ones(3, 64, 64)])[0]["exit_index"] in (0, 1, 2)

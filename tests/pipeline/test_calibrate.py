"""The search for thresholds on recorded photos, and a calibration from photos to a routed model."""

import itertools
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd import EarlyExitSSDLite
from earlyexit_ssd.calibration import load_certificate
from earlyexit_ssd.calibration.thresholds import Grid
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import write_image
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.modeling.checkpoint import save_model
from earlyexit_ssd.pipeline import calibrate
from earlyexit_ssd.pipeline.replay import CostModel
from earlyexit_ssd.routing import POLICIES, FittedPolicy, register_policy


def four_photos(monkeypatch, full_ap50, ap50, losses):
    """Recorded photos whose bootstrap draws all lose nothing. ``ap50`` is a function of the choices of exits."""
    monkeypatch.setattr(calibrate, "ap_of_choice", lambda *_, **__: SimpleNamespace(AP50=full_ap50))
    monkeypatch.setattr(calibrate, "bootstrap_choices", lambda *_, **__: [SimpleNamespace(AP50=np.full(10, 0.5))])
    return MagicMock(
        __len__=lambda _: 4,
        early_exits=1,
        matches=None,
        matches_with_extra_exit=lambda reference: (None, np.ones(4, np.int64)),
        losses=lambda reference: np.array(losses),
        ap50_of=lambda choices, title: ap50(choices),
    )


@pytest.mark.parametrize(("cost", "opened"), [(3.8, True), (4.0, False), (4.2, False)])
def test_an_ap_drop_opens_no_exit_that_raises_the_mean_cost(monkeypatch, caplog, cost, opened):
    """One photo of four may leave, with more AP50 than the full path has. The other photos pay for the branch."""
    grid = Grid(np.array([[CLOSED], [0.9], [0.1]]), np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=np.int8))
    monkeypatch.setattr(calibrate, "threshold_grid", lambda confidences: grid)
    losses = [[0.4, 0.0], [0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]
    calib = four_photos(monkeypatch, 0.5, lambda choices: np.array([0.5, 0.51, 0.2]), losses)
    costs = SimpleNamespace(of_each=lambda thresholds: np.array([[4.0, 4.0], [cost, cost], [1.0, 1.0]]))
    target = calibrate.CalibrationTarget("ap_drop", 0.01, 0.05)
    chosen = calibrate.ThresholdSearch(load_config(), target, None, None, calib, None, costs).run()
    assert chosen.thresholds == ((0.9,) if opened else (CLOSED,))
    assert chosen.exits.tolist() == ([0, 1, 1, 1] if opened else [1, 1, 1, 1])
    assert ("all exits stay closed: opening them saves no cost at 0.01 AP50 lost" in caplog.text) is not opened


@pytest.mark.parametrize(("ap50", "opened"), [(None, False), (0.0, False), (0.049, False), (0.051, True)])
def test_an_ap_drop_opens_nothing_if_the_full_path_does_not_detect(monkeypatch, caplog, ap50, opened):
    """If the full path detects hardly anything, leaving early loses hardly any AP50."""
    calib = four_photos(monkeypatch, ap50, lambda choices: np.full(len(choices), ap50 or 0.0), np.zeros((4, 2)))
    costs = CostModel("mmacs", {(): 1.0, (True,): 4.0, (False,): 3.0}, 1, 3.0, {})
    confidences = [np.array([0.9, 0.8, 0.7, 0.6])]
    target = calibrate.CalibrationTarget("ap_drop", 0.1)
    chosen = calibrate.ThresholdSearch(load_config(), target, None, confidences, calib, None, costs).run()
    assert chosen.thresholds == ((0.0,) if opened else (CLOSED,))
    assert chosen.exits.tolist() == ([0] * 4 if opened else [1] * 4)
    assert chosen.measured.AP50_lost_bound == 0.0 and chosen.measured.photos_needed == 29
    warnings = [record.getMessage() for record in caplog.records if "does not detect" in record.getMessage()]
    assert len(warnings) == (0 if opened else 1)
    assert opened or ("all exits stay closed" in warnings[0] and len(warnings[0]) < 300)


@pytest.mark.parametrize(
    ("draws", "needed", "advice"),
    [
        (4, 79, "at least 79 are needed, even if no detection changes"),
        (100, None, "not accurate enough: allow a larger risk, or fit the policy"),
    ],
)
def test_closed_exits_of_a_risk_are_explained(monkeypatch, caplog, draws, needed, advice):
    """The photos that leave lose everything, also on too few photos for any threshold."""
    recorded = MagicMock(
        confidences=lambda router: [np.linspace(0, 1, draws)],
        losses=lambda reference: np.tile([1.0, 0.0], (draws, 1)),
        empty=[True],
        __len__=lambda _: draws,
    )
    costs = CostModel("mmacs", {(): 1.0, (True,): 4.0, (False,): 3.0}, 1, 3.0, {})
    confidences, target = recorded.confidences(None), calibrate.CalibrationTarget("risk", 0.05)
    search = calibrate.ThresholdSearch(load_config(), target, None, confidences, recorded, recorded, costs)
    found = search.run()
    assert found.thresholds == (CLOSED,) and found.measured.photos_needed == needed
    assert advice in caplog.text


@pytest.mark.parametrize(
    ("draws", "block", "warning"),
    [
        (78, None, "a risk of 0.05 needs at least 79 calibration photos, but there are 78"),
        (4, 25, "a risk of 0.05 needs at least 79 calibration blocks of 25 photos, but there are 4"),
        (79, None, None),
    ],
)
def test_too_few_photos_for_a_risk_warn_before_the_photos_are_recorded(caplog, draws, block, warning):
    calibrate._warn_of_few_draws(calibrate.CalibrationTarget("risk", 0.05, block=block), "betting", draws)
    assert (f"all exits will stay closed: {warning}" in caplog.text) if warning else not caplog.records


@pytest.mark.parametrize(("objects", "kept", "warns"), [(20, 0, True), (20, 9, True), (20, 10, False), (0, 0, False)])
def test_a_routing_that_loses_most_objects_warns(caplog, objects, kept, warns):
    measured = SimpleNamespace(agreement={"objects": objects, "kept": kept})
    calibrate._warn_if_objects_are_lost(SimpleNamespace(measured=measured, target=SimpleNamespace(score=0.5)))
    assert (f"this routing keeps only {kept} of {objects} objects (score 0.5)" in caplog.text) is warns


@pytest.mark.parametrize(("baseline", "bound"), [(None, 0.0), ({}, None)])
def test_closed_exits_lose_nothing_only_against_their_own_full_path(monkeypatch, baseline, bound):
    calib = four_photos(monkeypatch, 0.0, lambda choices: np.zeros(len(choices)), np.zeros((4, 2)))
    target = calibrate.CalibrationTarget("ap_drop", 0.1)
    chosen = calibrate.ThresholdSearch(load_config(), target, None, [], calib, None, None, baseline=baseline).run()
    assert chosen.thresholds == (CLOSED,) and chosen.measured.AP50_lost_bound == bound


@pytest.mark.parametrize(
    ("value", "delta", "needed"), [(0.01, 0.05, 299), (0.05, 0.05, 59), (0.0, 0.05, 598), (1.0, 0.05, 1)]
)
def test_number_of_photos_that_an_ap_drop_needs(value, delta, needed):
    """0.99^299 < 0.05 < 0.99^298: 299 photos show a fault of one photo in a hundred with probability 0.95."""
    assert calibrate.draws_needed(calibrate.CalibrationTarget("ap_drop", value, delta)) == needed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "risk", "value": 1.5}, r"risk is 1.5, expected a number in \(0, 1\)"),
        ({"kind": "risk", "value": 0.1, "delta": 0.0}, "delta is 0"),
        ({"kind": "speedup", "value": 1.0}, "speedup is 1, expected a number above 1, such as 1.4"),
        ({"kind": "ap_drop", "value": -0.1}, r"ap_drop is -0.1, expected a number in \[0, 1\]"),
        ({"kind": "gain", "value": 1.0}, "the target's kind is 'gain', expected one of speedup, ap_drop, risk"),
        ({"kind": "speedup", "value": 1.2, "block": 5}, "--block is for --risk and --ap-drop"),
    ],
)
def test_invalid_targets_are_errors(values, message):
    with pytest.raises(EarlyExitError, match=message):
        calibrate.CalibrationTarget(**values)


def test_used_splits_need_labels():
    cfg = load_config(overrides=["CALIBRATION.REFERENCE", "labels", "DATA.TRAIN", "[frames]"])
    sets = {"CALIB": SimpleNamespace(labelled=True), "TRAIN": SimpleNamespace(labelled=False)}
    recorded, target = SimpleNamespace(sets=sets), calibrate.CalibrationTarget("speedup", 1.2)
    calibrate._require_labels(cfg, target, recorded, ("CALIB",))
    with pytest.raises(EarlyExitError, match=r"REFERENCE is labels, but DATA.TRAIN \(frames\) has unlabelled photos"):
        calibrate._require_labels(cfg, target, recorded, ("CALIB", "TRAIN"))


@pytest.fixture
def own_policy():
    """A user's fitted policy: the confidence is higher the more a photo's mean tap exceeds the training photos'."""

    @register_policy("brightness_of_a_test", boxes=4)
    class Brightness(FittedPolicy):
        reads_taps = True

        def __init__(self, parameters):
            super().__init__()
            self.register_buffer("means", torch.tensor(parameters["means"]))

        @classmethod
        def fit(cls, photos):
            signals = list(photos.signals(0, cls.boxes))
            assert all(batch.logits.shape[1] == 4 for batch in signals)
            photos_seen = sum(len(batch.tap) for batch in signals)
            assert len(photos.losses()) == len(photos.largest_scores()) == photos_seen == 10
            taps = [[batch.tap for batch in photos.signals(index)] for index in range(len(photos.temperatures))]
            return {"means": [torch.cat(of_exit).mean().item() for of_exit in taps]}

        def forward(self, signals, exit_index):
            if exit_index == len(self.means):
                return torch.ones(len(signals.logits))
            return (signals.tap.mean(1) - self.means[exit_index]).sigmoid()

    yield "brightness_of_a_test"
    del POLICIES["brightness_of_a_test"]


def test_calibration_with_a_users_policy(own_policy, tmp_path, caplog):
    """The policy is fitted on the training photos, stored in the certificate, and routes in the loaded model. The gate
    of the training had failed."""
    (tmp_path / "gate.json").write_text('{"passed": false}')
    generator = np.random.default_rng(0)
    for folder, photo in itertools.product(("train", "calib", "test"), range(10)):
        noise = generator.integers(0, 25 * (photo + 1), (64, 64, 3), dtype=np.uint8)
        write_image(tmp_path / folder / f"{photo}.png", Image.fromarray(noise))
    architecture = Architecture(("chair",), image_size=64, width=0.25, exit_layers=(8, 12))
    save_model(tmp_path / "weights.pth", architecture.build(), architecture, {})
    names = ", ".join(f"[{folder}, '', {tmp_path / folder}]" for folder in ("train", "calib", "test"))
    settings = [
        "DATA.DATASETS", f"[{names}]", "DATA.TRAIN", "[train]", "DATA.CALIB", "[calib]", "DATA.TEST", "[test]",
        "DATA.WORKERS", "0", "DATA.CLASSES", "[chair]", "CALIBRATION.COST", "mmacs", "ROUTING.POLICY", own_policy,
    ]  # fmt: skip
    target = calibrate.CalibrationTarget("speedup", 1.01)
    calibrate.calibrate(load_config(None, settings), tmp_path / "weights.pth", target, tmp_path / "out")
    assert "weights.pth: its gate failed (gate.json), so its exits may not open" in caplog.text
    certificate = load_certificate(tmp_path / "out" / "certificate.json")
    assert certificate.router["policy"] == own_policy and not certificate.closed
    means = certificate.router["parameters"]["means"]
    model = EarlyExitSSDLite.from_pretrained(tmp_path / "out" / "model.pth").eval()
    assert model.router._policy.means.tolist() == pytest.approx(means) and len(means) == 2
    with torch.inference_mode():
        assert model([torch.ones(3, 64, 64)])[0]["exit_index"] in (0, 1, 2)

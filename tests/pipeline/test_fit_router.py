from types import SimpleNamespace

import pytest
import torch

from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.fit_router import fit_foreseen_emptiness, fit_policy, learns, per_exit
from earlyexit_ssd.routing.policies import FITTED_POLICIES, POLICIES
from earlyexit_ssd.routing.temperature import FittedTemperature, Reliability


class Recording:
    """Fifty photos; the tap's first channel says what the full path will."""

    early_exits, empty = 1, [True]

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.taps = [torch.randn(50, 4, generator=generator)]
        self.image_ids = list(range(50))
        scores = torch.sigmoid(self.taps[0][:, 0])
        full = {index: {"scores": torch.tensor([0.001, float(value)])} for index, value in enumerate(scores)}
        full[0] = {"scores": torch.zeros(0)}  # nothing found
        self.detections = [{}, full]

    def signals(self, exit_index):
        for start in (0, 30):
            rows = self.taps[exit_index][start : start + (30 if start == 0 else 20)]
            yield ExitSignals(torch.zeros(len(rows), 3, 2), rows, empty=True)


class Replay:
    recording = Recording()


def test_foresight_is_of_the_full_path_s_largest_score():
    (fitted,) = fit_foreseen_emptiness(Replay(), [1.0])
    assert fitted["weight"][0] == pytest.approx(1.0, abs=0.3)
    assert max(abs(value) for value in fitted["weight"][1:]) < 0.3


def test_a_fitted_router_lets_nobody_leave_yet():
    router = fit_policy(load_config(), "foreseen_emptiness", [1.0], Replay())
    assert router.thresholds.tolist() == [CLOSED]
    signals = next(Replay.recording.signals(0))
    confidence = router.confidence(signals, 0)
    assert confidence[signals.tap[:, 0].argmin()] > confidence[signals.tap[:, 0].argmax()]


def test_exits_without_a_temperature_have_one():
    found = [FittedTemperature("exit12", 1.5, *[Reliability((), (), (), 0.0)] * 2)]
    assert per_exit(found, ("exit8", "exit12", "full")) == [1.0, 1.5]


def test_classes_weigh_by_the_photos_that_are_counted():
    def replay(*objects):  # of class 1 and of class 2, and a crowd of class 2 that does not count
        rows = [(1, 0)] * objects[0] + [(2, 0)] * objects[1] + [(2, 1)]
        annotations = {index: {"category_id": label, "iscrowd": crowd} for index, (label, crowd) in enumerate(rows)}
        return SimpleNamespace(ground_truth=SimpleNamespace(anns=annotations, getCatIds=lambda: [2, 1]))

    train, calib = replay(1, 3), replay(9, 4)
    router = fit_policy(load_config(), "balanced_ambiguity", [1.0], train, calib)
    assert router.to_dict()["parameters"] == [0.75, 1.5]
    assert fit_policy(load_config(), "balanced_ambiguity", [1.0], train).to_dict()["parameters"] == [1.5, 0.75]


def test_photos_without_a_label_count_nothing():
    unlabelled = SimpleNamespace(ground_truth=SimpleNamespace(anns={}, getCatIds=lambda: [1, 2]))
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' counts objects, and the photos have no labelled"):
        fit_policy(load_config(), "balanced_ambiguity", [1.0], unlabelled)


def test_what_counts_labels_needs_no_training_photos():
    learning = {"learned_gain", "foreseen_emptiness"}
    assert {name for name in (*POLICIES, *FITTED_POLICIES) if learns(name)} == learning

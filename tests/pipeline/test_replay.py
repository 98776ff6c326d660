"""Recorded splits: the inputs of fitted policies, and the costs of a photo."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.evaluation.cost import Timing, mmacs_to_exit
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline import replay
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    FittingPhotos,
    fit_router,
    measure_cost_model,
)
from earlyexit_ssd.routing.policies import ForeseenEmptiness
from tests.modeling.conftest import small_model


@pytest.mark.parametrize(
    ("reference", "measured", "expected"),
    [
        ("full", ("CALIB",), ["optional", "required", "optional"]),  # TRAIN, CALIB, TEST
        ("labels", ("CALIB",), ["required", "required", "optional"]),
        ("full", ("CALIB", "TEST"), ["optional", "required", "required"]),
    ],
)
def test_measured_splits_need_labels(monkeypatch, reference, measured, expected):
    """An unlabelled photo would count as a photo without objects."""
    loaded = SimpleNamespace(records=[], subset=lambda records: records)
    requested = []
    monkeypatch.setattr(replay, "load_dataset", lambda cfg, names, labels: requested.append(labels) or loaded)
    monkeypatch.setattr(replay, "distinct", lambda dataset, near: (dataset, None))
    monkeypatch.setattr(replay, "require_disjoint", lambda **sets: None)
    replay.disjoint_sets(load_config(None, ["CALIBRATION.REFERENCE", reference]), measured)
    assert requested == expected


def test_a_model_without_exits_is_not_calibrated(monkeypatch, tmp_path):
    model = small_model(exit_layers=())
    monkeypatch.setattr(replay.build, "open_model", lambda *_: (model, None, {}))
    with pytest.raises(EarlyExitError, match="model.pth: the model has no early exit to calibrate; train exits"):
        replay.open_model_on_splits(load_config(), "model.pth", tmp_path)


class FiftyPhotos:
    """Fifty photos. The tap's first channel determines the largest score of the full path."""

    early_exits, empty = 1, [True]

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.taps = [torch.randn(50, 4, generator=generator)]
        self.image_ids = list(range(50))
        scores = torch.sigmoid(self.taps[0][:, 0])
        full = {index: {"scores": torch.tensor([0.001, float(value)])} for index, value in enumerate(scores)}
        full[0] = {"scores": torch.zeros(0)}  # no detection
        self.detections = [{}, full]

    def signals(self, exit_index):
        for rows in self.taps[exit_index].split(30):
            yield ExitSignals(torch.zeros(len(rows), 3, 2), rows, empty=True)

    def confidences(self, router):
        return []


FIFTY = FiftyPhotos()


def test_a_fitted_router_knows_the_largest_score_of_the_full_path_and_has_all_exits_closed():
    router, _ = fit_router(load_config(), "foreseen_emptiness", [1.0], FIFTY, cross_fit=False)
    assert router.thresholds.tolist() == [CLOSED]
    (fitted,) = router.to_dict()["parameters"]
    assert fitted["weight"][0] == pytest.approx(1.0, abs=0.3)
    assert max(abs(value) for value in fitted["weight"][1:]) < 0.3


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, [0, 0, 0, 1, 1, 1]),  # neighbours by image id share a fold
        (np.array([0, 0, 0, 0, 1, 1]), [0, 0, 0, 0, 1, 1]),  # a group is never divided
    ],
)
def test_folds_are_neighbours_and_whole_groups(monkeypatch, groups, expected):
    received = {}

    def cross_fit(train, calib, folds):
        received["folds"] = folds
        return [{"weight": [1.0], "bias": 0.0}], [torch.arange(6) / 10]

    monkeypatch.setattr(ForeseenEmptiness, "cross_fit", cross_fit)
    cfg = load_config(overrides=["CALIBRATION.FOLDS", "2"])
    router, (confidences,) = fit_router(cfg, "foreseen_emptiness", [1.0], range(6), FIFTY, groups=groups)
    assert received["folds"].tolist() == expected
    assert confidences.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert router.thresholds.tolist() == [CLOSED] and router.policy == "foreseen_emptiness"


def test_exits_without_a_fit_have_temperature_1():
    fitted = [SimpleNamespace(exit_name="exit12", temperature=1.5)]
    assert replay.temperatures_of(fitted, ("exit8", "exit12", "full")) == [1.0, 1.5]


def test_inputs_of_a_policy_fit():
    """Rows are by increasing image id, here photo 3 before photo 7; crowds do not count."""
    logits = torch.tensor([[[0.0, 2.0], [4.0, 0.0]]])
    full = {3: {"scores": torch.tensor([0.5, 0.25])}, 7: {"scores": torch.zeros(0)}}
    rows = [{"category_id": label, "iscrowd": crowd} for label, crowd in ((1, 0), (3, 0), (3, 0), (3, 1))]
    recorded = SimpleNamespace(
        signals=lambda index: iter([ExitSignals(logits, torch.ones(1, 2))]),
        detections=[{}, full],
        image_ids=[3, 7],
        ground_truth=SimpleNamespace(anns=dict(enumerate(rows)), getCatIds=lambda: [2, 3, 1]),
        losses=lambda reference: {"full": np.array([[0.3, 0.0], [0.7, 0.0]])}[reference],
    )
    photos = FittingPhotos(recorded, [2.0], "full", 5)
    (signals,) = photos.signals(0, boxes=1)
    assert signals.logits.tolist() == [[[0.0, 1.0]]] and signals.tap.tolist() == [[1.0, 1.0]]
    assert photos.losses()[:, 0].tolist() == pytest.approx([0.3, 0.7])
    assert photos.largest_scores().tolist() == [0.5, 0.0]
    assert photos.object_counts() == [1, 0, 2]


def test_balanced_ambiguity_needs_labelled_objects():
    unlabelled = SimpleNamespace(ground_truth=SimpleNamespace(anns={}, getCatIds=lambda: [1, 2]))
    with pytest.raises(EarlyExitError, match="'balanced_ambiguity' counts labelled objects, and the photos have none"):
        fit_router(load_config(), "balanced_ambiguity", [1.0], unlabelled)


MODEL = CostModel(
    "mmacs",
    {(): 10, (True,): 22, (False,): 20, (True, True): 45, (True, False): 42, (False, True): 43, (False, False): 40},
    2,
    40.0,
    {},
)


def test_costs_by_hand():
    """A closed exit costs nothing."""
    assert MODEL.per_exit().tolist() == [10, 22, 45]
    assert MODEL.per_exit([CLOSED, 0.5]).tolist() == [10, 20, 43]
    assert MODEL.of_each(np.array([[0.5, 0.5], [CLOSED, CLOSED]])).tolist() == [[10, 22, 45], [10, 20, 40]]
    assert MODEL.speedup(np.array([0, 1, 2, 0]), [0.5, 0.5]) == pytest.approx(40 / ((10 + 22 + 45 + 10) / 4))


@pytest.mark.parametrize("changes", [{}, {"empty": (8,)}], ids=str)
def test_measured_costs_are_those_of_the_paths(changes):
    model, router = small_model(exit_layers=(8, 12), **changes), ExitRouter(2)
    costs = measure_cost_model(load_config(None, ["CALIBRATION.COST", "mmacs"]), model, router)
    for thresholds in ([0.5, 0.5], [CLOSED, 0.5], [0.5, CLOSED], [CLOSED, CLOSED]):
        expected = np.array(mmacs_to_exit(model, ExitRouter(2, thresholds=thresholds)))
        opened = [*(index for index in range(2) if thresholds[index] < CLOSED), 2]
        assert costs.per_exit(thresholds)[opened] == pytest.approx(expected[opened])
    assert costs.per_exit([CLOSED, CLOSED])[2] == costs.plain  # measured once


@pytest.mark.parametrize(
    ("cost", "installed", "fails", "runtime"),
    [
        ("auto", True, False, "onnxruntime"),
        ("auto", False, False, "eager"),
        ("ms", True, False, "eager"),
        ("auto", True, True, "eager"),
    ],
)
def test_costs_are_measured_in_onnx_runtime_if_possible(monkeypatch, caplog, cost, installed, fails, runtime):
    def timed(networks, examples, runtime, runs, threads):
        if fails and runtime == "onnxruntime":
            raise EarlyExitError("no export to ONNX (such a layer)")
        return [Timing(1.0, [1.0, 1.0])] * len(networks)

    monkeypatch.setattr(replay.cost, "time_in_runtime", timed)
    monkeypatch.setattr(replay.cost, "runtime_installed", lambda: installed)
    model = small_model(exit_layers=(8,))
    costs = measure_cost_model(load_config(None, ["CALIBRATION.COST", cost]), model, ExitRouter(1))
    assert costs.measured["runtime"] == runtime and costs.unit == "ms"
    assert ("costs are measured in eager instead of ONNX Runtime: no export to ONNX" in caplog.text) is fails

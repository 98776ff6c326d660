"""Rows of rivals, with detections made by hand."""

import pytest
import torch
from torch import nn

from earlyexit_ssd.evaluation.collect import Collected
from earlyexit_ssd.evaluation.cost import Timing, mmacs_to_exit
from earlyexit_ssd.evaluation.mode import evaluating
from earlyexit_ssd.evaluation.quality import EvaluationSettings, evaluate_detections
from earlyexit_ssd.evaluation.rivals import ONNX, PLAIN, Rival, evaluate_rivals, exits_alone
from earlyexit_ssd.evaluation.runtime import OnnxNetwork, export_onnx
from earlyexit_ssd.modeling import PathToExit

SETTINGS = EvaluationSettings(resamples=20)
BOX, FAR = (10.0, 10.0, 110.0, 110.0), (300.0, 300.0, 400.0, 400.0)
TIMING = Timing(5.0, 4.0, 7.0, threads=1, runs=3)


class Finds(nn.Module):
    """The box in every photo."""

    def __init__(self, found):
        super().__init__()
        self.register_buffer("boxes", found["boxes"])
        self.found = found

    def forward(self, photos):
        return [self.found for _ in photos]


@pytest.fixture
def rows(ground_truth, found):
    """Two photos, an object each; the routed detector finds both, the first rival one, the second none."""
    truth = ground_truth(2, [(1, 1, BOX), (2, 1, FAR)], ("cat",))
    routed = evaluate_detections(truth, {1: found((1, 0.9, BOX)), 2: found((1, 0.9, FAR))}, SETTINGS)
    loader = [([torch.zeros(3, 8, 8)] * 2, [{"image_id": 1}, {"image_id": 2}])]
    example, network = torch.zeros(1, 3, 64, 32), nn.Identity()
    exported = OnnxNetwork(export_onnx(nn.ReLU(), example))
    rivals = [
        Rival("half", PLAIN, network, example, 12.5, Finds(found((1, 0.8, BOX)))),
        Rival("blind", ONNX, exported, example, None, {1: found(), 2: found()}, "/models/of/mine/blind.onnx"),
    ]
    return evaluate_rivals(rivals, [TIMING, TIMING], loader, truth, routed, SETTINGS)


def test_rows(rows):
    half, blind = rows
    # recall 0.5 at precision 1: 51 of 101 recall points, and the false alarm comes later
    assert half["AP50"] == pytest.approx(51 / 101)
    assert (half["precision"], half["recall"]) == (0.5, 0.5)
    assert (half["name"], half["kind"], half["source"]) == ("half", "plain", None)
    assert (half["input_size"], half["mmacs"]) == ([64, 32], 12.5)
    assert (half["ms"], half["ms_interval"], half["runtime"]) == (5.0, [4.0, 7.0], "eager")
    assert (blind["kind"], blind["source"], blind["AP50"], blind["mmacs"]) == ("onnx", "blind.onnx", 0.0, None)


def test_a_graph_from_a_file_has_its_own_runtime(rows):
    assert rows[1]["runtime"] == "onnxruntime"


def test_differences_are_paired(rows):
    assert rows[1]["routed_minus_rival_AP50_interval"] == pytest.approx([1.0, 1.0])
    low, high = rows[0]["routed_minus_rival_AP50_interval"]
    assert 0 <= low <= 50 / 101 <= high <= 1


def test_every_exit_is_a_detector_already(small_model, found):
    first, second, full = {1: found((1, 0.9, BOX))}, {1: found()}, {1: found()}
    rivals = exits_alone(small_model, Collected([1], [first, second, full], []))
    assert [(rival.name, rival.kind) for rival in rivals] == [
        ("exit8 alone", "single_exit"),
        ("exit12 alone", "single_exit"),
    ]
    assert rivals[0].found is first and rivals[1].found is second
    to_first, to_second, _ = mmacs_to_exit(small_model)
    assert rivals[0].mmacs == pytest.approx(to_first)
    assert rivals[1].mmacs < to_second  # the first branch is not in it
    for index, rival in enumerate(rivals):
        with evaluating(rival.network), torch.no_grad():
            logits, boxes = rival.network(rival.example)
            beside_the_others, _ = PathToExit(small_model, index)(rival.example)
        assert logits.shape[1:] == (boxes.shape[1], 3)
        assert torch.equal(logits, beside_the_others)

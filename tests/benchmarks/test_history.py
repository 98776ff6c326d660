import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from torchvision.models.detection._utils import BoxCoder

from benchmarks.history import run
from benchmarks.history.attempts import Attempt, distribution_loss, gated_confidence, round_robin
from benchmarks.history.figures import detect, foreground_rule
from benchmarks.history.training import Predictions
from earlyexit_ssd.evaluation.matches import exit_matches
from earlyexit_ssd.modeling.ssdlite import earlyexit_ssdlite320_mobilenet_v3_large
from tests.evaluation.conftest import build_found, build_ground_truth


def test_round_robin_assigns_default_boxes_in_the_given_order():
    anchors = tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 20, 10], [50, 50, 60, 60]])
    target = {"boxes": tensor([[50.0, 50, 60, 60], [0, 0, 10, 20]]), "labels": tensor([2, 1])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    orders = [tensor([1, 0, 2]), tensor([], dtype=torch.int64)]
    assignment = round_robin([target, empty], anchors, orders, BoxCoder((10.0, 10.0, 5.0, 5.0)))
    assert assignment.labels.tolist() == [[1, 2, 2, 0], [0, 0, 0, 0]]
    halved, doubled = 5 * math.log(0.5), 5 * math.log(2)
    expected = [
        [0.0, 5, 0, doubled],  # object 1 is as wide as box 0 and twice as high: its centre is half a side below
        [12.5, 12.5, halved, halved],  # object 0 is half as large as box 1, its centre 25 pixels away
        [22.5, 50, halved, 0],
        [0, 0, 0, 0],
    ]
    torch.testing.assert_close(assignment.regression[0], tensor(expected))
    assert not assignment.regression[1].any()


def test_confidence_is_halved_for_each_missing_object():
    probabilities = tensor([[0.9, 0.5, 0.1, 0.1], [0.4, 0.4, 0.4, 0.4]])  # of one class at four default boxes
    logits = torch.stack([torch.zeros(2, 4), probabilities.logit()], -1)
    assert gated_confidence(logits, 0).tolist() == pytest.approx([0.4, 0.4])
    assert gated_confidence(logits, 2).tolist() == pytest.approx([0.4, 0.1])
    assert gated_confidence(logits, 6).tolist() == pytest.approx([0.4 / 16, 0.4 / 64])


def test_minimum_rises_after_the_warm_up():
    assert [Attempt("", minimum=6, warm_up=3).minimum_in(epoch) for epoch in (1, 3, 4, 5, 9)] == [0, 0, 2, 6, 6]
    assert [Attempt("", minimum=6).minimum_in(epoch) for epoch in (1, 2)] == [6, 6]


def test_distribution_loss_is_minimal_at_the_wanted_shares_even_if_no_photo_leaves():
    confidences, thresholds = [torch.full((8,), 0.3)] * 2, tensor([0.5, 0.5], requires_grad=True)
    # sigmoid((0.3 - t) / 0.05) is 0.4 of all at the first exit, and half of the rest at the second
    wanted = tensor([0.3 - 0.05 * math.log(0.4 / 0.6), 0.3])
    least = -sum(share * math.log(share) for share in (0.4, 0.3, 0.3))
    assert distribution_loss(confidences, wanted).item() == pytest.approx(least)
    distribution_loss(confidences, thresholds).backward()
    assert (thresholds.grad > 0).all()  # too few photos leave, so a step lowers the thresholds
    assert (confidences[0] >= wanted[0]).sum() == 0


def test_foreground_rule_compares_the_most_and_least_confident_half():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    truth = build_ground_truth(2, [(1, 1, box), (2, 1, box)], ("chair",))
    right, wrong = build_found((1, 0.9, box)), build_found((1, 0.9, elsewhere))
    # the early exit is right only for the first photo, which has the lower confidence
    matches = exit_matches(truth, [{1: right, 2: wrong}, {1: right, 2: right}])
    rule = foreground_rule(matches, tensor([0.2, 0.7]).numpy(), 0)
    assert (rule.share, rule.largest) == (0.5, pytest.approx(0.7))
    assert rule.lowest == 1.0 and rule.highest < rule.coin < 1.0


def test_detections_are_in_pixels_of_the_photo():
    model = earlyexit_ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2, exit_layers=(8,), image_size=64
    )
    anchors = tensor([[16.0, 32, 32, 48], [0, 0, 8, 8]])  # of the network, 64 x 64
    head = {"cls_logits": tensor([[[0.0, 4], [4, 0]]]), "bbox_regression": torch.zeros(1, 2, 4)}
    targets = [{"image_id": tensor(7), "photo_size": tensor([100, 200])}]  # height, width
    losses = SimpleNamespace(model=model.train(), anchors=anchors)
    for detections in detect(losses, Predictions([head, head], None, targets)):
        torch.testing.assert_close(detections[7]["boxes"][:1], tensor([[50.0, 50, 100, 75]]))


def test_tiny_reproduction_trains_all_attempts_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "EPOCHS", 1)
    monkeypatch.setattr(run, "LIGHT", run.LIGHT[:1])
    monkeypatch.setattr(run, "SEEDS", (0,))
    monkeypatch.setattr(run, "TIMING_RUNS", 1)
    own = ["DATA.ROOT", str(tmp_path), "DATA.SYNTHETIC.SIZES", "[32, 8, 12]", "DATA.SYNTHETIC.IMAGE_SIZE", "64"]
    arguments = ["--out", str(tmp_path / "out"), "--", *own, "MODEL.IMAGE_SIZE", "64"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 1.9 | history | 0/0/100 |" in printed and "| light | 1 |" in printed
    trials = json.loads((tmp_path / "out" / "rendered.json").read_text())["trials"]
    names = [[attempt["attempt"] for attempt in trial["attempts"]] for trial in trials]
    assert names == [["1.1"]] * 2 + [[f"1.{number}" for number in range(2, 10)]] * 2 + [["plain"]]
    assert [trial["matching"] for trial in trials] == ["random", "iou", "random", "iou", "iou"]
    assert all(sum(attempt["shares"]) == pytest.approx(1) for trial in trials for attempt in trial["attempts"])
    assert all(trial["photos"] == 12 and len(trial["exits"]) == 3 for trial in trials)
    monkeypatch.setattr(run, "train_heads", None)  # nothing is trained again
    assert run.main(["--parts", "branches", *arguments]) == 0

"""Evaluation of small detectors: confidences, intervals, rivals, and all keys and figures of metrics.json."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from earlyexit_ssd.calibration.certificate import Certificate, CertifiedCosts, CertifiedTarget, Measured
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.evaluation.cost import OnnxNetwork, PlainPath, Timing, example_input, export_onnx, mmacs_to_exit
from earlyexit_ssd.evaluation.evaluate import (
    Rival,
    WantedClasses,
    describe_boxes,
    evaluate_detections,
    evaluate_rivals,
    exits_alone,
    summarize_confidence,
)
from earlyexit_ssd.evaluation.evaluate import evaluate_exits as evaluate_all
from earlyexit_ssd.evaluation.matches import APs, bootstrap_choices, exit_matches, interval
from earlyexit_ssd.evaluation.metrics import METRICS, DetectorEvaluation, EvaluationSettings, register_metric
from earlyexit_ssd.evaluation.outputs import Collected, collect
from earlyexit_ssd.evaluation.results import BoxSummary, Context, TableRow
from earlyexit_ssd.modeling import PathToExit
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.report.tables import columns
from earlyexit_ssd.routing.router import ExitRouter


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        (torch.tensor([0.25, 0.75]), (0.5, 0.25, 0.25, 0.75)),
        (torch.tensor([0.5, -1.0]), (0.5, 0.0, 0.5, 0.5)),  # -1: the policy gives no confidence
        (torch.full((100_000,), 0.1), (0.1, 0.0, 0.1, 0.1)),
        (torch.zeros(0), None),
        (torch.full((3,), -1.0), None),
    ],
)
def test_summary_of_confidences(confidence, expected):
    summary = summarize_confidence(confidence)
    assert (summary and tuple(vars(summary).values())) == (expected and pytest.approx(expected, abs=1e-7))


# Figures of one set of detections.

SETTINGS, CONTEXT = EvaluationSettings(score=0.3, runs=2, resamples=20, seed=3), Context()


def test_intervals_are_those_of_the_bootstrap(random_case):
    coco, detections = random_case(1)
    figures = evaluate_detections(coco, detections, SETTINGS).figures
    matches = exit_matches(coco, [detections])
    (draws,) = bootstrap_choices(matches, [np.zeros(matches.photos, int)], resamples=20, seed=3, ap50_only=False)
    assert (figures["AP_interval"], figures["AP50_interval"]) == (interval(draws.AP), interval(draws.AP50))
    low, high = figures["AP_interval"]
    assert 0 <= low < high <= 1
    without = evaluate_detections(coco, detections, replace(SETTINGS, resamples=0)).figures
    assert without["AP50_interval"] is None and without["AP_interval"] is None


def drawn(values):
    evaluation = DetectorEvaluation(None, SETTINGS)
    vars(evaluation)["draws"] = APs(np.zeros(3), np.array(values))
    return evaluation


def test_differences_in_ap50_are_paired():
    first, second = drawn([0.5, 0.6, 0.7]), drawn([0.4, 0.5, 0.6])
    assert first.ap50_minus(second) == pytest.approx([0.1, 0.1])
    assert first.ap50_minus(drawn([np.nan] * 3)) is None


@pytest.fixture
def own_metrics(monkeypatch):
    own = copy.copy(METRICS)
    for module in ("evaluation.metrics", "report.tables"):
        monkeypatch.setattr(f"earlyexit_ssd.{module}.METRICS", own)


def test_a_metric_can_be_registered(own_metrics, random_case):
    """The figure is in metrics.json and in the table. Without labels it is undefined, like AP."""

    @register_metric({"boxes/img": ("boxes_per_image", 1)}, needs_labels=True)
    def boxes_per_image(detector):
        return {"boxes_per_image": len(detector.matches.score) / detector.matches.photos}

    coco, detections = random_case(1)
    figures = evaluate_detections(coco, detections, SETTINGS).figures
    assert figures["boxes_per_image"] == sum(len(one["labels"]) for one in detections.values()) / 12
    row = TableRow("exit8", "exit", figures, 1.0, 1.0)
    assert columns()["boxes/img"](row) == f"{figures['boxes_per_image']:.1f}"
    unlabelled = replace(evaluate_detections(coco, detections, SETTINGS), labelled=False).figures
    undefined = {name for name, value in unlabelled.items() if value is None}
    assert undefined == {"boxes_per_image", *(name for name in figures if "AP" in name)}
    assert set(unlabelled["per_class"]["class0"].values()) == {None}


def test_a_metric_must_not_replace_a_figure(own_metrics, random_case):
    register_metric()(lambda detector: {"AP50": 1.0})
    with pytest.raises(EarlyExitError, match="metric '<lambda>' returns the figure 'AP50', as another metric does"):
        evaluate_detections(*random_case(1), SETTINGS).figures  # noqa: B018


# Rows of rivals, with detections made by hand.

BOX, FAR = (10.0, 10.0, 110.0, 110.0), (300.0, 300.0, 400.0, 400.0)
TIMING = Timing(5.0, [4.0, 7.0])


class Finds(nn.Module):
    """A detector that returns the same detections for every photo."""

    def __init__(self, found):
        super().__init__()
        self.register_buffer("boxes", found["boxes"])
        self.found = found

    def forward(self, photos):
        return [self.found for _ in photos]


@pytest.fixture
def rows(ground_truth, found):
    """Two photos with one object each. The routed detector finds both, the first rival one, the second none."""
    truth = ground_truth(2, [(1, 1, BOX), (2, 1, FAR)], ("cat",))
    routed = evaluate_detections(truth, {1: found((1, 0.9, BOX)), 2: found((1, 0.9, FAR))}, SETTINGS)
    loader = [([torch.zeros(3, 8, 8)] * 2, [{"image_id": 1}, {"image_id": 2}])]
    example, network = torch.zeros(1, 3, 64, 32), nn.Identity()
    exported = OnnxNetwork(export_onnx(nn.ReLU(), example))
    rivals = [
        Rival("half", "plain", network, example, 12.5, Finds(found((1, 0.8, BOX)))),
        Rival("blind", "onnx", exported, example, None, {1: found(), 2: found()}, "/models/of/mine/blind.onnx"),
    ]
    rivals = [replace(rival, detector=rival.detections(loader)) for rival in rivals]
    results = evaluate_rivals(rivals, [TIMING, TIMING], truth, routed)
    return [one.to_json() for one in results]


def test_results_of_rivals(rows):
    half, blind = rows
    # recall 0.5 at precision 1: 51 of 101 recall points; the false positive has a lower rank
    assert half["AP50"] == pytest.approx(51 / 101)
    assert (half["precision"], half["recall"]) == (0.5, 0.5)
    assert (half["name"], half["kind"], half["source"]) == ("half", "plain", None)
    assert (half["input_size"], half["mmacs"]) == ([64, 32], 12.5)
    assert (half["ms"], half["ms_interval"], half["runtime"]) == (5.0, [4.0, 7.0], "eager")
    assert (blind["kind"], blind["source"], blind["AP50"], blind["mmacs"]) == ("onnx", "blind.onnx", 0.0, None)
    assert blind["runtime"] == "onnxruntime"  # whatever the runtime of the exits


def test_differences_from_rivals_are_paired(rows):
    assert rows[1]["routed_minus_rival_AP50_interval"] == pytest.approx([1.0, 1.0])
    low, high = rows[0]["routed_minus_rival_AP50_interval"]
    assert 0 <= low <= 50 / 101 <= high <= 1


def test_every_exit_with_a_branch_is_a_rival(small_model, found):
    first, second, full = {1: found((1, 0.9, BOX))}, {1: found()}, {1: found()}
    rivals = exits_alone(small_model, Collected([1], [first, second, full], []))
    assert [rival.name for rival in rivals] == ["exit8 alone", "exit12 alone"]
    assert {rival.kind for rival in rivals} == {"single_exit"}
    assert rivals[0].detector is first and rivals[1].detector is second
    to_first, to_second, _ = mmacs_to_exit(small_model)
    assert rivals[0].mmacs == pytest.approx(to_first)
    assert rivals[1].mmacs < to_second  # without the first branch
    for index, rival in enumerate(rivals):
        with evaluating(rival.network), torch.no_grad():
            logits, boxes = rival.network(rival.example)
            with_other_branches, _ = PathToExit(small_model, index)(rival.example)
        assert logits.shape[1:] == (boxes.shape[1], 3)
        assert torch.equal(logits, with_other_branches)


# Detectors with other classes.


class FixedLabels(nn.Module):
    """A detector that returns the same labels for every photo."""

    def __init__(self, *labels):
        super().__init__()
        self.labels = torch.tensor(labels)

    def forward(self, photos):
        count = len(self.labels)
        found = {"boxes": torch.arange(4.0 * count).view(count, 4), "scores": torch.linspace(1, 0.1, count)}
        return [{**found, "labels": self.labels} for _ in photos]


def test_wanted_classes_are_renumbered_and_others_dropped():
    detector = WantedClasses(FixedLabels(3, 1, 2, 3), ("person", "tv", "Sofa"), ("couch", "person"), "rival")
    first, second = detector([torch.zeros(3, 8, 8)] * 2)
    assert first["labels"].tolist() == second["labels"].tolist() == [1, 2, 1]
    assert first["boxes"][:, 0].tolist() == [0, 4, 12]
    assert first["scores"].tolist() == pytest.approx([1.0, 0.7, 0.1])


def test_a_missing_class_is_logged(caplog):
    WantedClasses(FixedLabels(1), ("person",), ("person", "lamp"), "rival")
    assert "rival has no class lamp" in caplog.text


def test_a_detector_without_a_wanted_class_is_refused():
    with pytest.raises(EarlyExitError, match=r"rival: has none of the classes chiar, lamp \(did you mean 'chair'\?\)"):
        WantedClasses(FixedLabels(1), ("chair",), ("chiar", "lamp"), "rival")


# All figures of a small untrained detector: keys, consistency, JSON.

QUALITY = {
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "per_class", "AP_interval", "AP50_interval"),
    *("precision", "recall", "f1", "false_positives_per_image", "false_positives_per_empty_image"),
    *("localization_error", "true_positives", "false_positives", "false_negatives"),
}


@pytest.fixture(scope="module")
def collected(found):
    """The full path finds both objects, exit 12 one, exit 8 none. Exit 8 is confident in photo 2 only."""
    nothing = {1: found(), 2: found(), 3: found()}
    one = {**nothing, 1: found((1, 0.9, BOX))}
    both = {**one, 2: found((2, 0.8, FAR))}
    confidences = torch.tensor([[0.2, 0.9, 0.1], [0.7, 0.0, 0.3], [1.0, 1.0, 0.0]])
    return Collected([1, 2, 3], [nothing, one, both], list(confidences))


@pytest.fixture(scope="module")
def objects(ground_truth):
    return ground_truth(3, [(1, 1, BOX), (2, 2, FAR)])


@pytest.fixture(scope="module")
def evaluate_exits(small_model, collected, objects):
    """Return metrics.json of the small model. Photo 1 leaves at exit 12 and photo 2 at exit 8."""

    def evaluate(collected=collected, objects=objects, settings=SETTINGS, context=CONTEXT, **more):
        router = ExitRouter(2, policy="max_foreground", thresholds=(0.5, 0.6))
        return evaluate_all(small_model, collected, objects, router, settings, context, **more).results.to_json()

    return evaluate


@pytest.fixture(scope="module")
def metrics(small_model, collected, evaluate_exits):
    """metrics.json with a rival that has the full path's detections."""
    found = collected.detections[2]
    rival = Rival("small", "plain", PlainPath(small_model), example_input(small_model), 7.0, found)
    return evaluate_exits(context=Context(splits=["toy_test"]), rivals=[rival])


def test_documented_keys(metrics):
    assert set(metrics) == {"context", "exits", "without_exits", "routed", "rivals", "verdict"}
    exit_keys = QUALITY | {"name", "layer", "confidence", "mmacs", "ms", "ms_interval"}
    assert set(metrics["exits"][-1]) == exit_keys | {"found"}
    assert set(metrics["exits"][0]) == exit_keys | {"empty", "AP50_below_full_interval"}
    routing_keys = {"policy", "thresholds", "hybrid", "exit_share"}
    assert set(metrics["routed"]) == QUALITY | routing_keys | {"mmacs", "ms", "speedup", "speedup_interval"}
    assert set(metrics["verdict"]) == {"ship", "what", "findings"}
    assert all(set(finding) == {"line", "veto"} for finding in metrics["verdict"]["findings"])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    settings = {"score": 0.3, "iou": 0.5, "runs": 2, "threads": 1, "runtime": "eager"}
    photos = {"images": 3, "empty_images": 1, "splits": ["toy_test"], "classes": ["cat", "dog"], "device": "cpu"}
    assert metrics["context"].items() >= {**settings, **photos, "torch": torch.__version__, "forced": False}.items()


def test_results_of_exits(metrics):
    exits = metrics["exits"]
    assert [(row["name"], row["layer"], row["recall"]) for row in exits] == [
        ("exit8", 8, 0.0), ("exit12", 12, 0.5), ("full", 16, 1.0),
    ]  # fmt: skip
    assert [row["AP50"] for row in exits] == pytest.approx([0.0, 0.5, 1.0])
    assert exits[1]["per_class"]["dog"]["AP50"] == 0.0
    assert exits[0]["confidence"]["mean"] == pytest.approx(0.4)


def test_interval_of_the_loss_against_the_full_path(metrics):
    assert metrics["exits"][0]["AP50_below_full_interval"] == pytest.approx([1.0, 1.0])
    low, high = metrics["exits"][1]["AP50_below_full_interval"]
    assert 0 <= low < high <= 1


def test_results_of_the_routed_detector(metrics):
    routed = metrics["routed"]
    # photo 1 leaves at exit 12, photo 2 at exit 8 (and loses its object), photo 3 takes the full path
    assert routed["exit_share"] == pytest.approx({"exit8": 1 / 3, "exit12": 1 / 3, "full": 1 / 3})
    assert routed["AP50"] == pytest.approx(0.5)
    assert (routed["policy"], routed["thresholds"]) == ("max_foreground", pytest.approx([0.5, 0.6]))
    for unit in ("ms", "mmacs"):
        assert routed[unit] == pytest.approx(sum(row[unit] for row in metrics["exits"]) / 3)
    assert routed["speedup"] == pytest.approx(metrics["without_exits"]["ms"] / routed["ms"])
    low, high = routed["speedup_interval"]
    assert low <= routed["speedup"] <= high


def test_without_photos_figures_are_undefined(evaluate_exits, ground_truth):
    nothing = Collected([], [{}] * 3, [torch.zeros(0)] * 3)
    routed = evaluate_exits(nothing, ground_truth(0, []))["routed"]
    assert {routed[key] for key in ("AP50", "ms", "mmacs", "speedup")} == {None} and "speedup_interval" not in routed


def test_an_untrained_network_gets_one_finding(small_model, evaluate_exits, ground_truth):
    loader = [([torch.rand(3, 64, 80)], [{"image_id": image_id}]) for image_id in (1, 2)]
    found = collect(small_model, loader, ExitRouter(2))
    metrics = evaluate_exits(found, ground_truth(2, [(1, 1, BOX)]), context=Context(forced=True))
    (finding,) = metrics["verdict"]["findings"]
    assert finding["veto"] and "does not detect" in finding["line"] and "--force" in finding["line"]
    assert metrics["context"]["forced"] and not metrics["context"]["taken_over"]


def certificate(kind, unit="mmacs", **target):
    target = CertifiedTarget(**{"kind": kind, "reference": "full", "score": 0.3, "iou": 0.5, **target})
    return Certificate({}, target, Measured(), CertifiedCosts(unit=unit), "", (), "", {}, {})


@pytest.mark.parametrize(
    ("target", "measured", "kept"),
    [
        ({"kind": "ap_drop", "value": 0.4, "delta": 0.05}, 0.5, False),
        ({"kind": "ap_drop", "value": 0.5, "delta": 0.05}, 0.5, True),
        # of three photos, photo 2 loses the one object that the full path finds
        ({"kind": "risk", "epsilon": 1 / 3, "delta": 0.05}, 1 / 3, True),
        ({"kind": "risk", "value": 0.3, "delta": 0.05, "reference": "labels"}, 1 / 3, False),
    ],
)
def test_the_target_of_the_certificate_is_measured(evaluate_exits, target, measured, kept):
    result = evaluate_exits(certificate=certificate(**target))["certificate"]
    assert (result["measured"], result["kept"]) == (pytest.approx(measured), kept)
    assert result["target"]["kind"] == target["kind"]
    assert result["interval"][0] <= measured <= result["interval"][1]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_photos_of_a_block_are_drawn_together(evaluate_exits):
    """The second of three photos loses all objects. The draws of the two blocks lose 0, 1/3 or 1/2."""
    metrics = evaluate_exits(certificate=certificate("risk", epsilon=0.5), blocks=np.array([0, 1, 1]))
    assert metrics["certificate"]["interval"] == pytest.approx([0, 1 / 2])


@pytest.mark.parametrize("target", [{"kind": "risk", "epsilon": 0.5}, {"kind": "ap_drop", "value": 0.5}])
def test_one_block_gives_no_interval(evaluate_exits, target, caplog):
    """Every draw would have all photos, so the intervals would have no width."""
    metrics = evaluate_exits(certificate=certificate(**target, delta=0.05), blocks=np.zeros(3, int))
    assert not any(part.get("AP50_interval") for part in metrics["exits"]) and not metrics["certificate"]["interval"]
    assert not metrics["routed"]["AP50_interval"] and "speedup_interval" not in metrics["routed"]
    assert metrics["certificate"]["measured"] is not None and "all photos are in one block" in caplog.text


@pytest.mark.parametrize("unit", ["ms", "mmacs"])
def test_a_speedup_is_measured_in_the_unit_of_the_certificate(evaluate_exits, unit):
    metrics = evaluate_exits(certificate=certificate("speedup", unit, value=0.01))
    assert metrics["certificate"]["kept"] is True
    expected = metrics["without_exits"][unit] / (sum(row[unit] for row in metrics["exits"]) / 3)
    assert metrics["certificate"]["measured"] == pytest.approx(expected)


def test_summary_of_boxes_of_a_broken_detector(ground_truth, found):
    """A box with half of its area in the photo (640 px) counts as inside. A box without area counts as outside."""
    truth = ground_truth(2, [])
    boxes = [(600.0, 0.0, 680.0, 80.0), (601.0, 0.0, 680.0, 79.0), (640.0, 5.0, 640.0, 9.0), (5e3, 5e3, 6e3, 6e3)]
    summary = describe_boxes(truth, {1: found(*[(1, 0.2, box) for box in boxes]), 2: found()})
    assert (summary.boxes, summary.outside_share) == (4, 0.75)
    assert (summary.score_mean, summary.score_std) == pytest.approx((0.2, 0.0))
    assert describe_boxes(truth, {1: found()}) == BoxSummary(0, None, None, None)


def test_photos_without_detections_are_refused(evaluate_exits, ground_truth):
    with pytest.raises(DataError, match=r"image 4 \(2 in all\)"):
        evaluate_exits(objects=ground_truth(5, []))

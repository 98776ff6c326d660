"""Messages of a search, and the verdict on the chosen candidate."""

import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from earlyexit_ssd.calibration.certificate import Measured
from earlyexit_ssd.config import load_config
from earlyexit_ssd.deploy.benchmark import Ratio
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.cost import Timing
from earlyexit_ssd.modeling import Architecture
from earlyexit_ssd.pipeline import optimize
from earlyexit_ssd.pipeline.calibrate import FoundThresholds
from earlyexit_ssd.pipeline.int8 import FloatLayers, Int8Figures
from earlyexit_ssd.pipeline.optimize import (
    Candidate,
    CandidateSearch,
    Goal,
    MeasuredCandidate,
    _choose,
    _choose_8_bits,
    _evaluate,
    _in_8_bits,
    _measure_candidates,
    _summary,
    _warn_if_busy,
    _write_model,
)
from earlyexit_ssd.pipeline.replay import CostModel
from tests.modeling.conftest import SMALL, small_model

FAST = Candidate("fast", 320, "as it is", lost=0.009, holds=True, ms=5.0, speedup=2.0)


@pytest.mark.parametrize(("load", "warned"), [(2.5, True), (1.5, False)])
def test_a_busy_machine_gives_a_warning(monkeypatch, caplog, load, warned):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    _warn_if_busy()
    assert ("the machine is busy (load 2.5 on 2 cores)" in caplog.text) is warned


def figures_of(ap, ap50, ap50_base, interval, found):
    costs = (5.0, 9.0, 5.0, 9.0, [8.0, 10.0])  # MMACs, milliseconds and their interval
    return optimize.TestFigures(["val"], 9, ap, ap, ap50, ap50_base, interval, *found, *costs, "eager", 1)


def test_a_detector_that_does_not_detect_is_not_shipped():
    figures = figures_of(0.0, 0.01, 0.01, [0.0, 0.0], (0, 0))
    assert not figures.base_detects
    assert "your detector itself does not detect (AP50 0.010)" in _summary(FAST, figures, False, Goal())
    assert dataclasses.replace(figures, AP50_base=0.2).base_detects


def test_the_verdict_compares_the_loss_on_the_test_photos():
    """Not its interval, whose upper end is above the budget here, and not the bound on the calib photos."""
    figures = figures_of(0.3, 0.495, 0.5, [0.001, 0.02], (7, 8))
    assert figures.worth_shipping(Goal()) and not figures.worth_shipping(Goal(ap_drop=0.004))
    slow = dataclasses.replace(figures, ms=8.5)
    assert not slow.worth_shipping(Goal())
    assert _summary(FAST, slow, False, Goal()).startswith("do not ship it: on the test photos it is no faster.")
    assert _summary(FAST, figures, False, Goal()).startswith("do not ship it: on the test photos it exceeds")
    summary = _summary(FAST, figures, True, Goal(delta=0.1))
    assert summary.startswith("ship it. fast: 1.80 times as fast as your detector (5.0 ms against 9.0, eager, thr")
    assert "compares the budget of 0.01 AP50 with the loss measured on the test photos" in summary
    assert "the loss that 90 % of the bootstrap draws of the calib photos do not exceed." in summary
    assert "interval includes losses above the budget" in summary and " AP lost" in summary
    narrow = dataclasses.replace(figures, AP50_lost_interval=[0.001, 0.009])
    assert "interval includes losses above the budget" not in _summary(FAST, narrow, True, Goal())
    same = dataclasses.replace(figures, AP50_lost_interval=[-1e-5, -1e-9])
    assert " AP50 lost [0.000, 0.000]," in _summary(FAST, same, True, Goal())


def test_a_cut_head_has_background_and_the_wanted_classes_only():
    folded = {"classes": ("chair",), "head_outputs": 5, "folded_rows": (2,)}
    architecture = Architecture(**{**SMALL, "channels": 0, **folded})
    model = architecture.build()
    search = Mock(model=model, architecture=architecture)
    described, state = CandidateSearch._cut.func(search)
    assert (described.head_outputs, described.folded_rows) == (0, ())
    cut = dataclasses.replace(described, exits=()).build()
    cut.load_state_dict({key: state[key] for key in cut.state_dict()})
    blocks = zip(cut.head.classification_head.module_list, model.head.classification_head.module_list, strict=True)
    for new, old in blocks:
        rows = old[1].weight.view(-1, 5, *old[1].weight.shape[1:])[:, [0, 2]]  # [default box, class, ...]
        assert torch.equal(new[1].weight, rows.flatten(0, 1))


@pytest.mark.parametrize(("any_size", "sides"), [(True, [300, 128]), (False, [300])])
def test_a_detector_of_one_size_is_not_fine_tuned_at_the_sizes_of_glances(tmp_path, monkeypatch, any_size, sides):
    monkeypatch.setattr(optimize, "fine_tune", fine_tune := Mock())
    search = Mock(has_empty_photos=True, sets={"CALIB": None}, out=tmp_path)
    search.architecture.image_size, search._build.return_value.model.any_size = 300, any_size
    search.plan.sizes.return_value, search.plan.glances = [300], [(128, 12)]
    optimize.CandidateSearch._fine_tuned.func(search)
    assert fine_tune.call_args.args[4] == sides


@pytest.mark.parametrize(
    ("runtime", "file_format", "name"),
    [("onnxruntime", "onnx", "detector.onnx"), ("openvino", "openvino", "detector.xml")],
)
def test_8_bits_are_a_candidate_unless_they_are_refused(tmp_path, monkeypatch, caplog, runtime, file_format, name):
    goal = Goal(ap_drop=0.02, delta=0.1, coco_ap_drop=0.03, block=5)
    search = SimpleNamespace(goal=goal, out=tmp_path, sets={"CALIB": "calib"}, reference="base")
    search.cfg = SimpleNamespace(EVAL=SimpleNamespace(RUNTIME=runtime))

    def quantised(*arguments):
        assert arguments == ("model", tmp_path / name, file_format, "calib", 0.02, "base", 0.1, 0.03, 5)
        aps, speed = ((0.5, 0.4), (0.7, 0.69)), Ratio(1.25, 1.2, 1.3)
        return Int8Figures(tmp_path, 1, FloatLayers(3, False), 9, True, *aps, 0.015, 0.02, 0.1, 20, 19, speed, runtime)

    monkeypatch.setattr(optimize, "open_any", lambda path: "model")
    monkeypatch.setattr(optimize, "export_int8", quantised)
    found = _in_8_bits(search, FAST)
    assert (found.name, found.AP50, found.lost_bound, found.objects_kept) == ("fast, 8 bits", 0.69, 0.015, 19)
    assert found.holds and found.AP_lost_bound == 0.02
    assert found.lost == pytest.approx(0.01) and found.ms == pytest.approx(4.0) and found.speedup == pytest.approx(2.5)

    monkeypatch.setattr(optimize, "export_int8", Mock(side_effect=EarlyExitError("8 bits are refused")))
    caplog.set_level("INFO")
    assert _in_8_bits(search, FAST) is None and "no candidate in 8 bits: 8 bits are refused" in caplog.text


@pytest.mark.parametrize(
    ("speeds", "files_of", "in_8_bits"),
    [
        ({"routed": 1.2, "net": 9.0}, "routed", "routed, 8 bits"),  # the net is not tried
        ({"net": 2.5}, "net", "net, 8 bits"),  # 8 bits of the routed detector are refused
        ({"net": 1.5}, "routed", None),  # slower than the routed detector in 32 bits
        ({}, "routed", None),
    ],
)
def test_8_bits_are_tried_without_exits_if_they_are_refused_with_exits(monkeypatch, speeds, files_of, in_8_bits):
    net = Candidate("net", 320, "compact", ms=8.0)
    routed = dataclasses.replace(net, name="routed", exits=("exit12",), thresholds=(0.5,), ms=5.0)
    written = []

    def write(search, measured):
        written.append(measured.candidate.name)
        return measured.candidate

    monkeypatch.setattr(optimize, "_write_model", write)
    search = SimpleNamespace(measure=lambda candidate: MeasuredCandidate(dataclasses.replace(candidate, ms=8.0), None))

    def quantise(search, candidate):
        speed = speeds.get(candidate.name)
        ms = speed and candidate.ms / speed
        return speed and dataclasses.replace(candidate, name=f"{candidate.name}, 8 bits", ms=ms)

    monkeypatch.setattr(optimize, "_in_8_bits", quantise)
    before = dataclasses.replace(net, ms=2.0)  # as measured earlier
    best = MeasuredCandidate(routed, None)
    chosen, int8 = _choose_8_bits(search, [FAST, before, routed], best)
    assert chosen.name == files_of and (int8 and int8.name) == in_8_bits
    assert (written or ["routed"])[-1] == files_of
    if not speeds:  # the net was measured only with exits
        assert _choose_8_bits(search, [FAST, routed], best) == (routed, None)


def test_a_stopped_search_counts_the_candidates_that_are_left_and_resumes(tmp_path):
    plan = [Candidate("", size, "compact", ms=8.0) for size in (320, 288, 256, 224)]
    search = SimpleNamespace(out=tmp_path, key="key", candidates=plan, goal=Goal(minutes=1.0))
    search.measure = lambda candidate: MeasuredCandidate(candidate, None)
    search.plan = SimpleNamespace(skips=lambda candidate, _: candidate.image_size == 256)
    assert _measure_candidates(search, 0.0) == (plan[:1], 2)
    assert _measure_candidates(search, np.inf) == ([plan[0], plan[1], plan[3]], 0)
    assert search.base_ms == 8.0
    assert _measure_candidates(search, 0.0)[1] == 0


@pytest.mark.parametrize(("threshold", "ms", "speedup"), [(2.0, 8.0, 1.0), (0.5, 9.0, 0.9)])
def test_a_candidate_with_closed_exits_has_the_times_of_its_net(tmp_path, threshold, ms, speedup):
    net = Candidate("", 320, "compact", ms=8.0, speedup=1.0)
    routed = dataclasses.replace(net, exits=("exit12",), thresholds=(threshold,), ms=9.0, speedup=0.9)
    search = SimpleNamespace(out=tmp_path, key="key", candidates=[net, routed])
    search.measure = lambda candidate: MeasuredCandidate(candidate, None)
    search.plan = SimpleNamespace(skips=lambda *_: False)
    (_, measured), _ = _measure_candidates(search, np.inf)
    assert (measured.ms, measured.speedup) == (ms, speedup)


def test_the_base_detector_is_timed_once(monkeypatch):
    """Two times of one network would give it a speed other than 1."""
    monkeypatch.setattr(optimize.replay, "measure_cost_model", timed := Mock())
    base, net = Candidate("", 320, "as it is"), Candidate("", 288, "as it is")
    search = Mock(candidates=[base, net], model="base")
    search._replay.return_value.only.return_value = []
    for candidate in (base, net):
        CandidateSearch.measure(search, candidate)
    assert [call.args[3] for call in timed.call_args_list] == [None, "base"]


def test_a_choice_whose_exits_close_when_it_is_measured_again_is_not_shipped():
    base = Candidate("base", 320, "compact", lost=0.0, ms=9.0, speedup=1.0, holds=True)
    net = dataclasses.replace(base, image_size=288, speedup=1.5)
    routed = dataclasses.replace(net, exits=("exit12",), thresholds=(0.5,), speedup=2.0)
    closed = dataclasses.replace(routed, thresholds=(2.0,), speedup=1.6)
    again = {net: net, routed: closed}
    search = SimpleNamespace(goal=Goal(), measure=lambda candidate: MeasuredCandidate(again[candidate], None))
    measured, best = _choose(search, [base, net, routed])
    assert best.candidate == net and measured == [base, net, closed]
    again = {routed: closed}
    assert _choose(search, [base, routed]) == ([base, closed], None)


def test_wanted_milliseconds_are_compared_with_the_first_of_the_base_detector(monkeypatch):
    """The machine is faster than when the base detector was measured. Candidates have milliseconds of that time."""
    monkeypatch.setattr(optimize.replay, "fit_temperatures", lambda *_: [])
    monkeypatch.setattr(optimize.replay, "fit_router", lambda *_, groups: (groups, None))
    monkeypatch.setattr(optimize.replay, "measure_cost_model", lambda *_: CostModel("ms", {(): 7.6}, 0, 7.6, {}))
    monkeypatch.setattr(optimize, "ThresholdSearch", search := Mock(side_effect=KeyError))
    recorded = SimpleNamespace(model=Mock(exit_names=("exit8", "full")))
    given = SimpleNamespace(cfg=None, model=None, goal=Goal(ms=4.0), base_ms=8.0, reference=None, blocks="blocks")
    with pytest.raises(KeyError):
        CandidateSearch._measure_routed(given, FAST, recorded, None, "ambiguous_mass")
    assert search.call_args.args[1].value == 2.0
    assert search.call_args.args[2] == search.call_args.args[7] == "blocks"


def test_milliseconds_of_candidates_are_those_of_the_base_detector_by_their_speedup():
    """The machine was half as fast when the second candidate was measured."""
    calib = Mock(
        matches_with_extra_exit=lambda _: (None, np.zeros(2, int)), agreement=lambda *_: Mock(objects=1, kept=1)
    )
    search = SimpleNamespace(base_ms=None, reference=None, cfg=load_config(), goal=Goal())
    search.architecture = Architecture(**SMALL)
    found = FoundThresholds((), np.zeros(2, int), Measured(AP50_lost_bound=0.0))
    with patch.object(optimize, "ap_of_choice", lambda *_, **__: Mock(AP50=0.5)):
        first, second = (
            CandidateSearch._with_figures(
                search, Candidate("", size, "compact"), calib, CostModel("ms", {(): ms}, 0, plain, {}), found
            )
            for size, ms, plain in ((128, 8.0, 8.0), (96, 8.0, 16.0))
        )
    assert (first.ms, first.speedup, second.ms, second.speedup) == (8.0, 1.0, 4.0, 2.0)


# What the search checks, builds and writes.


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ROUTING.CERTIFICATE", "c.json", "ROUTING.CERTIFICATE is c.json, but this command calibrates anew"),
        ("ROUTING.POLICY", "entrop", "ROUTING.POLICY: .*did you mean 'entropy'"),
        ("ROUTING.HYBRID", "true", "calibration does not support hybrid routing"),
        ("EVAL.RIVALS.FULL_PATHS", "[none.pth]", "EVAL.RIVALS.FULL_PATHS has none.pth: no such file"),
        ("MODEL.WEIGHTS", "", "a search needs a trained detector: set MODEL.WEIGHTS, or give --weights"),
    ],
)
def test_unusable_settings_are_found_before_the_search(tmp_path, key, value, message):
    cfg, weights = load_config(None, [key, value, "EVAL.RIVALS.ENABLED", "false"]), "x.pth" if value else None
    with pytest.raises(ConfigError, match=message):
        CandidateSearch(cfg, weights, Goal(), tmp_path)


def test_a_joint_training_with_other_settings_is_found_before_the_search(monkeypatch, tmp_path):
    """Not when its net is measured, after all others. The search needs labels of the calib and test photos."""
    monkeypatch.setattr(
        optimize.replay, "disjoint_sets", asked := Mock(side_effect=EarlyExitError("the search starts"))
    )
    monkeypatch.setattr(optimize.build, "open_model", lambda *_: (small_model(), Architecture(**SMALL), {}))
    (tmp_path / "joint" / "joint").mkdir(parents=True)
    (tmp_path / "joint" / "joint" / "gate.json").write_text('{"passed": true}')
    keys = ["PHASES", "[baseline, exits, joint]", "DATA.CLASSES", "[chair, table]"]
    (tmp_path / "joint" / "config.yaml").write_text(load_config(None, keys).dump())
    changed = [*keys, "JOINT.LR", "0.5"]
    for settings, goal, message in (
        (keys, Goal(train=True), "the search starts"),
        (changed, Goal(train=True), "the run to resume has JOINT.LR"),
        (changed, Goal(), "the search starts"),
    ):
        with pytest.raises(EarlyExitError, match=message):
            CandidateSearch(load_config(None, settings), "x.pth", goal, tmp_path)
    assert asked.call_args.args[1] == ("CALIB", "TEST")


def test_a_jointly_trained_net_has_the_default_boxes_of_its_training(tmp_path):
    """The configuration may have another input size than the given weights."""
    own, trained = (Architecture(("chair",), image_size=size, width=0.25, exits=()) for size in (96, 128))
    search = Mock(
        architecture=own,
        model=own.build(),
        _jointly_trained=(trained, trained.build().state_dict()),
        device="cpu",
        out=tmp_path,
        plan=SimpleNamespace(exits_of=lambda net: ()),
    )
    built = CandidateSearch._build(search, Candidate("", 96, "as it is", joint=True)).architecture
    assert (built.image_size, built.trained_size) == (96, 128)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("trained", [{"trained_temperatures": [1.5, 2.0]}, {}], ids=["calibrated", "trained"])
def test_the_written_model_has_the_temperatures_of_the_training(monkeypatch, tmp_path, routed, trained):
    """A later calibration for a risk needs them."""
    saved = []
    monkeypatch.setattr(optimize, "save_model", lambda path, model, architecture, info: saved.append(info))
    monkeypatch.setattr(optimize, "certificate_of", lambda *_: Mock(router={"temperatures": [3.0, 3.0]}))
    for name in ("open_any", "export_detector"):
        monkeypatch.setattr(optimize, name, lambda *_: None)
    model = SimpleNamespace(exit_names=("glance128", "exit12", "full"))
    recorded = SimpleNamespace(model=model, architecture=None, sets={"CALIB": SimpleNamespace(records=[])})
    again = dataclasses.replace(FAST, ms=5.1)
    measured = MeasuredCandidate(again, recorded, *(["search", "chosen"] if routed else []))
    info = {"phase": "exits", "router": {"temperatures": [4.0, 4.0] if trained else [1.5, 2.0]}, **trained}
    given = SimpleNamespace(exit_names=("exit8", "exit12", "full"))
    search = SimpleNamespace(out=tmp_path, info=info, model=given, cfg=load_config())
    assert _write_model(search, measured) == again
    assert saved[0].get("trained_temperatures") == ([1.0, 2.0] if routed else None)
    assert ("router" in saved[0]) is ("certificate" in saved[0]) is routed and saved[0]["phase"] == "exits"
    _write_model(search, measured._replace(candidate=dataclasses.replace(again, joint=True)))
    assert saved[1]["phase"] == "joint"


def test_the_base_detector_is_the_first_rival_from_a_file(monkeypatch, tmp_path):
    """`TestFigures.of` finds it by its name, and the file of another search has the same name."""
    monkeypatch.setattr(optimize, "save_model", lambda *_: None)
    monkeypatch.setattr(optimize, "evaluate_model", lambda cfg, *_, block, **__: (*cfg.EVAL.RIVALS.FULL_PATHS, block))
    architecture = Architecture(**SMALL)
    cfg = load_config(None, ["EVAL.RIVALS.FULL_PATHS", "[other/base.pth]"])
    search = SimpleNamespace(cfg=cfg, out=tmp_path, architecture=architecture, full_path=architecture.build_detector)
    search.goal = Goal(block=5)
    assert _evaluate(search) == (str(tmp_path / "base.pth"), "other/base.pth", 5)


@pytest.mark.parametrize(("runtime", "name"), [("onnxruntime", "nano"), ("openvino", "nano (in ONNX Runtime)")])
def test_a_rival_that_was_timed_in_another_runtime_says_so(monkeypatch, runtime, name):
    model, shape = small_model(), torch.zeros(1, 3, 416, 416)
    rival = SimpleNamespace(name="nano", network=None, example=shape, mmacs=9.0, detector=None)
    monkeypatch.setattr(optimize, "onnx_rivals", lambda *_: [rival])
    monkeypatch.setattr(optimize.build, "evaluation_loader", lambda *_: None)
    monkeypatch.setattr(optimize, "collect_detections", lambda *_: None)
    monkeypatch.setattr(optimize, "time_in_runtime", lambda *_: [Timing(2.0, [2, 2]), Timing(6.0, [6, 6])])
    monkeypatch.setattr(optimize, "ap_of_choice", lambda matches, choice, ap50_only: SimpleNamespace(AP50=choice / 10))
    search = SimpleNamespace(
        cfg=load_config(None, ["EVAL.RUNTIME", runtime]),
        architecture=Architecture(**SMALL),
        sets={"CALIB": None},
        model=model,
        base=SimpleNamespace(matches_with_extra_exit=lambda detections: (None, 4)),
        base_ms=None,
    )
    (found,) = CandidateSearch.rivals(search)
    assert (found.name, found.ms, found.speedup, found.image_size) == (name, 2.0, 3.0, 416)
    assert found.lost == pytest.approx(-0.1) and found.rival

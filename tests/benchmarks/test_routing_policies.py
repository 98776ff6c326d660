"""Policies compared with coin, oracle and published rules: each figure by hand, and the command as a whole."""

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import routing_policies
from benchmarks.routing_policies import (
    Compared,
    Line,
    Planned,
    Study,
    best_policy,
    coin,
    errors_against_labels,
    gap_cells,
    gap_closed,
    line_of,
    mixed_throughput,
    msdnet_shares,
    oracle_choice,
    oracle_over_exits,
    overthinking,
    pooled_gap,
    published_rules_table,
    reference_lines_table,
    resampled_leads,
    routing_table,
    thresholds_for_shares,
    time_scoring,
    with_interval,
)
from earlyexit_ssd.calibration import thresholds as soft_exit
from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.cost import Timing
from earlyexit_ssd.evaluation.matches import bootstrap_choices, exit_matches
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.replay import CostModel
from earlyexit_ssd.routing import ExitRouter
from tools import train_net

RESULTS = Path(routing_policies.__file__).parent / "results"
COSTS = np.array([1.0, 2.0, 4.0])


def test_oracle_spends_the_budget_where_errors_fall_most():
    errors = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 1.0, 1.0]])
    assert oracle_choice(errors, COSTS, 2.0).tolist() == [0, 1, 2, 0]  # mean cost (1 + 2 + 4 + 1) / 4
    assert oracle_choice(errors, COSTS, 1.3).tolist() == [0, 1, 0, 0]
    assert oracle_choice(errors, COSTS, 1.0).tolist() == [0, 0, 0, 0]


def test_oracle_with_one_exit():
    assert oracle_choice(np.ones((3, 1)), COSTS[:1], 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_oracle_error_is_within_one_photo_of_the_best_choice(seed):
    generator = np.random.default_rng(seed)
    errors = generator.random((6, 3)).round(1)
    choices = np.array(list(itertools.product(range(3), repeat=6)))
    mean_errors = errors[np.arange(6), choices].mean(1)
    for budget in (1.2, 1.7, 2.5, 3.5):
        choice = oracle_choice(errors, COSTS, budget)
        assert COSTS[choice].mean() <= budget + 1e-12
        best = mean_errors[COSTS[choices].mean(1) <= budget].min()
        assert errors[np.arange(6), choice].mean() <= best + 1 / 6


def test_router_and_coin_have_equal_cost(random_case):
    truth, shallow = random_case(1, images=60)
    _, other = random_case(2, images=60)
    matches = exit_matches(truth, [other, shallow])  # detections of other photos, so the first exit has no hits
    choice = np.array([0, 1] * 30)
    router, chance = line_of(matches, choice, COSTS[:2]), coin(matches, choice, COSTS[:2])
    assert router.cost == chance.cost == 1.5
    assert 0 < chance.AP50 < line_of(matches, np.ones(60, int), COSTS[:2]).AP50
    assert coin(matches, choice, COSTS[:2], seed=0) == chance != coin(matches, choice, COSTS[:2], seed=1)
    constant = np.ones(60, int)
    assert pytest.approx(line_of(matches, constant, COSTS[:2]).AP50) == coin(matches, constant, COSTS[:2]).AP50


def test_gap_closed_by_hand():
    lines = [Line(1.0, None, value) for value in (0.69, 0.65, 0.72)]
    assert gap_closed(*lines) == pytest.approx(4 / 7)
    assert gap_closed(lines[0], lines[1], lines[1]) is None
    assert gap_closed(Line(1.0, None, None), lines[1], lines[2]) is None


def test_oracle_closes_exits_that_cost_more_than_they_gain():
    errors = np.array([[0.9, 0.5, 0.0], [0.9, 0.0, 0.0]])

    def costs_with(thresholds):
        return np.array([1.0, 2.0, 4.0]) + (thresholds[0] < CLOSED) * np.array([0.0, 1.0, 1.0])

    def accuracy(choice):
        return 1 - errors[[0, 1], choice].mean()

    choice, costs = oracle_over_exits(errors, costs_with, 3.0, accuracy)
    assert choice.tolist() == [2, 1] and costs.tolist() == [1.0, 2.0, 4.0]
    choice, costs = oracle_over_exits(errors, costs_with, 1.0, accuracy)
    assert choice.tolist() == [0, 0] and costs.tolist() == [1.0, 3.0, 5.0]


def test_oracle_may_spend_less_than_the_budget():
    """The smallest error would send photo 0 to the full path. The score counts photos at the first exit."""
    errors = np.array([[0.1, 0.0], [0.0, 0.5]])
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: float((exits == 0).sum()))
    assert choice.tolist() == [0, 0]
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: None)  # undefined score
    assert choice.tolist() == [0, 0]  # the cheapest


def test_pooled_gap_in_resamples(random_case):
    """The oracle closes the whole gap in every resample. A coin closes nothing on average, but varies."""
    truth, shallow = random_case(1, images=60)
    matches = exit_matches(truth, [random_case(2, images=60)[1], shallow])
    oracle = np.zeros(60, int)
    oracle[np.argsort(-matches.objects)[:30]] = 1
    own = pooled_gap([resampled_leads(matches, oracle, [oracle])[0]])
    assert len(own) == 200 and own[~np.isnan(own)] == pytest.approx(1.0)
    assert np.isnan(own).mean() < 0.2  # undefined if a coin is as good
    toss = np.random.default_rng(5).permutation(oracle)
    low, high = np.nanquantile(pooled_gap([resampled_leads(matches, toss, [oracle])[0]]), [0.025, 0.975])
    assert low < 0 < high < 1
    everywhere = np.ones(60, int)
    assert np.isnan(
        pooled_gap([resampled_leads(matches, everywhere, [everywhere])[0]])
    ).all()  # a coin makes the same choice


def test_pooled_gap_by_hand():
    """0.01 of 0.04 and 0.02 of 0.02 give 0.03 of 0.06, not the mean of 0.25 and 1."""
    assert pooled_gap([(0.01, 0.04), (0.02, 0.02)]) == pytest.approx(0.5)
    draws = pooled_gap([np.array([[0.01, 0.02], [0.04, 0.0]]), np.array([[0.02, 0.0], [0.02, -0.01]])])
    assert draws[0] == pytest.approx(0.5) and np.isnan(draws[1])


def test_overthinking_by_hand():
    errors = np.array([[0.0, 0.2, 0.5], [0.0, 0.0, 0.0], [0.1, 0.0, 0.1], [0.3, 0.3, 0.0]])
    assert overthinking(errors) == [0.25, 0.25]


def test_errors_against_labels_by_hand(ground_truth, found):
    """At the early exit, photo 1 has a miss and a false positive, and photo 2 a miss. Photo 3 has no object."""
    here, there, far = (10.0, 10.0, 110.0, 110.0), (200.0, 200.0, 300.0, 320.0), (400.0, 400.0, 500.0, 500.0)
    truth = ground_truth(3, [(1, 1, here), (1, 2, there), (2, 1, far)])
    early = {1: found((1, 0.9, here), (1, 0.8, far), (2, 0.3, there)), 2: found((1, 0.2, far)), 3: found()}
    full = {1: found((1, 0.9, here), (2, 0.9, there)), 2: found((1, 0.7, far)), 3: found((1, 0.6, here))}
    errors = errors_against_labels(exit_matches(truth, [early, full]), 0.5)
    assert errors.tolist() == [
        [2 / 3, 0.0],
        [1.0, 0.0],
        [0.0, 1.0],
    ]


def test_errors_against_labels_are_in_0_to_1(random_case):
    truth, detections = random_case(5, images=40)
    errors = errors_against_labels(exit_matches(truth, [random_case(6, images=40)[1], detections]), 0.3)
    assert errors.shape == (40, 2) and (errors >= 0).all() and (errors <= 1).all()
    assert np.ptp(errors[:, 0]) > 0


def test_budgets_lie_between_the_first_exit_with_a_branch_and_the_full_path():
    costs = CostModel(
        "mmacs",
        {
            (): 4.0,
            (True,): 6.0,
            (False,): 5.0,
            (True, True): 14.0,
            (False, True): 13.0,
            (True, False): 12.0,
            (False, False): 10.0,
        },
        2,
        9.0,
        {},
    )
    names = ("exit8", "exit12", "full")
    assert Study(None, None, costs, names, (False, False), 0).budgets() == pytest.approx([5, 6, 7, 8, 9])
    assert Study(None, None, costs, names, (True, False), 0).budgets()[0] == pytest.approx(6 + 4 / 6)
    assert Study(None, None, costs, names, (True, True), 0).budgets()[0] == pytest.approx(5)


def test_msdnet_shares_by_hand():
    assert msdnet_shares(3, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert msdnet_shares(3, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_thresholds_let_the_most_confident_photos_leave():
    confidences = [np.array([0.9, 0.1, 0.5, 0.3]), np.array([1.0, 0.2, 0.8, 0.6])]
    thresholds = thresholds_for_shares(confidences, [0.25, 0.5, 0.25])
    assert thresholds.tolist() == pytest.approx([0.7, 0.4])
    assert choose(confidences, thresholds).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_thresholds_give_the_wanted_shares(shares):
    confidences = list(np.random.default_rng(0).random((2, 1000)))
    choice = choose(confidences, thresholds_for_shares(confidences, shares))
    assert (np.bincount(choice, minlength=3) / 1000).tolist() == pytest.approx(shares, abs=0.002)


def test_photos_of_equal_confidence_leave_together():
    confidences = [np.array([1.0, 1.0, 1.0, 0.2, 0.1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])]
    thresholds = thresholds_for_shares(confidences, [0.2, 0.2, 0.6])
    assert choose(confidences, thresholds).tolist() == [0, 0, 0, 1, 2]


def test_share_0_closes_the_exit():
    assert thresholds_for_shares([np.array([0.5, 1.0])], [0.0, 1.0]).tolist() == [CLOSED]


def test_photos_with_confidence_below_0_never_leave():
    nowhere, partly = np.full(4, -1.0), np.array([0.5, -1.0, 0.7, -1.0])
    assert thresholds_for_shares([nowhere, nowhere], [0.5, 0.25, 0.25]).tolist() == [CLOSED, CLOSED]
    thresholds = thresholds_for_shares([partly], [1.0, 0.0])
    assert choose([partly], thresholds).tolist() == [0, 1, 0, 1]


class Spy:
    """A policy that records its calls."""

    def __init__(self):
        self.calls = []

    def confidence(self, signals, exit_index):
        self.calls.append((signals, exit_index))
        return torch.ones(len(signals.logits))


def test_time_scoring_passes_one_photo_with_logits_and_tap():
    spy, other = Spy(), Spy()
    signals = ExitSignals(torch.rand(4, 7, 3), torch.rand(4, 6))
    timings = time_scoring([spy, other], signals, 1, runs=5)
    assert len(timings) == 2 and min(timing.ms for timing in timings) > 0
    assert len(spy.calls) == len(other.calls) >= 5
    signals, exit_index = spy.calls[-1]
    assert exit_index == 1 and signals.logits.shape == (1, 7, 3)
    assert signals.tap.shape == (1, 6) and not signals.empty


def test_time_scoring_of_an_empty_exit():
    spy = Spy()
    time_scoring([spy], ExitSignals(torch.rand(2, 7, 3), empty=True), 0, runs=2)
    signals, _ = spy.calls[0]
    assert signals.tap is None and signals.empty


def test_planned_exits_are_taken_in_every_call(small_model):
    routed = Planned(small_model.eval(), ExitRouter(2), [2, 0, 1, 0], frozenset({0, 1, 2}))
    x = torch.randn(4, 3, 96, 96)
    with torch.inference_mode():
        assert routed(x).tolist() == routed(x).tolist() == [2, 0, 1, 0]
    assert small_model.router is None


def test_branch_of_an_exit_with_share_0_is_not_computed(small_model, monkeypatch):
    computed = []
    for name, branch in small_model.eval().branches.items():
        branch.register_forward_hook(lambda *_, name=name: computed.append(name))
    monkeypatch.setattr(routing_policies, "time_modules", lambda modules, images, *_: run_once(modules[:1], images))
    with pytest.raises(RuntimeError, match="run once"):
        mixed_throughput(small_model, ExitRouter(2), [0.0, 0.5, 0.5], batch=4)
    assert computed == [list(small_model.branches)[1]]


def run_once(modules, images):
    with torch.inference_mode():
        for module in modules:
            module(images)
    raise RuntimeError("run once")


def test_throughput_figures_by_hand(small_model, monkeypatch):
    plans = []

    def times(modules, images, runs, threads):
        plans.append(sorted(modules[0].plan.tolist()))
        assert len(images) == 4
        # mixed, plain, and batches that leave together at exits 0, 1 and 2
        return [Timing(ms, [ms, ms]) for ms in (10.0, 12.0, 4.0, 8.0, 16.0)]

    monkeypatch.setattr(routing_policies, "time_modules", times)
    found = mixed_throughput(small_model, ExitRouter(2), [0.5, 0.25, 0.25], batch=4)
    assert plans == [[0, 0, 1, 2]]
    assert found.ideal == pytest.approx(4000 / ((4 + 4 + 8 + 16) / 4))
    assert found.mixed == pytest.approx(400) and found.plain == pytest.approx(4000 / 12)
    assert found.share_of_ideal == pytest.approx(0.8)


def test_throughput_of_a_small_model(small_model):
    found = mixed_throughput(small_model, ExitRouter(2), [0.5, 0.0, 0.5], batch=4, runs=2)
    assert min(found.mixed, found.ideal, found.plain) > 0


def test_best_policy_is_chosen_on_the_calibration_split():
    flattered = {"gap_closed": 0.9, "pooled_gap": 0.9, "calib_pooled_gap": 0.2}
    chosen = {"gap_closed": 0.1, "pooled_gap": 0.1, "calib_pooled_gap": 0.4}
    unknown = {"gap_closed": 0.95, "pooled_gap": 0.9, "calib_pooled_gap": None}
    assert best_policy({"a": flattered, "b": chosen, "c": unknown}) == "b"


def test_leads_over_a_coin_in_ap50_and_in_ap():
    oracle = np.zeros(1, int), Line(1.0, 0.46, 0.72)
    lines = Compared(np.zeros(1, int), Line(1.0, 0.45, 0.69), Line(1.0, 0.41, 0.65), {"best_oracle": oracle})
    assert lines.leads("best_oracle") == pytest.approx((0.04, 0.07))
    assert lines.leads("best_oracle", "AP") == pytest.approx((0.04, 0.05))
    undefined = Compared(np.zeros(1, int), Line(1.0, None, None), lines.chance, lines.oracles)
    assert np.isnan(undefined.leads("best_oracle", "AP")[0])


def points(*pairs):
    return [{"cost": cost, "AP50": ap50} for cost, ap50 in pairs]


def leak(calib, test):
    return {"calib": {"cost": 1.0, "AP50": calib}, "test": {"cost": 1.0, "AP50": test}}


POLICIES = {
    "ambiguous_mass": {
        "budgets": points((300.0, 0.6), (400.0, 0.7)),
        "msdnet": points((350.0, 0.65), (250.0, 0.55)),
        "leak": [leak(0.61, 0.62), leak(0.7, 0.71)],
    },
    "entropy": {"budgets": points((200.0, 0.4), (400.0, 0.6))},
    "max_foreground": {"msdnet": points((200.0, 0.3), (500.0, None))},
}


def test_published_rules_are_interpolated_at_the_costs_of_the_best_policy():
    """At 300, between 0.4 at 200 and 0.6 at 400, the AP50 is 0.5. A curve has no figure outside its costs."""
    assert published_rules_table(POLICIES, "ambiguous_mass", "mmacs").splitlines() == [
        "| rule | 300 mmacs | 400 mmacs |",
        "| --- | ---: | ---: |",
        "| ambiguous_mass, searched thresholds | 0.600 | 0.700 |",
        "| BranchyNet: entropy, searched thresholds | 0.500 | 0.600 |",
        "| MSDNet: shares q^k of max_foreground | - | - |",
        "| MSDNet: shares q^k of ambiguous_mass | 0.600 | - |",
        "| percentiles of ambiguous_mass from calib | 0.610 | 0.700 |",
        "| DynamicDet: the same percentiles of the reported photos | 0.620 | 0.710 |",
    ]


def test_best_policy_is_not_compared_with_itself():
    alone = {"max_foreground": {**POLICIES["ambiguous_mass"]}}
    assert "BranchyNet" not in published_rules_table(alone, "max_foreground", "ms")
    assert published_rules_table(alone, "max_foreground", "ms").count("MSDNet") == 1


def line(ap, ap50, **more):
    return {"AP": ap, "AP50": ap50, "AP_interval": [ap - 0.1, ap + 0.1], "AP50_interval": None, **more}


def test_reference_lines_table():
    entry = line(0.4, 0.6, budget=300.0, coin=line(0.3, 0.5), oracle=line(0.5, 0.7), best_oracle=line(0.6, 0.8))
    other = {"budgets": [line(0.2, 0.4, budget=300.0)]}
    bare = {"budgets": [{"AP": 0.1, "AP50": 0.2}]}
    table = reference_lines_table({"other": other, "bare": bare, "chosen": {"budgets": [entry]}}, "chosen")
    assert table.splitlines() == [
        "| line | figure | budget 300.0 |",
        "| --- | --- | ---: |",
        "| chosen | AP | 0.400 [0.300, 0.500] |",
        "| chosen | AP50 | 0.600 |",
        "| coin | AP | 0.300 [0.200, 0.400] |",
        "| coin | AP50 | 0.500 |",
        "| oracle | AP | 0.500 [0.400, 0.600] |",
        "| oracle | AP50 | 0.700 |",
        "| best oracle | AP | 0.600 [0.500, 0.700] |",
        "| best oracle | AP50 | 0.800 |",
        "| other | AP | 0.200 [0.100, 0.300] |",
        "| other | AP50 | 0.400 |",
    ]


def test_undefined_ap_is_a_dash():
    assert with_interval({"AP": None, "AP_interval": None}, "AP") == "-"


def test_gap_cells():
    pooled, best = {"value": 0.25, "interval": [0.1, 0.4]}, {"value": 0.2, "interval": None}
    found = {"gap_closed": 0.5, "pooled_gap": pooled, "pooled_gap_of_best_oracle": best}
    found |= {"pooled_gap_by_AP": 0.7, "calib_pooled_gap": 0.3}
    assert gap_cells(found) == ["0.50", "0.25 [0.10, 0.40]", "0.20", "0.70", "0.30"]
    nothing = {"value": None, "interval": None}
    found = {"gap_closed": None, "pooled_gap": nothing, "pooled_gap_of_best_oracle": nothing}
    found |= {"pooled_gap_by_AP": None, "calib_pooled_gap": None}
    assert gap_cells(found) == ["-", "-", "-", "-", "-"]


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("routing_*")), ids=lambda folder: folder.name)
def test_stored_tables_match_the_stored_figures(folder):
    results = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    assert (folder / "routing.md").read_text(encoding="utf-8") == routing_table(results) + "\n"


@pytest.fixture
def short_study(monkeypatch):
    """Reduce training steps of thresholds, coin tosses, budgets of the oracle, resamples and timing runs."""

    def few_draws(matches, choices, resamples=200, seed=0, **more):
        return bootstrap_choices(matches, choices, 10, seed, **more)

    monkeypatch.setattr(soft_exit, "STEPS", 5)
    monkeypatch.setattr(routing_policies, "bootstrap_choices", few_draws)
    monkeypatch.setattr(routing_policies, "time_scoring", partial(time_scoring, runs=3))
    monkeypatch.setattr(routing_policies, "mixed_throughput", partial(mixed_throughput, batch=4, runs=1))
    for name in ("COIN_TOSSES", "BOOTSTRAP_TOSSES", "ORACLE_BUDGETS"):
        monkeypatch.setattr(routing_policies, name, 2)


def test_policies_are_compared_with_coin_and_oracle(trained, capsys, short_study):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    policies = ["--policies", "ambiguous_mass,learned_gain"]
    assert routing_policies.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    results = json.loads((root / "routing" / "routing.json").read_text())
    assert list(results["policies"]) == ["max_foreground", "ambiguous_mass", "learned_gain"]
    assert [entry["name"] for entry in results["exits"]] == ["exit8", "exit12", "full"]
    costs, plain = results["context"]["cost_model"]["exits"], results["context"]["cost_model"]["plain"]
    for found in results["policies"].values():
        assert len(found["budgets"]) == 5 and len(found["msdnet"]) == 25
        for entry in found["budgets"]:
            assert min(costs[0], plain) < entry["budget"] < max(costs[0], plain)
            assert entry["coin"]["cost"] == entry["cost"]
            assert entry["oracle"]["cost"] <= entry["cost"] + 1e-9
            assert sum(entry["exit_share"].values()) == pytest.approx(1.0)
    printed = capsys.readouterr().out
    assert set(results["scoring_ms"]) == set(results["policies"]) and min(results["scoring_ms"].values()) > 0
    assert "| policy |" in printed and "coin at the cost of" in printed and "oracle at the cost of" in printed
    with Image.open(root / "routing" / "routing.png") as picture:
        assert picture.size[0] > 300
    assert len(results["throughput"]) == 5 and all(speed["share_of_ideal"] > 0 for speed in results["throughput"])
    # deterministic except for times; the second run uses the recorded outputs
    before = results["policies"]
    assert routing_policies.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    assert "record exits" not in capsys.readouterr().err
    assert json.loads((root / "routing" / "routing.json").read_text())["policies"] == before


def test_unknown_policy_is_an_error(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    assert routing_policies.main([*arguments, "--out", str(root / "wrong"), "--policies", "marginn"]) == 2
    assert "did you mean 'margin'" in capsys.readouterr().err
    assert routing_policies.main([*arguments, "--out", str(root / "wrong"), "--policies", "margin,"]) == 2
    assert "unknown routing policy '', expected one of" in capsys.readouterr().err


def retrofitted(trained, tiny, name, *keys):
    """Return arguments of the tools for a model with the full path of ``trained`` and untrained exits."""
    weights = str(trained[0] / "run" / "model.pth")
    keys = ("MODEL.WEIGHTS", weights, "BASELINE.EPOCHS", "0", "EXITS_PHASE.EPOCHS", "0", *keys)
    assert train_net.main(tiny(name, "--force", "EVAL.PICTURES", "0", "EVAL.RIVALS.ENABLED", "false", *keys)) == 0
    return tiny(name, "EVAL.SCORE", "0.02", "CALIBRATION.COST", "mmacs", *keys)


def test_empty_exits_have_policies_that_need_no_logits(
    trained, tiny, tmp_path, capsys, short_study, without_evaluation
):
    arguments = retrofitted(trained, tiny, "empty", "EXITS.EMPTY", "[8, 12]")
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing")]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert set(results["policies"]) == {"foreseen_emptiness", "learned_gain"}
    capsys.readouterr()
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing"), "--policies", "margin"]) == 2
    assert "policy 'margin' reads logits, but all exits of" in capsys.readouterr().err


def test_budgets_begin_at_the_first_exit_of_every_policy(trained, tiny, tmp_path, short_study, without_evaluation):
    arguments = retrofitted(trained, tiny, "mixed", "EXITS.LAYERS", "[4, 8, 12]", "EXITS.EMPTY", "[4]")
    policies = ["--policies", "margin,foreseen_emptiness"]
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing"), *policies]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    costs, plain = results["context"]["cost_model"]["exits"], results["context"]["cost_model"]["plain"]
    for found in results["policies"].values():
        assert all(min(costs[1], plain) < entry["budget"] < max(costs[1], plain) for entry in found["budgets"])
    assert all(entry["exit_share"]["exit4"] == 0 for entry in results["policies"]["margin"]["budgets"])

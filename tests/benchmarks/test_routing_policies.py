"""Policies against coin, oracle and published rules: the lines by hand, and the command as a whole."""

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


def test_oracle_spends_where_it_helps():
    errors = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 1.0, 1.0]])
    assert oracle_choice(errors, COSTS, 2.0).tolist() == [0, 1, 2, 0]  # mean cost (1 + 2 + 4 + 1) / 4
    assert oracle_choice(errors, COSTS, 1.3).tolist() == [0, 1, 0, 0]
    assert oracle_choice(errors, COSTS, 1.0).tolist() == [0, 0, 0, 0]


def test_oracle_with_one_exit():
    assert oracle_choice(np.ones((3, 1)), COSTS[:1], 1.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_oracle_is_the_best_of_all_choices_but_for_a_photo(seed):
    generator = np.random.default_rng(seed)
    errors = generator.random((6, 3)).round(1)
    choices = np.array(list(itertools.product(range(3), repeat=6)))
    mean_errors = errors[np.arange(6), choices].mean(1)
    for budget in (1.2, 1.7, 2.5, 3.5):
        found = oracle_choice(errors, COSTS, budget)
        assert COSTS[found].mean() <= budget + 1e-12
        best = mean_errors[COSTS[choices].mean(1) <= budget].min()
        assert errors[np.arange(6), found].mean() <= best + 1 / 6


def test_lines_at_equal_cost(random_case):
    truth, shallow = random_case(1, images=60)
    _, other = random_case(2, images=60)
    matches = exit_matches(truth, [other, shallow])  # the first exit sees other photos: it finds nothing
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


def test_oracle_closes_exits_that_cost_more_than_they_give():
    errors = np.array([[0.9, 0.5, 0.0], [0.9, 0.0, 0.0]])

    def costs_with(thresholds):
        return np.array([1.0, 2.0, 4.0]) + (thresholds[0] < CLOSED) * np.array([0.0, 1.0, 1.0])

    def rightness(choice):
        return 1 - errors[[0, 1], choice].mean()

    choice, costs = oracle_over_exits(errors, costs_with, 3.0, rightness)
    assert choice.tolist() == [2, 1] and costs.tolist() == [1.0, 2.0, 4.0]
    choice, costs = oracle_over_exits(errors, costs_with, 1.0, rightness)
    assert choice.tolist() == [0, 0] and costs.tolist() == [1.0, 3.0, 5.0]


def test_oracle_need_not_spend_what_it_may():
    """Least error would send photo 0 deep; what counts here is that nobody goes deep."""
    errors = np.array([[0.1, 0.0], [0.0, 0.5]])
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: float((exits == 0).sum()))
    assert choice.tolist() == [0, 0]
    choice, _ = oracle_over_exits(errors, lambda _: np.array([1.0, 2.0]), 2.0, lambda exits: None)  # nothing to find
    assert choice.tolist() == [0, 0]  # the cheapest


def test_gap_in_draws_of_the_photos(random_case):
    """The oracle itself closes all of it in every resample, a coin nothing on average, and photos decide how far."""
    truth, shallow = random_case(1, images=60)
    matches = exit_matches(truth, [random_case(2, images=60)[1], shallow])
    oracle = np.zeros(60, int)
    oracle[np.argsort(-matches.objects)[:30]] = 1
    own = pooled_gap([resampled_leads(matches, oracle, [oracle])[0]])
    assert len(own) == 200 and own[~np.isnan(own)] == pytest.approx(1.0)
    assert np.isnan(own).mean() < 0.2  # a draw in which a coin does as well
    toss = np.random.default_rng(5).permutation(oracle)
    low, high = np.nanquantile(pooled_gap([resampled_leads(matches, toss, [oracle])[0]]), [0.025, 0.975])
    assert low < 0 < high < 1
    everywhere = np.ones(60, int)
    assert np.isnan(pooled_gap([resampled_leads(matches, everywhere, [everywhere])[0]])).all()  # no coin can do worse


def test_pooled_gap_by_hand():
    """0.01 of 0.04 and 0.02 of 0.02 are 0.03 of 0.06, not the mean of 0.25 and 1."""
    assert pooled_gap([(0.01, 0.04), (0.02, 0.02)]) == pytest.approx(0.5)
    draws = pooled_gap([np.array([[0.01, 0.02], [0.04, 0.0]]), np.array([[0.02, 0.0], [0.02, -0.01]])])
    assert draws[0] == pytest.approx(0.5) and np.isnan(draws[1])


def test_overthinking_by_hand():
    errors = np.array([[0.0, 0.2, 0.5], [0.0, 0.0, 0.0], [0.1, 0.0, 0.1], [0.3, 0.3, 0.0]])
    assert overthinking(errors) == [0.25, 0.25]


def test_errors_by_hand(ground_truth, found):
    """Photo 1: one of two objects missed and one false; photo 2: its object missed; photo 3: nothing to find."""
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


def test_errors_are_shares(random_case):
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


def test_shares_by_hand():
    assert msdnet_shares(3, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert msdnet_shares(3, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_the_most_confident_leave_first_and_the_next_exit_sees_the_rest():
    confidences = [np.array([0.9, 0.1, 0.5, 0.3]), np.array([1.0, 0.2, 0.8, 0.6])]
    thresholds = thresholds_for_shares(confidences, [0.25, 0.5, 0.25])
    assert thresholds.tolist() == pytest.approx([0.7, 0.4])
    assert choose(confidences, thresholds).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_shares_come_true(shares):
    confidences = list(np.random.default_rng(0).random((2, 1000)))
    choice = choose(confidences, thresholds_for_shares(confidences, shares))
    assert (np.bincount(choice, minlength=3) / 1000).tolist() == pytest.approx(shares, abs=0.002)


def test_equal_confidences_leave_together_and_take_no_place_at_the_next_exit():
    confidences = [np.array([1.0, 1.0, 1.0, 0.2, 0.1]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])]
    thresholds = thresholds_for_shares(confidences, [0.2, 0.2, 0.6])
    assert choose(confidences, thresholds).tolist() == [0, 0, 0, 1, 2]


def test_nobody_leaves_at_a_share_of_nothing():
    assert thresholds_for_shares([np.array([0.5, 1.0])], [0.0, 1.0]).tolist() == [CLOSED]


def test_nobody_leaves_who_cannot():
    nowhere, partly = np.full(4, -1.0), np.array([0.5, -1.0, 0.7, -1.0])
    assert thresholds_for_shares([nowhere, nowhere], [0.5, 0.25, 0.25]).tolist() == [CLOSED, CLOSED]
    thresholds = thresholds_for_shares([partly], [1.0, 0.0])
    assert choose([partly], thresholds).tolist() == [0, 1, 0, 1]


class Spy:
    """Keeps what it is asked."""

    def __init__(self):
        self.asked = []

    def confidence(self, signals, exit_index):
        self.asked.append((signals, exit_index))
        return torch.ones(len(signals.logits))


def test_one_photo_with_all_that_a_policy_may_look_at():
    spy, other = Spy(), Spy()
    given = ExitSignals(torch.rand(4, 7, 3), torch.rand(4, 6))
    timings = time_scoring([spy, other], given, 1, runs=5)
    assert len(timings) == 2 and min(timing.ms for timing in timings) > 0
    assert len(spy.asked) == len(other.asked) >= 5
    signals, exit_index = spy.asked[-1]
    assert exit_index == 1 and signals.logits.shape == (1, 7, 3)
    assert signals.tap.shape == (1, 6) and not signals.empty


def test_of_the_first_exit():
    spy = Spy()
    time_scoring([spy], ExitSignals(torch.rand(2, 7, 3), empty=True), 0, runs=2)
    signals, _ = spy.asked[0]
    assert signals.tap is None and signals.empty


def test_plan_is_followed_again_and_again(small_model):
    routed = Planned(small_model.eval(), ExitRouter(2), [2, 0, 1, 0], frozenset({0, 1, 2}))
    x = torch.randn(4, 3, 96, 96)
    with torch.inference_mode():
        assert routed(x).tolist() == routed(x).tolist() == [2, 0, 1, 0]
    assert small_model.router is None


def test_an_exit_where_nobody_leaves_is_not_computed(small_model, monkeypatch):
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


def test_figures_follow_from_the_times(small_model, monkeypatch):
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


def test_runs_for_real(small_model):
    found = mixed_throughput(small_model, ExitRouter(2), [0.5, 0.0, 0.5], batch=4, runs=2)
    assert min(found.mixed, found.ideal, found.plain) > 0


def test_the_test_split_does_not_choose_the_policy():
    flattered = {"gap_closed": 0.9, "pooled_gap": 0.9, "calib_pooled_gap": 0.2}
    chosen = {"gap_closed": 0.1, "pooled_gap": 0.1, "calib_pooled_gap": 0.4}
    unknown = {"gap_closed": 0.95, "pooled_gap": 0.9, "calib_pooled_gap": None}
    assert best_policy({"a": flattered, "b": chosen, "c": unknown}) == "b"


def test_leads_over_a_coin_by_ap50_and_by_ap():
    oracle = np.zeros(1, int), Line(1.0, 0.46, 0.72)
    lines = Compared(np.zeros(1, int), Line(1.0, 0.45, 0.69), Line(1.0, 0.41, 0.65), {"best_oracle": oracle})
    assert lines.leads("best_oracle") == pytest.approx((0.04, 0.07))
    assert lines.leads("best_oracle", "AP") == pytest.approx((0.04, 0.05))
    nothing = Compared(np.zeros(1, int), Line(1.0, None, None), lines.chance, lines.oracles)
    assert np.isnan(nothing.leads("best_oracle", "AP")[0])


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


def test_curves_are_read_at_the_costs_of_the_best_policy():
    """Halfway between 200 and 400 is 0.5; a curve that ends before a cost has no figure there."""
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


def test_the_best_policy_is_not_compared_with_itself():
    alone = {"max_foreground": {**POLICIES["ambiguous_mass"]}}
    assert "BranchyNet" not in published_rules_table(alone, "max_foreground", "ms")
    assert published_rules_table(alone, "max_foreground", "ms").count("MSDNet") == 1


def line(ap, ap50, **more):
    return {"AP": ap, "AP50": ap50, "AP_interval": [ap - 0.1, ap + 0.1], "AP50_interval": None, **more}


def test_a_row_per_line_and_figure():
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


def test_nothing_to_find_is_a_dash():
    assert with_interval({"AP": None, "AP_interval": None}, "AP") == "-"


def test_gap_with_its_interval_or_without():
    pooled, best = {"value": 0.25, "interval": [0.1, 0.4]}, {"value": 0.2, "interval": None}
    found = {"gap_closed": 0.5, "pooled_gap": pooled, "pooled_gap_of_best_oracle": best}
    found |= {"pooled_gap_by_AP": 0.7, "calib_pooled_gap": 0.3}
    assert gap_cells(found) == ["0.50", "0.25 [0.10, 0.40]", "0.20", "0.70", "0.30"]
    nothing = {"value": None, "interval": None}
    found = {"gap_closed": None, "pooled_gap": nothing, "pooled_gap_of_best_oracle": nothing}
    found |= {"pooled_gap_by_AP": None, "calib_pooled_gap": None}
    assert gap_cells(found) == ["-", "-", "-", "-", "-"]


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("routing_*")), ids=lambda folder: folder.name)
def test_stored_tables_are_those_of_the_stored_figures(folder):
    results = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    assert (folder / "routing.md").read_text(encoding="utf-8") == routing_table(results) + "\n"


@pytest.fixture
def briefly(monkeypatch):
    """Few steps where thresholds are learnt, few tosses, budgets of the oracle, draws and timing runs; other tests look
    at these."""

    def few_draws(matches, choices, resamples=200, seed=0, **more):
        return bootstrap_choices(matches, choices, 10, seed, **more)

    monkeypatch.setattr(soft_exit, "STEPS", 5)
    monkeypatch.setattr(routing_policies, "bootstrap_choices", few_draws)
    monkeypatch.setattr(routing_policies, "time_scoring", partial(time_scoring, runs=3))
    monkeypatch.setattr(routing_policies, "mixed_throughput", partial(mixed_throughput, batch=4, runs=1))
    for name in ("COIN_TOSSES", "BOOTSTRAP_TOSSES", "ORACLE_BUDGETS"):
        monkeypatch.setattr(routing_policies, name, 2)


def test_policies_are_held_against_coin_and_oracle(trained, capsys, briefly):
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
    # deterministic but for times, and the second time without the network
    before = results["policies"]
    assert routing_policies.main([*arguments, "--out", str(root / "routing"), *policies]) == 0
    assert "record exits" not in capsys.readouterr().err
    assert json.loads((root / "routing" / "routing.json").read_text())["policies"] == before


def test_unknown_policy(trained, capsys):
    root, arguments = trained[0], [*trained[1], "CALIBRATION.COST", "mmacs"]
    assert routing_policies.main([*arguments, "--out", str(root / "wrong"), "--policies", "marginn"]) == 2
    assert "did you mean 'margin'" in capsys.readouterr().err
    assert routing_policies.main([*arguments, "--out", str(root / "wrong"), "--policies", "margin,"]) == 2
    assert "unknown routing policy '', expected one of" in capsys.readouterr().err


def retrofitted(trained, tiny, name, *keys):
    """Arguments of the tools for a model on the full path that ``trained`` has, with exits that nothing has taught."""
    weights = str(trained[0] / "run" / "model.pth")
    keys = ("MODEL.WEIGHTS", weights, "BASELINE.EPOCHS", "0", "EXITS_PHASE.EPOCHS", "0", *keys)
    assert train_net.main(tiny(name, "--force", "EVAL.PICTURES", "0", "EVAL.RIVALS.ENABLED", "false", *keys)) == 0
    return tiny(name, "EVAL.SCORE", "0.02", "CALIBRATION.COST", "mmacs", *keys)


def test_empty_exits_have_the_policies_that_foresee(trained, tiny, tmp_path, capsys, briefly, without_evaluation):
    arguments = retrofitted(trained, tiny, "empty", "EXITS.EMPTY", "[8, 12]")
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing")]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    assert set(results["policies"]) == {"foreseen_emptiness", "learned_gain"}
    capsys.readouterr()
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing"), "--policies", "margin"]) == 2
    assert "policy 'margin' reads logits, but all exits of" in capsys.readouterr().err


def test_budgets_begin_where_every_policy_may_let_photos_leave(trained, tiny, tmp_path, briefly, without_evaluation):
    arguments = retrofitted(trained, tiny, "mixed", "EXITS.LAYERS", "[4, 8, 12]", "EXITS.EMPTY", "[4]")
    policies = ["--policies", "margin,foreseen_emptiness"]
    assert routing_policies.main([*arguments, "--out", str(tmp_path / "routing"), *policies]) == 0
    results = json.loads((tmp_path / "routing" / "routing.json").read_text())
    costs, plain = results["context"]["cost_model"]["exits"], results["context"]["cost_model"]["plain"]
    for found in results["policies"].values():
        assert all(min(costs[1], plain) < entry["budget"] < max(costs[1], plain) for entry in found["budgets"])
    assert all(entry["exit_share"]["exit4"] == 0 for entry in results["policies"]["margin"]["budgets"])

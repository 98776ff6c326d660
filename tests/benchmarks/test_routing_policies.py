"""Policies compared with coin, oracle and published rules: each figure by hand, and the command as a whole."""

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import routing_policies as study
from benchmarks.routing_policies import Compared, Planned, Point, Study, coin, oracle_choice, point_of, pooled_gap
from earlyexit_ssd.calibration import thresholds as soft_exit
from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.config import CLOSED
from earlyexit_ssd.evaluation.cost import Timing
from earlyexit_ssd.evaluation.matches import bootstrap_choices, exit_matches
from earlyexit_ssd.modeling.outputs import ExitSignals
from earlyexit_ssd.pipeline.replay import CostModel
from earlyexit_ssd.routing import ExitRouter
from tools import train_net

RESULTS = Path(study.__file__).parent / "results"
COSTS = np.array([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("budget", "choice"),
    [(2.0, [0, 1, 2, 0]), (1.3, [0, 1, 0, 0]), (1.0, [0, 0, 0, 0])],  # mean cost (1 + 2 + 4 + 1) / 4 of the first
)
def test_oracle_spends_the_budget_where_errors_fall_most(budget, choice):
    errors = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 1.0, 1.0]])
    assert oracle_choice(errors, COSTS, budget).tolist() == choice
    assert oracle_choice(errors[:, :1], COSTS[:1], budget).tolist() == [0, 0, 0, 0]  # one exit


def test_oracle_spends_the_rest_of_the_budget_on_some_of_equal_photos():
    assert oracle_choice(np.array([[1.0, 0.0]] * 3), COSTS[:2], 1.7).tolist() == [1, 1, 0]


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


def two_exits(random_case):
    """Matches of 60 photos. The first exit has the detections of other photos, so it has no hits."""
    truth, detections = random_case(1, images=60)
    return exit_matches(truth, [random_case(2, images=60)[1], detections])


def test_router_and_coin_have_equal_cost(random_case):
    matches, costs = two_exits(random_case), COSTS[:2]
    choice, second = np.array([0, 1] * 30), np.ones(60, int)
    router, chance = point_of(matches, choice, costs), coin(matches, choice, costs)
    assert router.cost == chance.cost == 1.5
    assert 0 < chance.AP50 < point_of(matches, second, costs).AP50
    assert coin(matches, choice, costs, seed=0) == chance != coin(matches, choice, costs, seed=1)
    assert pytest.approx(point_of(matches, second, costs).AP50) == coin(matches, second, costs).AP50


def test_oracle_closes_exits_that_cost_more_than_they_gain():
    errors = np.array([[0.9, 0.5, 0.0], [0.9, 0.0, 0.0]])

    def costs_with(thresholds):
        return np.array([1.0, 2.0, 4.0]) + (thresholds[0] < CLOSED) * np.array([0.0, 1.0, 1.0])

    def accuracy(choice):
        return 1 - errors[[0, 1], choice].mean()

    for budget, expected in ((3.0, ([2, 1], [1.0, 2.0, 4.0])), (1.0, ([0, 0], [1.0, 3.0, 5.0]))):
        choice, costs = study.oracle_over_exits(errors, costs_with, budget, accuracy)
        assert (choice.tolist(), costs.tolist()) == expected


@pytest.mark.parametrize(
    "value", [lambda exits: float((exits == 0).sum()), lambda exits: None], ids=["AP50", "no AP50"]
)
def test_oracle_may_spend_less_than_the_budget(value):
    """The smallest error would send photo 0 to the full path, but the value is highest at the first exit. Without a
    value the cheapest exit is taken."""
    errors = np.array([[0.1, 0.0], [0.0, 0.5]])
    assert study.oracle_over_exits(errors, lambda _: COSTS[:2], 2.0, value)[0].tolist() == [0, 0]


def test_pooled_gap_in_resamples(random_case):
    """The oracle closes the whole gap in every resample. A coin closes nothing on average, but varies."""
    matches = two_exits(random_case)

    def gaps(choice, oracle):
        return pooled_gap(study.resampled_leads(matches, choice, [oracle]))

    oracle, second = np.zeros(60, int), np.ones(60, int)
    oracle[np.argsort(-matches.objects)[:30]] = 1
    own = gaps(oracle, oracle)
    assert len(own) == 200 and own[~np.isnan(own)] == pytest.approx(1.0)
    assert np.isnan(own).mean() < 0.2  # undefined if a coin is as good
    low, high = np.nanquantile(gaps(np.random.default_rng(5).permutation(oracle), oracle), [0.025, 0.975])
    assert low < 0 < high < 1
    assert np.isnan(gaps(second, second)).all()  # a coin makes the same choice


def test_pooled_gap_by_hand():
    """0.01 of 0.04 and 0.02 of 0.03 give 0.03 of 0.07, not the mean of two gaps."""
    assert pooled_gap([(0.01, 0.04), (0.02, 0.03)]) == pytest.approx(3 / 7)
    draws = pooled_gap([np.array([[0.01, 0.02], [0.04, 0.0]]), np.array([[0.02, 0.0], [0.02, -0.01]])])
    assert draws[0] == pytest.approx(0.5) and np.isnan(draws[1])


def test_overthinking_by_hand():
    errors = np.array([[0.0, 0.2, 0.5], [0.0, 0.0, 0.0], [0.1, 0.0, 0.1], [0.3, 0.3, 0.0]])
    assert study.overthinking(errors) == [0.25, 0.25]


def test_errors_against_labels_by_hand(ground_truth, found):
    """At the early exit, photo 1 has a miss and a false positive, and photo 2 a miss. Photo 3 has no object."""
    here, there, far = (10.0, 10.0, 110.0, 110.0), (200.0, 200.0, 300.0, 320.0), (400.0, 400.0, 500.0, 500.0)
    truth = ground_truth(3, [(1, 1, here), (1, 2, there), (2, 1, far)])
    early = {1: found((1, 0.9, here), (1, 0.8, far), (2, 0.3, there)), 2: found((1, 0.2, far)), 3: found()}
    full = {1: found((1, 0.9, here), (2, 0.9, there)), 2: found((1, 0.7, far)), 3: found((1, 0.6, here))}
    errors = study.errors_against_labels(exit_matches(truth, [early, full]), 0.5)
    assert errors.tolist() == [[2 / 3, 0.0], [1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(("empty", "first"), [((False, False), 4), ((True, False), 6), ((True, True), 4)])
def test_budgets_lie_between_the_first_exit_with_a_branch_and_the_full_path(empty, first):
    early = {(): 4.0, (True,): 6.0, (False,): 5.0}
    deeper = {(True, True): 14.0, (False, True): 13.0, (True, False): 12.0, (False, False): 10.0}
    budgets = Study(None, None, CostModel("mmacs", early | deeper, 2, 9.0, {}), (), empty, 0).budgets()
    assert budgets == pytest.approx(np.linspace(first, 10, 7)[1:-1])


@pytest.mark.parametrize(("q", "shares"), [(1.0, [1 / 3] * 3), (0.5, [4 / 7, 2 / 7, 1 / 7])])
def test_msdnet_shares_by_hand(q, shares):
    assert study.msdnet_shares(3, q) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("confidences", "shares", "thresholds", "choice"),
    [
        ([[0.9, 0.1, 0.5, 0.3], [1.0, 0.2, 0.8, 0.6]], [0.25, 0.5, 0.25], [0.7, 0.4], [0, 2, 1, 1]),
        # photos of equal confidence leave together
        ([[1.0, 1.0, 1.0, 0.2, 0.1], [0.9, 0.8, 0.7, 0.6, 0.5]], [0.2, 0.2, 0.6], [1.0, 0.55], [0, 0, 0, 1, 2]),
        # share 0 closes the exit
        ([[0.5, 1.0]], [0.0, 1.0], [CLOSED], [1, 1]),
        # a photo with a confidence below 0 never leaves
        ([[-1.0] * 4] * 2, [0.5, 0.25, 0.25], [CLOSED, CLOSED], [2, 2, 2, 2]),
        ([[0.5, -1.0, 0.7, -1.0]], [1.0, 0.0], [0.5], [0, 1, 0, 1]),
    ],
)
def test_thresholds_let_the_most_confident_photos_leave(confidences, shares, thresholds, choice):
    confidences = list(np.array(confidences))
    found = study.thresholds_for_shares(confidences, shares)
    assert found == pytest.approx(thresholds)
    assert choose(confidences, found).tolist() == choice


class Spy:
    """A policy that records its calls."""

    def __init__(self):
        self.calls = []

    def confidence(self, signals, exit_index):
        self.calls.append((signals, exit_index))
        return torch.ones(len(signals.logits))


@pytest.mark.parametrize("empty", [False, True])
def test_time_scoring_passes_one_photo(empty):
    spies = Spy(), Spy()
    signals = ExitSignals(torch.rand(4, 7, 3), None if empty else torch.rand(4, 6), empty)
    timings = study.time_scoring(spies, signals, 1, runs=5)
    assert len(timings) == 2 and min(timing.ms for timing in timings) > 0
    assert len(spies[0].calls) == len(spies[1].calls) >= 5
    passed, exit_index = spies[0].calls[-1]
    assert exit_index == 1 and passed.logits.shape == (1, 7, 3) and passed.empty == empty
    assert passed.tap is None if empty else passed.tap.shape == (1, 6)


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

    def time_first(modules, images, *_):
        with torch.inference_mode():
            modules[0](images)
        return [Timing(1.0, [])] * len(modules)

    monkeypatch.setattr(study, "time_modules", time_first)
    study.mixed_throughput(small_model, ExitRouter(2), [0.0, 0.5, 0.5], batch=4)
    assert computed == [list(small_model.branches)[1]]


def test_throughput_figures_by_hand(small_model, monkeypatch):
    plans = []

    def times(modules, images, runs, threads):
        plans.append(sorted(modules[0].plan.tolist()))
        assert len(images) == 4
        # mixed, plain, and batches that leave together at exits 0, 1 and 2
        return [Timing(ms, [ms, ms]) for ms in (10.0, 12.0, 4.0, 8.0, 16.0)]

    monkeypatch.setattr(study, "time_modules", times)
    found = study.mixed_throughput(small_model, ExitRouter(2), [0.5, 0.25, 0.25], batch=4)
    assert plans == [[0, 0, 1, 2]]
    assert found.ideal == pytest.approx(4000 / ((4 + 4 + 8 + 16) / 4))
    assert found.mixed == pytest.approx(400) and found.plain == pytest.approx(4000 / 12)
    assert found.share_of_ideal == pytest.approx(0.8)


def test_best_policy_is_chosen_on_the_calibration_split():
    gaps = {"a": (0.9, 0.2), "b": (0.1, 0.4), "c": (0.95, None)}  # on test photos, on calibration photos
    entries = {name: {"pooled_gap": test, "calib_pooled_gap": calib} for name, (test, calib) in gaps.items()}
    assert study.best_policy(entries) == "b"


def test_leads_over_a_coin_in_ap50_and_in_ap():
    oracle = np.zeros(1, int), Point(1.0, 0.46, 0.72)
    lines = Compared(np.zeros(1, int), Point(1.0, 0.45, 0.69), Point(1.0, 0.41, 0.65), {"best_oracle": oracle})
    assert lines.leads("best_oracle") == pytest.approx((0.04, 0.07))
    assert lines.leads("best_oracle", "AP") == pytest.approx((0.04, 0.05))
    undefined = Compared(np.zeros(1, int), Point(1.0, None, None), lines.chance, lines.oracles)
    assert np.isnan(undefined.leads("best_oracle", "AP")[0]) and np.isnan(pooled_gap([undefined.leads("best_oracle")]))


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
    assert study.published_rules_table(POLICIES, "ambiguous_mass", "mmacs").splitlines() == [
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
    table = study.published_rules_table({"max_foreground": POLICIES["ambiguous_mass"]}, "max_foreground", "ms")
    assert "BranchyNet" not in table and table.count("MSDNet") == 1


def line(ap, ap50, **more):
    return {"AP": ap, "AP50": ap50, "AP_interval": [ap - 0.1, ap + 0.1], "AP50_interval": None, **more}


def test_reference_lines_table():
    entry = line(0.4, 0.6, budget=300.0, coin=line(0.3, 0.5), oracle=line(0.5, 0.7), best_oracle=line(0.6, 0.8))
    other = {"budgets": [line(0.2, 0.4, budget=300.0)]}
    bare = {"budgets": [{"AP": 0.1, "AP50": 0.2}]}
    table = study.reference_lines_table({"other": other, "bare": bare, "chosen": {"budgets": [entry]}}, "chosen")
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


def gap_cells(*values):
    keys = ("gap_closed", "pooled_gap", "pooled_gap_of_best_oracle", "pooled_gap_by_AP", "calib_pooled_gap")
    return study.gap_cells(dict(zip(keys, values, strict=True)))


def test_cells_of_figures_and_of_undefined_ones():
    cells = gap_cells(0.5, {"value": 0.25, "interval": [0.1, 0.4]}, {"value": 0.2, "interval": None}, 0.7, 0.3)
    assert cells == ["0.50", "0.25 [0.10, 0.40]", "0.20", "0.70", "0.30"]
    undefined = {"value": None, "interval": None}
    assert gap_cells(None, undefined, undefined, None, None) == ["-"] * 5
    assert study.with_interval({"AP": None, "AP_interval": None}, "AP") == "-"


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("routing_*")), ids=lambda folder: folder.name)
def test_stored_tables_match_the_stored_figures(folder):
    results = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    assert (folder / "routing.md").read_text(encoding="utf-8") == study.routing_table(results) + "\n"


@pytest.fixture
def short_study(monkeypatch):
    """Reduce training steps of thresholds, coin tosses, budgets of the oracle, resamples and timing runs."""

    def few_draws(matches, choices, resamples=200, seed=0, **more):
        return bootstrap_choices(matches, choices, 10, seed, **more)

    monkeypatch.setattr(soft_exit, "STEPS", 5)
    monkeypatch.setattr(study, "bootstrap_choices", few_draws)
    monkeypatch.setattr(study, "time_scoring", partial(study.time_scoring, runs=3))
    monkeypatch.setattr(study, "mixed_throughput", partial(study.mixed_throughput, batch=4, runs=1))
    for name in ("COIN_TOSSES", "BOOTSTRAP_TOSSES", "ORACLE_BUDGETS"):
        monkeypatch.setattr(study, name, 2)


def evaluated(arguments, out, *policies):
    """Run the command and return the content of routing.json."""
    assert study.main([*arguments, "--out", str(out), *(["--policies", ",".join(policies)] if policies else [])]) == 0
    return json.loads((out / "routing.json").read_text())


def test_policies_are_compared_with_coin_and_oracle(trained, capsys, short_study):
    arguments, out = [*trained[1], "CALIBRATION.COST", "mmacs"], trained[0] / "routing"
    results = evaluated(arguments, out, "ambiguous_mass", "learned_gain")
    assert list(results["policies"]) == ["max_foreground", "ambiguous_mass", "learned_gain"]
    assert [entry["name"] for entry in results["exits"]] == ["exit8", "exit12", "full"]
    for found in results["policies"].values():
        assert len(found["budgets"]) == 5 and len(found["msdnet"]) == 25
        for entry in found["budgets"]:
            assert entry["coin"]["cost"] == entry["cost"]
            assert entry["oracle"]["cost"] <= entry["cost"] + 1e-9
            assert sum(entry["exit_share"].values()) == pytest.approx(1.0)
    printed = capsys.readouterr().out
    assert set(results["scoring_ms"]) == set(results["policies"]) and min(results["scoring_ms"].values()) > 0
    assert "| policy |" in printed and "coin at the cost of" in printed and "oracle at the cost of" in printed
    with Image.open(out / "routing.png") as picture:
        assert picture.size[0] > 300
    assert len(results["throughput"]) == 5 and all(speed["share_of_ideal"] > 0 for speed in results["throughput"])
    # all figures but times are deterministic; the second run uses the recorded outputs
    assert evaluated(arguments, out, "ambiguous_mass", "learned_gain")["policies"] == results["policies"]
    assert "record exits" not in capsys.readouterr().err


def test_unknown_policy_is_an_error(trained, capsys):
    cases = {"marginn": "did you mean 'margin'", "margin,": "routing policy is '', expected one of"}
    for policies, message in cases.items():
        assert study.main([*trained[1], "--out", str(trained[0] / "wrong"), "--policies", policies]) == 2
        assert message in capsys.readouterr().err


def test_empty_exits_have_policies_that_need_no_logits(
    trained, tiny, tmp_path, capsys, short_study, without_evaluation
):
    keys = ["MODEL.WEIGHTS", str(trained[0] / "run" / "model.pth"), "BASELINE.EPOCHS", "0", "EXITS.EMPTY", "[8, 12]"]
    assert train_net.main(tiny("empty", "--force", *keys)) == 0
    arguments = tiny("empty", "EVAL.SCORE", "0.02", "CALIBRATION.COST", "mmacs", *keys)
    assert set(evaluated(arguments, tmp_path)["policies"]) == {"foreseen_emptiness", "learned_gain"}
    assert study.main([*arguments, "--out", str(tmp_path), "--policies", "margin"]) == 2
    assert "policy 'margin' reads logits, but all exits of" in capsys.readouterr().err

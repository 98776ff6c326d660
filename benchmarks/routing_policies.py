#!/usr/bin/env python
"""Compare routing policies with chance, with an oracle and with published rules.

All policies have the same five limits of the mean cost (*budgets*). Thresholds come from the calib split, all figures
from the test split. For each policy and budget:

- *coin*: at each exit as many photos leave as with the policy, but random ones.
- *oracle*: each photo's exit is chosen with the labels. Of several mean costs up to the policy's and several sets of
  open exits, those with the smallest mean error are taken.
- *best oracle*: the same, but with the highest AP50.
- *gap closed*: (policy - coin) / (oracle - coin) in AP50. 0 is chance, 1 is the oracle.

The policy that closes most of the gap on the *calib* photos is compared with published rules: BranchyNet (entropy),
MSDNet (geometric shares of the photos) and DynamicDet (percentiles of the scores of the test photos). It is also used
to time batches whose photos leave at different exits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn

from earlyexit_ssd.calibration.thresholds import best_within, choose, learn_open_exits, open_sets, threshold_grid
from earlyexit_ssd.config import CLOSED, load_config
from earlyexit_ssd.console import progress, run_tool
from earlyexit_ssd.evaluation.cost import PlainPath, Timing, time_modules
from earlyexit_ssd.evaluation.matches import ExitMatches, ap_of_choice, bootstrap_choices, interval, photo_counts
from earlyexit_ssd.files import locks_folder, write_image, write_json, write_text
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.modeling.detector import fuse_for_inference, route
from earlyexit_ssd.modeling.outputs import ExitSignals, Router
from earlyexit_ssd.pipeline.replay import (
    CostModel,
    Replay,
    fit_router,
    fit_temperatures,
    measure_cost_model,
    open_model_on_splits,
    require_deciding,
    temperatures_of,
)
from earlyexit_ssd.report.pictures import GREY, draw_charts
from earlyexit_ssd.report.tables import figure
from earlyexit_ssd.routing import ExitRouter
from earlyexit_ssd.routing.policies import POLICIES, reads_taps

REFERENCE_POLICY = "max_foreground"
BUDGETS = 5
COIN_TOSSES = 20  # a toss is one random assignment of photos to exits
BOOTSTRAP_TOSSES = 5
"""Tosses in every bootstrap draw. Few are enough, because the interval is over photos."""
ORACLE_BUDGETS = 8  # mean costs that an oracle tries
MSDNET_Q = np.geomspace(0.1, 10, 25)  # see `msdnet_shares`
BRANCHYNET, MSDNET = "entropy", "max_foreground"
"""The policies of BranchyNet (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018)."""
COIN_AND_ORACLES = {"coin": "coin", "oracle": "oracle", "best_oracle": "best oracle"}
"""What a policy is compared with: key in routing.json -> name in tables."""
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f", "#2c7a7b", "#c53030")

EXAMPLES = """
examples:
  python benchmarks/routing_policies.py --config configs/voc_animals.yaml --out output/routing
      every policy, with the model.pth in OUTPUT_DIR
  python benchmarks/routing_policies.py --config configs/voc_animals.yaml --weights model.pth --out output/routing \\
      --policies ambiguous_mass,learned_gain EVAL.RUNTIME onnxruntime
      two policies and max_foreground, with costs in ONNX Runtime

The network runs once per photo. A second run uses the recordings in the results folder.
See benchmarks/README.md.
"""


# ---------------------------------------------------------------------------------------------- coin and oracle


@dataclass(frozen=True)
class Point:
    """AP and AP50 in [0, 1] at a mean cost."""

    cost: float
    AP: float | None
    AP50: float | None


def point_of(matches: ExitMatches, choice: np.ndarray, costs: np.ndarray) -> Point:
    """Return AP and mean cost if photos take the exits ``choice`` [n]. ``costs`` is [exits]."""
    metrics = ap_of_choice(matches, choice)
    return Point(float(costs[choice].mean()), metrics.AP, metrics.AP50)


def tosses(choice: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Return ``count`` random permutations of ``choice`` [n]: each exit has the same share of the photos as before."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(choice) for _ in range(count)]


def coin(matches: ExitMatches, choice: np.ndarray, costs: np.ndarray, seed: int = 0) -> Point:
    """Return mean AP and cost of `COIN_TOSSES` random permutations of ``choice`` [n]."""
    metrics = [ap_of_choice(matches, toss) for toss in tosses(choice, COIN_TOSSES, seed)]
    cost = float(costs[choice].mean())
    if metrics[0].AP50 is None:  # no labelled object
        return Point(cost, None, None)
    return Point(cost, float(np.mean([toss.AP for toss in metrics])), float(np.mean([toss.AP50 for toss in metrics])))


def errors_against_labels(matches: ExitMatches, score: float) -> np.ndarray:
    """Return the error of each exit on each photo, [n, exits] in [0, 1]: (missed + false) / (objects + false).

    It is 0 for a photo without objects and without detections.
    """
    counts = photo_counts(matches, score)
    return counts.errors / np.maximum(counts.errors + counts.true_positives, 1)


def oracle_choice(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Return exits [n] with the smallest mean error at a mean cost of at most ``budget``, chosen with the labels.

    Each photo takes the exit with the smallest error + price * cost (a Lagrange multiplier), the cheaper one of equal
    exits. Bisection finds the smallest price that meets the budget. The rest of the budget is used for photos that take
    a more expensive exit at a slightly lower price.

    Args:
        errors: [n, exits], see `errors_against_labels`.
        costs: [exits], the cheapest first.
        budget: at least the cheapest cost.
    """
    scale = costs / costs.max()

    def choose_at(price: float) -> np.ndarray:
        return (errors + price * scale).argmin(1)  # argmin returns the first of equal values

    # at the price ``high`` every photo takes the cheapest exit
    low, high = 0.0, 1.0 + float(np.ptp(errors)) / max(float(np.diff(np.sort(scale)).min(initial=1.0)), 1e-9)
    if costs[choose_at(low)].mean() <= budget:
        return choose_at(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs[choose_at(middle)].mean() > budget else (low, middle)
    choice, expensive = choose_at(high), choose_at(low)
    for photo in np.flatnonzero(choice != expensive):
        change = (costs[expensive[photo]] - costs[choice[photo]]) / len(choice)
        if costs[choice].mean() + change <= budget:
            choice[photo] = expensive[photo]
    return choice


def oracle_over_exits(
    errors: np.ndarray,
    costs_with: Callable[[Sequence[float]], np.ndarray],
    budget: float,
    value: Callable[[np.ndarray], float | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the oracle's exits [n] with the highest ``value``, and the costs [exits] with its set of open exits.

    It tries `ORACLE_BUDGETS` mean costs up to ``budget``, with every set of open exits, because a closed exit makes
    deeper exits cheaper. So it is at least as good as any single exit at this cost.

    ``errors`` are [n, exits]. ``costs_with`` is a function from thresholds of the early exits (0 or `CLOSED`) to costs
    [exits]. ``value`` is a function from the exits of the photos, [n], to a number such as AP50.
    """
    best, best_value = None, (-np.inf, -np.inf)
    budget *= 1 + 1e-9  # tolerance for the rounding of means
    for thresholds, usable in open_sets(errors.shape[1] - 1):
        costs = costs_with(thresholds)
        if costs[usable[0]] > budget:
            continue
        for level in np.linspace(costs[usable[0]], budget, ORACLE_BUDGETS):
            choice = usable[oracle_choice(errors[:, usable], costs[usable], level)]
            candidate = (value(choice) or 0.0, -costs[choice].mean())
            if candidate > best_value:
                best, best_value = (choice, costs), candidate
    return best


def pooled_gap(leads: Sequence[np.ndarray | Sequence[float]]) -> np.ndarray:
    """Return the gap closed at several budgets together: the sum of the router's leads / the sum of the oracle's leads.

    The mean of the gaps would give large weight to budgets where the oracle gains little. ``leads`` are (router - coin,
    oracle - coin) for each budget, [2] or, for bootstrap draws, [2, resamples]. The gap is a scalar or [resamples], and
    NaN if the oracle gains nothing.
    """
    router, oracle = np.sum(np.asarray(leads, dtype=float), axis=0)
    return router / np.where(oracle < 1e-6, np.nan, oracle)


def resampled_leads(
    matches: ExitMatches, choice: np.ndarray, oracles: Sequence[np.ndarray], resamples: int = 200, seed: int = 0
) -> list[np.ndarray]:
    """Return the leads in AP50 of router and oracle over the coin in bootstrap draws, [2, resamples] for each oracle.
    ``choice`` and each of ``oracles`` are exits [n]."""
    compared = [choice, *tosses(choice, BOOTSTRAP_TOSSES, seed), *oracles]
    router, *others = (draws.AP50 for draws in bootstrap_choices(matches, compared, resamples, seed))
    chance = np.mean(others[:BOOTSTRAP_TOSSES], axis=0)
    return [np.stack([router - chance, best - chance]) for best in others[BOOTSTRAP_TOSSES:]]


def overthinking(errors: np.ndarray) -> list[float]:
    """Return for each early exit the share of photos with no error there, but with an error in the full path.

    See Kaya et al. 2019, "Shallow-deep networks". ``errors`` is [n, exits].
    """
    correct = errors == 0
    return [float((correct[:, index] & ~correct[:, -1]).mean()) for index in range(errors.shape[1] - 1)]


# ------------------------------------------------------------------------------------- published rules: shares


def msdnet_shares(exits: int, q: float) -> np.ndarray:
    """Return the share of photos for each exit, [exits], proportional to q^k for the k-th exit.

    These are the geometric shares of MSDNet's budgeted batch classification (Huang et al. 2018: z (1 - q)^(k - 1) q,
    with 1 - q for this q). With q above 1, more photos leave at deep exits.
    """
    shares = q ** np.arange(1, exits + 1, dtype=float)
    return shares / shares.sum()


def thresholds_for_shares(confidences: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """Return thresholds [early exits] at which ``shares`` [exits] of the photos leave, the most confident first.

    Photos with equal confidence leave together, so an exit may get more than its share and the next exit less. MSDNet
    computes the thresholds on a validation set, DynamicDet (Lin et al. 2023, section 3.4) on the test photos.
    ``confidences`` are [n] for each early exit, below 0 for photos that cannot leave.
    """
    left = np.arange(len(confidences[0]))
    thresholds = []
    for confidence, share in zip(confidences, shares, strict=False):
        available = int((confidence[left] >= 0).sum())
        leaving = min(available, round(share * len(confidence)))
        if leaving == 0:
            thresholds.append(CLOSED)
            continue
        order = left[np.argsort(-confidence[left], kind="stable")]
        last, following = confidence[order[leaving - 1]], confidence[order[leaving:available]]
        thresholds.append(float((last + following[0]) / 2) if len(following) and following[0] < last else float(last))
        left = left[confidence[left] < np.float32(thresholds[-1])]  # as the router, which compares in fp32
    return np.array(thresholds, dtype=np.float32)


# -------------------------------------------------------------------------- speed: scoring, and mixed batches


def time_scoring(
    routers: Sequence[Router], signals: ExitSignals, exit_index: int, threads: int = 1, runs: int = 300
) -> list[Timing]:
    """Time each router on the first image of ``signals``, with its temperature. The routers take turns."""
    first = ExitSignals(signals.logits[:1], None if signals.tap is None else signals.tap[:1], signals.empty)
    modules = [_Call(lambda _, router=router: router.confidence(first, exit_index)) for router in routers]
    return time_modules(modules, signals.logits, runs, threads)


class _Call(nn.Module):
    """A function as a module, for `time_modules`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Throughput:
    """Photos per second of the network, fused for inference, in batches, without resizing and post-processing."""

    batch: int  # number of photos in a batch
    mixed: float  # photos leave at different exits
    ideal: float  # if every photo took as long as in a batch whose photos all leave at its exit
    plain: float  # the detector without exits
    share_of_ideal: float  # mixed / ideal


class Planned(nn.Module):
    """The network on normalised images, in which image i leaves at exit ``plan[i]``.

    At the exits ``used``, ``router`` computes the confidences, so its time is included. During a forward pass, this
    module is the model's router.
    """

    hybrid = False  # an attribute of a router

    def __init__(self, model: nn.Module, router: nn.Module, plan: Sequence[int], used: frozenset[int]) -> None:
        super().__init__()
        self._others = [model, router]  # in a list, so they are not registered as submodules
        self.plan, self._used = torch.tensor(plan), used
        self._left = self.plan

    def forward(self, x: Tensor) -> Tensor:
        model = self._others[0]
        before, model.router = model.router, self
        try:
            return route(model, x)[1]
        finally:
            model.router = before

    def needs(self, exit_index: int) -> bool:
        if exit_index == 0:
            self._left = self.plan
        return exit_index in self._used

    def confidence(self, signals: ExitSignals, exit_index: int) -> Tensor:
        return self._others[1].confidence(signals, exit_index)

    def leaves(self, confidence: Tensor, exit_index: int) -> Tensor:
        leave = self._left == exit_index
        self._left = self._left[~leave]
        return leave


def mixed_throughput(
    model: EarlyExitSSDLite,
    router: ExitRouter,
    shares: Sequence[float],
    batch: int = 16,
    runs: int = 10,
    threads: int = 1,
) -> Throughput:
    """Time batches whose photos leave in these shares [exits], and batches whose photos all leave at the same exit.

    An exit where no photo of the mixed batch leaves is closed in all batches, so its branch is not computed.
    """
    model = fuse_for_inference(model)
    width, height = model.transform.fixed_size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()).device)
    ends = np.cumsum(shares)[:-1]
    plan = np.searchsorted(ends, (np.arange(batch) + 0.5) / batch, side="right").tolist()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).tolist()
    used = frozenset(plan)
    mixed = Planned(model, router, [plan[index] for index in order], used)
    together = [Planned(model, router, [index] * batch, used) for index in sorted(used)]
    timings = time_modules([mixed, PlainPath(model), *together], images, runs, threads)
    mixed_ms, plain_ms, *together_ms = (timing.ms for timing in timings)
    ms_of_exit = dict(zip(sorted(used), together_ms, strict=True))
    ideal = statistics.fmean(ms_of_exit[index] for index in plan)
    return Throughput(batch, 1000 * batch / mixed_ms, 1000 * batch / ideal, 1000 * batch / plain_ms, ideal / mixed_ms)


# ------------------------------------------------------------------------------------------------- one policy


@dataclass(frozen=True)
class Study:
    """The calib split (for thresholds), the test split (for figures), the costs, and which early exits are empty."""

    calib: Replay
    test: Replay
    costs: CostModel
    exit_names: tuple[str, ...]
    empty: tuple[bool, ...]
    seed: int

    def budgets(self) -> list[float]:
        """Return `BUDGETS` mean costs, evenly spaced between the cost of the first exit and of the full path alone.

        The first exit is the first with a branch, if there is one. Both ends are excluded.
        """
        first = 0 if all(self.empty) else self.empty.index(False)
        # with all exits open, and with all early exits closed
        ends = self.costs.per_exit()[first], self.costs.per_exit([CLOSED] * len(self.empty))[-1]
        return np.linspace(*ends, BUDGETS + 2)[1:-1].tolist()


@dataclass(frozen=True)
class Compared:
    """A router on a split, with the coin and oracles at its cost."""

    choice: np.ndarray  # exits of the router, [n]
    router: Point
    chance: Point  # the coin
    # exits [n] and point of ``oracle`` (smallest error) and ``best_oracle`` (highest AP50)
    oracles: dict[str, tuple[np.ndarray, Point]]

    def leads(self, oracle: str, key: str = "AP50") -> tuple[float, float]:
        """Return the leads of router and oracle over the coin in ``AP50`` or ``AP``, NaN if there are no objects."""
        values = [getattr(point, key) for point in (self.router, self.chance, self.oracles[oracle][1])]
        router, chance, best = (np.nan if value is None else value for value in values)
        return router - chance, best - chance


def compare(study: Study, split: Replay, confidences: list[np.ndarray], thresholds: Sequence[float]) -> Compared:
    """Compare a router with the coin and oracles on a split. ``confidences`` is [n] for each early exit."""
    matches, costs = split.matches, study.costs.per_exit(thresholds)
    choice = choose(confidences, thresholds).astype(np.int64)
    router = point_of(matches, choice, costs)
    rows, errors = np.arange(len(choice)), errors_against_labels(matches, split.score)
    values = {
        "oracle": lambda exits: 1 - errors[rows, exits].mean(),
        "best_oracle": lambda exits: ap_of_choice(matches, exits, ap50_only=True).AP50,
    }
    oracles = {}
    for name, value in values.items():
        exits, exit_costs = oracle_over_exits(errors, study.costs.per_exit, router.cost, value)
        oracles[name] = exits, point_of(matches, exits, exit_costs)
    return Compared(choice, router, coin(matches, choice, costs, study.seed), oracles)


def evaluate_policy(study: Study, router: ExitRouter, name: str) -> tuple[dict[str, Any], list[Compared]]:
    """Return the entry of a policy in routing.json, and its comparison on the test photos at each budget."""
    calib, test = (split.confidences(router) for split in (study.calib, study.test))
    grid = threshold_grid(calib)
    mean_costs = grid.mean_cost(study.costs.of_each(grid.thresholds))
    ap50 = study.calib.ap50_of(grid.choices, f"thresholds of {name}")
    budgets, on_test, on_calib = [], [], []
    for budget in study.budgets():
        thresholds = grid.thresholds[best_within(mean_costs, -ap50, budget)]
        on_test.append(compare(study, study.test, test, thresholds))
        on_calib.append(compare(study, study.calib, calib, thresholds))
        budgets.append({"budget": budget, **_figures(study, on_test[-1], thresholds)})
    gaps = [figures["gap_closed"] for figures in budgets]
    pooled = _pooled_gaps(study, on_test)
    entry = {
        "budgets": budgets,
        "gap_closed": None if None in gaps else float(np.mean(gaps)),
        "pooled_gap": pooled["oracle"],
        "pooled_gap_of_best_oracle": pooled["best_oracle"],
        "pooled_gap_by_AP": _number(pooled_gap([compared.leads("best_oracle", "AP") for compared in on_test])),
        "calib_pooled_gap": _number(pooled_gap([compared.leads("best_oracle") for compared in on_calib])),
        "msdnet": [_at_shares(study, calib, test, msdnet_shares(len(study.exit_names), q)) for q in MSDNET_Q],
        "leak": _leak(study, calib, test, budgets),
    }
    return entry, on_test


def best_policy(policies: Mapping[str, Any]) -> str:
    """Return the policy that closes most of the gap on the calib photos. Nothing is chosen on test photos."""
    return max(policies, key=lambda name: _sortable(policies[name]["calib_pooled_gap"]))


def _sortable(gap: float | None) -> float:
    return float("-inf") if gap is None else gap


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def _figures(study: Study, compared: Compared, thresholds: np.ndarray) -> dict[str, Any]:
    """Return the figures of a budget on the test photos."""
    matches, choice = study.test.matches, compared.choice
    full = len(study.exit_names) - 1
    routed, kept = bootstrap_choices(matches, [choice, np.full(len(choice), full)], seed=study.seed)
    shares = np.bincount(choice, minlength=full + 1) / len(choice)
    return {
        "thresholds": thresholds.tolist(),
        **asdict(compared.router),
        "AP50_interval": interval(routed.AP50),
        "AP50_below_full_interval": interval(kept.AP50 - routed.AP50),
        "coin": asdict(compared.chance),
        **{name: asdict(point) for name, (_, point) in compared.oracles.items()},
        "gap_closed": _number(pooled_gap([compared.leads("oracle")])),
        "speedup": study.costs.speedup(choice, thresholds),
        "loss": float(study.test.losses("full")[np.arange(len(choice)), choice].mean()),
        "exit_share": dict(zip(study.exit_names, shares.tolist(), strict=True)),
    }


def _pooled_gaps(study: Study, budgets: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """Return for each oracle the pooled gap of all budgets and its bootstrap interval."""
    resampled, pooled = [], {}
    for compared in budgets:
        oracles = [exits for exits, _ in compared.oracles.values()]
        resampled.append(resampled_leads(study.test.matches, compared.choice, oracles, seed=study.seed))
    for name, draws in zip(budgets[0].oracles, zip(*resampled, strict=True), strict=True):
        value = _number(pooled_gap([compared.leads(name) for compared in budgets]))
        pooled[name] = {"value": value, "interval": None if value is None else interval(pooled_gap(draws))}
    return pooled


def _at_shares(
    study: Study, calib: list[np.ndarray], test: list[np.ndarray], shares: Sequence[float]
) -> dict[str, float | None]:
    """Return cost and AP50 on the test photos, with thresholds at which these shares of the calib photos leave."""
    thresholds = thresholds_for_shares(calib, shares)
    choice = choose(test, thresholds).astype(np.int64)
    return {
        "cost": float(study.costs.per_exit(thresholds)[choice].mean()),
        "AP50": ap_of_choice(study.test.matches, choice, ap50_only=True).AP50,
    }


def _leak(
    study: Study, calib: list[np.ndarray], test: list[np.ndarray], budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return for the exit shares of each budget the figures of thresholds from the confidences of the calib photos, and
    from those of the test photos themselves (DynamicDet), which leaks test data into the thresholds."""
    entries = []
    for entry in budgets:
        choice = choose(calib, entry["thresholds"])
        shares = (np.bincount(choice, minlength=len(study.exit_names)) / len(choice)).tolist()
        entries.append({"calib": _at_shares(study, calib, test, shares), "test": _at_shares(study, test, test, shares)})
    return entries


# ---------------------------------------------------------------------------------------------- all policies


@locks_folder("out")
def evaluate_routing(cfg: CfgNode, weights: str | Path, out: Path, policies: Sequence[str] = ()) -> dict[str, Any]:
    """Compare policies on DATA.TEST with thresholds from DATA.CALIB. Write routing.json, the table and the chart.

    Args:
        cfg: its DATA, ROUTING, CALIBRATION and EVAL sections are used.
        weights: a model.pth of this project.
        out: folder for the results and the recordings of the splits.
        policies: names of policies, all by default. ``max_foreground`` is added unless all exits are empty.

    Returns:
        The content of routing.json.

    Raises:
        EarlyExitError: the weights, data or settings are invalid, or splits share photos.
    """
    names = list(dict.fromkeys([REFERENCE_POLICY, *(policies or POLICIES)]))
    for name in names:
        POLICIES.find(name)
    recorded = open_model_on_splits(cfg, weights, out, needs_labels=("CALIB", "TEST"), include_near_duplicates=False)
    cfg, model = recorded.cfg, recorded.model
    for name in policies:
        require_deciding(name, model.empty, weights)
    if all(model.empty):  # only policies that read taps can route
        names = [name for name in names if reads_taps(name)]
    calib, test = recorded.replay("CALIB"), recorded.replay("TEST")
    on_train = [name for name in names if POLICIES[name].needs_training_photos]
    train = recorded.replay("TRAIN") if on_train else None
    temperatures = temperatures_of(fit_temperatures(cfg, calib), model.exit_names)
    routers = {
        name: fit_router(cfg, name, temperatures, train if name in on_train else calib, cross_fit=False)[0]
        for name in names
    }
    # timed before the evaluation, which fragments the memory and would change the times
    scoring_ms = _scoring_ms(cfg, routers, test)
    # one cost model for all policies, so that their budgets are equal
    costs = measure_cost_model(cfg, model, routers[names[0]])
    study = Study(calib, test, costs, model.exit_names, tuple(model.empty), cfg.SEED)
    entries, compared = {}, {}
    for name, router in routers.items():
        entries[name], compared[name] = evaluate_policy(study, router, name)
    best, errors = best_policy(entries), errors_against_labels(test.matches, test.score)
    for name in {best, REFERENCE_POLICY} & set(entries):
        _add_intervals(study, entries[name], compared[name])
    results = {
        "context": _context(cfg, study),
        "exits": _exits(study),
        "throughput": _throughput(cfg, model, routers[best], entries[best]["budgets"]),
        "overthinking": dict(zip(model.exit_names, overthinking(errors), strict=False)),
        "scoring_ms": scoring_ms,
        "best": best,
        "policies": entries,
        "learnt_thresholds": {best: _with_learnt_thresholds(cfg, study, routers[best])},
    }
    write_text(out / "routing.md", routing_table(results) + "\n")
    write_image(out / "routing.png", routing_chart(results))
    write_json(out / "routing.json", results)
    return results


def _context(cfg: CfgNode, study: Study) -> dict[str, Any]:
    return {
        "calib": list(cfg.DATA.CALIB),
        "test": list(cfg.DATA.TEST),
        "calib_photos": study.calib.matches.photos,
        "images": study.test.matches.photos,
        "score": cfg.EVAL.SCORE,
        "iou": cfg.EVAL.IOU,
        "seed": cfg.SEED,
        "reference": cfg.CALIBRATION.REFERENCE,
        "cost_model": asdict(study.costs.certified()),
    }


def _ap_intervals(study: Study, choices: Sequence[np.ndarray]) -> list[dict[str, tuple[float, float] | None]]:
    """Return bootstrap intervals of AP and AP50 on the test photos for each of ``choices``, exits [n]."""
    resampled = bootstrap_choices(study.test.matches, choices, seed=study.seed, ap50_only=False)
    return [{"AP_interval": interval(draws.AP), "AP50_interval": interval(draws.AP50)} for draws in resampled]


def _add_intervals(study: Study, policy: dict[str, Any], budgets: Sequence[Compared]) -> None:
    """Add the intervals of router, a toss of the coin and oracles to every budget of a ``policy`` entry."""
    for entry, compared in zip(progress(policy["budgets"], desc="intervals"), budgets, strict=True):
        oracles = [exits for exits, _ in compared.oracles.values()]
        choices = [compared.choice, *tosses(compared.choice, 1, study.seed), *oracles]
        rows = [entry, entry["coin"], *(entry[name] for name in compared.oracles)]
        for row, intervals in zip(rows, _ap_intervals(study, choices), strict=True):
            row.update(intervals)


def _exits(study: Study) -> list[dict[str, Any]]:
    """Return the figures of every exit alone, with the exits before it closed."""
    choices = [np.full(study.test.matches.photos, index) for index in range(len(study.exit_names))]
    entries = []
    for index, (name, intervals) in enumerate(zip(study.exit_names, _ap_intervals(study, choices), strict=True)):
        only = [CLOSED] * index + [0.0] * (len(study.exit_names) - 1 - index)
        point = point_of(study.test.matches, choices[index], study.costs.per_exit(only))
        entries.append({"name": name, **asdict(point), **intervals})
    return entries


def _scoring_ms(cfg: CfgNode, routers: Mapping[str, ExitRouter], replay: Replay) -> dict[str, float]:
    """Return milliseconds per photo of each policy at the last early exit with a branch, or at the last early exit."""
    early = range(replay.early_exits)
    last = max((index for index in early if not replay.empty[index]), default=early[-1])
    signals = next(replay.signals(last))
    timings = time_scoring(list(routers.values()), signals, last, cfg.EVAL.TIMING_THREADS)
    return {name: timing.ms for name, timing in zip(routers, timings, strict=True)}


def _throughput(
    cfg: CfgNode, model: EarlyExitSSDLite, router: ExitRouter, budgets: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the throughput of mixed batches with the exit shares of each budget, in eager PyTorch."""
    threads, device, timed = cfg.EVAL.TIMING_THREADS, next(model.parameters()).device, []
    router = ExitRouter(**router.to_dict()).to(device)  # a copy, because the caller's router must not move
    for entry in progress(budgets, desc="batches"):
        shares = entry["exit_share"]
        speed = mixed_throughput(model, router, list(shares.values()), threads=threads)
        timed.append({"budget": entry["budget"], "exit_share": shares, "threads": threads, **asdict(speed)})
    return timed


def _with_learnt_thresholds(cfg: CfgNode, study: Study, router: ExitRouter) -> list[dict[str, Any]]:
    """Return the figures at the same budgets with thresholds learnt by gradient descent instead of a search."""
    calib, test = (split.confidences(router) for split in (study.calib, study.test))
    costs_with, losses = study.costs.per_exit, study.calib.losses(cfg.CALIBRATION.REFERENCE)
    entries = []
    for budget in progress(study.budgets(), desc="learnt thresholds"):
        thresholds = learn_open_exits(calib, losses, costs_with, budget)
        choice = choose(test, thresholds).astype(np.int64)
        point = point_of(study.test.matches, choice, costs_with(thresholds))
        entries.append({"budget": budget, "thresholds": thresholds.tolist(), **asdict(point)})
    return entries


# --------------------------------------------------------------------------------------------- tables and chart


def routing_table(results: Mapping[str, Any]) -> str:
    """Return routing.md: policies at every budget, exits alone, published rules, intervals and batches."""
    context, policies, best = results["context"], results["policies"], results["best"]
    unit = context["cost_model"]["unit"]
    alone = [
        (entry["name"], f"{entry['cost']:.1f}", with_interval(entry, "AP"), with_interval(entry, "AP50"))
        for entry in results["exits"]
    ]
    plain = ("without exits", f"{context['cost_model']['plain']:.1f}", "", "")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in results["overthinking"].items())
    parts = [
        f"AP50 on {', '.join(context['test'])} (n {context['images']}, seed {context['seed']}); thresholds from "
        f"{', '.join(context['calib'])} (n {context['calib_photos']}). In brackets: mean cost on the test photos, "
        f"{unit}.",
        "*Gap closed* is the mean over the budgets of (policy - coin) / (oracle - coin). *Pooled* adds up the leads of "
        "all budgets before it divides. The next two columns are pooled, too, with the best oracle instead: by AP50 "
        "and by AP. *On calib* is the first of these two on the calibration photos; it chooses the policy. *ms* is the "
        "time to score one photo in eager PyTorch.",
        _policies_table(results),
        _table(["exit alone", "cost", "AP [95 %]", "AP50 [95 %]"], [*alone, plain]),
        f"Photos that an early exit gets wholly right and the full path does not: {shares}.",
        "Published rules on the same exits and photos, AP50:",
        published_rules_table(policies, best, unit),
        "With 95 % intervals (bootstrap over photos):",
        reference_lines_table(policies, best),
        _throughput_table(results["throughput"]),
    ]
    return "\n\n".join(parts)


def _policies_table(results: Mapping[str, Any]) -> str:
    """Return AP50 and cost at every budget, gap and scoring time for each policy, and the references of the best."""
    policies, best = results["policies"], results["best"]
    budgets = [f"budget {entry['budget']:.1f}" for entry in policies[best]["budgets"]]
    heads = ["policy", *budgets, "gap closed", "pooled", "best oracle", "by AP", "on calib", "ms"]
    rows = []
    for name in sorted(policies, key=lambda name: _sortable(policies[name]["calib_pooled_gap"]), reverse=True):
        cells = map(_cell, policies[name]["budgets"])
        rows.append([name, *cells, *gap_cells(policies[name]), f"{results['scoring_ms'][name]:.2f}"])
    if best in results.get("learnt_thresholds", {}):
        cells = map(_cell, results["learnt_thresholds"][best])
        rows.append([f"{best}, thresholds learnt with a soft exit", *cells, *["-"] * 5, ""])
    for key, name in COIN_AND_ORACLES.items():
        cells = [_cell(entry[key]) for entry in policies[best]["budgets"]]
        rows.append([f"{name} at the cost of {best}", *cells, *[""] * 6])
    return _table(heads, rows)


def published_rules_table(policies: Mapping[str, Any], best: str, unit: str) -> str:
    """Return a table of AP50 at the mean costs of the policy ``best``, interpolated, "-" outside a curve. ``policies``
    are the entries of routing.json by name, and ``unit`` is the unit of the costs."""
    entries, leaks = policies[best]["budgets"], policies[best]["leak"]
    costs = [entry["cost"] for entry in entries]
    rows = [(f"{best}, searched thresholds", [entry["AP50"] for entry in entries])]
    if BRANCHYNET in policies and best != BRANCHYNET:
        rows.append(("BranchyNet: entropy, searched thresholds", _at(costs, policies[BRANCHYNET]["budgets"])))
    if MSDNET in policies and best != MSDNET:
        rows.append(("MSDNet: shares q^k of max_foreground", _at(costs, policies[MSDNET]["msdnet"])))
    rows.append((f"MSDNet: shares q^k of {best}", _at(costs, policies[best]["msdnet"])))
    rows.append((f"percentiles of {best} from calib", [leak["calib"]["AP50"] for leak in leaks]))
    rows.append(("DynamicDet: the same percentiles of the reported photos", [leak["test"]["AP50"] for leak in leaks]))
    heads = ["rule", *(f"{cost:.0f} {unit}" for cost in costs)]
    return _table(heads, [[name, *map(figure, values)] for name, values in rows])


def _at(costs: Sequence[float], points: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return AP50 at each cost, interpolated between points (``cost``, ``AP50``), None outside."""
    curve = sorted((point["cost"], point["AP50"]) for point in points if point["AP50"] is not None)
    if not curve:
        return [None] * len(costs)
    x, y = zip(*curve, strict=True)
    return [float(np.interp(cost, x, y)) if x[0] <= cost <= x[-1] else None for cost in costs]


def reference_lines_table(policies: Mapping[str, Any], best: str) -> str:
    """Return a table of AP and AP50 with 95 % intervals at every budget, for the policy ``best``, coin and oracles at
    its cost, and other policies with intervals."""
    first = policies[best]["budgets"]
    others = {name: entry["budgets"] for name, entry in policies.items() if name != best}
    lines = {best: first} | {name: [entry[key] for entry in first] for key, name in COIN_AND_ORACLES.items()}
    lines |= {name: entries for name, entries in others.items() if "AP_interval" in entries[0]}
    rows = [
        [name, key, *(with_interval(entry, key) for entry in entries)]
        for name, entries in lines.items()
        for key in ("AP", "AP50")
    ]
    return _table(["line", "figure", *(f"budget {entry['budget']:.1f}" for entry in first)], rows, left=2)


def _throughput_table(speeds: Sequence[Mapping[str, Any]]) -> str:
    batch, threads = speeds[0]["batch"], speeds[0]["threads"]
    rows = [
        ("mixed", *(f"{speed['mixed']:.1f}" for speed in speeds)),
        ("share of ideal", *(f"{100 * speed['share_of_ideal']:.0f} %" for speed in speeds)),
        ("without exits", *(f"{speed['plain']:.1f}" for speed in speeds)),
    ]
    return (
        f"Batches of {batch} with exits mixed as at each budget, eager PyTorch with BatchNorm fused, {threads} "
        "thread(s). Ideal: every photo is as fast as in a batch that leaves together.\n\n"
    ) + _table(["photos/s", *(f"budget {speed['budget']:.1f}" for speed in speeds)], rows)


def gap_cells(policy: Mapping[str, Any]) -> list[str]:
    """Return the cells of the mean gap, the pooled gaps by both oracles and by AP, and the gap on the calib photos."""
    pooled = []
    for gap in (policy["pooled_gap"], policy["pooled_gap_of_best_oracle"]):
        bounds = gap["interval"]  # None if no bootstrap draw of few photos has a gap
        pooled.append(figure(gap["value"], 2) + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""))
    others = [figure(policy[key], 2) for key in ("pooled_gap_by_AP", "calib_pooled_gap")]
    return [figure(policy["gap_closed"], 2), *pooled, *others]


def with_interval(entry: Mapping[str, Any], key: str) -> str:
    """Return a figure with its interval, such as ``0.713 [0.678, 0.751]``, or without it if there is none."""
    bounds = entry[f"{key}_interval"]
    return figure(entry[key]) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _cell(entry: Mapping[str, Any]) -> str:
    return f"{figure(entry['AP50'])} ({entry['cost']:.1f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table. The first ``left`` columns are left-aligned, the others right-aligned."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def routing_chart(results: Mapping[str, Any]) -> Image.Image:
    """Draw AP50 against mean cost for policies, coin, oracles and each exit alone."""

    def draw(all_axes: np.ndarray) -> None:
        axes = all_axes[0, 0]
        policies, cost_model = results["policies"], results["context"]["cost_model"]
        for color, (name, policy) in zip(COLORS * 3, policies.items(), strict=False):
            _draw_line(axes, policy["budgets"], color=color, marker="o", markersize=4, linewidth=1.2, label=name)
        for (key, name), style in zip(COIN_AND_ORACLES.items(), (":", "--", "-."), strict=True):
            entries = [entry[key] for entry in policies[results["best"]]["budgets"]]
            _draw_line(axes, entries, color=GREY, linestyle=style, label=name)
        for entry in results["exits"]:
            if entry["AP50"] is not None:
                axes.plot(entry["cost"], entry["AP50"], color=GREY, marker="s", linestyle="")
                axes.annotate(entry["name"], (entry["cost"], entry["AP50"]), (5, -10), textcoords="offset points")
        axes.axvline(cost_model["plain"], color=GREY, linewidth=0.8)
        axes.set_xlabel(f"mean cost per photo, {cost_model['unit']} (line: without exits)")
        axes.set_ylabel("AP50")
        axes.legend(frameon=False, fontsize=8)

    return draw_charts(draw)


def _draw_line(axes: Axes, entries: Sequence[Mapping[str, Any]], **style: Any) -> None:
    points = sorted((entry["cost"], entry["AP50"]) for entry in entries if entry["AP50"] is not None)
    axes.plot([cost for cost, _ in points], [value for _, value in points], **style)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, evaluate and print the table. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth of this project; by default the one in OUTPUT_DIR")
    parser.add_argument("--out", required=True, help="folder for routing.json, the table, the chart and the recordings")
    parser.add_argument("--policies", default="", help="names of policies, separated by commas; all by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        policies = args.policies.split(",") if args.policies else []
        print(routing_table(evaluate_routing(cfg, weights, Path(args.out), policies)))
        print(f"\nresults: {args.out}/ (routing.json, routing.md, routing.png)")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Check on many random splits how often the guarantee of a risk certificate holds, and what the guarantee costs.

The photos of the calib and test splits are pooled. For each random split, a certificate is made on one part and tested
on the other. The path of thresholds and fitted policies come from the train split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from scipy import stats

from earlyexit_ssd.calibration.risk import certify, threshold_path
from earlyexit_ssd.calibration.thresholds import choose
from earlyexit_ssd.config import load_config
from earlyexit_ssd.console import progress, run_tool
from earlyexit_ssd.errors import EarlyExitError
from earlyexit_ssd.files import locks_folder, write_json
from earlyexit_ssd.pipeline.build import require_policy, trained_temperatures
from earlyexit_ssd.pipeline.calibrate import CalibrationTarget
from earlyexit_ssd.pipeline.replay import fit_router, measure_cost_model, open_model_on_splits, require_deciding

EPSILONS = (0.01, 0.02, 0.05)
EXAMPLES = """
example:
  python benchmarks/check_guarantee.py --config configs/voc_animals.yaml --out output/guarantee \\
      ROUTING.POLICY learned_gain

With the --out folder of benchmarks/routing_policies.py, its recordings are used. See benchmarks/README.md.
"""


@dataclass(frozen=True)
class Resplits:
    """Results over many random splits into calibration and test photos."""

    epsilon: float
    delta: float
    splits: int
    exceeded: float  # share of the splits in which the mean loss of the test photos was above epsilon
    tolerance: float  # 97.5 % quantile of binomial(splits, delta) / splits, which ``exceeded`` can reach by chance
    opened: float  # share of the splits in which any exit was opened
    speedup: float  # compared with the detector without exits, on the test photos, mean over the splits
    # the same for thresholds chosen on the test photos: the cheapest step of the path with a loss of at most epsilon
    best_speedup: float


def check_certificates(
    path: np.ndarray,
    confidences: Sequence[np.ndarray],
    losses: np.ndarray,
    costs: np.ndarray,
    plain: float,
    *,
    calibration: int,
    epsilon: float,
    delta: float,
    method: str,
    splits: int = 1000,
    seed: int = 0,
) -> Resplits:
    """Certify on ``calibration`` photos of a random split and measure on the others, ``splits`` times.

    Args:
        path: thresholds [steps, early exits] from other photos, from the safest step to the cheapest.
        confidences: for each early exit, [n].
        losses: [n, exits].
        costs: costs of the exits at each step of the path, [steps, exits].
        plain: cost of the detector without exits.
    """
    generator, rows = np.random.default_rng(seed), np.arange(len(losses))
    choices = np.stack([choose(confidences, thresholds) for thresholds in path])
    risks = losses[rows, choices]  # [steps, n]
    photo_costs = np.take_along_axis(costs, choices.astype(np.int64), axis=1)  # [steps, n]
    exceeded, opened, speedups, best = 0, 0, [], []
    for _ in progress(range(splits), desc=f"re-splits at {epsilon:g}"):
        order = generator.permutation(len(losses))
        calib, test = order[:calibration], order[calibration:]
        on_calib = [values[calib] for values in confidences]
        # the photos are in random order already, so no seed is needed
        step = certify(path, on_calib, losses[calib], costs, epsilon, delta, method, seed=None).step
        test_risks = risks[:, test].mean(1)
        exceeded += bool(test_risks[step] > epsilon)
        opened += step > 0
        speedups.append(plain / photo_costs[step, test].mean())
        best.append(plain / photo_costs[:, test].mean(1)[test_risks <= epsilon].min())
    return Resplits(
        epsilon=epsilon,
        delta=delta,
        splits=splits,
        exceeded=exceeded / splits,
        tolerance=float(stats.binom.ppf(0.975, splits, delta)) / splits,
        opened=opened / splits,
        speedup=float(np.mean(speedups)),
        best_speedup=float(np.mean(best)),
    )


@locks_folder("out")
def check_guarantee(
    cfg: CfgNode, weights: str | Path, out: Path, delta: float = 0.05, splits: int = 1000
) -> dict[str, Any]:
    """Check certificates at `EPSILONS` on the photos of DATA.CALIB and DATA.TEST, and write guarantee.json.

    The temperatures are those of the training, as in a certificate.

    Returns:
        The content of guarantee.json: ``context`` and, for each epsilon, a `Resplits` as a dict.

    Raises:
        EarlyExitError: the weights, data or settings are invalid, or splits share photos.
    """
    if splits < 1:
        raise EarlyExitError(f"--splits is {splits}, expected at least 1")
    for epsilon in EPSILONS:
        CalibrationTarget("risk", epsilon, delta)  # raises if the values are impossible
    require_policy(cfg)
    both, by_labels = ("CALIB", "TEST"), cfg.CALIBRATION.REFERENCE == "labels"
    needs_labels = both if by_labels else ("CALIB",)
    recorded = open_model_on_splits(
        cfg, weights, out, needs_labels=needs_labels, unlabelled=not by_labels, deduplicate=both
    )
    cfg, model, reference = recorded.cfg, recorded.model, cfg.CALIBRATION.REFERENCE
    require_deciding(cfg.ROUTING.POLICY, model.empty, weights)
    calib, test, train = (recorded.replay(name) for name in ("CALIB", "TEST", "TRAIN"))
    temperatures = trained_temperatures(cfg, recorded.info, model.num_early_exits)
    router, on_train = fit_router(cfg, cfg.ROUTING.POLICY, temperatures, train, cross_fit=False)
    costs = measure_cost_model(cfg, model, router)
    path = threshold_path(on_train, train.losses(reference), costs.of_each)
    pairs = zip(calib.confidences(router), test.confidences(router), strict=True)
    confidences = [np.concatenate(pair) for pair in pairs]
    losses = np.concatenate([calib.losses(reference), test.losses(reference)])
    bound, photos = cfg.CALIBRATION.BOUND, len(calib)
    settings = {"calibration": photos, "delta": delta, "method": bound, "splits": splits, "seed": cfg.SEED}
    arguments = (path, confidences, losses, costs.of_each(path), costs.plain)
    resplits = [check_certificates(*arguments, epsilon=epsilon, **settings) for epsilon in EPSILONS]
    context = {
        "policy": cfg.ROUTING.POLICY,
        "bound": bound,
        "reference": reference,
        "photos": len(losses),
        "calibration_photos": photos,
        "seed": cfg.SEED,
        "cost_model": asdict(costs.certified()),
    }
    results = {"context": context, "resplits": [asdict(entry) for entry in resplits]}
    write_json(out / "guarantee.json", results)
    return results


def guarantee_report(results: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row for each epsilon."""
    context = results["context"]
    lines = [
        f"Policy {context['policy']}, bound {context['bound']}, loss against {context['reference']}: "
        f"{context['calibration_photos']} of {context['photos']} photos calibrate, the rest test, "
        f"{results['resplits'][0]['splits']} random splits, seed {context['seed']}.",
        "",
        "| epsilon | test loss above it | at most (delta, chance) | exits opened | speed-up | by the test answers |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in (Resplits(**entry) for entry in results["resplits"]):
        lines.append(
            f"| {row.epsilon:g} | {100 * row.exceeded:.1f} % | {100 * row.tolerance:.1f} % | {100 * row.opened:.0f} % "
            f"| {row.speedup:.2f} | {row.best_speedup:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run the check and print the table. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth of this project; by default the one in OUTPUT_DIR")
    parser.add_argument("--out", required=True, help="folder for guarantee.json and the recordings")
    parser.add_argument("--delta", type=float, default=0.05, help="probability that the risk may exceed epsilon; 0.05")
    parser.add_argument("--splits", type=int, default=1000, help="number of random splits; 1000")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        print(guarantee_report(check_guarantee(cfg, weights, Path(args.out), args.delta, args.splits)))
        print(f"\nresults: {args.out}/guarantee.json")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Measure a cascade of two input sizes: photos with high confidence at the small size skip the large size.

Both sizes run the whole detector. A share of the calib photos, those with the highest confidence, leaves at the small
size. For every pair of sizes and every policy the table has cost, AP50 and AP, and the differences to a single size at
the same cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch

from earlyexit_ssd.config import load_config
from earlyexit_ssd.console import run_tool
from earlyexit_ssd.data import build_loader, load_dataset, to_coco
from earlyexit_ssd.evaluation.cost import PlainPath, count_mmacs, example_input
from earlyexit_ssd.evaluation.matches import ap_of_choice, exit_matches
from earlyexit_ssd.evaluation.outputs import on_cpu, over_batches
from earlyexit_ssd.modeling import load_model
from earlyexit_ssd.routing import POLICIES

RULES = ("ambiguous_mass", "entropy", "margin", "max_foreground", "emptiness")
SHARES = (0.3, 0.5, 0.7)

EXAMPLES = """
examples:
  %(prog)s --config configs/voc_animals.yaml --weights output/optimize/fine_tuned/*/model.pth DATA.ROOT photos
      the detector that `earlyexit optimize --train` fine-tuned for several sizes
"""


def job(args: argparse.Namespace) -> None:
    """Run every size once. Then print a row for each pair of sizes, policy and share."""
    cfg = load_config(args.config, args.overrides)
    dataset, (trained, architecture, *_) = load_dataset(cfg, cfg.DATA.CALIB), load_model(args.weights)
    state, sizes = trained.state_dict(), sorted(args.sizes)
    detections, confidences, costs = [], {rule: [] for rule in RULES}, []
    for size in sizes:
        own = architecture.trained_size or architecture.image_size
        model = dataclasses.replace(architecture, image_size=size, trained_size=own).build().eval()
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        costs.append(count_mmacs(PlainPath(model), example_input(model)))

        def of_batch(images, targets, model=model):
            outputs, last = model.exit_outputs(images), len(model.exit_names) - 1
            detected = [on_cpu(result) for result in model.detections(outputs, last)]
            scores = torch.stack([POLICIES[rule](outputs.signals(last), last) for rule in RULES], 1).tolist()
            image_ids = [int(target["image_id"]) for target in targets]
            return list(zip(image_ids, detected, scores, strict=True))

        loader = build_loader(dataset, 16, cfg.DATA.WORKERS, False, cfg.SEED)
        rows = itertools.chain.from_iterable(over_batches(model, loader, of_batch, f"{size} px"))
        rows = sorted(rows, key=lambda row: row[0])
        detections.append({image_id: detected for image_id, detected, _ in rows})
        for index, rule in enumerate(RULES):
            confidences[rule].append(np.array([scores[index] for *_, scores in rows]))
    matches = exit_matches(to_coco(dataset), detections)
    alone = [ap_of_choice(matches, np.full(len(dataset), index)) for index in range(len(sizes))]
    print(f"{len(dataset)} photos of {', '.join(cfg.DATA.CALIB)}\n")
    print("| sizes | policy | leave | MMAC | AP50 | AP |\n|---|---|---|---|---|---|")
    for size, cost, metrics in zip(sizes, costs, alone, strict=True):
        print(f"| {size} | - | - | {cost:.0f} | {metrics.AP50:.3f} | {metrics.AP:.3f} |")
    pairs = itertools.combinations(range(len(sizes)), 2)
    for rule, (small, large), share in itertools.product(RULES, pairs, SHARES):
        order = np.argsort(-confidences[rule][small], kind="stable")
        choice = np.full(len(dataset), large)
        choice[order[: round(share * len(order))]] = small
        metrics, cost = ap_of_choice(matches, choice), costs[small] + (1 - share) * costs[large]
        cells = []
        for key in ("AP50", "AP"):
            value = getattr(metrics, key)
            single = np.interp(cost, costs, [getattr(other, key) for other in alone])
            cells.append(f"{value:.3f} ({value - single:+.3f})")
        print(f"| {sizes[small]}, {sizes[large]} | {rule} | {share:.0%} | {cost:.0f} | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; its DATA.CALIB is measured")
    parser.add_argument("--weights", required=True, help="a detector that was trained at several sizes")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128, 160, 192, 224, 256, 272, 320], help="input sides, pixels"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the configuration")
    args = parser.parse_args(arguments)
    return run_tool(lambda: job(args))


if __name__ == "__main__":
    sys.exit(main())

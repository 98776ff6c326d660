#!/usr/bin/env python
"""Hold routing policies against a coin and an oracle at five equal mean costs; thresholds come from the calib split."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.pipeline.evaluate_routing import evaluate_routing
from earlyexit_ssd.report.routing import routing_table

EXAMPLES = """
examples:
  python tools/eval_routing.py --config configs/voc_animals.yaml --out results/routing
      every policy, with the model that train_net.py left in OUTPUT_DIR
  python tools/eval_routing.py --config configs/voc_animals.yaml --weights model.pth --out results/routing \\
      --policies ambiguous_mass,learned_gain EVAL.RUNTIME onnxruntime
      two of them beside max_foreground, costs in ONNX Runtime

The network runs once per photo; the second time the recordings in the results folder are used. See docs/routing.md.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth, or a checkpoint with exits; by default that of OUTPUT_DIR")
    parser.add_argument("--out", required=True, help="folder for routing.json, the table, the chart and the recordings")
    parser.add_argument("--policies", default="", help="names with commas between; by default all that there are")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        print(
            routing_table(evaluate_routing(cfg, weights, args.out, args.policies.split(",") if args.policies else []))
        )
        print(f"\nresults: {args.out}/ (routing.json, routing.md, routing.png)")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

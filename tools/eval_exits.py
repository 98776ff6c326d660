#!/usr/bin/env python
"""Evaluate every exit of a trained detector, the routed one and static rivals; say which of them is worth shipping."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline import evaluate_model
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.report.tables import text_report

EXAMPLES = """
examples:
  python tools/eval_exits.py --config configs/quickstart.yaml --out results
      the model that train_net.py left in the configuration's OUTPUT_DIR, on its test split
  python tools/eval_exits.py --config configs/voc_animals.yaml --weights model.pth --out results \\
      ROUTING.POLICY max_foreground ROUTING.THRESHOLDS "(0.5, 0.7)"
      other weights, another routing
  python tools/eval_exits.py --config configs/voc_animals.yaml --out results EVAL.RUNTIME onnxruntime \\
      EVAL.RIVALS.ONNX "['yolox:yolox_nano.onnx']" EVAL.RIVALS.SINGLE_EXITS "[output/exit12/model.pth]"
      more rivals than the plain net at smaller inputs and each exit alone; all timed in ONNX Runtime

How to read the figures: docs/metrics.md
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the test split (DATA.TEST)")
    parser.add_argument("--weights", help="a model.pth, or a checkpoint with exits; by default that of OUTPUT_DIR")
    parser.add_argument("--out", required=True, help="folder for metrics.json, the table, the charts and the pictures")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        print(text_report(evaluate_model(cfg, weights, args.out)))
        print(f"\nresults: {args.out}/ (metrics.json, table, charts, pictures)")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

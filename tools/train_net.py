#!/usr/bin/env python
"""Train a detector with early exits, phase by phase, each with its gate, and evaluate it."""

from __future__ import annotations

import argparse
import sys

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline import train
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.report.tables import text_report

EXAMPLES = """
examples:
  python tools/train_net.py --config configs/quickstart.yaml
      render a synthetic data set, train everything from scratch, evaluate: no download, minutes on a CPU
  python tools/train_net.py --config configs/voc_animals.yaml DATA.ROOT ~/data MODEL.WEIGHTS COCO_V1
      put exits on torchvision's COCO detector for seven classes
  python tools/train_net.py --config my.yaml --resume
      go on with a run that was stopped or killed
  torchrun --nproc-per-node 2 tools/train_net.py --config my.yaml
      two processes on one global batch

exit codes: 0 done, 2 bad input, 3 a gate failed (the figures and what to try are printed), 130 stopped by a signal
Every key and its default: docs/config.md
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; configs/ has examples")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    parser.add_argument("--force", action="store_true", help="go on past a failed gate; every later report says so")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        results = train(cfg, args.resume, args.force)
        if results:
            print(text_report(results))
            print(f"\nresults: {cfg.OUTPUT_DIR}/ (metrics.json, model.pth, pictures)")

    return run_tool(job, after_a_stop="go on with --resume")


if __name__ == "__main__":
    sys.exit(main())

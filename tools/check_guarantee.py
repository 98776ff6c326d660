#!/usr/bin/env python
"""Try the risk certificate on many random splits of calibration and test photos: does it hold, what does it cost?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.check_guarantee import check_guarantee
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.report.guarantee import guarantee_report

EXAMPLES = """
example:
  python tools/check_guarantee.py --config configs/voc_animals.yaml --out results/guarantee ROUTING.POLICY learned_gain

Give it the folder of tools/eval_routing.py to use its recordings. See docs/routing.md.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, simulate, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that names the splits (DATA)")
    parser.add_argument("--weights", help="a model.pth, or a checkpoint with exits; by default that of OUTPUT_DIR")
    parser.add_argument("--out", required=True, help="folder for guarantee.json and the recordings")
    parser.add_argument("--delta", type=float, default=0.05, help="0.05")
    parser.add_argument("--splits", type=int, default=1000, help="1000")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        weights = args.weights or Path(cfg.OUTPUT_DIR) / "model.pth"
        print(guarantee_report(check_guarantee(cfg, weights, args.out, delta=args.delta, splits=args.splits)))
        print(f"\nresults: {args.out}/guarantee.json")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

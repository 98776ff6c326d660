#!/usr/bin/env python
"""Say where exits can pay on this machine: cost, ceiling of the speed-up, and with probes the expected AP50."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.pipeline.plan import ALL_LAYERS, plan_exits
from earlyexit_ssd.report.charts import placement_report

EXAMPLES = """
examples:
  python tools/plan_exits.py --config configs/voc_animals.yaml --speedup 1.5
      cost of an exit behind every layer and what it can save, in minutes; no photo is read (with MODEL.WEIGHTS "" not
      even weights)
  python tools/plan_exits.py --config configs/voc_animals.yaml --layers 4 6 8 10 12 --probe-epochs 3
      train probe branches too (minutes, on cached taps) and propose one or two exits
  python tools/plan_exits.py --config configs/voc_animals.yaml --speedup 1.5 EVAL.RUNTIME onnxruntime
      the same in ONNX Runtime, where you will run it (pip install -e '.[deploy]')

The probes are judged on the calib split (DATA.CALIB). Configurations may leave EXITS.LAYERS as it is.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; configs/ has examples")
    parser.add_argument("--layers", type=int, nargs="+", default=ALL_LAYERS, help="trunk layers to look at; 1 to 12")
    parser.add_argument("--speedup", type=float, default=2.0, help="wanted, against the detector without exits; 2.0")
    parser.add_argument("--probe-epochs", type=int, default=0, help="epochs of the probe branches; 0 trains none")
    parser.add_argument("--out", help="folder of the results; OUTPUT_DIR/placement by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.overrides)
        out = Path(args.out or Path(cfg.OUTPUT_DIR) / "placement")
        print(placement_report(plan_exits(cfg, out, args.layers, args.speedup, args.probe_epochs)))
        print(f"\nresults: {out}/ (placement.json, table, chart)")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

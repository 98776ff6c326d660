#!/usr/bin/env python
"""Make a trained model one that comes with the package: fp16 weights and their description, under 12 MB."""

from __future__ import annotations

import argparse
import sys

from earlyexit_ssd.config import load_config
from earlyexit_ssd.modeling.checkpoint import FOLDER
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.pipeline.ship import ship_weights

EXAMPLES = """
examples, in this order:
  python tools/export_weights.py output/chair/model.pth --name chair --config configs/chair.yaml
      writes chair.pth and chair.json into earlyexit_ssd/weights; the routing is the configuration's
  python tools/eval_exits.py --config configs/chair.yaml --weights earlyexit_ssd/weights/chair.pth \\
      --out docs/results/zoo_chair_coco DATA.TEST "[coco_2017_val]"
      measures these very weights, once for each test set
  python tools/export_weights.py output/chair/model.pth --name chair --config configs/chair.yaml \\
      --metrics docs/results/zoo_chair_*/metrics.json
      the same weights to the byte, and the figures in chair.json
  python -m earlyexit_ssd.report.tables docs/model_zoo.md
      writes the tables of the model zoo anew
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, print size and sha256."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model.pth of a finished run")
    parser.add_argument("--name", required=True, help="what from_pretrained will call it, such as voc_animals")
    parser.add_argument("--config", required=True, help="YAML file of the run; its ROUTING section is stored")
    parser.add_argument("--metrics", nargs="+", default=[], help="metrics.json files measured with the shipped weights")
    parser.add_argument("--recipe", help="command that trains it; by default train_net.py with --config and overrides")
    parser.add_argument("--out", default=FOLDER, help="folder of the two files; the package's own by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_args(arguments)

    def job() -> None:
        cfg = load_config(args.config, args.set)
        recipe = args.recipe or " ".join(["python tools/train_net.py --config", args.config, *args.set])
        shipped = ship_weights(args.model, args.name, args.out, cfg, recipe, args.metrics)
        print(f"{shipped.weights}: {shipped.size} bytes, sha256 {shipped.sha256}")
        print(f"{shipped.description}: figures of {len(args.metrics)} test sets")

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

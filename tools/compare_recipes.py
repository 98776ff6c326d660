#!/usr/bin/env python
"""Hold recipes for the exits against each other: AP50 per exit on the calib split, cost, parameters and minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from earlyexit_ssd.config import load_config
from earlyexit_ssd.pipeline.command_line import run_tool
from earlyexit_ssd.pipeline.recipes import compare_recipes, read_recipes
from earlyexit_ssd.report.recipes import recipe_table

EXAMPLES = """
A file of recipes has a line for each, keys as on a command line:

  _ALL_: {EXITS.LAYERS: [8], EXITS_PHASE.EPOCHS: 5}      (for every recipe, and may be missing)
  as it is: {}
  thinner: {EXITS.COPY: [0.25]}
  focal: {LOSS.CLASSIFICATION: focal}

examples:
  python tools/compare_recipes.py --config configs/voc_animals.yaml --recipes configs/recipes/exit8.yaml
      train the branches by every recipe, on taps that are computed once
  python tools/compare_recipes.py --config configs/voc_animals.yaml --recipes mine.yaml --seeds 0 1 2
      three seeds each: mean and range

Stop it at any time: the same command goes on, and trains only what is new in the file. The taps stay in the folder
(taps/, gigabytes); delete them when you are done. The test split is not looked at.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, compare, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that every recipe starts from")
    parser.add_argument("--recipes", required=True, help="YAML file of recipes; configs/recipes/ has examples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each recipe is trained with each; 0")
    parser.add_argument("--out", help="folder of the results; OUTPUT_DIR/recipes by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys for all recipes")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        recipes = read_recipes(args.recipes)
        out = Path(args.out or Path(load_config(args.config, args.overrides).OUTPUT_DIR) / "recipes")
        print(recipe_table(compare_recipes(args.config, args.overrides, recipes, args.seeds, out)))
        print(f"\nresults: {out}/ (recipes.json, recipes.md)")

    return run_tool(job, after_a_stop="the same command goes on")


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Compare recipes for the exits: AP50 per exit on the calib split, cost, parameters and minutes.

A recipe is a set of configuration keys. Each recipe trains the branches on a frozen full path. The taps (features of
the trunk) are computed once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import load_config
from earlyexit_ssd.console import run_tool
from earlyexit_ssd.data import load_dataset
from earlyexit_ssd.data.dataset import fingerprint
from earlyexit_ssd.errors import ConfigError, EarlyExitError
from earlyexit_ssd.evaluation.cost import mmacs_to_exit
from earlyexit_ssd.files import locks_folder, make_folder, sha256, write_json, write_text
from earlyexit_ssd.pipeline.build import build_device, with_classes
from earlyexit_ssd.pipeline.phases import tap_loader, train_branches, views_of
from earlyexit_ssd.pipeline.run import RunFolder
from earlyexit_ssd.pipeline.train import prepare
from earlyexit_ssd.plain import read_json, read_yaml

Recipes = dict[str, dict[str, Any]]
"""Name -> keys of the configuration and their values."""
SHARED_KEY = "_ALL_"

EXAMPLES = """
A file of recipes has a line for each recipe, with keys of the configuration:

  _ALL_: {EXITS.LAYERS: [8], EXITS_PHASE.EPOCHS: 5}      (optional, for every recipe)
  as it is: {}
  thinner: {EXITS.COPY: [0.25]}
  focal: {LOSS.CLASSIFICATION: focal}

examples:
  python benchmarks/compare_recipes.py --config configs/voc_animals.yaml --recipes benchmarks/recipes/exit8.yaml
      train the branches with each recipe, on taps that are computed once
  python benchmarks/compare_recipes.py --config configs/voc_animals.yaml --recipes mine.yaml --seeds 0 1 2
      three seeds per recipe: mean and range

You can stop the comparison at any time. The same command continues it, and trains only new recipes. The taps stay in
the folder taps/ (gigabytes); delete them at the end. The test split is not used. See benchmarks/README.md.
"""


def read_recipes(path: str | Path) -> Recipes:
    """Read recipes: name -> configuration keys and values such as ``{"EXITS.COPY": [0.25]}``.

    Keys of the entry ``_ALL_`` are added to every recipe.

    Raises:
        ConfigError: the file is missing or is not such a mapping.
    """
    path = Path(path)
    recipes = read_yaml(path, "file of recipes", "benchmarks/recipes/ has examples", ConfigError)
    if not isinstance(recipes, dict) or not recipes:
        raise ConfigError(f"{path}: expected lines such as 'thinner: {{EXITS.COPY: [0.25]}}'")
    for name, keys in recipes.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: recipe {name!r} is {keys!r:.60}, expected keys and values, such as {{EXITS.DEPTH: 1}}"
            )
    shared = recipes.pop(SHARED_KEY, {})
    if not recipes:
        raise ConfigError(f"{path}: has {SHARED_KEY} only, expected recipes; add a recipe such as 'as it is: {{}}'")
    return {str(name): {**shared, **keys} for name, keys in recipes.items()}


def compare_recipes(
    config: str | Path, overrides: Sequence[str], recipes: Recipes, seeds: Sequence[int], out_dir: Path
) -> list[dict[str, Any]]:
    """Train the branches with every recipe and seed on a frozen full path, and evaluate all exits on the calib split.

    Taps are computed once for all recipes with the same photos, views and layers. Results in ``out_dir`` with the same
    settings are not trained again, so a comparison can be stopped, continued and extended. ``out_dir`` gets
    recipes.json, the table and the taps.

    Returns:
        A dict per recipe and seed: ``recipe``, ``seed``, ``settings``, ``minutes`` (training steps only), ``threads``
        and, by exit, ``AP50``, ``mmacs`` and the ``parameters`` of its branch.

    Raises:
        EarlyExitError: settings, data or weights are invalid. The settings of all recipes are checked before training.
    """
    folders: dict[str, str] = {}
    for name in recipes:
        other = folders.setdefault(_slug(name), name)
        if other != name:
            raise ConfigError(f"recipes {other!r} and {name!r} have the same folder {_slug(name)}; rename one of them")
    trials = [
        (name, seed, _configuration(config, overrides, name, keys, seed), out_dir / _slug(name) / f"seed{seed}")
        for name, keys in recipes.items()
        for seed in dict.fromkeys(seeds)
    ]
    return _train_all(trials, out_dir)


@locks_folder("out_dir")
def _train_all(trials: Sequence[tuple[str, int, CfgNode, Path]], out_dir: Path) -> list[dict[str, Any]]:
    """Return a row for each trial (name, seed, configuration, folder). Trials with stored results are not trained."""
    rows, contents = [], {}
    for name, seed, cfg, folder in trials:
        photos = f"{cfg.DATA} {cfg.SEED}"  # the seed selects photos
        if photos not in contents:
            contents[photos] = _photo_contents(cfg)
        # torchvision's weights are identified by their name
        weights = {"WEIGHTS": sha256(cfg.MODEL.WEIGHTS)} if Path(cfg.MODEL.WEIGHTS).is_file() else {}
        settings = {**_settings(cfg), "SHA256": {**weights, **contents[photos]}}
        row = _stored(folder, settings)
        if "AP50" not in row:
            row |= {"recipe": name, "seed": seed, **_train(cfg, folder, out_dir / "taps", row)}
            row.pop("seconds")
            write_json(folder / "result.json", row)
        rows.append(row)
        write_json(out_dir / "recipes.json", rows)
        write_text(out_dir / "recipes.md", recipe_table(rows) + "\n")
    return rows


def _configuration(config: str | Path, overrides: Sequence[str], name: str, keys: dict[str, Any], seed: int) -> CfgNode:
    if "SEED" in (*keys, *overrides[::2]):
        raise ConfigError(
            f"recipe {name!r}: SEED is set, but recipes are trained with each of --seeds; use --seeds instead"
        )
    own = [text for key, value in keys.items() for text in (str(key), str(value))]
    try:
        # without curves, which would take time, because minutes are compared
        fixed = ["PHASES", "[baseline, exits]", "ENGINE.CURVE_PERIOD", "0"]
        cfg = load_config(config, [*overrides, *fixed, *own, "SEED", str(seed)])
    except ConfigError as error:
        raise ConfigError(f"recipe {name!r}: {str(error).removeprefix('command line: ')}") from None
    if not cfg.MODEL.WEIGHTS:  # only branches are trained
        raise ConfigError(
            f"recipe {name!r} needs a trained full path; set MODEL.WEIGHTS to a checkpoint or a model.pth"
        )
    return cfg


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", name.lower())


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings that the figures depend on, without paths of this machine."""
    sections = ("DATA", "MODEL", "EXITS", "LOSS", "EXITS_PHASE", "SEED")
    settings = json.loads(json.dumps({section: cfg[section] for section in sections}))
    settings["AMP"] = cfg.ENGINE.AMP
    for key in ("ROOT", "WORKERS"):
        settings["DATA"].pop(key)
    settings["MODEL"]["WEIGHTS"] = Path(cfg.MODEL.WEIGHTS).name
    return settings


def _photo_contents(cfg: CfgNode) -> dict[str, str]:
    """Return hashes of the photos and boxes of DATA.TRAIN and DATA.CALIB."""
    train = load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels="optional")
    calib = load_dataset(with_classes(cfg, train.classes), cfg.DATA.CALIB)
    return {"TRAIN": fingerprint(train), "CALIB": fingerprint(calib)}


def _stored(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the stored result, or the settings and seconds of a training that was stopped. Delete the folder if its
    settings differ."""
    path = folder / "result.json"
    try:
        row = read_json(path, "result", "it is computed again")
    except EarlyExitError:
        row = {}
    if isinstance(row, dict) and row.get("settings") == settings:
        return row
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    write_json(path, {"settings": settings})
    return {"settings": settings}


def _train(cfg: CfgNode, folder: Path, taps: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe and return its figures. ``row["seconds"]``, stored in the folder, is the time of all sessions."""
    views = [views_of(cfg), cfg.MODEL, cfg.EXITS.LAYERS, cfg.EXITS_PHASE.CACHE_VIEWS, cfg.EXITS_PHASE.CACHE_DTYPE]
    shared = taps / hashlib.sha256(repr(views).encode()).hexdigest()[:12]
    run = prepare(cfg, RunFolder(folder, shared), build_device(cfg))
    run.model.freeze_full_path()
    tap_loader(run)
    start = time.perf_counter()
    try:
        train_branches(run)
    finally:
        row["seconds"] = row.get("seconds", 0.0) + time.perf_counter() - start
        write_json(folder / "result.json", row)
    ap50 = [figures["AP50"] for figures in run.calib_quality.of_exits(run.model)]
    names = run.model.exit_names
    return {
        "AP50": dict(zip(names, ap50, strict=True)),
        "mmacs": dict(zip(names, mmacs_to_exit(run.model), strict=True)),
        "parameters": {
            name: sum(value.numel() for value in branch.parameters()) for name, branch in run.model.branches.items()
        },
        "minutes": row["seconds"] / 60,
        "threads": torch.get_num_threads(),
    }


def recipe_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the rows of :func:`compare_recipes`, with one row per recipe.

    It has the minutes of a training and, for each early exit, AP50 (mean and range over the seeds), the MMACs of a
    photo that leaves there, and the parameters of its branch in millions.
    """
    by_recipe: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    exits = list(dict.fromkeys(name for row in rows for name in row["parameters"]))
    figures = [f"{name} {what}" for name in exits for what in ("AP50", "MMAC", "M param.")]
    heads = ["recipe", "seeds", "minutes", *figures]
    lines = [heads, ["---"] * len(heads)]
    for recipe, trials in by_recipe.items():
        cells = [recipe, str(len(trials)), f"{mean(trial['minutes'] for trial in trials):.1f}"]
        parameters, mmacs = trials[0]["parameters"], trials[0]["mmacs"]
        for name in exits:
            if name not in parameters:
                cells += ["-", "-", "-"]
                continue
            values = [trial["AP50"][name] or 0.0 for trial in trials]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells += [f"{mean(values):.3f}{spread}", f"{mmacs[name]:.0f}", f"{parameters[name] / 1e6:.2f}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, train and print the table. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file that every recipe changes")
    parser.add_argument("--recipes", required=True, help="YAML file of recipes; benchmarks/recipes/ has examples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="every recipe is trained with each seed; 0")
    parser.add_argument("--out", help="folder of the results; OUTPUT_DIR/recipes by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="override keys for all recipes")
    args = parser.parse_intermixed_args(arguments)

    def job() -> None:
        recipes = read_recipes(args.recipes)
        out = Path(args.out or Path(load_config(args.config, args.overrides).OUTPUT_DIR) / "recipes")
        print(recipe_table(compare_recipes(args.config, args.overrides, recipes, args.seeds, out)))
        print(f"\nresults: {out}/ (recipes.json, recipes.md)")

    return run_tool(job, after_a_stop="the same command continues")


if __name__ == "__main__":
    sys.exit(main())

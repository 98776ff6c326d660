#!/usr/bin/env python
"""For maintainers: add a trained model to the package, as fp16 weights and a description."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

EXAMPLES = """
examples, in this order:
  %(prog)s output/chair/model.pth --name chair --config configs/chair.yaml
      write chair.pth and chair.json to earlyexit_ssd/weights, with the routing of the configuration
  earlyexit evaluate --config configs/chair.yaml --weights chair --out docs/results/zoo_chair_coco
      evaluate these weights, once for each test set (DATA.TEST)
  %(prog)s ... --metrics docs/results/zoo_chair_*/metrics.json
      write the same weights again, and the figures to chair.json
  python tools/model_zoo.py
      update the tables of the model zoo
"""
MAX_BYTES = 12_000_000  # the repository's history keeps every version of a binary file
KEYS = ("AP", "AP50", "AP50_interval", "mmacs", "ms", "share")


def export_weights(source: str | Path, name: str, folder: Path, cfg, recipe: str, results=()) -> Path:
    """Write ``folder/NAME.pth``, with the routing of ``cfg`` and the temperatures of ``source``, and NAME.json."""
    from earlyexit_ssd.errors import EarlyExitError
    from earlyexit_ssd.files import write_bytes, write_json
    from earlyexit_ssd.modeling import load_model
    from earlyexit_ssd.modeling.checkpoint import half_file
    from earlyexit_ssd.modeling.retrofit import read_weights
    from earlyexit_ssd.pipeline.build import build_router

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise EarlyExitError(f"name '{name}': expected lower-case letters, digits and underscores, a letter first")
    model, _, info = load_model(source)
    if not info.get("router"):
        raise EarlyExitError(f"{source}: its exits are not trained; use the model.pth of a finished run")
    if info.get("forced"):
        raise EarlyExitError(f"{source}: a gate was passed by --force; only models that passed their gates are shipped")
    routing = build_router(cfg, info["router"]).to_dict()
    kept = {key: value for key, value in info.items() if key != "certificate"}  # which is for the fp32 weights
    content = half_file({**read_weights(source), "info": {**kept, "router": routing}})
    path = folder / f"{name}.pth"
    if len(content) > MAX_BYTES:
        fix = "reduce EXITS.COPY, EXITS.DEPTH or the number of exits, or set MODEL.FOLD to compact"
        raise EarlyExitError(f"{path}: {len(content)} bytes, at most {MAX_BYTES} are shipped; {fix}")
    digest = hashlib.sha256(content).hexdigest()
    description = {
        "classes": list(model.classes),
        "exits": list(model.exit_names),
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": len(content),
        "sha256": digest,
        "recipe": recipe,
        "routing": routing,
        "metrics": dict(measured(result, routing, digest) for result in results),
    }
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), description)
    return path


def measured(result: str | Path, routing, digest: str) -> tuple[str, dict]:
    """Return the name of the test split, and the figures of its metrics.json for the description."""
    from earlyexit_ssd.errors import EarlyExitError, shown
    from earlyexit_ssd.plain import read_json

    fix = "write it with tools/eval_exits.py and the exported weights"
    metrics = read_json(result, "metrics.json of an evaluation", fix)
    try:
        context, routed, plain = metrics["context"], metrics["routed"], metrics["without_exits"]
        rows = [{**row, "share": routed["exit_share"][row["name"]]} for row in metrics["exits"]]
        rows.append({**routed, "name": "routed", "share": None})
        split, other = "+".join(context["splits"]), str(context.get("weights_sha256"))
        figures = {"results": Path(result).as_posix(), "images": context["images"]}
        figures["without_exits"] = {key: plain[key] for key in ("mmacs", "ms")}
        figures["exits"] = {row["name"]: {key: row[key] for key in KEYS} for row in rows}
        different = [key for key in ("policy", "thresholds") if routed[key] != routing[key]]
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"not the metrics.json of an evaluation ({type(error).__name__}: {error})"
        raise EarlyExitError(f"{result}: {problem}; {fix}") from None
    if other != digest:
        hashes = f"sha256 {other[:8]}, the shipped weights have {digest[:8]}"
        raise EarlyExitError(f"{result}: measured with weights of {hashes}; {fix}")
    for key in different:
        problem = f"routed with {key} {shown(routed[key])}, the shipped model has {routing[key]}"
        raise EarlyExitError(f"{result}: {problem}; use the same --config")
    return split, figures


def main(arguments: list[str] | None = None) -> int:
    layout = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python tools/export_weights.py", description=__doc__, **layout)
    parser.add_argument("model", help="model.pth of a finished run")
    parser.add_argument("--name", required=True, help="name for from_pretrained, such as voc_animals")
    parser.add_argument("--config", required=True, help="YAML file of the run; its ROUTING section is stored")
    parser.add_argument("--metrics", nargs="+", default=[], help="metrics.json files of the exported weights")
    parser.add_argument("--recipe", help="command of the training; by default earlyexit train with --config and --set")
    parser.add_argument("--out", help="folder of the two files; that of the package by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="override keys of the configuration")
    args = parser.parse_args(arguments)
    from earlyexit_ssd.config import load_config
    from earlyexit_ssd.console import run_tool
    from earlyexit_ssd.modeling.checkpoint import FOLDER

    def job() -> None:
        cfg, folder = load_config(args.config, args.set), Path(args.out or FOLDER)
        recipe = args.recipe or " ".join(["earlyexit train --config", args.config, *args.set])
        print(export_weights(args.model, args.name, folder, cfg, recipe, args.metrics))

    return run_tool(job)


if __name__ == "__main__":
    sys.exit(main())

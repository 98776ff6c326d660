"""Make a trained model one that comes with the package: its weights in fp16, and beside them what is known of it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from earlyexit_ssd.errors import EarlyExitError, shown
from earlyexit_ssd.files import write_bytes, write_json
from earlyexit_ssd.modeling import load_model
from earlyexit_ssd.modeling.checkpoint import half_file
from earlyexit_ssd.modeling.outputs import RouterSettings
from earlyexit_ssd.modeling.retrofit import read_weights
from earlyexit_ssd.pipeline.build import build_router
from earlyexit_ssd.plain import read_json

MAX_BYTES = 12_000_000
"""Every version of a binary stays in the repository's history."""


@dataclass(frozen=True)
class Shipped:
    """Files of :func:`ship_weights`, and the size in bytes and the sha256 of the weights."""

    weights: Path
    description: Path
    size: int
    sha256: str


def ship_weights(
    source: str | os.PathLike[str],
    name: str,
    folder: str | os.PathLike[str],
    cfg: CfgNode,
    recipe: str,
    results: Sequence[str | os.PathLike[str]] = (),
) -> Shipped:
    """Write ``folder/NAME.pth`` and ``folder/NAME.json``; the same model gives the same bytes every time.

    Args:
        source: a model file of a finished run.
        name: lower case, as ``from_pretrained`` will know it.
        cfg: its ROUTING section goes into the file, with the temperatures of ``source``.
        recipe: the command that trains the model.
        results: metrics.json files, measured with the very file that this writes.

    Raises:
        EarlyExitError: a name that is none, a model without exits or with a forced gate, more than
            :data:`MAX_BYTES`, or results of another file, or of another policy or thresholds.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise EarlyExitError(f"name '{name}': expected lower-case letters, digits and underscores, a letter first")
    model, _, info = load_model(source)
    if not info.get("router"):
        raise EarlyExitError(f"{source}: its exits are not trained; take the model.pth of a run that has finished")
    if info.get("forced"):
        raise EarlyExitError(f"{source}: a gate was passed by --force; only models that passed their gates are shipped")
    routing = build_router(cfg, info["router"]).to_dict()
    kept = {key: value for key, value in info.items() if key != "certificate"}  # it is for the weights in fp32
    content = half_file({**read_weights(source), "info": {**kept, "router": routing}})
    path = Path(folder) / f"{name}.pth"
    if len(content) > MAX_BYTES:
        raise EarlyExitError(
            f"{path}: {len(content)} bytes, at most {MAX_BYTES} are shipped; reduce EXITS.COPY, EXITS.DEPTH or the "
            "number of exits, or set MODEL.FOLD to compact or rows (a smaller head)"
        )
    shipped = Shipped(path, path.with_suffix(".json"), len(content), hashlib.sha256(content).hexdigest())
    description = {
        "classes": list(model.classes),
        "exits": list(model.exit_names),
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": shipped.size,
        "sha256": shipped.sha256,
        "recipe": recipe,
        "routing": routing,
        "metrics": dict(_figures(result, routing, shipped) for result in results),
    }
    write_bytes(path, content)
    write_json(shipped.description, description)
    return shipped


def _figures(result: str | os.PathLike[str], routing: RouterSettings, shipped: Shipped) -> tuple[str, dict]:
    """The name of the test split, and of its metrics.json what the description repeats."""
    fix = f"write it with tools/eval_exits.py --weights {shipped.weights}"
    metrics = read_json(result, "metrics.json of an evaluation", fix)
    keys = ("AP", "AP50", "AP50_interval", "mmacs", "ms", "share")
    try:
        context, routed = metrics["context"], metrics["routed"]
        measured = str(context.get("weights_sha256"))
        rows = {row["name"]: {**row, "share": routed["exit_share"][row["name"]]} for row in metrics["exits"]}
        rows["routed"] = {**routed, "share": None}
        policy = {key: routed[key] for key in ("policy", "thresholds")}
        figures = {
            "results": Path(result).as_posix(),
            "images": context["images"],
            "without_exits": {key: metrics["without_exits"][key] for key in ("mmacs", "ms")},
            "exits": {name: {key: row[key] for key in keys} for name, row in rows.items()},
        }
        splits = "+".join(context["splits"])
    except (KeyError, TypeError, AttributeError) as error:
        raise EarlyExitError(
            f"{result}: not the metrics.json of an evaluation ({type(error).__name__}: {error}); {fix}"
        ) from None
    if measured != shipped.sha256:
        raise EarlyExitError(
            f"{result}: measured with weights of sha256 {measured[:8]}, the shipped ones have "
            f"{shipped.sha256[:8]}; measure again with tools/eval_exits.py --weights {shipped.weights}"
        )
    for key, value in policy.items():
        if value != routing[key]:
            raise EarlyExitError(
                f"{result}: routed with {key} {shown(value)}, the shipped model has {routing[key]}; use one --config"
            )
    return splits, figures

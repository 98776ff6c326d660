"""The placement advisor: what an exit behind each trunk layer costs here, and which exits a wanted speed-up needs."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import C4_LAYER, check_config
from earlyexit_ssd.data import class_names
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.evaluation.placement import SHARES, Placement, measure_placements, propose
from earlyexit_ssd.files import locked_folder, write_image, write_json, write_text
from earlyexit_ssd.pipeline.build import build_device, build_model, build_router, evaluation_device, require_full_path
from earlyexit_ssd.pipeline.phases import train_branches
from earlyexit_ssd.pipeline.run import RunFolder
from earlyexit_ssd.pipeline.train import prepare
from earlyexit_ssd.report.charts import placement_chart, placement_report

ALL_LAYERS = tuple(range(1, C4_LAYER))
"""Those from which a branch can copy its first map; behind the others there is next to nothing to save."""


def plan_exits(
    cfg: CfgNode,
    out_dir: Path,
    layers: Sequence[int] = ALL_LAYERS,
    speedup: float = 2.0,
    probe_epochs: int = 0,
) -> dict[str, Any]:
    """Measure an exit behind each of ``layers``, train probes if asked for, and propose a set of exits.

    Args:
        cfg: its MODEL, EXITS (but for the layers) and EVAL timing are used; with probes DATA and EXITS_PHASE too.
        out_dir: for placement.json, the table and the chart.
        layers: trunk layers, increasing.
        speedup: wanted, against the detector without exits.
        probe_epochs: epochs of probe branches on cached taps; 0 trains none, and nothing is proposed.

    Returns:
        ``placements``, ``full_AP50``, ``proposal``, ``speedup`` and ``context``: plain numbers, lists and None.

    Raises:
        EarlyExitError: unusable settings, data or weights.
    """
    cfg = _with_exits(cfg, layers, speedup, probe_epochs)
    with locked_folder(out_dir):
        placements, full_ap50 = _measure(cfg), None
        if probe_epochs:
            *ap50, full_ap50 = _probe(cfg, out_dir)
            placements = [dataclasses.replace(one, AP50=value) for one, value in zip(placements, ap50, strict=True)]
        plan = _describe(cfg, placements, full_ap50, speedup)
        write_json(out_dir / "placement.json", plan)
        write_text(out_dir / "placement.txt", placement_report(plan) + "\n")
        write_image(out_dir / "placement.png", placement_chart(plan))
        return plan


def _with_exits(cfg: CfgNode, layers: Sequence[int], speedup: float, probe_epochs: int) -> CfgNode:
    """One exit per layer, none leaning on another; the phases are those of a trained full path that gets probes."""
    if not (math.isfinite(speedup) and speedup > 0):
        raise ConfigError(f"the wanted speed-up is {speedup:g}, expected a number above 0, such as 1.5")
    if probe_epochs:
        require_full_path(cfg, "a probe")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.PHASES, cfg.BASELINE.EPOCHS, cfg.BASELINE.GATE.RELATIVE = ("baseline", "exits"), 0, 0.0
    cfg.EXITS.LAYERS, cfg.EXITS.EMPTY = tuple(layers), ()
    cfg.EXITS.COPY, cfg.EXITS.DEPTH = cfg.EXITS.COPY[:1], cfg.EXITS.DEPTH[:1]  # one branch for all, the first exit's
    cfg.LOSS.EXIT_WEIGHTS, cfg.JOINT.EXIT_WEIGHTS = (1.0,), ()
    cfg.ROUTING.THRESHOLDS, cfg.ROUTING.TEMPERATURES = (0.5,), (1.0,)
    cfg.EXITS_PHASE.EPOCHS, cfg.EXITS_PHASE.CACHE_VIEWS = probe_epochs, 1
    cfg.ENGINE.CURVE_PERIOD = 0
    check_config(cfg)
    cfg.freeze()
    return cfg


def _measure(cfg: CfgNode) -> list[Placement]:
    """Cost of each exit, alone in the detector; no photo is read."""
    device = evaluation_device(cfg)
    model, architecture = build_model(cfg, class_names(cfg))
    singles = {
        layer: dataclasses.replace(architecture, exit_layers=(layer,)).add_exits(model).to(device)
        for layer in cfg.EXITS.LAYERS
    }
    router = build_router(cfg, {"num_exits": 1}).to(device)
    return measure_placements(singles, router, cfg.EVAL.TIMING_RUNS, cfg.EVAL.TIMING_THREADS, cfg.EVAL.RUNTIME)


def _probe(cfg: CfgNode, out_dir: Path) -> list[float | None]:
    """AP50 on the calib split of a short-trained branch behind each layer and, last, of the full path."""
    with tempfile.TemporaryDirectory(prefix=".probes.", dir=out_dir) as folder:
        run = prepare(cfg, RunFolder(Path(folder)), build_device(cfg))
        train_branches(run)
        return [figures["AP50"] for figures in run.calib_quality.of_exits(run.model)]


def _describe(cfg: CfgNode, placements: Sequence[Placement], full_ap50: float | None, speedup: float) -> dict[str, Any]:
    proposal = propose(placements, full_ap50, speedup) if full_ap50 is not None else None
    return {
        "context": {
            "splits": list(cfg.DATA.CALIB) if full_ap50 is not None else [],
            "epochs": cfg.EXITS_PHASE.EPOCHS,
            "runs": cfg.EVAL.TIMING_RUNS,
            "threads": cfg.EVAL.TIMING_THREADS,
            "runtime": cfg.EVAL.RUNTIME,
            "seed": cfg.SEED,
            "torch": torch.__version__,
        },
        "speedup": speedup,
        "plain_ms": placements[0].plain_ms,
        "full_AP50": full_ap50,
        "placements": [
            {
                **dataclasses.asdict(one),
                "speedups": {f"{share:g}": one.speedup(share) for share in SHARES},
                "share_for_speedup": one.share_for(speedup),
            }
            for one in placements
        ],
        "proposal": dataclasses.asdict(proposal) if proposal else None,
    }

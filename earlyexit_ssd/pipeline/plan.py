"""The placement advisor: what an exit behind each trunk layer costs here, and which exits a wanted speed-up needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.data import class_names, load_dataset, require_disjoint
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.evaluation.placement import SHARES, Placement, measure_placements, propose
from earlyexit_ssd.files import write_image, write_json, write_text
from earlyexit_ssd.modeling import EarlyExitSSDLite
from earlyexit_ssd.pipeline.build import build_device, build_model, with_classes
from earlyexit_ssd.pipeline.phases import Run, train_branches
from earlyexit_ssd.pipeline.run_folder import RunFolder
from earlyexit_ssd.report.placement import placement_chart, placement_report

ALL_LAYERS = tuple(range(1, 16))


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
        out_dir: for placement.json, the table and the chart; with probes their weights and logs.
        layers: trunk layers, increasing.
        speedup: wanted, against the detector without exits.
        probe_epochs: epochs of probe branches on cached taps; 0 trains none, and nothing is proposed.

    Returns:
        ``placements``, ``full_AP50``, ``proposal``, ``speedup`` and ``context``: plain numbers, lists and None.

    Raises:
        EarlyExitError: unusable settings, data or weights.
    """
    cfg = _with_exits(cfg, layers, probe_epochs)
    device = build_device(cfg)
    torch.manual_seed(cfg.SEED)
    cfg = with_classes(cfg, class_names(cfg))
    model, architecture = build_model(cfg, cfg.DATA.CLASSES)
    singles = {
        layer: dataclasses.replace(architecture, exit_layers=(layer,)).add_exits(model).to(device) for layer in layers
    }
    placements = measure_placements(singles, cfg.EVAL.TIMING_RUNS, cfg.EVAL.TIMING_THREADS)
    full_ap50 = None
    if probe_epochs:
        run = _probe_run(cfg, out_dir, model.to(device), architecture, device)
        *ap50, full_ap50 = _probe(run)
        placements = [dataclasses.replace(one, AP50=value) for one, value in zip(placements, ap50, strict=True)]
    plan = _describe(cfg, placements, full_ap50, speedup)
    write_json(out_dir / "placement.json", plan)
    write_text(out_dir / "placement.txt", placement_report(plan) + "\n")
    write_image(out_dir / "placement.png", placement_chart(plan))
    return plan


def _with_exits(cfg: CfgNode, layers: Sequence[int], probe_epochs: int) -> CfgNode:
    """One exit per layer, none leaning on another."""
    layers = tuple(layers)
    if not layers or layers != tuple(sorted(set(layers) & set(ALL_LAYERS))):
        raise ConfigError(f"layers {layers}: expected increasing trunk layers from 1 to {ALL_LAYERS[-1]}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.EXITS.LAYERS, cfg.EXITS.CASCADE = layers, False
    cfg.LOSS.EXIT_WEIGHTS = (1.0,)
    cfg.ROUTING.THRESHOLDS, cfg.ROUTING.TEMPERATURES = (0.5,), (1.0,)
    cfg.EXITS_PHASE.EPOCHS, cfg.EXITS_PHASE.CACHE_VIEWS = probe_epochs, 1
    cfg.freeze()
    return cfg


def _probe_run(cfg: CfgNode, out_dir: Path, model: EarlyExitSSDLite, architecture: Any, device: torch.device) -> Run:
    train_set = load_dataset(cfg, cfg.DATA.TRAIN, train=True, need_boxes=cfg.LOSS.SUPERVISION == "labels")
    calib_set = load_dataset(cfg, cfg.DATA.CALIB, need_boxes=True)
    require_disjoint(TRAIN=train_set, CALIB=calib_set)
    return Run(cfg, RunFolder(out_dir), model, architecture, train_set, calib_set, device)


def _probe(run: Run) -> list[float | None]:
    """AP50 on the calib split of each probe and, last, of the full path."""
    train_branches(run)
    run.folder.remove_taps()
    return [figures["AP50"] for figures in run.calib_quality.of_exits(run.model)]


def _describe(cfg: CfgNode, placements: Sequence[Placement], full_ap50: float | None, speedup: float) -> dict[str, Any]:
    proposal = propose(placements, full_ap50, speedup) if full_ap50 is not None else None
    return {
        "context": {
            "splits": list(cfg.DATA.CALIB) if full_ap50 is not None else [],
            "epochs": cfg.EXITS_PHASE.EPOCHS,
            "runs": cfg.EVAL.TIMING_RUNS,
            "threads": cfg.EVAL.TIMING_THREADS,
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

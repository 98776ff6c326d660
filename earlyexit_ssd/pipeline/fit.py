"""One training with a phase's settings, from its last checkpoint if there is one."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from earlyexit_ssd.config import PHASE_SECTIONS
from earlyexit_ssd.data import DetectionDataset, build_loader
from earlyexit_ssd.engine import (
    CachedLoader,
    Checkpoint,
    ClampTemperatures,
    ExponentialMovingAverage,
    Log,
    PhotoLoader,
    ProgressBar,
    Trainer,
    UpdateAverage,
    build_optimizer,
)
from earlyexit_ssd.engine.distributed import rank, same_everywhere, world_size
from earlyexit_ssd.modeling.training import TapBatch
from earlyexit_ssd.pipeline.run import Run


class Interrupted(Exception):
    """A signal stopped the training; everything is saved."""


def fit(run: Run, name: str, losses: nn.Module, loader: PhotoLoader | CachedLoader) -> None:
    """Train what ``losses`` holds, with the phase's settings; the model ends with the averaged weights if asked.

    Raises:
        Interrupted: a signal stopped it.
        TrainingDiverged: a loss is NaN or infinite.
    """
    cfg, model, phase = run.cfg, run.model, run.cfg[PHASE_SECTIONS[name]]
    folder = run.folder.phase(name)
    ema = ExponentialMovingAverage(model, phase.EMA) if phase.EMA else None
    # Outermost, the checkpoint moves to where it left off before the others start, and saves when they are done.
    checkpoint = Checkpoint(folder / "last.pth", cfg.ENGINE.CHECKPOINT_PERIOD, ema)
    curves = run.curve_quality if cfg.ENGINE.CURVE_PERIOD else None
    log = Log(
        folder,
        cfg.ENGINE.LOG_PERIOD,
        curves and (lambda: curves.curve_point(ema.average if ema else model)),
        cfg.ENGINE.CURVE_PERIOD,
    )
    hooks = [checkpoint, ProgressBar(name), log]
    hooks += [UpdateAverage(ema)] if ema else []
    hooks += [ClampTemperatures(model.router)] if isinstance(model.router, nn.Module) else []
    # A third faster on a CPU, where most of the time goes into depthwise convolutions; on CUDA these are many times
    # slower so. Not with bf16: there oneDNN's gradient of depthwise convolutions on 1x1 maps is infinite now and then
    # (torch 2.6 and 2.14).
    if run.device.type == "cpu" and cfg.ENGINE.AMP == "off":
        losses.to(memory_format=torch.channels_last)
    if world_size() > 1:
        losses = DistributedDataParallel(losses, device_ids=[run.device] if run.device.type == "cuda" else None)
    trainer = Trainer(
        model=model,
        compute_losses=lambda batch: losses(batch) if isinstance(batch, TapBatch) else losses(*batch),
        loader=loader,
        optimizer=build_optimizer(losses, phase.OPTIMIZER, phase.LR, phase.WEIGHT_DECAY, lr_factors(phase)),
        epochs=phase.EPOCHS,
        peak_lr=phase.LR,
        warmup=phase.WARMUP,
        clip_gradient=phase.CLIP_GRADIENT,
        amp=cfg.ENGINE.AMP,
        device=run.device,
        hooks=hooks,
        describe=lambda batch: _photo_names(run.train_set, batch),
    )
    finished = trainer.run()
    losses.to(memory_format=torch.contiguous_format)
    if not finished:
        raise Interrupted(f"{checkpoint.signal_name}: saved step {trainer.step} of phase {name} in {folder}")
    if ema:
        model.load_state_dict(ema.average.state_dict())
    same_everywhere(model)


def lr_factors(phase: CfgNode) -> dict[str, float]:
    """Of the full path's two parts in the joint phase; the other phases train everything at one rate."""
    factor = phase.get("FULL_PATH_LR_FACTOR", 1.0)
    return {f"{wrapper}{part}.": factor for wrapper in ("", "module.") for part in ("backbone", "head")}


def _photo_names(dataset: DetectionDataset, batch: Any) -> list[str]:
    targets = batch.targets if isinstance(batch, TapBatch) else batch[1]
    return [str(dataset.paths(int(target["image_id"]))) for target in targets]


def photo_loader(run: Run, batch_size: int) -> PhotoLoader:
    cfg = run.cfg
    loader = build_loader(run.train_set, batch_size, cfg.DATA.WORKERS, True, cfg.SEED, rank(), world_size())
    return PhotoLoader(loader, run.device)

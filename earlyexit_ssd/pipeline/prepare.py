"""Everything that a run works on, checked before it starts."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.config import PHASE_SECTIONS
from earlyexit_ssd.data import catalog, load_dataset, repeat_rare_classes, require_disjoint
from earlyexit_ssd.engine.distributed import barrier, is_main, world_size
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.modeling.retrofit import require_weights
from earlyexit_ssd.pipeline.build import backbone_weights, build_model, build_router, evaluation_device, with_classes
from earlyexit_ssd.pipeline.phases import tap_cache
from earlyexit_ssd.pipeline.rivals import check_rivals
from earlyexit_ssd.pipeline.run import Run
from earlyexit_ssd.pipeline.run_folder import RunFolder


def prepare(cfg: CfgNode, folder: RunFolder, device: torch.device) -> Run:
    """Load all data and build the model, so that what is missing is found before anything is written or trained.

    Raises:
        EarlyExitError: unusable settings, data or weights.
    """
    _check_names(cfg)
    if cfg.ROUTING.CERTIFICATE:
        raise ConfigError("ROUTING.CERTIFICATE is for weights that exist; leave it out of a training")
    build_router(cfg)  # raises where its policy is unknown, or one that training cannot fit
    check_rivals(cfg, evaluation_device(cfg))
    if not is_main():
        barrier()  # the first process may render or download
    train_set = load_dataset(cfg, cfg.DATA.TRAIN, train=True, need_boxes=learns_from_labels(cfg))
    cfg = with_classes(cfg, train_set.classes)
    calib_set, test_set = load_dataset(cfg, cfg.DATA.CALIB, need_boxes=True), load_dataset(cfg, cfg.DATA.TEST)
    if is_main():
        barrier()
    require_disjoint(TRAIN=train_set, CALIB=calib_set, TEST=test_set)
    train_set = repeat_rare_classes(train_set, cfg.DATA.REPEAT_THRESHOLD, cfg.SEED)
    torch.manual_seed(cfg.SEED)
    model, architecture = build_model(cfg, train_set.classes)
    run = Run(cfg, folder, model.to(device), architecture, train_set, calib_set, device)
    if "exits" in cfg.PHASES and cfg.EXITS_PHASE.EPOCHS and cfg.EXITS_PHASE.CACHE and not all(model.empty):
        tap_cache(run)  # raises where it would be too large
    return run


def learns_from_labels(cfg: CfgNode) -> bool:
    """Whether any phase does; where the full path learns, it has no other teacher."""
    whole = any(phase in cfg.PHASES and cfg[PHASE_SECTIONS[phase]].EPOCHS for phase in ("baseline", "joint"))
    return cfg.LOSS.SUPERVISION == "labels" or bool(whole)


def _check_names(cfg: CfgNode) -> None:
    """What is cheap to find out comes first: names of data sets, files of weights, batches for all processes."""
    for name in (*cfg.DATA.TRAIN, *cfg.DATA.CALIB, *cfg.DATA.TEST):
        catalog.require_known(name, cfg.DATA)
    for weights in (cfg.MODEL.WEIGHTS, cfg.BASELINE.GATE.REFERENCE):
        if weights:
            require_weights(weights)
    if cfg.MODEL.WEIGHTS_BACKBONE:
        backbone_weights(cfg.MODEL.WEIGHTS_BACKBONE)
    for section in (PHASE_SECTIONS[phase] for phase in cfg.PHASES):
        size, processes = cfg[section].BATCH_SIZE, world_size()
        if size % processes or size < 2 * processes:
            raise ConfigError(
                f"{section}.BATCH_SIZE is {size}, expected a multiple of the {processes} processes, "
                "two images or more for each"
            )

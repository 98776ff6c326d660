"""Train a detector with exits on photos with boxes. All inputs are checked before the training starts."""

import contextlib
import dataclasses
import logging
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.calibration.thresholds import require_few_exits
from earlyexit_ssd.config import PHASE_SECTIONS, get_cfg
from earlyexit_ssd.config.check import num_exits
from earlyexit_ssd.data import catalog, load_dataset, repeat_rare_classes, require_disjoint
from earlyexit_ssd.engine import read_log
from earlyexit_ssd.engine.processes import barrier, failing_together, is_main, process_group, world_size
from earlyexit_ssd.errors import ConfigError
from earlyexit_ssd.evaluation.results import Results
from earlyexit_ssd.files import locked_folder, write_bytes, write_image, write_json
from earlyexit_ssd.modeling import load_model, save_model
from earlyexit_ssd.modeling.branches import check_exits
from earlyexit_ssd.modeling.detector import DETECTORS
from earlyexit_ssd.modeling.retrofit import load_every_key, require_weights, retrofit
from earlyexit_ssd.pipeline import build
from earlyexit_ssd.pipeline.calibrate import build_target, calibrate
from earlyexit_ssd.pipeline.evaluate import PAGE, check_rivals, evaluate_model, read_training
from earlyexit_ssd.pipeline.phases import PHASE_FUNCTIONS, tap_cache
from earlyexit_ssd.pipeline.replay import require_deciding
from earlyexit_ssd.pipeline.run import Run, RunFolder
from earlyexit_ssd.report.page import never_failing, training_page, write_page
from earlyexit_ssd.report.pictures import photo_grid, training_curves
from earlyexit_ssd.routing.policies import is_fitted

logger = logging.getLogger(__name__)


def prepare(cfg: CfgNode, folder: RunFolder, device: torch.device) -> Run:
    """Check all inputs, load the data and build the model."""
    _check_names(cfg)
    if cfg.ROUTING.CERTIFICATE:
        raise ConfigError("ROUTING.CERTIFICATE belongs to trained weights; remove it for a training")
    if cfg.CALIBRATION.TARGET:  # these raise if the calibration after the training would fail
        build_target(cfg)
        require_few_exits(num_exits(cfg))
        require_deciding(cfg.ROUTING.POLICY, [exit_.empty for exit_ in build.build_exits(cfg)], "the configuration")
    cfg = _closed_until_fitted(cfg)
    build.build_router(cfg)  # raises if the number of thresholds is wrong
    check_rivals(cfg, build.evaluation_device(cfg))
    if cfg.DATA.CLASSES and Path(cfg.MODEL.WEIGHTS).is_file():  # raises before the photos are read
        source = build.source_classes(cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_CLASSES, cfg.MODEL.NAME)
        fold = "rows" if cfg.MODEL.FOLD == "rows" else "exact"  # a compact head needs photos
        retrofit(build.build_architecture(cfg, tuple(cfg.DATA.CLASSES)), cfg.MODEL.WEIGHTS, source, fold)
    if not is_main():
        barrier()  # the first process may render or download
    labels = "required" if learns_from_labels(cfg) else "optional"
    train_set = load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels=labels)
    cfg = build.with_classes(cfg, train_set.classes)
    calib_set, test_set = load_dataset(cfg, cfg.DATA.CALIB, labels="required"), load_dataset(cfg, cfg.DATA.TEST)
    if is_main():
        barrier()
    require_disjoint(TRAIN=train_set, CALIB=calib_set, TEST=test_set)
    train_set = repeat_rare_classes(train_set, cfg.DATA.REPEAT_THRESHOLD, cfg.SEED)
    torch.manual_seed(cfg.SEED)
    model, architecture = build.build_model(cfg, train_set.classes)
    run = Run(cfg, folder, model.to(device), architecture, train_set, calib_set, device)
    if "exits" in cfg.PHASES and cfg.EXITS_PHASE.EPOCHS and cfg.EXITS_PHASE.CACHE and not all(model.empty):
        tap_cache(run)  # raises if it would be too large
    return run


def _closed_until_fitted(cfg: CfgNode) -> CfgNode:
    """Return the configuration, with every exit closed if its policy needs a fit by a calibration."""
    default = get_cfg().ROUTING
    closed = {"ROUTING.POLICY": default.POLICY, "ROUTING.THRESHOLDS": default.THRESHOLDS}
    return build.with_values(cfg, closed) if is_fitted(cfg.ROUTING.POLICY) else cfg


def learns_from_labels(cfg: CfgNode) -> bool:
    """Return whether any phase needs labels. A phase that trains the full path always does."""
    full_path = [phase for phase in ("baseline", "joint") if phase in cfg.PHASES and cfg[PHASE_SECTIONS[phase]].EPOCHS]
    return cfg.LOSS.SUPERVISION == "labels" or bool(full_path)


def _check_names(cfg: CfgNode) -> None:
    """Check names of data sets, weight files, the exits, the policy, input sizes and batch sizes."""
    for name in (*cfg.DATA.TRAIN, *cfg.DATA.CALIB, *cfg.DATA.TEST):
        catalog.find(name, cfg.DATA)
    detector = DETECTORS.find(cfg.MODEL.NAME)
    for weights in (cfg.MODEL.WEIGHTS, cfg.BASELINE.GATE.REFERENCE):
        if weights:
            require_weights(weights, detector.plain_weights)
    exits = build.build_architecture(cfg, ("object",)).exits  # raises for EXITS.BRANCH and the branches' arguments
    check_exits(exits, detector.last_layer, cfg.MODEL.IMAGE_SIZE)
    build.require_policy(cfg)
    if cfg.MODEL.WEIGHTS_BACKBONE:
        build.backbone_weights(cfg)
    for key, section in {"BASELINE": cfg.BASELINE, "JOINT": cfg.JOINT, "EVAL.RIVALS": cfg.EVAL.RIVALS}.items():
        if section.SIZES and not detector.any_size:
            raise ConfigError(f"{key}.SIZES is {section.SIZES}, expected []: {cfg.MODEL.NAME} has only one input size")
    for section in (PHASE_SECTIONS[phase] for phase in cfg.PHASES):
        size, processes = cfg[section].BATCH_SIZE, world_size()
        if size % processes or size < 2 * processes:
            expected = f"a multiple of the number of processes ({processes}), with at least two images for each"
            raise ConfigError(f"{section}.BATCH_SIZE is {size}, expected {expected}")


def train(cfg: CfgNode, resume: bool = False, force: bool = False) -> Results | None:
    """Run the configured phases, calibrate if CALIBRATION.TARGET is set, then evaluate on the test split.

    Args:
        cfg: configuration from :func:`earlyexit_ssd.config.load_config`.
        resume: continue the run in OUTPUT_DIR.
        force: continue after a failed gate. Every later report mentions it.

    Returns:
        The `Results` of :func:`evaluate_model`; None on processes other than the first.

    Raises:
        EarlyExitError: unusable settings, data or weights, or a training that diverged.
        GateFailed: a phase's gate failed and ``force`` is not set.
        Interrupted: a signal stopped a phase. Its state is saved, so the run can be resumed.
    """
    folder = RunFolder(Path(cfg.OUTPUT_DIR))
    # under torchrun the first process locks the folder for all processes
    with process_group(build.build_device(cfg)), locked_folder(folder.root) if is_main() else contextlib.nullcontext():
        trained = train_phases(cfg, resume, force)
        if cfg.CALIBRATION.TARGET:
            calibrate(cfg, trained, build_target(cfg), folder.phase("calibration"))
            trained = folder.phase("calibration") / "model.pth"
        else:
            cfg = _closed_until_fitted(cfg)
        with failing_together():  # the other processes read the file next
            if is_main():
                write_bytes(folder.model, trained.read_bytes())
        return evaluate_model(cfg, folder.model, folder.root)


def train_phases(cfg: CfgNode, resume: bool = True, force: bool = True) -> Path:
    """Run the configured phases, see `train`, and return the path of the last phase's model. The caller must hold the
    lock of OUTPUT_DIR."""
    folder = RunFolder(Path(cfg.OUTPUT_DIR))
    _check_names(cfg)  # `prepare` does it too; here a wrong name is reported before a folder in use
    if is_main():
        folder.require_free(cfg, resume)
    run = prepare(cfg, folder, build.build_device(cfg))
    if is_main():
        folder.start(cfg)
        samples = [run.train_set.sample(index, epoch=0) for index in range(min(12, len(run.train_set)))]
        write_image(folder.root / "training_photos.png", photo_grid(samples, run.train_set.classes))
    barrier()  # the other processes must not read files that start() still moves
    for phase in cfg.PHASES:
        _run_phase(run, phase, force)
    return folder.phase(cfg.PHASES[-1]) / "model.pth"


def _run_phase(run: Run, name: str, force: bool) -> None:
    """Train the phase and check its gate, or load its model if the phase is finished already."""
    folder, phases = run.folder, run.cfg.PHASES
    path = folder.phase(name) / "model.pth"
    if folder.finished(name):
        _load_finished(run, path, name)
        if is_main():
            folder.remove_taps()
        logger.info("phase %s is finished already: %s", name, path)
        return
    logger.info("phase %s (%d of %d)", name, phases.index(name) + 1, len(phases))
    gate = PHASE_FUNCTIONS[name](run)
    gate = dataclasses.replace(gate, forced=force and not gate.passed)
    if is_main():
        curves = training_curves({phase: read_log(folder.phase(phase)) for phase in phases})
        if curves is not None:
            write_image(folder.root / "curves.png", curves)
        router = run.model.router.to_dict() if run.model.router is not None else None
        forced = gate.forced or folder.forced()
        info = {"phase": name, "forced": forced, "router": router, "taken_over": build.takes_over(run.cfg)}
        save_model(path, run.model, run.architecture, info)
        write_json(folder.phase(name) / "gate.json", gate.to_dict())
        folder.remove_taps()
        write_training_page(folder.root, run.cfg)
    barrier()
    logger.info("%s", gate)
    if not gate.passed and not force:
        raise gate.failed()


def write_training_page(folder: Path, cfg: CfgNode) -> None:
    """Write the report page of an unevaluated training into its ``folder``, once there is a log entry or a gate."""
    with never_failing(folder / PAGE):
        section, gates = read_training(folder, cfg.ROUTING.TEMPERATURE_BOUNDS)
        if section is not None:
            write_page(folder / PAGE, training_page(section, gates, ", ".join(cfg.DATA.TRAIN)))


def _load_finished(run: Run, path: Path, phase: str) -> None:
    """Load the model of a finished phase into ``run``, with its losses and its router."""
    model, architecture, info = load_model(path)
    if phase == "baseline":  # load only the full path, since the exits may have changed in the configuration
        load_every_key(run.model.backbone, model.backbone.state_dict(), path)
        load_every_key(run.model.head, model.head.state_dict(), path)
        return
    run.model, run.architecture = model.to(run.device), architecture
    run.model.losses = build.build_losses(run.cfg)
    if info.get("router"):
        router = build.build_router(run.cfg, info["router"], run.cfg.ROUTING.LEARN_TEMPERATURES)
        run.model.router = router.to(run.device)

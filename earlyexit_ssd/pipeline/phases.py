"""The phases of a training run: each trains the run's model and returns a gate. Also fine-tuning, without a gate."""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_iou

from earlyexit_ssd.config import PHASE_SECTIONS, get_cfg
from earlyexit_ssd.data import DetectionDataset, build_loader, load_dataset, repeat_rare_classes
from earlyexit_ssd.data.dataset import fingerprint
from earlyexit_ssd.engine import Trainer, loop
from earlyexit_ssd.engine.cache import CachedLoader, TapCache
from earlyexit_ssd.engine.processes import broadcast_state, rank, world_size
from earlyexit_ssd.errors import EarlyExitError, Interrupted
from earlyexit_ssd.evaluation.verdict import DETECTS_AP50
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, LossSettings, load_model, retrofit, save_model
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.detector import BranchLosses, FullPathLosses, ResizedBatch, TapBatch, full_path_losses
from earlyexit_ssd.modeling.losses import distillation_loss
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline.build import build_losses, build_router, source_classes, takes_over
from earlyexit_ssd.pipeline.doctor import Watch
from earlyexit_ssd.pipeline.run import Gate, GateCheck, Run, RunFolder

logger = logging.getLogger(__name__)

DEEPEST_USEFUL_LAYER = 12  # a branch after a later layer saves next to nothing


def fit(run: Run, name: str, losses: nn.Module, loader: loop.PhotoLoader | CachedLoader) -> None:
    """Train the parameters that the module ``losses`` registers, as phase ``name``. Its forward returns the losses.

    With EMA, the model gets the averaged weights at the end. Raise Interrupted after a signal, and TrainingDiverged if
    a loss is NaN or infinite.
    """
    cfg, model, phase = run.cfg, run.model, run.cfg[PHASE_SECTIONS[name]]
    folder = run.folder.phase(name)
    ema = loop.ExponentialMovingAverage(model, phase.EMA) if phase.EMA else None
    # The checkpoint is the first hook: it restores the state before the other hooks start, and saves after they end.
    checkpoint = loop.Checkpoint(folder / "last.pth", cfg.ENGINE.CHECKPOINT_PERIOD, ema)
    evaluated = ema.average if ema else model

    def measure() -> dict[str, float | None]:
        broadcast_state(evaluated)
        return run.curve_quality.curve_point(evaluated)

    log = loop.Log(folder, cfg.ENGINE.LOG_PERIOD, measure, cfg.ENGINE.CURVE_PERIOD)
    hooks = [checkpoint, loop.ProgressBar(name), log, Watch(run.calib_set, evaluated)]
    hooks += [loop.AfterStep(ema.update)] if ema else []
    if isinstance(model.router, nn.Module):
        hooks.append(loop.AfterStep(lambda _: model.router.clamp_temperatures()))
    lr_factors = dict.fromkeys(("backbone.", "head."), phase.get("FULL_PATH_LR_FACTOR", 1.0))  # a key of JOINT only
    optimizer = loop.build_optimizer(losses, phase.OPTIMIZER, phase.LR, phase.WEIGHT_DECAY, lr_factors)
    # channels_last is a third faster on a CPU, where depthwise convolutions dominate, and many times slower on CUDA.
    # Not with bf16: oneDNN's gradients of depthwise convolutions on 1x1 maps are then sometimes infinite.
    if run.device.type == "cpu" and cfg.ENGINE.AMP == "off":
        losses.to(memory_format=torch.channels_last)
    if world_size() > 1:
        losses = DistributedDataParallel(losses, device_ids=[run.device] if run.device.type == "cuda" else None)
    trainer = Trainer(
        model=model,
        compute_losses=lambda batch: losses(batch) if isinstance(batch, TapBatch) else losses(*batch),
        loader=loader,
        optimizer=optimizer,
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
    losses.to(memory_format=torch.contiguous_format)  # the model's usual format again
    if not finished:
        raise Interrupted(f"{checkpoint.signal_name}: saved step {trainer.step} of phase {name} in {folder}")
    if ema:
        model.load_state_dict(ema.average.state_dict())
    broadcast_state(model)


def _photo_names(dataset: DetectionDataset, batch: Any) -> list[str]:
    """Return the paths of the photos in a batch."""
    targets = batch.targets if isinstance(batch, TapBatch) else batch[1]
    return [str(dataset.path_of(int(target["image_id"]))) for target in targets]


def photo_loader(run: Run, batch_size: int) -> loop.PhotoLoader:
    """Return batches of augmented training photos on the run's device."""
    cfg = run.cfg
    loader = build_loader(run.train_set, batch_size, cfg.DATA.WORKERS, True, cfg.SEED, rank(), world_size())
    return loop.PhotoLoader(loader, run.device)


def baseline(run: Run) -> Gate:
    """Train the full path, and check its figures on the CALIB split."""
    phase, model, reference = run.cfg.BASELINE, run.model, _reference_figures(run)
    if phase.EPOCHS:
        plain = type(model)(model, exits=(), classes=model.classes)  # so a stopped phase resumes with any exits
        plain.losses, plain.norm_frozen = model.losses, phase.FREEZE_NORM
        losses = FullPathLosses(plain, phase.SIZES)
        fit(dataclasses.replace(run, model=plain), "baseline", losses, photo_loader(run, phase.BATCH_SIZE))
    return baseline_gate(run.cfg, run.calib_quality.of_full_path(model), reference)


def baseline_gate(
    cfg: CfgNode, figures: Mapping[str, float | None], reference: Mapping[str, float | None] | None = None
) -> Gate:
    """Return the gate on AP50, precision and recall of the full path.

    With the figures of a ``reference``, the limits are these figures times BASELINE.GATE.RELATIVE. Otherwise the limits
    are in BASELINE.GATE, and an unchanged checkpoint must reach only those that differ from the defaults. With a
    reference or an unchanged checkpoint, the limit of AP50 is at least `DETECTS_AP50`.
    """
    gate, default = cfg.BASELINE.GATE, get_cfg().BASELINE.GATE
    limits = {name: gate[name.upper()] for name in ("AP50", "precision", "recall")}
    if reference is not None:
        limits = {name: gate.RELATIVE * (reference[name] or 0.0) for name in limits}
    elif takes_over(cfg):
        limits = {name: limit if limit != default[name.upper()] else None for name, limit in limits.items()}
    if reference is not None or takes_over(cfg):
        limits["AP50"] = max(limits["AP50"] or 0.0, DETECTS_AP50)
    checks = tuple(GateCheck(name, figures[name], limit) for name, limit in limits.items())
    return Gate("baseline", checks, baseline_advice(cfg))


def baseline_advice(cfg: CfgNode) -> tuple[str, ...]:
    """Return what to try if the gate fails, without settings that are in use already."""
    phase, train = cfg.BASELINE, "train the full path: BASELINE.EPOCHS is 0"
    if phase.EPOCHS:
        more_epochs = f"more epochs than {phase.EPOCHS} (BASELINE.EPOCHS)"
        other_rate = f"another learning rate than {phase.LR:g} (BASELINE.LR)"
        train = f"{more_epochs} or {other_rate}; log.jsonl shows whether the loss still falls"
    start = "start from trained weights (MODEL.WEIGHTS) or an ImageNet trunk (MODEL.WEIGHTS_BACKBONE)"
    if cfg.MODEL.WEIGHTS:
        start = "check MODEL.IMAGE_SIZE, the order of the checkpoint's classes, and whether it detects in torchvision"
    elif cfg.MODEL.WEIGHTS_BACKBONE:
        start = "start from weights of a trained detector (MODEL.WEIGHTS)"
    look = "look at training_photos.png in the run's folder: are boxes missing, shifted or of another class?"
    return train, look, start


def _reference_figures(run: Run) -> dict[str, float | None] | None:
    """Return the CALIB figures of the checkpoint that the gate compares with; None if the gate is not relative."""
    gate = run.cfg.BASELINE.GATE
    if not gate.RELATIVE:
        return None
    weights = gate.REFERENCE or run.cfg.MODEL.WEIGHTS
    class_set = gate.REFERENCE_CLASSES if gate.REFERENCE else run.cfg.MODEL.WEIGHTS_CLASSES
    classes = source_classes(weights, class_set, run.architecture.detector)
    fold = "rows" if run.cfg.MODEL.FOLD == "rows" else "exact"  # a compact head is compared with the whole head
    detector, architecture, _ = retrofit(run.architecture, weights, classes, fold)
    return run.calib_quality.of_full_path(architecture.add_exits(detector).to(run.device))


def exits(run: Run) -> Gate:
    """Train the branches, and check the exits' figures on the CALIB split."""
    train_branches(run)
    model, figures = run.model, run.calib_quality.of_exits(run.model)
    with_branch = [index for index, empty in enumerate((*model.empty, False)) if not empty]
    ap50 = {model.exit_names[index]: figures[index]["AP50"] for index in with_branch}
    gate = exits_gate(run.cfg, ap50, model.exit_layers[with_branch[0]])
    if not gate.passed and Watch(run.calib_set, model).finds("near_uniform_scores"):  # too few steps
        gate = dataclasses.replace(gate, advice=tuple(sorted(gate.advice, key=lambda line: "EPOCHS" not in line)))
    return gate


def exits_gate(cfg: CfgNode, ap50: Mapping[str, float | None], first_layer: int) -> Gate:
    """Return the gate on the AP50 of the first exit and of the deepest early exit.

    The deepest exit is compared with the full path. The first exit has an absolute limit. If the full path is an
    unchanged checkpoint, the first exit is compared with it instead, and the full path must reach `DETECTS_AP50`.
    ``ap50`` is by name, for the exits that have a branch, shallow to deep, and the full path. ``first_layer`` is the
    trunk layer of the first exit in ``ap50``.
    """
    names = list(ap50)
    if len(names) == 1:
        return Gate("exits", ())
    first, full = names[0], names[-1]
    limits, full_ap50 = cfg.EXITS_PHASE.GATE, ap50[full] or 0.0

    def share_of_full(name: str, share: float) -> GateCheck:
        limit = share * (full_ap50 or 1.0)  # no exit passes if the full path has AP50 0
        return GateCheck(f"{name} AP50", ap50[name], limit, f"{share:.0%} of {full}'s {full_ap50:.3f}")

    checks = [GateCheck(f"{first} AP50", ap50[first], limits.FIRST_EXIT_AP50)]
    if takes_over(cfg):
        checks = [GateCheck(f"{full} AP50", ap50[full], DETECTS_AP50), share_of_full(first, limits.FIRST_EXIT_SHARE)]
    checks.append(share_of_full(names[-2], limits.DEEPEST_SHARE))
    return Gate("exits", tuple(checks), exits_advice(cfg, first, first_layer))


def exits_advice(cfg: CfgNode, first: str, layer: int) -> tuple[str, ...]:
    """Return what to try if the gate fails, without settings that are in use or at their limit already. ``first`` and
    ``layer`` are the name and the trunk layer of the first exit with a branch."""
    phase, advice = cfg.EXITS_PHASE, []
    if layer < DEEPEST_USEFUL_LAYER:
        advice.append(f"move the exit deeper (EXITS.LAYERS): {first} sees too little of the trunk")
    more = [f"more epochs than {phase.EPOCHS} (EXITS_PHASE.EPOCHS)"]
    if not phase.EPOCHS:
        more = ["train the exits: EXITS_PHASE.EPOCHS is 0"]
    elif phase.CACHE:
        more.append(f"more views of a photo than {phase.CACHE_VIEWS} (EXITS_PHASE.CACHE_VIEWS)")
    if "copied" in cfg.EXITS.BRANCH and min(cfg.EXITS.COPY) < 1:
        more.append(f"wider branches than {', '.join(f'{share:g}' for share in cfg.EXITS.COPY)} (EXITS.COPY)")
    photos = "more photos"
    if cfg.LOSS.SUPERVISION != "teacher":
        photos += "; they need no boxes with LOSS.SUPERVISION teacher"
    return (*advice, ", ".join(more), photos)


def train_branches(run: Run) -> None:
    """Train the branches on a frozen trunk, and check that the full path is bit-identical afterwards."""
    phase, model = run.cfg.EXITS_PHASE, run.model
    model.router = build_router(run.cfg, learn=run.cfg.ROUTING.LEARN_TEMPERATURES).to(run.device)
    model.inherit()  # copies the full path again, which the baseline phase may have trained
    model.freeze_full_path()
    before = full_path_fingerprint(model)
    if all(model.empty):
        logger.info("every early exit is empty: there is no branch to train")
    elif phase.EPOCHS and phase.CACHE:
        fit(run, "exits", BranchLosses(model), tap_loader(run))
    elif phase.EPOCHS:
        fit(run, "exits", model, photo_loader(run, phase.BATCH_SIZE))
    require_same_full_path(before, model)
    model.freeze_full_path(False)


def joint(run: Run) -> Gate:
    """Train everything at a low rate. If the full path loses too much AP50, restore the previous weights."""
    phase, model = run.cfg.JOINT, run.model
    before = run.calib_quality.of_full_path(model)["AP50"] or 0.0
    previous, losses = copy.deepcopy(model.state_dict()), model.losses
    model.norm_frozen = phase.FREEZE_NORM
    model.losses = joint_losses(losses, phase, model.num_early_exits)
    if phase.EPOCHS:
        module = MultiScaleLosses(model, run.architecture, phase.SIZES) if phase.SIZES else model
        fit(run, "joint", module, photo_loader(run, phase.BATCH_SIZE))
    model.norm_frozen, model.losses = False, losses
    after = run.calib_quality.of_full_path(model)["AP50"] or 0.0
    check = GateCheck("full AP50", after, before - phase.GATE.MAX_AP50_DROP)
    if not check.passed:
        logger.warning("joint phase: %s; the weights of the exits phase are restored", check)
        model.load_state_dict(previous)
        check = GateCheck("full AP50 (weights of the exits phase kept)", before, before)
    return Gate("joint", (check,))


class MultiScaleLosses(nn.Module):
    """Losses of all exits, each batch at one of several input sizes, which its image ids determine.

    There is a copy of the model for each of ``sides``, in pixels. All share the parameters and buffers of ``model``.
    """

    def __init__(self, model: EarlyExitSSDLite, architecture: Architecture, sides: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.head, self.branches = model.backbone, model.head, model.branches
        if isinstance(model.router, nn.Module):
            self.router = model.router
        self._copies, trained = [], architecture.trained_size or architecture.image_size
        for side in sides:
            copied = dataclasses.replace(architecture, image_size=side, trained_size=trained).build()
            copied.router, copied.losses, copied.norm_frozen = model.router, model.losses, model.norm_frozen
            copied.load_state_dict(model.state_dict(keep_vars=True), assign=True)
            self._copies.append(copied.train())

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of the model in train mode."""
        ids = sum(int(target["image_id"]) for target in targets)
        return self._copies[ids % len(self._copies)](images, targets)


def joint_losses(losses: LossSettings, phase: CfgNode, exits: int) -> LossSettings:
    """Return the losses with the teacher and the exit weights of ``phase``.

    By default the weight of an exit is 1 / (number of exits from this one on, including the full path). This is the
    gradient equilibrium of Li et al. 2019, "Improved techniques for training adaptive deep networks".
    """
    weights = tuple(phase.EXIT_WEIGHTS) or tuple(1 / (exits + 1 - index) for index in range(exits))
    return dataclasses.replace(losses, teacher=phase.TEACHER, exit_weights=weights)


PHASE_FUNCTIONS: dict[str, Callable[[Run], Gate]] = {"baseline": baseline, "exits": exits, "joint": joint}


def tap_cache(run: Run) -> TapCache:
    """Return the tap cache, not yet computed. Raise an EarlyExitError if it would exceed EXITS_PHASE.CACHE_GIB."""
    phase = run.cfg.EXITS_PHASE
    cache = TapCache(run.folder.taps, run.model, len(run.train_set), phase.CACHE_VIEWS, phase.CACHE_DTYPE)
    cache.require_budget(phase.CACHE_GIB)
    return cache


def views_of(cfg: CfgNode) -> str:
    """Return the settings that determine the training photos and their augmented views, as text. If it has changed, the
    tap cache is computed again."""
    ignored = ("ROOT", "WORKERS", "DOWNLOAD", "CALIB", "TEST")
    return f"{ {key: value for key, value in cfg.DATA.items() if key not in ignored} } {cfg.SEED}"


def tap_loader(run: Run) -> CachedLoader:
    """Return batches of the tap cache, which is computed first unless it is complete."""
    cfg, phase, cache = run.cfg, run.cfg.EXITS_PHASE, tap_cache(run)
    loader = build_loader(run.train_set, cfg.EVAL.BATCH_SIZE, cfg.DATA.WORKERS, False, cfg.SEED)
    cache.build(run.model, loader, f"{views_of(cfg)} {fingerprint(run.train_set)}")
    return CachedLoader(cache, phase.BATCH_SIZE, cfg.SEED, run.device, rank(), world_size())


def full_path_fingerprint(model: EarlyExitSSDLite) -> dict[str, Tensor]:
    """Return every parameter and buffer of the full path, and its outputs for a fixed random image."""
    state = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(("backbone.", "head."))}
    device = next(model.parameters()).device
    image = torch.rand(1, 3, *model.transform.fixed_size, generator=torch.Generator().manual_seed(0)).to(device)
    with evaluating(model):
        return {**state, **model.head(model.full_maps(image))}


def require_same_full_path(before: dict[str, Tensor], model: EarlyExitSSDLite) -> None:
    """Raise EarlyExitError if a tensor differs from the fingerprint ``before``."""
    after = full_path_fingerprint(model)
    for key, value in before.items():
        if not torch.equal(value, after[key]):
            difference = (value.double() - after[key].double()).abs().max().item()
            change = f"{key} differs by up to {difference:g}; this is a bug, please report it"
            raise EarlyExitError(f"the exits phase changed the full path: {change}")
    logger.info("full path bit-identical before and after the exits phase (%d tensors compared)", len(before))


class DistillationLosses(FullPathLosses):
    """Losses of a student's full path (``model``), compared with a teacher of the same classes and, if ``labelled``,
    with the targets. The batches take turns in the student's input sides ``sides``, in pixels.

    Teacher and student have the same own input size, at which the teacher gets each photo. A default box of the student
    learns from the teacher's default box with the highest IoU, in coordinates relative to the photo.
    """

    def __init__(
        self, model: EarlyExitSSDLite, teacher: EarlyExitSSDLite, sides: Sequence[int], labelled: bool
    ) -> None:
        super().__init__(model, sides)
        self._teacher, self._labelled = [teacher], labelled  # in a list, a module is not registered and not trained
        self._nearest: dict[int, Tensor] = {}

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the loss ``distillation``, and with labels also ``bbox_regression`` and ``classification``."""
        model, computed = self._model[0], self.compute(images, targets)
        losses, settings = {}, model.losses
        if self._labelled:
            losses = full_path_losses(computed.head, model.assign(computed.targets, computed.anchors), settings)
        distillation = distillation_loss(computed.head, self._teacher_outputs(computed), settings)
        return {**losses, "distillation": settings.distillation_weight * distillation}

    @torch.no_grad()
    def _teacher_outputs(self, batch: ResizedBatch) -> Head:
        """Return the teacher's logits at the student's default boxes, and its boxes as offsets to these."""
        teacher, side, teacher_side = self._teacher[0], batch.side, batch.images.tensors.shape[-1]
        with evaluating(teacher):
            head = teacher.head(teacher.full_maps(batch.images.tensors))
            boxes = teacher.default_boxes(batch.images)[0]
        if side not in self._nearest:
            self._nearest[side] = box_iou(batch.anchors[0] / side, boxes / teacher_side).argmax(1)
        nearest, photos = self._nearest[side], len(batch.anchors)
        offsets = head["bbox_regression"][:, nearest].flatten(0, 1).float()
        decoded = teacher.box_coder.decode_single(offsets, boxes[nearest].repeat(photos, 1)) * (side / teacher_side)
        encoded = teacher.box_coder.encode_single(decoded, torch.cat(batch.anchors))
        return {"cls_logits": head["cls_logits"][:, nearest], "bbox_regression": encoded.view(photos, -1, 4)}


def fine_tune(
    cfg: CfgNode,
    student: EarlyExitSSDLite,
    architecture: Architecture,
    teacher: EarlyExitSSDLite,
    sides: Sequence[int],
    calib_set: DetectionDataset,
    folder: Path,
) -> None:
    """Train ``student``, a detector without exits, in place with the settings of FINE_TUNING. A stopped run resumes.

    The student learns from the teacher alone if photos have no labels or LOSS.SUPERVISION is ``teacher``. ``sides`` are
    in pixels, ``calib_set`` is for the training curves. Raise the errors of `fit`.
    """
    train_set = load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels="optional")
    train_set = repeat_rare_classes(train_set, cfg.DATA.REPEAT_THRESHOLD, cfg.SEED)
    settings = f"{cfg.FINE_TUNING} {cfg.LOSS} {cfg.DATA.AUGMENTATION} {cfg.ENGINE.AMP} {cfg.SEED} {list(sides)}"
    settings += f" {fingerprint(train_set)}"
    key = hashlib.sha256(f"{weights_hash(student)} {weights_hash(teacher)} {settings}".encode()).hexdigest()
    run_folder = RunFolder(folder / key[:12])
    if run_folder.model.is_file():
        student.load_state_dict(load_model(run_folder.model)[0].state_dict())
        return
    labelled = train_set.labelled and cfg.LOSS.SUPERVISION == "labels"
    source = "labels and the original detector" if labelled else "the original detector"
    logger.info("fine-tuning on %d photos at %s px, from %s", len(train_set), list(sides), source)
    run = Run(cfg, run_folder, student, architecture, train_set, calib_set, next(student.parameters()).device)
    weight = cfg.FINE_TUNING.DISTILLATION_WEIGHT
    student.losses = dataclasses.replace(build_losses(cfg), distillation_weight=weight)
    student.norm_frozen = cfg.FINE_TUNING.FREEZE_NORM
    losses = DistillationLosses(student, teacher, sides, labelled)
    fit(run, "fine_tuning", losses, photo_loader(run, cfg.FINE_TUNING.BATCH_SIZE))
    student.norm_frozen = False
    student.eval()
    save_model(run_folder.model, student, architecture, {})

"""Fine-tune a full path for smaller inputs, taught by the detector at its own size."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.ops import box_iou

from earlyexit_ssd.data import DetectionDataset, load_dataset
from earlyexit_ssd.data.dataset import fingerprint
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite, load_model, save_model
from earlyexit_ssd.modeling.checkpoint import weights_hash
from earlyexit_ssd.modeling.detector import FullPathLosses, ResizedBatch, Targets, full_path_losses
from earlyexit_ssd.modeling.losses import distillation_loss
from earlyexit_ssd.modeling.outputs import Head
from earlyexit_ssd.modeling.trunk import evaluating
from earlyexit_ssd.pipeline.build import build_losses
from earlyexit_ssd.pipeline.phases import fit, photo_loader
from earlyexit_ssd.pipeline.run import Run, RunFolder

logger = logging.getLogger(__name__)


class TaughtFullPath(FullPathLosses):
    """Losses of the full path at several input sizes, against the labels and a teacher.

    The teacher sees the photo at its own size. A default box of the student learns from the teacher's default box of
    the highest IoU, in coordinates relative to the photo.

    Args:
        model: the student.
        teacher: a detector with the same classes.
        sides: input sides of the student, pixels, one per batch in turn.
        labelled: whether the targets teach too.
    """

    def __init__(
        self, model: EarlyExitSSDLite, teacher: EarlyExitSSDLite, sides: Sequence[int], labelled: bool
    ) -> None:
        super().__init__(model, sides)
        self._teacher, self._labelled = [teacher], labelled  # in a list, so that it is not trained
        self._nearest: dict[int, Tensor] = {}

    def forward(self, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """``distillation``, and with labels ``bbox_regression`` and ``classification``."""
        model, computed = self._model[0], self.compute(images, targets)
        losses, settings = {}, model.losses
        if self._labelled:
            losses = full_path_losses(computed.head, model.assign(computed.targets, computed.anchors), settings)
        taught = distillation_loss(computed.head, self._teach(computed), settings)
        return {**losses, "distillation": settings.distillation_weight * taught}

    @torch.no_grad()
    def _teach(self, student: ResizedBatch) -> Head:
        """The teacher's outputs for the student's default boxes: logits, and offsets to these default boxes."""
        teacher, side, own = self._teacher[0], student.side, student.images.tensors.shape[-1]
        with evaluating(teacher):
            head = teacher.head(teacher.trunk_maps(student.images.tensors)[1])
            boxes = teacher.default_boxes(student.images)[0]
        if side not in self._nearest:
            self._nearest[side] = box_iou(student.anchors[0] / side, boxes / own).argmax(1)
        nearest, photos = self._nearest[side], len(student.anchors)
        offsets = head["bbox_regression"][:, nearest].flatten(0, 1).float()
        found = teacher.box_coder.decode_single(offsets, boxes[nearest].repeat(photos, 1)) * (side / own)
        encoded = teacher.box_coder.encode_single(found, torch.cat(student.anchors))
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
    """Train ``student``, a detector without exits, in place with the settings of FINE_TUNING; a stopped run resumes.

    Photos without labels have only the teacher, as do all photos with LOSS.SUPERVISION ``teacher``.

    Args:
        teacher: the detector as it is, whose full path teaches.
        sides: input sides in pixels.
        calib_set: photos of the training curves.
        folder: folder of checkpoints, the log and the trained model.

    Raises:
        Interrupted: a signal stopped the training.
        TrainingDiverged: a loss is NaN or infinite.
    """
    train_set = load_dataset(cfg, cfg.DATA.TRAIN, train=True, labels="optional")
    settings = f"{cfg.FINE_TUNING} {cfg.LOSS} {cfg.DATA.AUGMENTATION} {cfg.SEED} {list(sides)} {fingerprint(train_set)}"
    key = hashlib.sha256(f"{weights_hash(student)} {weights_hash(teacher)} {settings}".encode()).hexdigest()
    run_folder = RunFolder(folder / key[:12])
    if run_folder.model.is_file():
        student.load_state_dict(load_model(run_folder.model)[0].state_dict())
        return
    labelled = train_set.labelled and cfg.LOSS.SUPERVISION == "labels"
    taught_by = "labels and the detector as it is" if labelled else "the detector as it is"
    logger.info("fine-tuning on %d photos at %s px; teachers: %s", len(train_set), list(sides), taught_by)
    run = Run(cfg, run_folder, student, architecture, train_set, calib_set, next(student.parameters()).device)
    weight = cfg.FINE_TUNING.DISTILLATION_WEIGHT
    student.losses = dataclasses.replace(build_losses(cfg), distillation_weight=weight)
    student.norm_frozen = cfg.FINE_TUNING.FREEZE_NORM
    losses = TaughtFullPath(student, teacher, sides, labelled)
    fit(run, "fine_tuning", losses, photo_loader(run, cfg.FINE_TUNING.BATCH_SIZE))
    student.norm_frozen = False
    student.eval()
    save_model(run_folder.model, student, architecture, {})

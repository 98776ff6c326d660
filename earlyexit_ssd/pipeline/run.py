"""What all phases of a run work on."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from fvcore.common.config import CfgNode

from earlyexit_ssd.data import DetectionDataset
from earlyexit_ssd.evaluation.quality import EvaluationSettings
from earlyexit_ssd.modeling import Architecture, EarlyExitSSDLite
from earlyexit_ssd.pipeline.quality import SplitQuality
from earlyexit_ssd.pipeline.run_folder import RunFolder


@dataclasses.dataclass
class Run:
    """What all phases work on."""

    cfg: CfgNode
    folder: RunFolder
    model: EarlyExitSSDLite
    architecture: Architecture
    train_set: DetectionDataset
    calib_set: DetectionDataset
    device: torch.device

    @property
    def calib_quality(self) -> SplitQuality:
        """Figures on the calib split; intervals are left out, a gate compares single figures."""
        return self._quality(self.calib_set, self.cfg.DATA.WORKERS)

    @property
    def curve_quality(self) -> SplitQuality:
        """The same on a few of the photos, for the training's curves."""
        photos = len(self.calib_set)
        chosen = np.random.default_rng(self.cfg.SEED).permutation(photos)[: self.cfg.ENGINE.CURVE_PHOTOS]
        return self._quality(self.calib_set.repeated(np.isin(np.arange(photos), chosen).tolist()), workers=0)

    def _quality(self, photos: DetectionDataset, workers: int) -> SplitQuality:
        settings = EvaluationSettings(score=self.cfg.EVAL.SCORE, iou=self.cfg.EVAL.IOU, resamples=0)
        return SplitQuality(photos, settings, self.cfg.EVAL.BATCH_SIZE, workers)

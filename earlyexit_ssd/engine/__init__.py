"""The training engine: a plain loop, hooks around it, and batches of photos or of cached taps."""

from earlyexit_ssd.engine.batches import PhotoLoader
from earlyexit_ssd.engine.checkpoints import Checkpoint
from earlyexit_ssd.engine.ema import ExponentialMovingAverage
from earlyexit_ssd.engine.hooks import ClampTemperatures, Log, ProgressBar, UpdateAverage, read_log
from earlyexit_ssd.engine.optimizer import build_optimizer, learning_rate
from earlyexit_ssd.engine.tap_cache import CachedLoader, TapCache
from earlyexit_ssd.engine.trainer import Hook, Trainer, TrainingDiverged

__all__ = [
    "CachedLoader",
    "Checkpoint",
    "ClampTemperatures",
    "ExponentialMovingAverage",
    "Hook",
    "Log",
    "PhotoLoader",
    "ProgressBar",
    "TapCache",
    "Trainer",
    "TrainingDiverged",
    "UpdateAverage",
    "build_optimizer",
    "learning_rate",
    "read_log",
]

"""The training engine: a plain loop, hooks around it, and batches of photos or of cached taps."""

from earlyexit_ssd.engine.cache import CachedLoader, TapCache
from earlyexit_ssd.engine.hooks import Checkpoint, ClampTemperatures, Log, ProgressBar, UpdateAverage, read_log
from earlyexit_ssd.engine.loop import (
    ExponentialMovingAverage,
    Hook,
    PhotoLoader,
    Trainer,
    TrainingDiverged,
    build_optimizer,
    learning_rate,
)

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

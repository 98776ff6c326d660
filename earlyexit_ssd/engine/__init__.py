"""The training engine: a plain loop, hooks around it, and batches of photos or of cached taps."""

from earlyexit_ssd.engine.cache import CachedLoader, TapCache
from earlyexit_ssd.engine.hooks import AfterStep, Checkpoint, Log, ProgressBar, read_log
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
    "AfterStep",
    "CachedLoader",
    "Checkpoint",
    "ExponentialMovingAverage",
    "Hook",
    "Log",
    "PhotoLoader",
    "ProgressBar",
    "TapCache",
    "Trainer",
    "TrainingDiverged",
    "build_optimizer",
    "learning_rate",
    "read_log",
]
